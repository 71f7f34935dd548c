"""The kernel of a Winograd convolution: transforms around products of matrices, one per pair of points.

One unit of work is a block of output tiles, counted through all images, times some panels of filters. It transforms
the inputs that its tiles meet, channels in vectors; multiplies, pair of points by pair of points, so that only one
matrix of transformed filters at a time is in use; then transforms the sums of each tile back and finishes them. Units
of the same tiles follow one another and share the transformed inputs.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu.builder import PTR, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue, Finisher, subfunction
from kgraph.codegen.cpu.microkernel import Panels, Tile, TileCode, TileSet
from kgraph.codegen.cpu.products import plain
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.winograd_transform import input_transform, output_transform
from kgraph.ops.winograd import TAPS

DTYPE = "float32"
LINE = 16  # elements of a cache line


class WinogradPlan(NamedTuple):
    """Params of `render_winograd`. Sizes are `int` or ("size", slot).

    pairs: of points of the transforms. outputs: along an axis of a tile. images, tiles: how many there are, and tiles
    along the rows and columns of one. sizes, out_sizes: rows and columns of an image. origins: minus the padding below.
    tile: output tiles of a register tile. block: those of a unit, a multiple of `tile`. group: panels of a unit. lanes,
    vectors: of a vector, a panel.
    """

    pairs: tuple[float, ...]
    outputs: int
    images: int | tuple
    tiles: tuple
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    channels: int
    filters: int
    tile: int
    block: int
    group: int
    lanes: int
    vectors: int
    epilogue: tuple

    @property
    def side(self) -> int:
        """Inputs along an axis of a tile."""
        return self.outputs + TAPS - 1

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def input_pitch(self) -> int:
        """Distance of tiles in a matrix of transformed inputs; few sets of the cache would hold multiples of 2 KiB."""
        pitch = -(-self.channels // self.lanes) * self.lanes
        return pitch + LINE if pitch * itemsize(DTYPE) % 2048 == 0 else pitch

    @property
    def input_matrix(self) -> int:
        """Distance of matrices of transformed inputs: an odd number of lines, as all are written at once."""
        return (-(-self.block * self.input_pitch // LINE) | 1) * LINE

    @property
    def sums_matrix(self) -> int:
        """Distance of matrices of sums, likewise."""
        return (-(-self.block * self.width // LINE) | 1) * LINE

    def scratch(self) -> dict[str, int]:
        """Byte offsets in a thread's scratch, and the `end`."""
        points, size = self.side**2, itemsize(DTYPE)
        sections = {
            "inputs": points * self.input_matrix * size,
            "sums": points * self.sums_matrix * self.group * size,
            "outputs": self.outputs**2 * self.width * size,
            "stage": points * self.lanes * size,
            "zeros": -(-self.channels // LINE) * LINE * size,
            "addresses": points * 8,
        }
        offsets, at = {}, 0
        for name, nbytes in sections.items():
            offsets[name] = at
            at += -(-nbytes // 64) * 64
        return {**offsets, "end": at}


def render_winograd(params: tuple, target) -> str:
    """Kernel (x, transformed filters, extras..., outputs...); see `WinogradPlan`."""
    b = KernelBuilder("winograd", target)
    _Winograd(b, WinogradPlan(*params)).emit()
    return b.ir_text()


class _Winograd:
    def __init__(self, b: KernelBuilder, plan: WinogradPlan):
        self.b, self.plan = b, plan
        self.pairs = tuple(Fraction(p) for p in plan.pairs)
        self.images = resolve(b, plan.images)
        self.tiles, self.origins = resolve_all(b, plan.tiles), resolve_all(b, plan.origins)
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.panels = Panels(plan.filters, plan.width, plan.lanes)
        code = TileCode(
            product=plain(DTYPE),
            lanes=plan.lanes,
            row_pitch=0,
            col_pitch=plan.input_pitch,
            a_step=1,
            loops=(),
            run=plan.channels,
            b_step=None,
            pixel_row_pitch=0,
            pixel_col_pitch=0,
            partial=False,
            ahead=plan.channels,  # the next panel
        )
        self.products = TileSet(b, code, None)
        pitches = (plan.out_sizes[1], 1)
        self.finisher = Finisher(b, Epilogue(*plan.epilogue), DTYPE, plan.lanes, pitches, sums_row=plan.outputs)
        offsets = plan.scratch()

        def scratch(name: str) -> Pointer:
            # What is never written together has a name of its own, so that LLVM may reorder accesses.
            return Pointer(b, b.scratch(DTYPE, offsets[name]).value, DTYPE, name)

        # Zeros stand in for inputs beyond the image: they are read through the same addresses.
        self.x = Pointer(b, b.operand(0, DTYPE).value, DTYPE, "pixels")
        self.zeros = Pointer(b, scratch("zeros").value, DTYPE, "pixels")
        self.inputs, self.sums, self.outputs = scratch("inputs"), scratch("sums"), scratch("outputs")
        self.stage = scratch("stage")
        self.addresses = scratch("addresses").value
        self.filters = b.operand(1, DTYPE)

    def emit(self) -> None:
        b, plan = self.b, self.plan
        count = self.images * (self.tiles[0] * self.tiles[1])
        groups = b.ceil_div(self.panels.count(), plan.group)
        zero = b.constant(0, DTYPE, plan.lanes)
        b.vector_loop(0, plan.channels, plan.lanes, lambda i, mask, slot: b.store(self.zeros, i, zero, mask))
        self.transform_input = self._input_function()
        transformed = b.variable(b.i64(-1))
        with b.loop(b.begin, b.end) as unit:
            group, place = unit % groups, unit // groups
            first = place * plan.block
            tiles = b.min(plan.block, count - first)
            with b.if_then(b.ir.icmp_signed("!=", b.i64(place), transformed.get())):
                self._inputs(first, tiles)
                transformed.set(b.i64(place))
            begin = group * plan.group
            end = b.min(begin + plan.group, self.panels.count())
            with b.loop(0, plan.side**2) as point:
                self._panels(begin, end, lambda *panel: self._products(point, tiles, *panel))
            with b.loop(0, tiles) as tile:
                image, row, col = self._place(first + tile)
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

    def _place(self, index):
        """(image, first row, first column) of the outputs of a tile."""
        high, wide = self.tiles
        rest = index // wide
        return rest // high, (rest % high) * self.plan.outputs, (index % wide) * self.plan.outputs

    # -- inputs -------------------------------------------------------------------------------------------------
    def _inputs(self, first, tiles) -> None:
        """Transforms what the tiles from `first` on meet. Tiles that fill up the last register tile meet zeros."""
        b, plan, side = self.b, self.plan, self.plan.side
        high, wide = self.sizes
        with b.loop(0, b.ceil_div(tiles, plan.tile) * plan.tile) as tile:
            image, row, col = self._place(first + tile)
            first_row, first_col = b.int(row + self.origins[0]), b.int(col + self.origins[1])
            columns = [first_col + j for j in range(side)]
            columns_inside = [b.ir.and_(c >= 0, c < wide) for c in columns]
            with b.loop(0, side) as i:
                r = first_row + i
                inside = b.ir.and_(b.ir.and_(r >= 0, r < high), tile < tiles)
                line = self.x + ((image * high + r) * wide) * plan.channels
                for j, c in enumerate(columns):
                    at = b.ir.select(
                        b.ir.and_(inside, columns_inside[j]), (line + c * plan.channels).value, self.zeros.value
                    )
                    b.ir.store(at, self._address(self.addresses, i * side + j))
            b.ir.call(
                self.transform_input, [self.addresses, self.stage.value, (self.inputs + tile * plan.input_pitch).value]
            )

    def _address(self, addresses: ir.Value, number) -> ir.Value:
        return self.b.ir.gep(addresses, [self.b.i64(number)], inbounds=True, source_etype=PTR)

    def _input_function(self) -> ir.Function:
        """transform(addresses of a tile's inputs, room for one channel vector of them, its row of the first matrix)."""
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        with subfunction(b, "transform_input", [PTR] * 3) as function:
            addresses, *at = function.args
            stage, out = (Pointer(b, p, DTYPE, s) for p, s in zip(at, ("stage", "inputs"), strict=True))

            def vector(channel, mask, slot):
                with b.loop(0, side) as j:
                    pixels = [b.ir.load(self._address(addresses, j + i * side), typ=PTR) for i in range(side)]
                    x = [b.load(Pointer(b, p, DTYPE, "pixels"), channel, lanes, mask) for p in pixels]
                    for i, value in enumerate(input_transform(b, x, self.pairs)):
                        b.store(stage, (j + i * side) * lanes, value)
                with b.loop(0, side) as i:
                    row = stage + i * (side * lanes)
                    x = [b.load(row, j * lanes, lanes) for j in range(side)]
                    at = out + (i * (side * plan.input_matrix) + channel)
                    for j, value in enumerate(input_transform(b, x, self.pairs)):
                        b.store(at, j * plan.input_matrix, value)

            b.vector_loop(0, plan.channels, lanes, vector)
        return function

    # -- products -----------------------------------------------------------------------------------------------
    def _products(self, point, tiles, panel, place, vectors: int, masked: bool) -> None:
        b, plan = self.b, self.plan
        width = vectors * plan.lanes
        packed = plan.channels * self.panels.packed_columns()
        filters = self.filters + (point * packed + panel * (plan.channels * plan.width))
        inputs = self.inputs + point * plan.input_matrix
        sums = self._sums(place) + point * plan.sums_matrix

        with b.loop(0, tiles, plan.tile) as tile:
            shape = Tile(1, plan.tile, vectors, False)
            self.products.call(shape, inputs + tile * plan.input_pitch, filters, sums + tile * width, 0, 0, 0)

    def _sums(self, place) -> Pointer:
        return self.sums + place * (self.plan.side**2 * self.plan.sums_matrix)

    # -- outputs ------------------------------------------------------------------------------------------------
    def _outputs(self, tile, image, row, col, panel, place, vectors: int, masked: bool) -> None:
        b, plan = self.b, self.plan
        high, wide = self.out_sizes
        width = vectors * plan.lanes
        sums = self._sums(place) + tile * width
        b.ir.call(self._output_function(vectors), [sums.value, self.stage.value, self.outputs.value])
        extents = (b.min(plan.outputs, high - row), b.min(plan.outputs, wide - col))
        pixel = (image * high + row) * wide + col
        column = panel * plan.width
        buffers, sizes = b.function.args[:2]
        remaining = plan.filters - column
        self.finisher.call(buffers, sizes, self.outputs, pixel, column, remaining, extents, vectors, masked)

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
            with b.loop(0, width, lanes) as lane:
                with b.loop(0, side) as j:
                    at = sums + (j * plan.sums_matrix + lane)
                    values = [b.load(at, i * (side * plan.sums_matrix), lanes) for i in range(side)]
                    for i, value in enumerate(output_transform(b, values, self.pairs)):
                        b.store(stage, (j + i * side) * lanes, value)
                with b.loop(0, plan.outputs) as i:
                    values = [b.load(stage + i * (side * lanes), j * lanes, lanes) for j in range(side)]
                    at = out + (i * (plan.outputs * width) + lane)
                    for j, value in enumerate(output_transform(b, values, self.pairs)):
                        b.store(at, j * width, value)
        return function
