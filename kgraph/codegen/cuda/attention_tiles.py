"""How the threads of an attention kernel multiply: tiles of scores, and sums of weighted rows, in registers.

A block works on tiles of `rows` queries and as many keys of one head. Operands come through shared memory in panels of
`chunk` elements along the sum; scores go back to it, and weights are read from there. `ScalarTiles` multiply any dtype;
`TensorTiles` multiply half floats, or float32 that may be rounded to TF32, on tensor cores (`tensor_cores`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kgraph.codegen.cuda import scalar_ops, tiles
from kgraph.codegen.cuda.mma import INSTRUCTIONS, LANES, ROWS
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.codegen.cuda.tensor_cores import GAP, TensorProduct, WeightedRows
from kgraph.codegen.cuda.tiles import BY_DEPTH, Panel
from kgraph.codegen.expressions import compute_dtype
from kgraph.ir import Dim

PANEL_WORDS = 8  # of a row of a panel on tensor cores: with twice as many, one block takes the registers of two


class Tile(NamedTuple):
    """block: threads. rows: queries of a tile, and keys. chunk: elements of a panel along the sum. width: columns of
    sums that a block keeps. gap: elements between rows of scores, so that threads that read down a column use different
    banks."""

    block: int
    rows: int
    chunk: int
    width: int
    gap: int = 1

    @property
    def side(self) -> int:
        """Threads along each axis of the block, where these are alike."""
        return math.isqrt(self.block)

    @property
    def pitch(self) -> int:
        """Distance of rows of scores."""
        return self.rows + self.gap


def choose_tile(dtype: str, depth, target, chunk: int = 16, instruction: str = "") -> Tile:
    """The tile for sums of `depth` columns (int | Dim), with panels of `chunk` elements on a GPU without tensor cores.

    instruction: of tensor cores, if they multiply."""
    if target.simulator:
        return Tile(LANES, ROWS, 16, 16, GAP) if instruction else Tile(4, 4, 2, 4)
    width = next((w for w in (32, 64) if isinstance(depth, int) and depth <= w), 64 if isinstance(depth, Dim) else 128)
    if instruction:
        return Tile(256, 64, PANEL_WORDS * INSTRUCTIONS[instruction].packed, width, GAP)
    return Tile(256, 32 if dtype == "float64" else 64, chunk, width)


class Rows(NamedTuple):
    """Rows of an operand: from `start` on, `stride` apart, `depth` elements each. first: the tile's. limit: their
    number; what lies behind counts as 0."""

    operand: Operand
    start: str
    stride: str
    first: str
    limit: str
    depth: str

    def fetch(self, k: KernelSource, panel: Panel, n: str, row: str, element: str) -> None:
        """Sets a register of a panel to an element of a row of the tile, or to 0."""
        number, element = k.let(k.add(self.first, row)), k.let(element)
        place = lambda: k.add(self.start, k.add(k.mul(number, self.stride), element))
        panel.fetch(n, [f"{number} < {self.limit}", f"{element} < {self.depth}"], self.operand, place)


class ScalarTiles:
    """Threads in a square of `side` x `side`, each with scores of queries and keys, and sums, in groups of neighbours
    as in `tiles`: neighbouring threads have neighbouring groups of keys.

    dtype: of scores and sums. height: rows of a thread's scores, and of its sums; across, width: columns of its scores,
    of its sums. scores: a tile of them in shared memory.
    """

    def __init__(self, k: KernelSource, tile: Tile, dtype: str):
        self.k, self.tile, self.dtype = k, tile, compute_dtype(dtype)
        self.row = k.let(k.div(k.thread(), tile.side), "row")
        self.column = k.let(k.mod(k.thread(), tile.side), "column")
        self.height = self.across = tile.rows // tile.side
        self.width = tile.width // tile.side
        most = tiles.WORD // (8 if self.dtype == "float64" else 4)
        self._group, self._sum_group = math.gcd(self.height, most), math.gcd(self.width, most)
        self._pitch = tile.rows + most
        self.scores = k.shared(self.dtype, tile.rows * tile.pitch)
        shared = lambda count: k.shared(self.dtype, count, grouped=True)
        self._left, self._right = (shared(tile.chunk * self._pitch) for _ in range(2))
        self._rows = shared(tile.chunk * tile.width)
        self._sides = [Panel(k, tile.block, tile.rows, tile.chunk, False, self.dtype) for _ in range(2)]
        self._panel = Panel(k, tile.block, tile.chunk, tile.width, False, self.dtype)
        # Registers for the products of a tile, and for the factors of one step.
        self._products = k.local(self.dtype, self.height * self.across)
        self._xs = k.local(self.dtype, self.height)
        self._ys = k.local(self.dtype, max(self.across, self.width))

    def score_place(self, i, j) -> tuple[str, str]:
        """(row, column) of the tile of the thread's score in row i and column j."""
        return self._place(self.row, i, self._group), self._place(self.column, j, self._group)

    def sum_place(self, i, j) -> tuple[str, str]:
        """(row, column) of its sum."""
        return self._place(self.row, i, self._group), self._place(self.column, j, self._sum_group)

    def _place(self, thread: str, n, group: int) -> str:
        return tiles.grouped(self.k, thread, n, group, self.tile.side)

    def new_sums(self) -> Operand:
        """Registers for a thread's sums of `width` columns."""
        return self.k.local(self.dtype, self.height * self.width)

    def clear(self, sums: Operand, count: int = 0) -> None:
        """Sets sums to 0."""
        with self.k.range(0, self.k.i(count or self.height * self.width), 1) as n:
            self.k.store(sums, n, self.k.literal(0, self.dtype))

    def products(self, x: Rows, y: Rows, into: Operand) -> None:
        """Leaves the products of rows of queries and of keys in shared memory."""
        k, tile = self.k, self.tile
        sides = list(zip(self._sides, (self._left, self._right), (x, y)))
        self.clear(self._products, self.height * self.across)
        with k.range(0, x.depth, tile.chunk) as first:
            for panel, _, rows in sides:
                with panel.each() as (n, row, at):
                    rows.fetch(k, panel, n, row, k.add(first, at))
            k.synchronise()
            for panel, shared, _ in sides:
                with panel.elements(1, self._pitch) as elements:
                    for values, place in elements:
                        k.store_group(shared, place, values)
            k.synchronise()
            row, column = (k.let(f"int64({place})") for place in self.score_place(0, 0))
            with k.range(0, k.i(tile.chunk), 1) as d:
                line = k.let(f"int64(int64({d}) * {self._pitch})")
                left, right = (k.let(f"int64({line} + {place})") for place in (row, column))
                self._take(self._left, left, self._group, self._xs, self.height)
                self._take(self._right, right, self._group, self._ys, self.across)
                self._multiply(self._products, self.across)
        k.synchronise()
        _leave_scores(self, self._products, into)

    def _take(self, shared: Operand, base: str, group: int, registers: Operand, count: int) -> None:
        """Reads a thread's operands of one step of the sum: groups that lie as far apart as those of its results."""
        k = self.k
        with k.range(0, k.i(count // group), 1) as n:
            first = k.let(k.mul(n, group))
            at = f"int64({base} + int64({k.mul(n, group * self.tile.side)}))"
            for g, value in enumerate(k.load_group(shared, at, group)):
                k.store(registers, k.add(first, g) if g else first, value)

    def _multiply(self, sums: Operand, width: int) -> None:
        """Adds the products of what a thread's rows and columns have at one step of the sum."""
        k = self.k
        with k.range(0, k.i(self.height), 1) as i, k.range(0, k.i(width), 1) as j:
            n = k.let(k.add(k.mul(i, width), j))
            k.store(sums, n, f"{k.load(sums, n)} + {k.load(self._xs, i)} * {k.load(self._ys, j)}")

    def put_weight(self, weights: Operand, row: str, column: str, value: str) -> None:
        """Leaves a weight in the place of scores that no thread reads any more, for `weigh`."""
        self.k.store(weights, self.k.add(self.k.mul(row, self.tile.pitch), column), value)

    def pack(self, weights: Operand, transposed: bool = False) -> None:
        """Readies for `weigh` what the threads have written to the places of their scores."""

    def weigh(self, sums: Operand, weights: Operand, rows: Rows, first_column: str, transposed: bool = False) -> None:
        """Adds a shared tile of weights [queries, keys], or its transpose, times rows of an operand to `sums`: their
        elements from `first_column` on."""
        k, tile = self.k, self.tile
        with k.range(0, k.i(tile.rows), tile.chunk) as first:
            with self._panel.each() as (n, at, column):
                rows.fetch(k, self._panel, n, k.add(first, at), k.add(first_column, column))
            k.synchronise()
            with self._panel.elements(tile.width, 1) as elements:
                for values, place in elements:
                    k.store_group(self._rows, place, values)
            k.synchronise()
            step, down = (1, tile.pitch) if transposed else (tile.pitch, 1)
            row = k.let(f"int64({k.add(k.mul(self.sum_place(0, 0)[0], step), k.mul(first, down))})")
            column = k.let(f"int64({self.sum_place(0, 0)[1]})")
            with k.range(0, k.i(tile.chunk), 1) as d:
                left = k.let(f"int64({row} + int64({d}) * {down})")
                with k.range(0, k.i(self.height), 1) as i:
                    away = tiles.grouped(k, k.i(0), i, self._group, self.tile.side)
                    k.store(self._xs, i, k.load(weights, f"int64({left} + int64({k.mul(away, step)}))"))
                right = k.let(f"int64({column} + int64({d}) * {tile.width})")
                self._take(self._rows, right, self._sum_group, self._ys, self.width)
                self._multiply(sums, self.width)


class TensorTiles:
    """As `ScalarTiles`, by the products of `tensor_cores`. Weights lie at the beginning of the rows of scores, as half
    floats or rounded to TF32.

    dtype: the operands'; that of scores and sums is float32. name: of the instruction's function.
    """

    def __init__(self, k: KernelSource, tile: Tile, dtype: str, name: str):
        self.k, self.tile, self.operands, self.dtype = k, tile, dtype, "float32"
        self.height = 4 if tile.block > LANES else 2  # a warp has two rows of products, or one
        self.across, self.width = (n * tile.rows // (tile.block * self.height) for n in (tile.rows, tile.width))
        shape = lambda columns, width: tiles.Tile(tile.rows, columns, tile.chunk, self.height, width)
        self.scores = k.shared(self.dtype, tile.rows * tile.pitch)
        self._scores = TensorProduct(k, shape(tile.rows, self.across), name, BY_DEPTH, BY_DEPTH)
        self._sums = WeightedRows(k, shape(tile.width, self.width), name, self.scores, tile.pitch)
        self._unused = [self._sums.sums]
        self._kept = k.local(self.dtype, self.height * self.across)

    def score_place(self, i, j) -> tuple[str, str]:
        return self._scores.place_row(i), self._scores.place_column(j)

    def sum_place(self, i, j) -> tuple[str, str]:
        return self._sums.place_row(i), self._sums.place_column(j)

    def new_sums(self) -> Operand:
        return self._unused.pop() if self._unused else self.k.local(self.dtype, self.height * self.width)

    def clear(self, sums: Operand) -> None:
        self._sums.sums = sums
        self._sums.clear()

    def products(self, x: Rows, y: Rows, into: Operand) -> None:
        k, product = self.k, self._scores
        start = k.fresh("start")
        k.line(f"{start} = {k.i(0)}")

        def fetch() -> None:
            with product.left_panel.each() as (n, row, at):
                x.fetch(k, product.left_panel, n, row, k.add(start, at))
            with product.right_panel.each() as (n, at, row):
                y.fetch(k, product.right_panel, n, row, k.add(start, at))
            k.line(f"{start} = {k.add(start, self.tile.chunk)}")

        product.run(k.let(k.ceil_div(x.depth, self.tile.chunk), "chunks"), fetch)
        k.synchronise()
        _leave_scores(self, product.sums, into)

    def put_weight(self, weights: Operand, row: str, column: str, value: str) -> None:
        k, packed = self.k, self._sums.instruction.packed
        place = k.add(k.mul(row, self.tile.pitch * packed), column)
        self._sums.put(weights, place, scalar_ops.to_memory(value, self.operands))

    def pack(self, weights: Operand, transposed: bool = False) -> None:
        k, count = self.k, self.height * self.across
        place = lambda n: [k.let(at) for at in self.score_place(k.div(n, self.across), k.mod(n, self.across))]
        with k.range(0, k.i(count), 1) as n:
            row, column = place(n)
            k.store(self._kept, n, k.load(weights, k.add(k.mul(row, self.tile.pitch), column)))
        k.synchronise()
        with k.range(0, k.i(count), 1) as n:
            row, column = place(n)[:: -1 if transposed else 1]
            self.put_weight(weights, row, column, k.load(self._kept, n))

    def weigh(self, sums: Operand, weights: Operand, rows: Rows, first_column: str, transposed: bool = False) -> None:
        """transposed: whether `pack` has transposed the weights."""
        k, panel, chunk = self.k, self._sums.right_panel, self.tile.chunk
        start = k.fresh("start")
        k.line(f"{start} = {k.i(0)}")

        def fetch() -> None:
            with panel.each() as (n, at, column):
                rows.fetch(k, panel, n, k.add(start, at), k.add(first_column, column))
            k.line(f"{start} = {k.add(start, chunk)}")

        self._sums.left, self._sums.sums = weights, sums
        self._sums.add(k.i(self.tile.rows // chunk), fetch)


def _leave_scores(tiles: ScalarTiles | TensorTiles, products: Operand, into: Operand) -> None:
    """Writes a thread's products to their places in shared memory."""
    k, across = tiles.k, tiles.across
    for i in range(tiles.height):  # written out, since numbers of registers have to be known
        row = k.let(k.mul(tiles.score_place(i, 0)[0], tiles.tile.pitch))
        with k.range(0, k.i(across), 1) as j:
            k.store(into, k.add(row, tiles.score_place(i, j)[1]), k.load(products, k.add(j, i * across)))


def tiles_for(k: KernelSource, tile: Tile, dtype: str, instruction: str = "") -> ScalarTiles | TensorTiles:
    """The tiles for operands of `dtype`, on tensor cores where an instruction is named."""
    return TensorTiles(k, tile, dtype, instruction) if instruction else ScalarTiles(k, tile, dtype)
