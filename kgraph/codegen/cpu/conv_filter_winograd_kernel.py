"""The kernel of filter cotangents by Winograd's algorithm: sums of products over tiles, one matrix per point.

A unit takes a chunk of tiles, a block of channels and a block of filters. It goes through its tiles a few at a time:
transforms the inputs that they meet and the cotangents of their outputs, then adds, point by point, the products of
both to sums [channels, filters] that rest in scratch; tiles are the k of these products. What the sums of all points
make of a filter's taps is computed once at the end of the chunk.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu.builder import PTR, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import subfunction
from kgraph.codegen.cpu.microkernel import Tile, TileCode, TileRange, TileSet
from kgraph.codegen.cpu.products import plain
from kgraph.codegen.cpu.strided import resolve_all
from kgraph.codegen.cpu.winograd_inputs import TileGrid, both_axes
from kgraph.codegen.cpu.winograd_plan import DTYPE, odd_lines, offsets_of
from kgraph.codegen.cpu.winograd_transform import (
    cotangent_transform,
    filter_cotangent_transform,
    input_transform,
    over_axes,
)
from kgraph.ops.winograd import TAPS


class FilterWinogradPlan(NamedTuple):
    """Params of `render_filter_winograd`. Sizes are `int` or ("size", slot).

    pairs: of points of the transforms. outputs: along an axis of a tile, `dilations` apart, as its inputs are. images,
    tiles: how many there are, and tiles along the axes of one: rows and columns, or columns only. sizes, out_sizes: of
    an image. origins: minus the padding below. channel_block, filter_block: of a unit, the latter in vectors. rows: of
    a register tile. step: tiles that are transformed at once. chunk: tiles of a unit. lanes, vectors: of a vector, of a
    register tile.
    """

    pairs: tuple[float, ...]
    outputs: int
    dilations: tuple[int, ...]
    images: int | tuple
    tiles: tuple
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    channels: int
    filters: int
    channel_block: int
    filter_block: int
    rows: int
    step: int
    chunk: int
    lanes: int
    vectors: int

    @property
    def side(self) -> int:
        """Inputs along an axis of a tile."""
        return self.outputs + TAPS - 1

    @property
    def axes(self) -> int:
        """Of an image: 1 or 2."""
        return len(self.tiles)

    @property
    def points(self) -> int:
        """Of the transforms, over all axes."""
        return self.side**self.axes

    @property
    def channel_blocks(self) -> int:
        return -(-self.channels // self.channel_block)

    @property
    def filter_blocks(self) -> int:
        return -(-self.filters // (self.filter_block * self.lanes))

    @property
    def input_pitch(self) -> int:
        """Distance of tiles in a matrix of transformed inputs."""
        return -(-self.channel_block // self.lanes) * self.lanes

    @property
    def input_matrix(self) -> int:
        """Distance of matrices of transformed inputs."""
        return odd_lines(self.step * self.input_pitch)

    @property
    def cotangent_matrix(self) -> int:
        """Distance of matrices of transformed cotangents."""
        return odd_lines(self.step * self.filter_block * self.lanes)

    @property
    def sums_matrix(self) -> int:
        """Distance of matrices of sums."""
        return odd_lines(self.channel_block * self.filter_block * self.lanes)

    def scratch(self) -> dict[str, int]:
        """Byte offsets in a thread's scratch, and the `end`."""
        size = itemsize(DTYPE)
        elements = {
            "sums": self.points * self.sums_matrix,
            "inputs": self.points * self.input_matrix,
            "cotangents": self.points * self.cotangent_matrix,
            "zeros": max(self.input_pitch, self.filter_block * self.lanes),
        }
        sections = {name: count * size for name, count in elements.items()}
        return offsets_of({**sections, "addresses": self.points * 8})


def render_filter_winograd(params: tuple, target) -> str:
    """x[images, *sizes, C], cotangent[images, *out_sizes, F] -> sums[chunks, *window, C, F]."""
    b = KernelBuilder("conv_filter_winograd", target)
    _FilterWinograd(b, FilterWinogradPlan(*params)).emit()
    return b.ir_text()


class _FilterWinograd:
    def __init__(self, b: KernelBuilder, plan: FilterWinogradPlan):
        self.b, self.plan = b, plan
        self.pairs = tuple(Fraction(p) for p in plan.pairs)
        self.grid = TileGrid(b, plan)
        self.sizes = both_axes(resolve_all(b, plan.sizes), 1)
        self.out_sizes = both_axes(resolve_all(b, plan.out_sizes), 1)
        self.origins = both_axes(resolve_all(b, plan.origins), 0)
        code = TileCode(
            product=plain(DTYPE),
            lanes=plan.lanes,
            row_pitch=0,
            col_pitch=1,
            a_step=plan.input_pitch,
            loops=(),
            run=None,
            b_step=None,
            pixel_row_pitch=0,
            pixel_col_pitch=0,
            partial=True,
        )
        self.products = TileSet(b, code, None)
        offsets = plan.scratch()

        def scratch(name: str, scope: str = "") -> Pointer:
            # What is never written together has a name of its own, so that LLVM may reorder accesses.
            return Pointer(b, b.scratch(DTYPE, offsets[name]).value, DTYPE, scope or name)

        self.sums, self.inputs, self.cotangents = scratch("sums"), scratch("inputs"), scratch("cotangents")
        # Zeros stand in for pixels beyond the image: they are read through the same addresses.
        self.zeros = scratch("zeros", "pixels")
        self.addresses = b.scratch(DTYPE, offsets["addresses"]).value
        self.x = Pointer(b, b.operand(0, DTYPE).value, DTYPE, "pixels")
        self.cotangent = Pointer(b, b.operand(1, DTYPE).value, DTYPE, "pixels")
        self.out = b.operand(2, DTYPE)
        self.functions: dict[str, ir.Function] = {}

    def emit(self) -> None:
        b, plan = self.b, self.plan
        zero = b.constant(0, DTYPE, plan.lanes)
        for lane in range(0, max(plan.input_pitch, plan.filter_block * plan.lanes), plan.lanes):
            b.store(self.zeros, lane, zero)
        with b.loop(b.begin, b.end) as unit:
            filter_block, rest = unit % plan.filter_blocks, unit // plan.filter_blocks
            channel_block, chunk = rest % plan.channel_blocks, rest // plan.channel_blocks
            channel, filter = channel_block * plan.channel_block, filter_block * (plan.filter_block * plan.lanes)
            begin = chunk * plan.chunk
            end = b.min(begin + plan.chunk, self.grid.count)
            # An empty batch runs once, over no tiles, to write zeros.
            with b.loop(begin, b.max(end, begin + 1), plan.step) as first:
                count = b.max(b.min(end - first, plan.step), 0)
                self._transform(first, count, channel, filter)
                self._products(count, b.int(first).equals(begin))
            self._taps(chunk, channel, filter)

    # -- transforms -----------------------------------------------------------------------------------------------
    def _transform(self, first, count, channel, filter) -> None:
        """Transforms the inputs and cotangents of `count` tiles."""
        b, plan = self.b, self.plan
        with b.loop(0, count) as tile:
            image, row, col = self.grid.place(first + tile)
            place = row + self.origins[0], col + self.origins[1]
            self._find(self.x, plan.channels, channel, self.sizes, image, place, plan.side)
            to = self.inputs + tile * plan.input_pitch
            for lane in range(0, plan.channel_block, plan.lanes):
                left = plan.channels - (channel + lane)
                self._vector("inputs", lane, left, plan.channels, to + lane)
            self._find(self.cotangent, plan.filters, filter, self.out_sizes, image, (row, col), plan.outputs)
            for panel, vectors in self._panels():
                at = self.cotangents + (panel * plan.step + tile * vectors) * plan.lanes
                for vector in range(vectors):
                    lane = (panel + vector) * plan.lanes
                    left = plan.filters - (filter + lane)
                    self._vector("cotangents", lane, left, plan.filters, at + vector * plan.lanes)

    def _find(self, pixels: Pointer, pitch: int, first, sizes, image, place, count: int) -> None:
        """Stores the addresses of a tile's pixels, `count` along each axis from `place` on: of element `first`."""
        b, plan = self.b, self.plan
        down, right = self.grid.dilations
        high, wide = sizes
        columns = [b.int(place[1] + j * right) for j in range(count)]
        inside = [b.ir.and_(c >= 0, c < wide) for c in columns]
        for i in range(count if plan.axes == 2 else 1):
            r = b.int(place[0] + i * down)
            row_inside = b.ir.and_(r >= 0, r < high)
            line = pixels + (((image * high + r) * wide) * pitch + first)
            for j, c in enumerate(columns):
                at = (line + c * pitch).value
                at = b.ir.select(b.ir.and_(row_inside, inside[j]), at, self.zeros.value)
                b.ir.store(at, self._address(self.addresses, i * count + j))

    def _address(self, addresses: ir.Value, number: int) -> ir.Value:
        return self.b.ir.gep(addresses, [self.b.i64(number)], inbounds=True, source_etype=PTR)

    def _vector(self, kind: str, lane: int, left, elements: int, to: Pointer) -> None:
        """Transforms a tile's vector of channels, or of filters, of which `left` are there; `elements`: of a pixel."""
        b, plan = self.b, self.plan
        block = plan.channel_block if kind == "inputs" else plan.filter_block * plan.lanes
        # Only the last vector of the last block may lack some.
        whole = elements % plan.lanes == 0 and elements % block == 0 and lane + plan.lanes <= block
        name = f"transform_{kind}{'' if whole else '_masked'}"
        if name not in self.functions:
            self.functions[name] = self._transform_function(name, kind, not whole)
        b.ir.call(self.functions[name], [self.addresses, b.i64(lane), b.i64(left), to.value])

    def _transform_function(self, name: str, kind: str, masked: bool) -> ir.Function:
        """transform(addresses of a tile's pixels, first lane, lanes that are there, row of the first matrix)."""
        b, plan, lanes = self.b, self.plan, self.plan.lanes
        taken = plan.side if kind == "inputs" else plan.outputs
        matrix = plan.input_matrix if kind == "inputs" else plan.cotangent_matrix
        along = input_transform if kind == "inputs" else cotangent_transform
        # From a tile's pixels to those of the next one, which lies in the gaps of a dilated one.
        following = plan.outputs if plan.dilations[-1] == 1 else 1
        following *= plan.channels if kind == "inputs" else plan.filters
        with subfunction(b, name, [PTR, ir.IntType(64), ir.IntType(64), PTR]) as function:
            addresses, lane, left, to = function.args
            out = Pointer(b, to, DTYPE, kind)
            mask = b.tail_mask(b.max(b.int(left), 0), lanes) if masked else None

            def pixel(number: int) -> ir.Value:
                at = Pointer(b, b.ir.load(self._address(addresses, number), typ=PTR), DTYPE, "pixels")
                # Rows of the image are too far apart for caches to see what comes next.
                b.prefetch(at + following, b.int(lane))
                return b.load(at, b.int(lane), lanes, mask)

            transformed = over_axes(taken, plan.axes, pixel, lambda values: along(b, values, self.pairs))
            for point, value in transformed:
                b.store(out, point * matrix, value)
        return function

    # -- products -------------------------------------------------------------------------------------------------
    def _panels(self) -> list[tuple[int, int]]:
        """(first vector, vectors) of the panels of a block of filters."""
        plan = self.plan
        return [(v, min(plan.vectors, plan.filter_block - v)) for v in range(0, plan.filter_block, plan.vectors)]

    def _products(self, count, first) -> None:
        """Adds the products of `count` tiles to the sums."""
        b, plan = self.b, self.plan
        with b.loop(0, plan.points) as point:
            a = self.inputs + point * plan.input_matrix
            for panel, vectors in self._panels():
                columns = self.cotangents + (point * plan.cotangent_matrix + panel * plan.step * plan.lanes)
                sums = self.sums + (point * plan.sums_matrix + panel * plan.channel_block * plan.lanes)
                self._panel(a, columns, sums, vectors, count, first)

    def _panel(self, a: Pointer, columns: Pointer, sums: Pointer, vectors: int, count, first) -> None:
        """The products of all channels with a panel of filters."""
        plan = self.plan

        def tile(row, size: int) -> None:
            to = sums + row * (vectors * plan.lanes)
            self.products.call(Tile(1, size, vectors, False), a + row, columns, to, 0, 0, 0, count, first, 0)

        TileRange.static(plan.channel_block, plan.rows).walk(self.b, plan.channel_block, tile)

    # -- results --------------------------------------------------------------------------------------------------
    def _taps(self, chunk, channel, filter) -> None:
        """Writes the cotangents of a block's taps."""
        b, plan = self.b, self.plan
        taps, lanes = TAPS**plan.axes, plan.lanes
        out = self.out + (chunk * (taps * plan.channels * plan.filters) + channel * plan.filters + filter)
        for panel, vectors in self._panels():
            with b.loop(0, b.min(plan.channel_block, plan.channels - channel)) as row:
                for vector in range(vectors):
                    sums = self.sums + ((panel * plan.channel_block + row * vectors + vector) * lanes)
                    to = out + (row * plan.filters + (panel + vector) * lanes)
                    left = plan.filters - (filter + (panel + vector) * lanes)
                    with b.if_then(b.int(left) > 0):
                        b.ir.call(self._taps_function(), [sums.value, b.i64(left), to.value])

    def _taps_function(self) -> ir.Function:
        """taps(sums of the first point, filters that are there, the first tap)."""
        b, plan = self.b, self.plan
        if "taps" in self.functions:
            return self.functions["taps"]
        with subfunction(b, "taps", [PTR, ir.IntType(64), PTR]) as function:
            sums, out = Pointer(b, function.args[0], DTYPE, "sums"), Pointer(b, function.args[2], DTYPE, "operand2")
            block = plan.filter_block * plan.lanes
            whole = plan.filters % block == 0
            mask = None if whole else b.tail_mask(b.int(function.args[1]), plan.lanes)
            point = lambda number: b.load(sums, number * plan.sums_matrix, plan.lanes)
            along = lambda values: filter_cotangent_transform(b, values, self.pairs)
            for tap, value in over_axes(plan.side, plan.axes, point, along):
                b.store(out, tap * (plan.channels * plan.filters), value, mask)
        self.functions["taps"] = function
        return function
