"""Register tiles: `C[rows*cols, vectors*lanes] += sum_k A[pixel, k] * B[k, column]`, the inside of every contraction kernel.

A tile is a small block of output pixels (`rows` x `cols`: both along an image for convolutions, `rows` = 1 for matrix
products) times `vectors` vectors of output columns. All accumulators live in registers; each step of k loads
`vectors` vectors of B and one broadcast element of A per pixel. The sum over k runs in one fixed order per output
element, whatever the tile's shape and however k is cut into blocks, so results do not depend on tiling or threads.

A pixel's row of A lies at `row * row_pitch + col * col_pitch` from the tile's first, with pitches known when the kernel
is generated: addresses become displacements of one register. k is walked by nested loops (the taps of a convolution,
each with a stride in A and in B) around one run of `run` consecutive steps.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu.builder import I1, I64, PTR, VOID, Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue
from kgraph.codegen.cpu.strided import resolve


def register_tile(target) -> tuple[int, int]:
    """(pixels, vectors) of the largest tile that the register file holds: accumulators, B vectors, one broadcast."""
    return (14, 2) if target.num_vector_registers >= 32 else (6, 2)


class KLoop(NamedTuple):
    """One loop over k: its count, and its strides in elements of A and in rows of B (a row is one step of k)."""

    count: int
    a_stride: int
    b_rows: int


class TileCode(NamedTuple):
    """What all tiles of a kernel share.

    dtype: of A, B and the accumulators. lanes: of its vectors.
    row_pitch, col_pitch, a_step: strides of A in elements, per pixel row, pixel column and step of k.
    loops: around the run, outermost first. run: steps of the innermost loop; None where it is a run-time argument.
    b_step: elements from one row of B to the next; None for packed panels, whose rows are as wide as the panel.
    pixel_row_pitch, pixel_col_pitch: strides of the output in pixels (`int` or ("size", slot)).
    partial: whether k is cut into blocks, so that sums are kept in `sums` between them.
    """

    dtype: str
    lanes: int
    row_pitch: int
    col_pitch: int
    a_step: int
    loops: tuple[KLoop, ...]
    run: int | None
    b_step: int | tuple | None
    pixel_row_pitch: int | tuple
    pixel_col_pitch: int | tuple
    partial: bool


class Tile(NamedTuple):
    """The shape of a tile. masked: whether columns from `remaining` on are absent from the output (and from B)."""

    rows: int
    cols: int
    vectors: int
    masked: bool


@contextmanager
def subfunction(b: KernelBuilder, name: str, arguments: list[ir.Type]):
    """Builds an internal function of the kernel's module: within, `b` writes into it. Gives the function."""
    function = ir.Function(b.module, ir.FunctionType(VOID, arguments), name)
    function.linkage = "internal"
    for attribute in ("nounwind", "noinline"):
        function.attributes.add(attribute)
    outer_function, outer_ir = b.function, b.ir
    b.function, b.ir = function, ir.IRBuilder(function.append_basic_block("entry"))
    yield function
    b.ir.ret_void()
    b.function, b.ir = outer_function, outer_ir


class TileSet:
    """The tile functions of one kernel, made when first called.

    prefix: of the functions' names, for kernels with several sets.
    """

    def __init__(self, b: KernelBuilder, code: TileCode, epilogue: Epilogue, prefix: str = ""):
        self.b, self.code, self.epilogue, self.prefix = b, code, epilogue, prefix
        self.functions: dict[Tile, ir.Function] = {}

    def call(self, tile: Tile, a: Pointer, bp: Pointer, sums: Pointer, pixel, column, remaining, run=0, first=1, last=1):
        """Compute one tile.

        a, bp: first element of A and of B's panel. sums: scratch for the sums of the tile,
        `rows * cols * vectors * lanes` elements. pixel: number of the tile's first output pixel. column: its first
        output column. remaining: columns of the output from there on (matters to masked tiles). run: steps of k where
        `code.run` is None. first, last: whether this block of k is the first, the last one (where `code.partial`).
        """
        if tile not in self.functions:
            self.functions[tile] = self._build(tile)
        b = self.b
        buffers, sizes = b.function.args[0], b.function.args[1]
        integers = [b.i64(x) for x in (pixel, column, remaining, run)]
        flags = [ir.Constant(I1, bool(f)) if isinstance(f, int) else f for f in (first, last)]
        b.ir.call(self.functions[tile], [buffers, sizes, a.value, bp.value, sums.value, *integers, *flags])

    def _build(self, tile: Tile) -> ir.Function:
        b, code = self.b, self.code
        name = f"{self.prefix}tile_{tile.rows}x{tile.cols}x{tile.vectors}{'_masked' if tile.masked else ''}"
        with subfunction(b, name, [PTR] * 5 + [I64] * 4 + [I1] * 2) as function:
            _, sizes, a, bp, sums, *integers, first, last = function.args
            pixel, column, remaining, run = (Int(b, x) for x in integers)
            a, bp, sums = (Pointer(b, p, code.dtype, s) for p, s in ((a, "a"), (bp, "b"), (sums, "sums")))
            kind = b.type(code.dtype, code.lanes)
            zero = b.constant_of(kind, 0)
            pixels = tile.rows * tile.cols
            acc = [[b.variable(zero) for _ in range(tile.vectors)] for _ in range(pixels)]
            width = tile.vectors * code.lanes
            if code.partial:
                with b.if_then(b.ir.not_(first)):
                    for p, j in _grid(pixels, tile.vectors):
                        acc[p][j].set(b.load(sums, p * width + j * code.lanes, code.lanes))
            self._multiply(tile, a, bp, sizes, run, remaining, acc)
            if code.partial:
                with b.if_else(last) as (then, otherwise):
                    with then:
                        self._finish(tile, function, acc, sums, pixel, column, remaining)
                    with otherwise:
                        for p, j in _grid(pixels, tile.vectors):
                            b.store(sums, p * width + j * code.lanes, acc[p][j].get())
            else:
                self._finish(tile, function, acc, sums, pixel, column, remaining)
        return function

    def _multiply(self, tile: Tile, a: Pointer, bp: Pointer, sizes, run, remaining, acc) -> None:
        """The loops over k."""
        b, code = self.b, self.code
        lanes, pixels = code.lanes, tile.rows * tile.cols
        b_step = tile.vectors * lanes
        masks: list = [None] * tile.vectors
        if code.b_step is not None:
            b_step = _entry(b, sizes, code.b_step)
            if tile.masked:
                masks = [b.tail_mask(remaining - j * lanes, lanes) for j in range(tile.vectors)]
        displacements = [i * code.row_pitch + j * code.col_pitch for i in range(tile.rows) for j in range(tile.cols)]

        def step(a_at: Pointer, b_at: Pointer) -> None:
            columns = [b.load(b_at, j * lanes, lanes, masks[j]) for j in range(tile.vectors)]
            for p in range(pixels):
                x = b.load_broadcast(a_at, displacements[p], lanes)
                for j in range(tile.vectors):
                    acc[p][j].set(multiply_add(b, x, columns[j], acc[p][j].get()))

        def walk(loops: tuple[KLoop, ...], a_at: Pointer, b_at: Pointer) -> None:
            if loops:
                count, a_stride, b_rows = loops[0]
                if count == 1:
                    walk(loops[1:], a_at, b_at)
                else:
                    with b.loop(0, count) as i:
                        walk(loops[1:], a_at + i * a_stride, b_at + i * (b_rows * b_step))
                return
            steps = run if code.run is None else code.run
            unroll = _unroll(steps, pixels * tile.vectors)
            with b.loop(0, steps, unroll) as k:
                for u in range(unroll):
                    step(a_at + (k * code.a_step + u * code.a_step), b_at + (k * b_step + u * b_step))

        walk(code.loops, a, bp)

    def _finish(self, tile: Tile, function, acc, sums: Pointer, pixel, column, remaining) -> None:
        """The epilogue: in registers where it is short, else over the sums stored in scratch, pixel by pixel."""
        b, code, lanes = self.b, self.code, self.code.lanes
        buffers, sizes = function.args[:2]
        row_pitch = _entry(b, sizes, code.pixel_row_pitch)
        col_pitch = _entry(b, sizes, code.pixel_col_pitch)
        masks = [None] * tile.vectors
        if tile.masked:
            masks = [b.tail_mask(remaining - j * lanes, lanes) for j in range(tile.vectors)]
        bound = self.epilogue.bind(b, buffers, lambda e: _entry(b, sizes, e), column, masks, lanes)
        if self.epilogue.in_registers:
            for p in range(tile.rows * tile.cols):
                i, j = divmod(p, tile.cols)
                bound.apply(pixel + (i * row_pitch + j * col_pitch), [v.get() for v in acc[p]])
            return
        width = tile.vectors * lanes
        for p, j in _grid(tile.rows * tile.cols, tile.vectors):
            b.store(sums, p * width + j * lanes, acc[p][j].get())
        with b.loop(0, tile.rows) as i, b.loop(0, tile.cols) as j:
            at = (i * tile.cols + j) * width
            values = [b.load(sums, at + v * lanes, lanes) for v in range(tile.vectors)]
            bound.apply(pixel + i * row_pitch + j * col_pitch, values)


def multiply_add(b: KernelBuilder, x, y, z):
    """x * y + z: fused for floats, wrapping for integers."""
    element = z.type.element if isinstance(z.type, ir.VectorType) else z.type
    return b.add(b.mul(x, y), z) if isinstance(element, ir.IntType) else b.fma(x, y, z)


def _unroll(steps, accumulators: int) -> int:
    """Steps of k per turn of the loop: small tiles would spend their time on loop control."""
    if not isinstance(steps, int):
        return 1
    return next(u for u in (8, 4, 3, 2, 1) if steps % u == 0 and (u * accumulators <= 32 or u == 1))


def _entry(b: KernelBuilder, sizes: ir.Value, entry):
    """An entry of the params inside a subfunction, where the kernel's own reads of `sizes` are not visible."""
    if isinstance(entry, int):
        return entry
    at = b.ir.gep(sizes, [ir.Constant(I64, entry[1])], inbounds=True, source_etype=I64)
    return Int(b, b.ir.load(at, typ=I64))


def _grid(pixels: int, vectors: int):
    return [(p, j) for p in range(pixels) for j in range(vectors)]


class Panels(NamedTuple):
    """The columns of B, cut into panels of `width` columns.

    columns: how many there are (`int` or ("size", slot)). tail: vectors of the last panel, if its width is not full
    (packed panels are as wide as their vectors; with run-time columns every panel is full in memory).
    depth: rows of a packed panel; None where B is read in place, panels being `width` columns apart.
    """

    columns: int | tuple
    width: int
    lanes: int
    depth: int | tuple | None

    @property
    def vectors(self) -> int:
        return self.width // self.lanes

    @property
    def tail_vectors(self) -> int:
        if isinstance(self.columns, int) and self.columns % self.width:
            return -(-(self.columns % self.width) // self.lanes)
        return self.vectors

    def count(self):
        """Number of panels; needs integers, so call it on a resolved copy."""
        return (self.columns + (self.width - 1)) // self.width

    def packed_columns(self):
        """Columns of B after padding."""
        if isinstance(self.columns, int):
            return -(-self.columns // self.lanes) * self.lanes
        return self.count() * self.width


class TileRange(NamedTuple):
    """Tile extents along one axis of the output: of most tiles, and of those that may follow."""

    sizes: tuple[int, ...]

    @staticmethod
    def static(extent: int, largest: int) -> TileRange:
        """For an axis that is cut into blocks of whole tiles, the last one excepted."""
        rest = extent % largest
        sizes = (largest, rest) if rest else (largest,)
        return TileRange(sizes if extent >= largest else sizes[1:])

    @staticmethod
    def dynamic(largest: int, few: bool = False) -> TileRange:
        """For an axis whose size is known at run time only. few: spares code where tiles are made many times over."""
        smaller = tuple(s for s in ((4, 1) if few else (6, 2, 1)) if s < largest)
        return TileRange((largest, *smaller))

    def walk(self, b: KernelBuilder, extent, emit) -> None:
        """Calls `emit(position, size)` to emit code that covers [0, extent) in tiles."""
        position = 0
        for size in self.sizes:
            rest = extent - position
            stop = position + rest // size * size
            if isinstance(stop, int) and stop - position == size:
                emit(position, size)
            elif not isinstance(stop, int) or stop > position:
                with b.loop(position, stop, size) as at:
                    emit(at, size)
            position = stop


def sum_bytes(dtype: str, pixels: int, vectors: int, lanes: int) -> int:
    """Scratch for the sums of `pixels` pixels, one panel wide."""
    return pixels * vectors * lanes * itemsize(dtype)


__all__ = ["KLoop", "Panels", "Tile", "TileCode", "TileRange", "TileSet", "multiply_add", "register_tile", "resolve"]
