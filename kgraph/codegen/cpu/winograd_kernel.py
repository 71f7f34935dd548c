"""The kernel of a Winograd convolution: transforms around products of matrices, one per point, or pair of points.

One unit of work is a block of output tiles, counted through all images, times some panels of filters. It transforms
the inputs that its tiles meet, channels in vectors, unless a kernel ahead has done so; multiplies, pair of points by
pair of points, so that only one matrix of transformed filters at a time is in use; then transforms the sums of each
tile back and finishes them. Units of the same tiles follow one another and share the transformed inputs. Filters are
given transformed, or as taps (`winograd_chunk`): then the products of a panel are those of one chunk of channels after
the other.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import cast

from llvmlite import ir

from kgraph.codegen.cpu.builder import I64, PTR, Int, KernelBuilder, Pointer
from kgraph.codegen.cpu.epilogue import Epilogue, Finisher, entry_value, subfunction, vector_masks
from kgraph.codegen.cpu.microkernel import Panels, Tile, TileCode, TileSet
from kgraph.codegen.cpu.products import plain
from kgraph.codegen.cpu.strided import resolve_all
from kgraph.codegen.cpu.winograd_chunk import FilterTransform
from kgraph.codegen.cpu.winograd_inputs import InputTransform, TileGrid, both_axes
from kgraph.codegen.cpu.winograd_plan import DTYPE, WinogradPlan
from kgraph.codegen.cpu.winograd_requests import Requests
from kgraph.codegen.cpu.winograd_transform import output_part

# Register tiles that share the requests for the next panel. One asks for more than memory delivers meanwhile; what the
# last of four asks for comes too late.
REQUESTING_TILES = 2


def render_winograd(params: tuple, target) -> str:
    """Kernel (x or its transform, transformed filters, extras..., outputs...); see `WinogradPlan`."""
    b = KernelBuilder("winograd", target)
    _Winograd(b, WinogradPlan(*params)).emit()
    return b.ir_text()


class _Winograd:
    def __init__(self, b: KernelBuilder, plan: WinogradPlan):
        self.b, self.plan = b, plan
        self.pairs = tuple(Fraction(p) for p in plan.pairs)
        self.grid = TileGrid(b, plan)
        self.out_sizes = both_axes(resolve_all(b, plan.out_sizes), 1)
        self.panels = Panels(plan.filters, plan.width, plan.lanes)
        code = TileCode(
            product=plain(DTYPE),
            lanes=plan.lanes,
            row_pitch=0,
            col_pitch=plan.input_pitch,
            a_step=1,
            loops=(),
            run=plan.chunk or plan.channels,
            b_step=None,
            pixel_row_pitch=0,
            pixel_col_pitch=0,
            partial=0 < plan.chunk < plan.channels,
            requests=min(plan.block // plan.tile, REQUESTING_TILES),
        )
        self.products = TileSet(b, code, None)
        epilogue = Epilogue(*plan.epilogue)
        self.finisher = Finisher(b, epilogue, DTYPE, plan.lanes, plan.out_pitches, sums_row=plan.outputs)
        offsets = plan.scratch()

        def scratch(name: str) -> Pointer:
            # What is never written together has a name of its own, so that LLVM may reorder accesses.
            return Pointer(b, b.scratch(DTYPE, offsets[name]).value, DTYPE, name)

        self.requests = Requests(b, plan, self.grid, self.out_sizes, offsets["requests"]) if plan.asks else None
        self.sums, self.outputs = scratch("sums"), scratch("outputs")
        self.inputs = b.operand(0, DTYPE) if plan.shared else scratch("inputs")
        self.filters = b.operand(1, DTYPE)
        self.taps = FilterTransform(b, plan, self.filters, scratch("filters")) if plan.chunk else None

    def emit(self) -> None:
        b, plan = self.b, self.plan
        groups = b.ceil_div(self.panels.count(), plan.group)
        transform = None if plan.shared else InputTransform(b, plan, self.grid, plan.scratch())
        transformed = b.variable(b.i64(-1))
        with b.loop(b.begin, b.end) as unit:
            group, place = unit % groups, unit // groups
            first = place * plan.block
            tiles = b.min(plan.block, self.grid.count - first)
            inputs = self.inputs
            if transform is None:
                inputs = inputs + place * plan.inputs_block
            else:
                with b.if_then(b.ir.icmp_signed("!=", b.i64(place), transformed.get())):
                    transform.transform(first, b.ceil_div(tiles, plan.tile) * plan.tile, inputs)
                    transformed.set(b.i64(place))
            begin = group * plan.group
            end = b.min(begin + plan.group, self.panels.count())
            if self.taps is not None:
                self._panels(begin, end, lambda *panel: self._chunks(inputs, tiles, *panel))
            else:
                if self.requests is not None:
                    self.requests.begin(first, tiles, begin * plan.width, group, groups, transform)
                with b.loop(0, plan.points) as point:
                    at = inputs + point * plan.input_matrix
                    self._panels(begin, end, lambda *panel: self._products(at, point, tiles, begin, end, *panel))
            with b.loop(0, tiles) as tile:
                image, row, col = self.grid.place(first + tile)
                self._panels(begin, end, lambda *panel: self._outputs(tile, image, row, col, *panel))

    def _panels(self, begin, end, emit) -> None:
        """Calls `emit(panel, place among the unit's panels, vectors, masked)` to emit code for panels [begin, end)."""
        b, plan, panels = self.b, self.plan, self.panels
        whole = panels.columns // panels.width
        if whole:
            with b.loop(begin, b.min(end, whole)) as panel:
                emit(panel, panel - begin, panels.vectors, False)
        if panels.columns % panels.width:
            with b.if_then(b.int(end) > whole):
                emit(b.int(whole), whole - begin, panels.tail_vectors, panels.columns % plan.lanes != 0)

    # -- products -----------------------------------------------------------------------------------------------
    def _products(self, inputs, point, tiles, begin, end, panel, place, vectors: int, masked: bool) -> None:
        b, plan = self.b, self.plan
        packed = plan.channels * self.panels.packed_columns() + plan.apart
        filters = self.filters + (point * packed + panel * (plan.channels * plan.width))
        # What is needed next: another panel, or the unit's first one for the next pair of points.
        last = b.int(panel + 1) >= end
        following = b.ir.select(last, b.i64(begin - panel), b.i64(1))
        skipped = b.ir.select(last, b.i64(packed), b.i64(0))
        requested = filters + (Int(b, following) * (plan.channels * plan.width) + Int(b, skipped))
        if self.requests is not None:
            with b.if_then(b.int(place).equals(0)):
                self.requests.ask(point, tiles)
        self._tiles(inputs, filters, self._sums(place) + point * plan.sums_matrix, tiles, vectors, requested)

    def _chunks(self, inputs, tiles, panel, place, vectors: int, masked: bool) -> None:
        """The products of a panel whose filters are transformed chunk by chunk of the channels."""
        b, plan, taps = self.b, self.plan, cast(FilterTransform, self.taps)
        chunks = plan.channels // plan.chunk
        with b.loop(0, chunks) as chunk:
            channel = chunk * plan.chunk
            taps.transform(panel, vectors, channel)
            first, last = chunk.equals(0), chunk.equals(chunks - 1)
            # What is needed next: another chunk, or the next panel's first one; some rows of it with every point.
            following = Int(b, b.ir.select(last, b.i64(panel + 1), b.i64(panel)))
            start = Int(b, b.ir.select(last, b.i64(0), b.i64(channel + plan.chunk)))
            with b.loop(0, plan.points) as point:
                filters = taps.to + point * plan.filters_matrix
                requested = taps.first_row(following, vectors, point % taps.taps, start)
                at = inputs + (point * plan.input_matrix + channel)
                to = self._sums(place) + point * plan.sums_matrix
                self._tiles(at, filters, to, tiles, vectors, requested, first, last)

    def _tiles(self, inputs, filters, sums, tiles, vectors: int, requested: Pointer, first=1, last=1) -> None:
        """The products of all tiles with a matrix of filters, or with a chunk of one."""
        b, plan = self.b, self.plan
        width = vectors * plan.lanes
        with b.loop(0, tiles, plan.tile) as tile:
            shape = Tile(1, plan.tile, vectors, False)
            turn = tile // plan.tile % min(plan.block // plan.tile, REQUESTING_TILES)
            a, to, asked = inputs + tile * plan.input_pitch, sums + tile * width, requested + turn * width
            self.products.call(shape, a, filters, to, 0, 0, 0, first=first, last=last, requested=asked)

    def _sums(self, place) -> Pointer:
        return self.sums + place * (self.plan.points * self.plan.sums_matrix)

    # -- outputs ------------------------------------------------------------------------------------------------
    def _outputs(self, tile, image, row, col, panel, place, vectors: int, masked: bool) -> None:
        b, plan = self.b, self.plan
        high, wide = self.out_sizes
        sums = self._sums(place) + tile * (vectors * plan.lanes)
        down, right = self.grid.dilations
        rows = self._inside(high - row, down) if plan.axes == 2 else 1
        extents = (rows, self._inside(wide - col, right))
        pixel = (image * high + row) * wide + col
        column = panel * plan.width
        buffers, sizes = b.function.args[:2]
        remaining = plan.filters - column

        def by_finisher() -> None:
            b.ir.call(self._output_function(vectors), [sums.value, self.outputs.value])
            self.finisher.call(buffers, sizes, self.outputs, pixel, column, remaining, extents, vectors, masked)

        if not self.finisher.epilogue.in_registers:
            by_finisher()
            return
        whole = b.int(extents[1]).equals(plan.outputs)
        if plan.axes == 2:
            whole = b.ir.and_(whole, b.int(rows).equals(plan.outputs))
        with b.if_else(whole) as (then, otherwise):
            with then:
                integers = [b.i64(x) for x in (pixel, column, remaining)]
                b.ir.call(self._finished_function(vectors, masked), [buffers, sizes, sums.value, *integers])
            with otherwise:
                by_finisher()

    def _inside(self, left, dilation: int):
        """How many outputs of a tile lie in the image, where `left` pixels do from its first one on."""
        b = self.b
        return b.min(self.plan.outputs, b.ceil_div(b.max(left, 0), dilation))

    def _output_rows(self, sums: Pointer):
        """(row, its outputs) of a tile, one vector of filters; sums: those in the first matrix."""
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        everything = range(plan.outputs)

        def read(sums: Pointer, j: int, pitch: int, i: int) -> ir.Value:
            return b.load(sums, (i * pitch + j) * plan.sums_matrix, lanes)

        if plan.axes == 1:
            yield 0, output_part(b, functools.partial(read, sums, 0, 1), self.pairs, everything)
            return
        for numbers in (everything[::2], everything[1::2]):
            anew = b.hidden(sums)  # registers do not hold all sums of a tile
            column = functools.partial(functools.partial, read, anew)
            columns = [output_part(b, column(j, side), self.pairs, numbers) for j in range(side)]
            for row, values in zip(numbers, zip(*columns, strict=True), strict=True):
                yield row, output_part(b, values.__getitem__, self.pairs, everything)

    def _finished_function(self, vectors: int, masked: bool) -> ir.Function:
        """finish(buffers, sizes, a tile's sums in the first matrix, its first pixel, column, columns from there on).

        Of tiles that lie in the image as a whole, with an epilogue that registers hold.
        """
        b, plan, lanes = self.b, self.plan, self.plan.lanes
        name = f"finish_whole_{vectors}{'_masked' if masked else ''}"
        if name in b.module.globals:
            return b.module.globals[name]
        with subfunction(b, name, [PTR] * 3 + [I64] * 3) as function:
            buffers, sizes, at = function.args[:3]
            sums = Pointer(b, at, DTYPE, "sums")
            pixel, column, remaining = (b.int(x) for x in function.args[3:])
            down, right = (entry_value(b, sizes, p) for p in plan.out_pitches)
            with b.loop(0, vectors * lanes, lanes) as lane:
                masks = vector_masks(b, 1, masked, remaining - lane, lanes)
                entry = functools.partial(entry_value, b, sizes)
                bound = self.finisher.epilogue.bind(b, buffers, entry, column + lane, masks, lanes)
                for row, values in self._output_rows(sums + lane):
                    first = pixel + row * down
                    bound.apply(*((first + col * right, [value]) for col, value in enumerate(values)))
        return function

    def _output_function(self, vectors: int) -> ir.Function:
        """transform(a tile's sums in the first matrix, where its outputs go)."""
        b, plan, lanes = self.b, self.plan, self.plan.lanes
        name = f"transform_outputs_{vectors}"
        if name in b.module.globals:
            return b.module.globals[name]
        width = vectors * lanes
        with subfunction(b, name, [PTR] * 2) as function:
            sums, out = (Pointer(b, p, DTYPE, s) for p, s in zip(function.args, ("sums", "outputs"), strict=True))
            with b.loop(0, width, lanes) as lane:
                for row, values in self._output_rows(sums + lane):
                    for col, value in enumerate(values):
                        b.store(out, (row * plan.outputs + col) * width + lane, value)
        return function
