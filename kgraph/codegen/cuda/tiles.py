"""Tiles of matrix products: a block of threads sums products from panels in shared memory into registers.

A block makes `rows` x `columns` results. Depth goes in chunks: while the products of one are summed, the operands of
the next are on their way from memory into registers. A thread has `height` x `width` results. They come in groups of
neighbours, whose operands are read from shared memory as one word of up to 16 bytes; groups lie apart, so that
neighbouring threads read neighbouring words, or the same one. Where sizes allow, operands come
from memory in groups too.

What is in registers is an array of the thread's own whose loops the compiler unrolls: as many variables of their own
would take Numba several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.codegen.expressions import compute_dtype


class Tile(NamedTuple):
    """rows, columns: results of a block. depth: of a chunk. height, width: results of a thread."""

    rows: int
    columns: int
    depth: int
    height: int
    width: int

    @property
    def across(self) -> int:
        """Threads side by side along the columns."""
        return self.columns // self.width

    @property
    def down(self) -> int:
        """Threads below each other along the rows."""
        return self.rows // self.height

    @property
    def block(self) -> int:
        return self.across * self.down


LANES = 32
WORD = 16  # bytes that a thread reads at once at most
UNROLLED = 64  # products of a thread that the compiler writes out at least; of 150 and more it makes a loop
SIMULATED_TILE = Tile(4, 4, 4, 2, 2)
SIMULATED_TENSOR_TILE = Tile(16, 16, 16, 2, 4)  # one warp
# From the widest on. A thread has as many results as its registers hold: 128 threads then share a narrow tile.
TILES = (Tile(128, 128, 16, 8, 8), Tile(128, 64, 16, 8, 8), Tile(128, 32, 16, 8, 4), Tile(256, 16, 16, 4, 4))
SMALL_TILE = Tile(64, 64, 16, 8, 4)


def choose_tile(rows, columns: int, batch: int, dtype: str, target, instruction: str = "") -> Tile:
    """The tile for `batch` products of `rows` (int | Dim; a Dim counts as many) x `columns` results of `dtype` sums.

    instruction: of tensor cores, if they multiply."""
    if target.simulator:
        return SIMULATED_TENSOR_TILE if instruction else SIMULATED_TILE
    if dtype in ("float64", "int64"):
        return TILES[2] if columns <= TILES[2].columns else SMALL_TILE
    waste = lambda tile: -(-columns // tile.columns) * tile.columns - columns
    least = min(waste(tile) for tile in TILES)
    tile = next(t for t in TILES if waste(t) <= max(least, columns // 8))
    if tile.height * tile.width > 16 and isinstance(rows, int):
        if batch * -(-rows // tile.rows) * -(-columns // tile.columns) < target.num_sms:
            return SMALL_TILE
    return tile


def group_of(dtype: str, *steps) -> int:
    """How many neighbours of `dtype` a thread may fetch together: groups start at multiples of all `steps`."""
    most = {"float32": 4, "float16": 4, "bfloat16": 4, "float64": 2}.get(dtype, 1)
    return most if all(isinstance(n, int) and n % most == 0 for n in steps) else 1


class Panel:
    """The operands [outer, inner] of one side of a chunk, of which each thread of the block fetches equal parts.

    along_outer: whether neighbouring threads fetch along the outer axis, not along the inner one. group: neighbours
    along that axis which a thread fetches together; they lie next to each other in memory, the first one at a multiple
    of `group`, or of what panels are large enough for. fetched: registers for a thread's part. count: groups of it.
    """

    def __init__(
        self, k: KernelSource, block: int, outer: int, inner: int, along_outer: bool, dtype: str, group: int = 1
    ):
        self.k, self.block, self.along_outer = k, block, along_outer
        self.group = group = math.gcd(group, outer if along_outer else inner, outer * inner // block)
        self.width = (outer if along_outer else inner) // group
        if outer * inner % (block * group) or (block % self.width and self.width % block):
            raise ValueError(f"{block} threads do not fetch panels of {outer} x {inner} in equal parts")
        self.count = outer * inner // (block * group)
        self.fetched = k.local(dtype, self.count * group)
        thread = k.thread()
        near = k.mod(thread, self.width) if block >= self.width else thread
        self.near = k.let(k.mul(near, group) if group > 1 else near, "near")
        self.far = k.let(k.div(thread, self.width), "far")
        self._aligned: dict[Operand, str] = {}

    def place(self, n: str) -> tuple[str, str]:
        """(outer, inner) of the first element of the thread's group number n."""
        k, width, block = self.k, self.width, self.block
        if block >= width:
            place = self.near, k.let(k.add(self.far, k.mul(n, block // width)), "far")
        else:  # a line of the panel takes several turns
            turns, across = width // block, block * self.group
            place = k.let(k.add(self.near, k.mul(k.mod(n, turns), across)), "near"), k.let(k.div(n, turns), "far")
        return place if self.along_outer else place[::-1]

    @contextmanager
    def each(self) -> Iterator[tuple[str, str, str]]:
        """A loop over the thread's groups, unrolled by the compiler: (number, outer, inner)."""
        with self.k.range(0, self.k.i(self.count), 1) as n:
            yield (n, *self.place(n))

    @contextmanager
    def elements(self, outer: int, inner: int) -> Iterator[list[tuple[list[str], str]]]:
        """Such a loop, whose body gets all elements of a group: (values of neighbours, the first one's place), if
        `outer` and `inner` are the distances along the axes."""
        k, width, block = self.k, self.width, self.block
        along, across = (outer, inner) if self.along_outer else (inner, outer)
        # In 64 bits the rest is known once loops are unrolled, and becomes part of the instructions that write.
        base = k.let(f"int64({k.add(k.mul(self.near, along), k.mul(self.far, across))})")
        with k.range(0, k.i(self.count), 1) as n:
            if block >= width:
                further = k.mul(n, block // width * across)
            else:
                turns = width // block
                further = k.add(k.mul(k.mod(n, turns), block * self.group * along), k.mul(k.div(n, turns), across))
            first = k.let(k.mul(n, self.group)) if self.group > 1 else n
            values = [k.load(self.fetched, k.add(first, g) if g else first) for g in range(self.group)]
            place = lambda g: f"int64({base} + int64({k.add(further, g * along)}))"
            if along == 1:
                yield [(values, place(0))]
            else:
                yield [([value], place(g)) for g, value in enumerate(values)]

    def read(self, operand: Operand) -> None:
        """Say, before all loops, which buffer is fetched from."""
        if self.group > 1:
            self._aligned[operand] = self.k.aligned(operand)

    def fetch(self, n: str, conditions: list[str], operand: Operand, index: Callable[[], str]) -> None:
        """Sets the registers of group n to its elements where all conditions hold, else to 0."""
        k, dtype, group = self.k, self.fetched.dtype, self.group
        names = [k.fresh("x") for _ in range(group)]
        for name in names:
            k.line(f"{name} = {k.literal(0, dtype)}")
        aligned = self._aligned.get(operand, "")
        with k.suite(f"if {' and '.join(conditions)}:"):
            if dtype == "uint16":  # half floats as they lie in memory
                operand = operand._replace(dtype=dtype)
            for name, value in zip(names, k.load_group(operand, index(), group, aligned), strict=True):
                k.line(f"{name} = {scalar_ops.convert(k, value, compute_dtype(operand.dtype), dtype)}")
        first = k.let(k.mul(n, group)) if group > 1 else n
        for g, name in enumerate(names):
            k.store(self.fetched, k.add(first, g) if g else first, name)


class Side(NamedTuple):
    """How a side of a tile is fetched. along: whether neighbouring threads fetch along the rows or columns, not along
    the depth. group: see `Panel`."""

    along: bool
    group: int = 1


BY_DEPTH, BY_LINE = Side(False), Side(True)


class TileProduct:
    """The sums of one tile, in registers. left, right: how operands are fetched."""

    def __init__(self, k: KernelSource, tile: Tile, dtype: str, left: Side = BY_DEPTH, right: Side = BY_LINE):
        self.k, self.tile, self.dtype = k, tile, dtype
        self.thread = k.thread()
        self._allocate(k, right)
        self.sums = k.local(dtype, tile.height * tile.width)
        self._make_panels(left, right)

    def _make_panels(self, left: Side, right: Side) -> None:
        """(row, depth) on the left, (depth, column) on the right."""
        k, tile, fetched = self.k, self.tile, self._panel_dtype
        self.left_panel = Panel(k, tile.block, tile.rows, tile.depth, left.along, fetched, left.group)
        self.right_panel = Panel(k, tile.block, tile.depth, tile.columns, not right.along, fetched, right.group)

    def _allocate(self, k: KernelSource, right: Side) -> None:
        """The panels in shared memory, the thread's place in the tile, and what it multiplies at a time.

        part: rows and columns of what all results with one i of a warp are. part_row, part_column(j): a result's place
        in it. origin: row of the first of its threads, and first column.
        """
        tile, dtype = self.tile, self.dtype
        most = WORD // (8 if dtype in ("float64", "int64") else 4)
        self.row_group, self.column_group = math.gcd(tile.height, most), math.gcd(tile.width, most)
        # A word more than there are keeps threads that write along the depth in different banks.
        self.pitch = tile.rows + most
        self.right_pitch = tile.columns if right.along else tile.columns + most
        self.left = k.shared(dtype, tile.depth * self.pitch, grouped=True)
        self.right = k.shared(dtype, tile.depth * self.right_pitch, grouped=True)
        self.row = k.let(k.div(self.thread, tile.across), "row")
        self.column = k.let(k.mod(self.thread, tile.across), "column")
        self.part = self.warp_lanes // tile.across, tile.columns
        self.part_row = k.let(k.mod(self.row, self.part[0]))
        self.part_column = self.place_column
        self.origin = k.let(k.sub(self.row, self.part_row)), k.i(0)
        self.xs, self.ys = k.local(dtype, tile.height), k.local(dtype, tile.width)

    @property
    def _panel_dtype(self) -> str:
        """What the registers of a thread's part of a panel hold."""
        return self.dtype

    def place_row(self, i: str, row: str = "") -> str:
        """The row of the tile that is row i of the results of the thread, or of those whose `row` this is."""
        return grouped(self.k, row or self.row, i, self.row_group, self.tile.down)

    def place_column(self, j: str) -> str:
        """The column of the tile that is column j of the thread's results."""
        return grouped(self.k, self.column, j, self.column_group, self.tile.across)

    def _put_panels(self) -> None:
        """Writes what the thread has fetched to shared memory."""
        k = self.k
        with self.left_panel.elements(1, self.pitch) as elements:
            for values, place in elements:
                k.store_group(self.left, place, values)
        with self.right_panel.elements(self.right_pitch, 1) as elements:
            for values, place in elements:
                k.store_group(self.right, place, values)

    def clear(self) -> None:
        """Sets all sums to 0."""
        k, tile = self.k, self.tile
        with k.range(0, k.i(tile.height * tile.width), 1) as n:
            k.store(self.sums, n, k.literal(0, self.dtype))

    def run(self, chunks: str, fetch: Callable[[], None]) -> None:
        """Sums over `chunks` chunks. fetch: writes code that sets the panels' registers for the next chunk."""
        self.clear()
        self.add(chunks, fetch)

    def add(self, chunks: str, fetch: Callable[[], None]) -> None:
        """Adds the products of `chunks` chunks to the sums; see `run`."""
        k = self.k
        with k.range(0, k.add(chunks, 1), 1) as step:
            with k.suite(f"if {step} > {k.i(0)}:"):
                k.synchronise()
                self._put_panels()
                k.synchronise()
            with k.suite(f"if {step} < {chunks}:"):
                fetch()
            with k.suite(f"if {step} > {k.i(0)}:"):
                self._products(step)

    def _products(self, step: str) -> None:
        """Adds the products of chunk `step` - 1, which is in shared memory."""
        k, tile = self.k, self.tile
        # From these on all distances are known once loops are unrolled, and become part of the instructions that read.
        steps = math.gcd(max(UNROLLED // (tile.height * tile.width), 2), tile.depth)
        lefts, rights = k.fresh("lefts"), k.fresh("rights")
        k.line(f"{lefts} = int64({self.place_row(k.i(0))})")
        k.line(f"{rights} = int64({self.place_column(k.i(0))})")
        with k.range(0, k.i(tile.depth), steps):
            with k.range(0, k.i(steps), 1) as d:
                self._take(self.left, lefts, k.mul(d, self.pitch), self.row_group, tile.down, self.xs, tile.height)
                self._take(
                    self.right, rights, k.mul(d, self.right_pitch), self.column_group, tile.across, self.ys, tile.width
                )
                with k.range(0, k.i(tile.height), 1) as i, k.range(0, k.i(tile.width), 1) as j:
                    n = k.let(k.add(k.mul(i, tile.width), j))
                    total = f"{k.load(self.sums, n)} + {k.load(self.xs, i)} * {k.load(self.ys, j)}"
                    k.store(self.sums, n, total if scalar_ops.is_float(self.dtype) else f"{self.dtype}({total})")
            k.line(f"{lefts} = int64({lefts} + int64({steps * self.pitch}))")
            k.line(f"{rights} = int64({rights} + int64({steps * self.right_pitch}))")

    def _take(
        self, panel: Operand, base: str, line: str, group: int, apart: int, registers: Operand, count: int
    ) -> None:
        """Reads the thread's operands on a line of a panel: `count` of them in groups, which `apart` threads have in
        turn."""
        k = self.k
        with k.range(0, k.i(count // group), 1) as n:
            at = f"int64({base} + int64({k.add(line, k.mul(n, group * apart))}))"
            first = k.let(k.mul(n, group))
            for g, value in enumerate(k.load_group(panel, at, group)):
                k.store(registers, k.add(first, g) if g else first, value)

    def results(self, visit: Callable[[str, str, str], None]) -> None:
        """Calls `visit(row of the tile, column of the tile, sum)` once, in loops over as many results as the thread
        has. Warps turn their results, so that neighbouring threads visit neighbouring columns, whoever summed them."""
        k, tile = self.k, self.tile
        lanes, (_, wide) = self.warp_lanes, self.part
        stage = k.shared(self.dtype, tile.block * tile.width)
        base = k.let(k.mul(k.div(self.thread, lanes), lanes * tile.width))
        own = k.let(k.add(base, k.mul(self.part_row, wide)))
        lane = k.let(k.mod(self.thread, lanes))
        with k.range(0, k.i(tile.height), 1) as i:
            for number in range(tile.height):
                # Written out, since numbers of registers have to be known.
                with k.suite(f"if {i} == {k.i(number)}:"), k.range(0, k.i(tile.width), 1) as j:
                    value = k.load(self.sums, k.add(j, number * tile.width))
                    k.store(stage, k.add(own, self.part_column(j)), value)
            k.synchronise_warp()
            with k.range(0, k.i(tile.width), 1) as j:
                at = k.let(k.add(lane, k.mul(j, lanes)))
                row = k.let(self.place_row(i, k.add(self.origin[0], k.div(at, wide))), "row")
                column = k.let(k.add(self.origin[1], k.mod(at, wide)), "column")
                visit(row, column, k.load(stage, k.add(base, at)))
            k.synchronise_warp()

    @property
    def warp_lanes(self) -> int:
        """Threads of a warp."""
        return min(LANES, self.tile.block)


def grouped(k: KernelSource, first: str, n: str, group: int, apart: int) -> str:
    """Place number n of thread `first`, if `apart` threads take groups of places in turn."""
    n = k.i(n)
    if group == 1:
        return k.add(first, k.mul(n, apart))
    place = k.add(k.mul(k.div(n, group), group * apart), k.mul(first, group))
    return k.add(place, k.mod(n, group))
