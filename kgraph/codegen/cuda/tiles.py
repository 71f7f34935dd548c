"""Tiles of matrix products: a block of threads sums products from panels in shared memory into registers.

A block makes `rows` x `columns` results. Depth goes in chunks: while the products of one are summed, the operands of
the next are on their way from memory into registers. A thread has `height` x `width` results that lie `down` rows and
`across` columns apart, so that neighbouring threads read neighbouring words of shared memory, or the same one.

What is in registers is an array of the thread's own whose loops the compiler unrolls: as many variables of their own
would take Numba several times as long.
"""

from __future__ import annotations

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


SIMULATED_TILE = Tile(4, 4, 4, 2, 2)
SIMULATED_TENSOR_TILE = Tile(16, 16, 16, 2, 4)  # one warp
# From the widest on; all take 256 threads.
TILES = (Tile(128, 128, 16, 8, 8), Tile(128, 64, 16, 8, 4), Tile(128, 32, 16, 4, 4), Tile(256, 16, 16, 4, 4))
SMALL_TILE = Tile(64, 64, 16, 4, 4)


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


class Panel:
    """The operands [outer, inner] of one side of a chunk, of which each thread of the block fetches equal parts.

    along_outer: whether neighbouring threads fetch along the outer axis, not along the inner one. fetched: registers
    for a thread's part.
    """

    def __init__(self, k: KernelSource, block: int, outer: int, inner: int, along_outer: bool, dtype: str):
        self.k, self.block, self.along_outer = k, block, along_outer
        self.width = outer if along_outer else inner
        if outer * inner % block or (block % self.width and self.width % block):
            raise ValueError(f"{block} threads do not fetch panels of {outer} x {inner} in equal parts")
        self.count = outer * inner // block
        self.fetched = k.local(dtype, self.count)
        thread = k.thread()
        self.near = k.let(k.mod(thread, self.width), "near") if block >= self.width else thread
        self.far = k.let(k.div(thread, self.width), "far")

    def place(self, n: str) -> tuple[str, str]:
        """(outer, inner) of the thread's operand number n."""
        k, width, block = self.k, self.width, self.block
        if block >= width:
            place = self.near, k.let(k.add(self.far, k.mul(n, block // width)), "far")
        else:  # a line of the panel takes several turns
            turns = width // block
            place = k.let(k.add(self.near, k.mul(k.mod(n, turns), block)), "near"), k.let(k.div(n, turns), "far")
        return place if self.along_outer else place[::-1]

    @contextmanager
    def each(self) -> Iterator[tuple[str, str, str]]:
        """A loop over the thread's operands, unrolled by the compiler: (number, outer, inner)."""
        with self.k.range(0, self.k.i(self.count), 1) as n:
            yield (n, *self.place(n))

    def fetch(self, n: str, conditions: list[str], operand: Operand, index: Callable[[], str]) -> None:
        """Sets register n to an element where all conditions hold, else to 0."""
        k, dtype, name = self.k, self.fetched.dtype, self.k.fresh("x")
        k.line(f"{name} = {k.literal(0, dtype)}")
        with k.suite(f"if {' and '.join(conditions)}:"):
            if dtype == "uint16":  # half floats as they lie in memory
                operand = operand._replace(dtype=dtype)
            value = k.load(operand, index())
            k.line(f"{name} = {scalar_ops.convert(k, value, compute_dtype(operand.dtype), dtype)}")
        k.store(self.fetched, n, name)


class TileProduct:
    """The sums of one tile, in registers."""

    def __init__(
        self, k: KernelSource, tile: Tile, dtype: str, left_along_rows: bool = False, right_along_depth: bool = False
    ):
        """left_along_rows, right_along_depth: neighbouring threads fetch along those axes, not along the other one."""
        self.k, self.tile, self.dtype = k, tile, dtype
        self.thread = k.thread()
        self._allocate(k, right_along_depth)
        self.sums = k.local(dtype, tile.height * tile.width)
        self._make_panels(left_along_rows, right_along_depth)

    def _make_panels(self, left_along_rows: bool, right_along_depth: bool) -> None:
        """(row, depth) on the left, (depth, column) on the right."""
        k, tile, fetched = self.k, self.tile, self._panel_dtype
        self.left_panel = Panel(k, tile.block, tile.rows, tile.depth, left_along_rows, fetched)
        self.right_panel = Panel(k, tile.block, tile.depth, tile.columns, right_along_depth, fetched)

    def _allocate(self, k: KernelSource, right_along_depth: bool) -> None:
        """The panels in shared memory, the thread's place in the tile, and what it multiplies at a time."""
        tile, dtype = self.tile, self.dtype
        # An element more than there are keeps threads that write along the depth in different banks.
        self.pitch = tile.rows + 1
        self.right_pitch = tile.columns + 1 if right_along_depth else tile.columns
        self.left = k.shared(dtype, tile.depth * self.pitch)
        self.right = k.shared(dtype, tile.depth * self.right_pitch)
        self.row = k.let(k.div(self.thread, tile.across), "row")
        self.column = k.let(k.mod(self.thread, tile.across), "column")
        self.xs, self.ys = k.local(dtype, tile.height), k.local(dtype, tile.width)

    @property
    def _panel_dtype(self) -> str:
        """What the registers of a thread's part of a panel hold."""
        return self.dtype

    def place_row(self, i: str) -> str:
        """The row of the tile that is row i of the thread's results."""
        return self.k.add(self.row, self.k.mul(i, self.tile.down))

    def place_column(self, j: str) -> str:
        """The column of the tile that is column j of the thread's results."""
        return self.k.add(self.column, self.k.mul(j, self.tile.across))

    def _put_panels(self) -> None:
        """Writes what the thread has fetched to shared memory."""
        k = self.k
        with self.left_panel.each() as (n, row, depth):
            k.store(self.left, k.add(k.mul(depth, self.pitch), row), k.load(self.left_panel.fetched, n))
        with self.right_panel.each() as (n, depth, column):
            at = k.add(k.mul(depth, self.right_pitch), column)
            k.store(self.right, at, k.load(self.right_panel.fetched, n))

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
        with k.range(0, k.i(tile.depth), 1) as d:
            left = k.let(k.add(k.mul(d, self.pitch), self.row))
            right = k.let(k.add(k.mul(d, self.right_pitch), self.column))
            with k.range(0, k.i(tile.height), 1) as i:
                k.store(self.xs, i, k.load(self.left, k.add(left, k.mul(i, tile.down))))
            with k.range(0, k.i(tile.width), 1) as j:
                k.store(self.ys, j, k.load(self.right, k.add(right, k.mul(j, tile.across))))
            with k.range(0, k.i(tile.height), 1) as i, k.range(0, k.i(tile.width), 1) as j:
                n = k.let(k.add(k.mul(i, tile.width), j))
                total = f"{k.load(self.sums, n)} + {k.load(self.xs, i)} * {k.load(self.ys, j)}"
                k.store(self.sums, n, total if scalar_ops.is_float(self.dtype) else f"{self.dtype}({total})")

    def results(self, visit: Callable[[str, str, str], None]) -> None:
        """Calls `visit(row of the tile, column of the tile, sum)` once, in loops over a thread's results."""
        k, tile = self.k, self.tile
        stage = k.shared(self.dtype, tile.block * tile.width)
        with k.range(0, k.i(tile.height), 1) as i:
            for number in range(tile.height):
                # Written out, since numbers of registers have to be known.
                with k.suite(f"if {i} == {k.i(number)}:"), k.range(0, k.i(tile.width), 1) as j:
                    value = k.load(self.sums, k.add(j, number * tile.width))
                    k.store(stage, k.add(self.thread, k.mul(j, tile.block)), value)
            row = k.let(self.place_row(i), "row")
            with k.range(0, k.i(tile.width), 1) as j:
                column = k.let(self.place_column(j), "column")
                visit(row, column, k.load(stage, k.add(self.thread, k.mul(j, tile.block))))
