"""Tiles of matrix products on tensor cores: warps multiply panels in shared memory, see `mma` and `tiles`.

A warp has `height / 2` x `width / 2` of the instruction's results of 16 x 8, and a thread as many results as without
tensor cores. Both panels lie with the depth innermost, as words that go into registers as they are.
"""

from __future__ import annotations

import functools

from kgraph.codegen.cuda.mma import COLUMNS, INSTRUCTIONS, LANES, ROWS
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.codegen.cuda.tiles import BY_DEPTH, BY_LINE, Panel, Side, Tile, TileProduct

GAP = 4  # words between rows of a panel: eight lanes side by side then read from all 32 banks


class TensorProduct(TileProduct):
    """The sums of one tile, in registers of warps. name: of the instruction's function."""

    def __init__(self, k: KernelSource, tile: Tile, name: str, left: Side, right: Side):
        self.name, self.instruction = name, INSTRUCTIONS[name]
        self.warp_rows, self.warp_columns = tile.height // 2 * ROWS, tile.width // 2 * COLUMNS
        if tile.depth % self.instruction.depth or tile.rows % self.warp_rows or tile.columns % self.warp_columns:
            raise ValueError(f"{tile} is not made of products of {self.instruction.ptx}")
        super().__init__(k, tile, "float32", left, right)

    def _allocate(self, k: KernelSource, right: Side) -> None:
        tile, instruction = self.tile, self.instruction
        self.pitch = tile.depth // instruction.packed + GAP
        self.left, self.left_pitch = self._left_rows()
        self.right = k.shared("uint32", tile.columns * self.pitch, grouped=True)
        lane, warp = k.let(k.mod(self.thread, LANES), "lane"), k.let(k.div(self.thread, LANES), "warp")
        side = tile.columns // self.warp_columns  # warps next to each other
        group, member = k.let(k.div(lane, 4), "group"), k.let(k.mod(lane, 4), "member")
        self.row = k.let(k.add(k.mul(k.div(warp, side), self.warp_rows), group), "row")
        first = k.let(k.mul(k.mod(warp, side), self.warp_columns), "first")
        self.column = k.let(k.add(first, k.mul(member, 2)), "column")
        self.part, self.part_row = (ROWS // 2, self.warp_columns), group
        self.origin = k.let(k.sub(self.row, group)), first
        self._from_left = k.let(k.add(k.mul(self.row, self.left_pitch), member), "left")
        self._from_right = k.let(k.add(k.mul(k.add(first, group), self.pitch), member), "right")
        self._a = k.local("uint32", tile.height // 2 * len(instruction.a))
        self._b = k.local("uint32", tile.width // 2 * len(instruction.b))
        words = len(instruction.a) + len(instruction.b)
        self._lanes = k.shared("uint32", tile.block * words) if k.target.simulator else None

    def _left_rows(self) -> tuple[Operand, int]:
        """Where the rows of the left operand lie in shared memory, and how many words apart."""
        return self.k.shared("uint32", self.tile.rows * self.pitch, grouped=True), self.pitch

    @property
    def _panel_dtype(self) -> str:
        """Half floats stay what they are."""
        return "uint16" if self.instruction.packed == 2 else "float32"

    def place_row(self, i: str, row: str = "") -> str:
        return self.k.add(row or self.row, self.k.mul(i, ROWS // 2))

    def place_column(self, j: str) -> str:
        k = self.k
        return k.add(self.column, k.add(k.mul(k.div(j, 2), COLUMNS), k.mod(j, 2)))

    def part_column(self, j: str) -> str:
        return self.k.sub(self.place_column(j), self.origin[1])

    def put(self, words: Operand, place: str, value: str) -> None:
        """Writes an operand to its place in rows of words: the bits of a half float, or a float32 that is rounded."""
        if self.instruction.packed == 2:
            self.k.line(f"put_half({words.name}, {place}, {value})")
        else:
            word = f"to_tfloat32({value})"
            self.k.store(words, place, f"bits_float({word})" if words.dtype == "float32" else word)

    def _put_group(self, words: Operand, place: str, values: list[str]) -> None:
        """Writes operands to neighbouring places."""
        if len(values) == 1:
            self.put(words, place, values[0])
            return
        if self.instruction.packed == 1:
            values = [self.k.let(f"to_tfloat32({value})") for value in values]
        self.k.store_group(words, place, values)

    def _put_panel(self, panel: Panel, words: Operand, rows_first: bool) -> None:
        """Writes what the thread has fetched of a panel [rows, depth] or [depth, columns]."""
        line = self.pitch * self.instruction.packed
        with panel.elements(*((line, 1) if rows_first else (1, line))) as elements:
            for values, place in elements:
                self._put_group(words, place, values)

    def _put_panels(self) -> None:
        self._put_panel(self.left_panel, self.left, True)
        self._put_panel(self.right_panel, self.right, False)

    def _first_left(self, step: str) -> str:
        """Where the thread's words of the left operand begin for chunk `step` - 1."""
        return self._from_left

    def _products(self, step: str) -> None:
        k, tile, instruction = self.k, self.tile, self.instruction
        across = instruction.depth // instruction.packed  # words of a row that one instruction multiplies
        offset = lambda depth: depth // instruction.packed
        # In 64 bits, what is known once loops are unrolled becomes part of the instructions that read.
        from_left, from_right = (k.let(f"int64({at})") for at in (self._first_left(step), self._from_right))
        away = lambda base, *distances: f"int64({base} + int64({functools.reduce(k.add, distances)}))"
        with k.range(0, k.i(tile.depth // instruction.depth), 1) as part:
            along = k.let(k.mul(part, across))
            with k.range(0, k.i(tile.height // 2), 1) as i:
                line = k.mul(i, ROWS * self.left_pitch)
                for n, (row, depth) in enumerate(instruction.a):
                    word = k.load(self.left, away(from_left, along, line, row * self.left_pitch + offset(depth)))
                    word = f"float_bits({word})" if self.left.dtype == "float32" else word
                    k.store(self._a, k.add(k.mul(i, len(instruction.a)), n), word)
            with k.range(0, k.i(tile.width // 2), 1) as j:
                line = k.mul(j, COLUMNS * self.pitch)
                for n, depth in enumerate(instruction.b):
                    word = k.load(self.right, away(from_right, along, line, offset(depth)))
                    k.store(self._b, k.add(k.mul(j, len(instruction.b)), n), word)
            with k.range(0, k.i(tile.height // 2), 1) as i, k.range(0, k.i(tile.width // 2), 1) as j:
                self._multiply(i, j)

    def _multiply(self, i: str, j: str) -> None:
        """The warp's product number (i, j)."""
        k, tile = self.k, self.tile
        a = [k.load(self._a, k.add(k.mul(i, len(self.instruction.a)), n)) for n in range(len(self.instruction.a))]
        b = [k.load(self._b, k.add(k.mul(j, len(self.instruction.b)), n)) for n in range(len(self.instruction.b))]
        first = k.let(k.add(k.mul(i, 2 * tile.width), k.mul(j, 2)))
        places = [k.let(k.add(first, n)) for n in (0, 1, tile.width, tile.width + 1)]
        sums = ", ".join(k.load(self.sums, place) for place in places)
        results = [k.fresh("sum") for _ in places]
        if self._lanes is None:
            k.line(f"{', '.join(results)} = {self.name}(({', '.join(a)}), ({', '.join(b)},), ({sums}))")
        else:
            for n, value in enumerate((*a, *b)):
                k.store(self._lanes, k.add(k.mul(self.thread, len(a) + len(b)), n), value)
            k.synchronise()
            k.line(f"{', '.join(results)} = multiply_lanes({self.name!r}, {self._lanes.name}, {self.thread}, ({sums}))")
            k.synchronise()
        for place, result in zip(places, results, strict=True):
            k.store(self.sums, place, result)


class WeightedRows(TensorProduct):
    """Sums of which the left operand [rows, depth of all chunks] lies in shared memory: words at the beginning of rows
    that are `pitch` words apart, written by `put`. Only the right one comes in panels."""

    def __init__(self, k: KernelSource, tile: Tile, name: str, left: Operand, pitch: int):
        self._given = left, pitch
        super().__init__(k, tile, name, BY_DEPTH, BY_LINE)

    def _left_rows(self) -> tuple[Operand, int]:
        return self._given

    def _make_panels(self, left: Side, right: Side) -> None:
        tile = self.tile
        self.right_panel = Panel(self.k, tile.block, tile.depth, tile.columns, not right.along, self._panel_dtype)

    def _put_panels(self) -> None:
        self._put_panel(self.right_panel, self.right, False)

    def _first_left(self, step: str) -> str:
        k = self.k
        chunk = k.mul(k.sub(step, 1), self.tile.depth // self.instruction.packed)
        return k.let(k.add(self._from_left, chunk), "left")


def tile_product(
    k: KernelSource, tile: Tile, dtype: str, instruction: str = "", left: Side = BY_DEPTH, right: Side = BY_LINE
) -> TileProduct:
    """The product of a tile with sums of `dtype`, on tensor cores where an instruction is named."""
    if instruction:
        # Neighbours along a line of the tile would go to one bank, as panels have the depth innermost.
        left, right = (BY_LINE if side.along else side for side in (left, right))
        return TensorProduct(k, tile, instruction, left, right)
    return TileProduct(k, tile, dtype, left, right)
