"""The kernel of a Winograd convolution: transforms around products of matrices, one per point, or pair of points.

One unit of work is a block of output tiles, counted through all images, times some panels of filters. It transforms
the inputs that its tiles meet, channels in vectors, unless a kernel ahead has done so; multiplies, pair of points by
pair of points, so that only one matrix of transformed filters at a time is in use; then transforms the sums of each
tile back and finishes them. Units of the same tiles follow one another and share the transformed inputs. Filters are
given transformed, or as taps (`winograd_chunk`): then the products of a panel are those of one chunk of channels after
the other.
"""

from __future__ import annotations

from fractions import Fraction
from typing import cast

from llvmlite import ir

from kgraph.codegen.cpu.builder import PTR, Int, KernelBuilder, Pointer
from kgraph.codegen.cpu.epilogue import Epilogue, Finisher, subfunction
from kgraph.codegen.cpu.microkernel import Panels, Tile, TileCode, TileSet
from kgraph.codegen.cpu.products import plain
from kgraph.codegen.cpu.strided import resolve_all
from kgraph.codegen.cpu.winograd_chunk import FilterTransform
from kgraph.codegen.cpu.winograd_inputs import InputTransform, TileGrid, both_axes
from kgraph.codegen.cpu.winograd_plan import DTYPE, WinogradPlan
from kgraph.codegen.cpu.winograd_transform import output_transform

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

        self.sums, self.outputs, self.stage = scratch("sums"), scratch("outputs"), scratch("stage")
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
        width = vectors * plan.lanes
        sums = self._sums(place) + tile * width
        b.ir.call(self._output_function(vectors), [sums.value, self.stage.value, self.outputs.value])
        down, right = self.grid.dilations
        rows = self._inside(high - row, down) if plan.axes == 2 else 1
        extents = (rows, self._inside(wide - col, right))
        pixel = (image * high + row) * wide + col
        column = panel * plan.width
        buffers, sizes = b.function.args[:2]
        remaining = plan.filters - column
        self.finisher.call(buffers, sizes, self.outputs, pixel, column, remaining, extents, vectors, masked)

    def _inside(self, left, dilation: int):
        """How many outputs of a tile lie in the image, where `left` pixels do from its first one on."""
        b = self.b
        return b.min(self.plan.outputs, b.ceil_div(b.max(left, 0), dilation))

    def _output_function(self, vectors: int) -> ir.Function:
        """transform(a tile's sums in the first matrix, room for one vector of filters, where its outputs go)."""
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        name = f"transform_outputs_{vectors}"
        if name in b.module.globals:
            return b.module.globals[name]
        width = vectors * lanes
        with subfunction(b, name, [PTR] * 3) as function:
            scopes = ("sums", "stage", "outputs")
            sums, stage, out = (Pointer(b, p, DTYPE, s) for p, s in zip(function.args, scopes, strict=True))

            def transform(source: Pointer, distance: int, to: Pointer, step: int) -> None:
                values = [b.load(source, i * distance, lanes) for i in range(side)]
                for i, value in enumerate(output_transform(b, values, self.pairs)):
                    b.store(to, i * step, value)

            with b.loop(0, width, lanes) as lane:
                if plan.axes == 1:
                    transform(sums + lane, plan.sums_matrix, out + lane, width)
                else:
                    with b.loop(0, side) as j:
                        at = sums + (j * plan.sums_matrix + lane)
                        transform(at, side * plan.sums_matrix, stage + j * lanes, side * lanes)
                    with b.loop(0, plan.outputs) as i:
                        to = out + (i * (plan.outputs * width) + lane)
                        transform(stage + i * (side * lanes), lanes, to, width)
        return function
