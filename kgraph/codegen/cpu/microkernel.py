"""Register tiles: `C[pixel, column] += sum_k A[pixel, k] * B[k, column]`, the inside of every contraction kernel.

A tile is a small block of output pixels (`rows` x `cols`: both along an image for convolutions, `rows` = 1 for matrix
products) times `vectors` vectors of output columns. All accumulators live in registers; each step of k loads
`vectors` vectors of B and one broadcast element of A per pixel. The sum over k runs in one fixed order per output
element, whatever the tile's shape and however k is cut into blocks, so results do not depend on tiling or threads.
Where a machine sums several narrow products at once (`products`), a step of k is that many elements of each operand.

A pixel's row of A lies at `row * row_pitch + col * col_pitch` from the tile's first, with pitches known when the kernel
is generated: addresses become displacements of one register. k is walked by nested loops (the taps of a convolution,
each with a stride in A and in B) around one run of `run` consecutive steps.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu.builder import I1, I64, PTR, Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue, Finisher, entry_value, subfunction, vector_masks
from kgraph.codegen.cpu.products import Product


def register_tile(target) -> tuple[int, int]:
    """(pixels, vectors) of the largest tile that the register file holds: accumulators, B vectors, one broadcast."""
    return (14, 2) if target.num_vector_registers >= 32 else (6, 2)


class KLoop(NamedTuple):
    """One loop over k: its turns, and its strides in elements of A and in rows of B (a row is one step of k)."""

    turns: int
    a_stride: int
    b_rows: int


class TileCode(NamedTuple):
    """What all tiles of a kernel share.

    product: how A and B are multiplied. lanes: of a vector of sums.
    row_pitch, col_pitch, a_step: strides of A in elements, per pixel row, pixel column and step of k.
    loops: around the run, outermost first. run: steps of the innermost loop; None where it is a run-time argument.
    b_step: elements from one row of B to the next; None for packed panels, whose rows are as wide as the panel.
    pixel_row_pitch, pixel_col_pitch: strides of the output in pixels (`int` or ("size", slot)).
    partial: whether k is cut into blocks, so that sums are kept in `sums` between them.
    requests: tiles that read the same rows of B one after the other and between them ask for the rows that are needed
    next, each for one in so many, where B comes from beyond the second-level cache; 0 for none.
    panel, panel_step: vectors of a packed panel, elements from one to the next, where tiles may span several; else 0.
    """

    product: Product
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
    requests: int = 0
    panel: int = 0
    panel_step: int = 0

    @property
    def dtype(self) -> str:
        """The dtype of the sums."""
        return self.product.accumulate


class Tile(NamedTuple):
    """The shape of a tile. masked: whether columns from `remaining` on are absent from the output (and from B)."""

    rows: int
    cols: int
    vectors: int
    masked: bool


class TileSet:
    """The tile functions of one kernel, made when first called.

    epilogue: None leaves the sums in `sums`. prefix: of the functions' names, for kernels with several sets.
    """

    def __init__(self, b: KernelBuilder, code: TileCode, epilogue: Epilogue | None, prefix: str = ""):
        self.b, self.code, self.epilogue, self.prefix = b, code, epilogue, prefix
        self.functions: dict[Tile, ir.Function] = {}
        pitches = (code.pixel_row_pitch, code.pixel_col_pitch)
        self.finisher = Finisher(b, epilogue, code.dtype, code.lanes, pitches, prefix) if epilogue else None

    def call(
        self,
        tile: Tile,
        a: Pointer,
        bp: Pointer,
        sums: Pointer,
        pixel,
        column,
        remaining,
        run=0,
        first=1,
        last=1,
        requested: Pointer | None = None,
    ):
        """Compute one tile.

        a, bp: first element of A and of B's panel. sums: scratch for the sums of the tile,
        `rows * cols * vectors * lanes` elements. pixel: number of the tile's first output pixel. column: its first
        output column. remaining: columns of the output from there on (matters to masked tiles). run: steps of k where
        `code.run` is None. first, last: whether this block of k is the first, the last one (where `code.partial`).
        requested: the first row of B to ask for (where `code.requests`).
        """
        if tile not in self.functions:
            self.functions[tile] = self._build(tile)
        b = self.b
        buffers, sizes = b.function.args[0], b.function.args[1]
        integers = [b.i64(x) for x in (pixel, column, remaining, run)]
        flags = [ir.Constant(I1, bool(f)) if isinstance(f, int) else f for f in (first, last)]
        pointers = [p.value for p in (a, bp, sums, requested or bp)]
        b.ir.call(self.functions[tile], [buffers, sizes, *pointers, *integers, *flags])

    def _build(self, tile: Tile) -> ir.Function:
        b, code = self.b, self.code
        name = f"{self.prefix}tile_{tile.rows}x{tile.cols}x{tile.vectors}{'_masked' if tile.masked else ''}"
        with subfunction(b, name, [PTR] * 6 + [I64] * 4 + [I1] * 2) as function:
            _, sizes, a, bp, sums, requested, *integers, first, last = function.args
            pixel, column, remaining, run = (Int(b, x) for x in integers)
            a, bp = Pointer(b, a, code.product.a, "a"), Pointer(b, bp, code.product.b, "b")
            sums, requested = Pointer(b, sums, code.dtype, "sums"), Pointer(b, requested, code.product.b, "b")
            self._request_extras(tile, function, pixel, column, last)
            acc = self._first_sums(bp, tile.vectors) * (tile.rows * tile.cols)
            if code.partial:
                acc = self._sums_so_far(sums, first, acc)
            acc = self._multiply(tile, a, bp, requested, sizes, run, remaining, acc)
            if code.partial and self.epilogue is not None:
                with b.if_else(last) as (then, otherwise):
                    with then:
                        self._finish(tile, function, acc, sums, pixel, column, remaining)
                    with otherwise:
                        for i, value in enumerate(acc):
                            b.store(sums, i * code.lanes, value)
            else:
                self._finish(tile, function, acc, sums, pixel, column, remaining)
        return function

    def _request_extras(self, tile: Tile, function, pixel, column, last) -> None:
        """Asks for what the epilogue reads of operands of the result's shape: they may come from memory meanwhile."""
        b, code, epilogue = self.b, self.code, self.epilogue
        if epilogue is None or all(kind != "full" for kind, *_ in epilogue.inputs):
            return
        buffers, sizes = function.args[:2]
        with b.if_then(last) if code.partial else contextlib.nullcontext():
            columns = entry_value(b, sizes, epilogue.columns)
            row_pitch = entry_value(b, sizes, code.pixel_row_pitch)
            col_pitch = entry_value(b, sizes, code.pixel_col_pitch)
            for number, dtype in ((number, dtype) for kind, number, dtype in epilogue.inputs if kind == "full"):
                at = b.ir.gep(buffers, [b.i64(number)], inbounds=True, source_etype=PTR)
                extra = Pointer(b, b.ir.load(at, typ=PTR), dtype, f"operand{number}")
                for i, j in itertools.product(range(tile.rows), range(tile.cols)):
                    first = (pixel + (i * row_pitch + j * col_pitch)) * columns + column
                    for line in range(0, tile.vectors * code.lanes, 64 // itemsize(dtype)):
                        b.prefetch(extra, first + line)

    def _panels(self, vectors: int) -> list[tuple[int, int]]:
        """(distance in elements from the first one, vectors) of each panel of B that a tile spans."""
        code = self.code
        width = code.panel or vectors
        return [(code.panel_step * p, min(width, vectors - p * width)) for p in range(-(-vectors // width))]

    def _first_sums(self, bp: Pointer, vectors: int) -> list[ir.Value]:
        product, lanes = self.code.product, self.code.lanes
        return [v for at, count in self._panels(vectors) for v in product.first_sums(self.b, bp + at, count, lanes)]

    def _sums_so_far(self, sums: Pointer, first, initial: list) -> list:
        """`initial` in the first block of k, else what the one before it left."""
        b, lanes = self.b, self.code.lanes
        before = b.ir.block
        with b.if_then(b.ir.not_(first)):
            loaded = [b.load(sums, i * lanes, lanes) for i in range(len(initial))]
            loading = b.ir.block
        out = []
        for begun, value in zip(initial, loaded, strict=True):
            phi = b.ir.phi(begun.type)
            phi.add_incoming(begun, before)
            phi.add_incoming(value, loading)
            out.append(phi)
        return out

    def _multiply(self, tile: Tile, a: Pointer, bp: Pointer, requested: Pointer, sizes, run, remaining, acc) -> list:
        """The loops over k: the sums `acc` (pixels in order, vectors of a pixel together) with all products added."""
        b, code, product = self.b, self.code, self.code.product
        lanes, vectors = code.lanes, tile.vectors
        panels = self._panels(vectors)
        b_step = panels[0][1] * lanes * product.steps
        masks: list = [None] * vectors
        if code.b_step is not None:
            b_step = entry_value(b, sizes, code.b_step)
            masks = vector_masks(b, vectors, tile.masked, remaining, lanes)
        displacements = [i * code.row_pitch + j * code.col_pitch for i in range(tile.rows) for j in range(tile.cols)]

        steps = run if code.run is None else code.run
        unroll = _unroll(steps, len(acc))

        def request(at: Pointer, row) -> None:
            for line in range(0, vectors * lanes, 64 // itemsize(product.b)):
                b.prefetch(at, row * b_step + line)

        def step(a_at: Pointer, b_at: Pointer, sums: list) -> list:
            places = [(b_at + at, j, count) for at, count in panels for j in range(count)]
            columns = [product.columns(b, *place, lanes, mask) for place, mask in zip(places, masks)]
            out = []
            for p, displacement in enumerate(displacements):
                x = product.broadcast(b, a_at, displacement, lanes)
                out += [product.add(b, x, columns[j], sums[p * vectors + j]) for j in range(vectors)]
            return out

        def walk(loops: tuple[KLoop, ...], a_at: Pointer, b_at: Pointer, asked: Pointer, sums: list) -> list:
            if loops:
                count, a_stride, b_rows = loops[0]

                def turn(i, sums):
                    passed = i * (b_rows * b_step)
                    return walk(loops[1:], a_at + i * a_stride, b_at + passed, asked + passed, sums)

                return turn(0, sums) if count == 1 else carried_loop(b, count, 1, sums, turn)

            def unrolled(k, sums):
                for u in range(unroll):
                    if code.requests and u % math.gcd(code.requests, unroll) == 0:
                        request(asked, k + u)
                    sums = step(a_at + (k * code.a_step + u * code.a_step), b_at + (k * b_step + u * b_step), sums)
                return sums

            return carried_loop(b, steps, unroll, sums, unrolled)

        return walk(code.loops, a, bp, requested, acc)

    def _finish(self, tile: Tile, function, acc: list, sums: Pointer, pixel, column, remaining) -> None:
        """The epilogue: in registers where it is short, else by a function that all tiles of one width share."""
        b, code = self.b, self.code
        buffers, sizes = function.args[:2]
        if self.epilogue is not None and self.epilogue.in_registers:
            masks = vector_masks(b, tile.vectors, tile.masked, remaining, code.lanes)
            bound = self.epilogue.bind(b, buffers, lambda e: entry_value(b, sizes, e), column, masks, code.lanes)
            row_pitch = entry_value(b, sizes, code.pixel_row_pitch)
            col_pitch = entry_value(b, sizes, code.pixel_col_pitch)
            for p in range(tile.rows * tile.cols):
                i, j = divmod(p, tile.cols)
                values = acc[p * tile.vectors : (p + 1) * tile.vectors]
                bound.apply((pixel + (i * row_pitch + j * col_pitch), values))
            return
        for i, value in enumerate(acc):
            b.store(sums, i * code.lanes, value)
        if self.finisher is not None:
            extents = (tile.rows, tile.cols)
            self.finisher.call(buffers, sizes, sums, pixel, column, remaining, extents, tile.vectors, tile.masked)


def carried_loop(b: KernelBuilder, stop, step: int, values: list[ir.Value], turn) -> list[ir.Value]:
    """`for i in range(0, stop, step): values = turn(i, values)`; gives the last values.

    Like `KernelBuilder.loop`, with the values that the loop carries in registers from the start: where there are many,
    this spares LLVM the work of finding that out.
    """
    if isinstance(stop, int) and stop <= 0:
        return values
    before, body = b.ir.block, b.function.append_basic_block("turn")
    after = b.function.append_basic_block("after")
    if isinstance(stop, int):
        b.ir.branch(body)
    else:
        b.ir.cbranch(stop > 0, body, after)
    b.ir.position_at_end(body)
    index = b.ir.phi(I64)
    phis = [b.ir.phi(v.type) for v in values]
    new = turn(Int(b, index), list(phis))
    following = b.ir.add(index, ir.Constant(I64, step), flags=("nsw",))
    end = b.ir.block
    branch = b.ir.cbranch(b.ir.icmp_signed("<", following, b.i64(stop)), body, after)
    branch.set_metadata("llvm.loop", b._loop_metadata(False))
    index.add_incoming(ir.Constant(I64, 0), before)
    index.add_incoming(following, end)
    for phi, first, value in zip(phis, values, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, end)
    b.ir.position_at_end(after)
    if isinstance(stop, int):
        return new
    out = []
    for first, value in zip(values, new, strict=True):
        phi = b.ir.phi(value.type)
        phi.add_incoming(first, before)
        phi.add_incoming(value, end)
        out.append(phi)
    return out


def _unroll(steps, accumulators: int) -> int:
    """Steps of k per turn of the loop: small tiles would spend their time on loop control."""
    if not isinstance(steps, int):
        return 1
    return next(u for u in (8, 4, 3, 2, 1) if steps % u == 0 and (u * accumulators <= 32 or u == 1))


class Panels(NamedTuple):
    """The columns of B, cut into panels of `width` columns.

    columns: how many there are, as a resolved integer. width: of a panel; lanes: of a vector. Packed panels are as wide
    as the vectors that they need; with a run-time number of columns every panel is full in memory.
    """

    columns: int | Int
    width: int
    lanes: int

    @property
    def vectors(self) -> int:
        """Vectors in a whole panel."""
        return self.width // self.lanes

    @property
    def tail_vectors(self) -> int:
        if isinstance(self.columns, int) and self.columns % self.width:
            return -(-(self.columns % self.width) // self.lanes)
        return self.vectors

    def count(self):
        """Number of panels."""
        return (self.columns + (self.width - 1)) // self.width

    def packed_columns(self):
        """Columns of B after padding."""
        if isinstance(self.columns, int):
            return -(-self.columns // self.lanes) * self.lanes
        return self.count() * self.width


class TileRange(NamedTuple):
    """Tile extents along one axis of the output: of most tiles, and of those that may follow.

    first: how many tiles have the first extent; as many as fit if 0.
    """

    sizes: tuple[int, ...]
    first: int | Int = 0

    @staticmethod
    def static(extent: int, largest: int) -> TileRange:
        """For an axis that is cut into blocks of whole tiles, the last one excepted."""
        rest = extent % largest
        sizes = (largest, rest) if rest else (largest,)
        return TileRange(sizes if extent >= largest else sizes[1:])

    @staticmethod
    def even(extent: int, largest: int) -> TileRange:
        """For an axis in one block: the fewest tiles, of two neighbouring extents.

        A last tile of a row or two waits for its sums, and takes as long as one of several.
        """
        count = max(-(-extent // largest), 1)
        small, larger = divmod(extent, count)
        return TileRange((small + 1, small), larger) if larger else TileRange((small,))

    @staticmethod
    def dynamic(largest: int, few: bool = False) -> TileRange:
        """For an axis whose size is known at run time only. few: spares code where tiles are made many times over."""
        smaller = tuple(s for s in ((4, 1) if few else (6, 2, 1)) if s < largest)
        return TileRange((largest, *smaller))

    def walk(self, b: KernelBuilder, extent, emit) -> None:
        """Calls `emit(position, size)` to emit code that covers [0, extent) in tiles."""
        position = 0
        for number, size in enumerate(self.sizes):
            rest = extent - position
            given = number == 0 and not (isinstance(self.first, int) and self.first == 0)
            stop = position + (self.first if given else rest // size) * size
            if isinstance(stop, int) and stop - position == size:
                emit(position, size)
            elif not isinstance(stop, int) or stop > position:
                with b.loop(position, stop, size) as at:
                    emit(at, size)
            position = stop
