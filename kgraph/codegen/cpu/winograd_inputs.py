"""Transforms the inputs that tiles of a Winograd convolution meet: as part of its kernel, or ahead of it.

Ahead where few tiles are shared by many panels of filters, so that no thread transforms what another one has.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

from llvmlite import ir

from kgraph.codegen.cpu.builder import I64, PTR, KernelBuilder, Pointer
from kgraph.codegen.cpu.epilogue import subfunction
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.winograd_plan import DTYPE, WinogradPlan
from kgraph.codegen.cpu.winograd_transform import input_part, input_parts, input_transform
from kgraph.ops.winograd import TAPS


def render_inputs(params: tuple, target) -> str:
    """Kernel (x, transformed inputs [blocks, `inputs_block`]); see `WinogradPlan`. A unit is a register tile."""
    plan = WinogradPlan(*params)
    b = KernelBuilder("winograd_inputs", target)
    inputs = InputTransform(b, plan, TileGrid(b, plan), plan.input_scratch())
    out = b.operand(1, DTYPE)
    with b.loop(b.begin, b.end) as unit:
        first = unit * plan.tile
        inputs.transform(first, plan.tile, out + first // plan.block * plan.inputs_block, first % plan.block)
    return b.ir_text()


def both_axes(values: Sequence, alone) -> tuple:
    """(of rows, of columns); where images have columns only, that of rows is `alone`."""
    return (alone, *values) if len(values) == 1 else tuple(values)


class TileGrid:
    """Tiles of outputs, counted through all images; `count` of them.

    The outputs of a tile lie `dilations` apart: tiles that begin beside one another fill the gaps of the first.
    """

    def __init__(self, b: KernelBuilder, plan: WinogradPlan):
        self.outputs, self.tiles = plan.outputs, both_axes(resolve_all(b, plan.tiles), 1)
        self.dilations = both_axes(plan.dilations, 1)
        self.count = resolve(b, plan.images) * (self.tiles[0] * self.tiles[1])

    def place(self, index):
        """(image, first row, first column) of the outputs of a tile."""
        high, wide = self.tiles
        rest = index // wide
        row, col = (
            number // d * (self.outputs * d) + number % d
            for number, d in zip((rest % high, index % wide), self.dilations, strict=True)
        )
        return rest // high, row, col


class InputTransform:
    """The code of the transform. offsets: of its sections in scratch."""

    def __init__(self, b: KernelBuilder, plan: WinogradPlan, grid: TileGrid, offsets: dict[str, int]):
        self.b, self.plan, self.grid = b, plan, grid
        self.pairs = tuple(Fraction(p) for p in plan.pairs)
        self.origins = both_axes(resolve_all(b, plan.origins), 0)
        self.sizes = both_axes(resolve_all(b, plan.sizes), 1)
        self.rows = plan.side if plan.axes == 2 else 1  # of inputs that a tile meets
        # Zeros stand in for inputs beyond the image: they are read through the same addresses.
        self.x = Pointer(b, b.operand(0, DTYPE).value, DTYPE, "pixels")
        self.zeros = Pointer(b, b.scratch(DTYPE, offsets["zeros"]).value, DTYPE, "pixels")
        self.addresses = b.scratch(DTYPE, offsets["addresses"]).value
        zero = b.constant(0, DTYPE, plan.lanes)
        b.vector_loop(0, plan.channels, plan.lanes, lambda i, mask, slot: b.store(self.zeros, i, zero, mask))
        self.inside, self.border = self._function(True), self._function(False)

    def transform(self, first, tiles, to: Pointer, row=0) -> None:
        """Transforms what the tiles from `first` on meet, to rows from `row` on of the matrices at `to`.

        tiles: how many, in whole register tiles. Those beyond the last one meet zeros.
        """
        b, plan = self.b, self.plan
        high, wide = self.sizes
        down, right = self.grid.dilations
        with b.loop(0, tiles) as tile:
            image, top, left = self.grid.place(first + tile)
            first_row, first_col = b.int(top + self.origins[0]), b.int(left + self.origins[1])
            line = self.x + ((image * high + first_row) * wide + first_col) * plan.channels
            pitch = b.int(wide * (down * plan.channels))
            last_row, last_col = first_row + (self.rows - 1) * down, first_col + (plan.side - 1) * right
            limits = first_row >= 0, first_col >= 0, last_row < high, last_col < wide
            inside = functools.reduce(b.ir.and_, limits, b.int(first + tile) < self.grid.count)
            out = to + (tile + row) * plan.input_pitch
            with b.if_else(inside) as (then, otherwise):
                with then:
                    b.ir.call(self.inside, [line.value, out.value, pitch.value])
                with otherwise:
                    self._note_addresses(first + tile, image, first_row, first_col)
                    b.ir.call(self.border, [self.addresses, out.value, pitch.value])

    def _note_addresses(self, tile, image, first_row, first_col) -> None:
        """Where the inputs of a tile lie, or zeros."""
        b, plan, side = self.b, self.plan, self.plan.side
        high, wide = self.sizes
        down, right = self.grid.dilations
        columns = [first_col + j * right for j in range(side)]
        columns_inside = [b.ir.and_(c >= 0, c < wide) for c in columns]
        with b.loop(0, self.rows) as i:
            r = first_row + i * down
            inside = b.ir.and_(b.ir.and_(r >= 0, r < high), b.int(tile) < self.grid.count)
            line = self.x + ((image * high + r) * wide) * plan.channels
            for j, c in enumerate(columns):
                at = (line + c * plan.channels).value
                at = b.ir.select(b.ir.and_(inside, columns_inside[j]), at, self.zeros.value)
                b.ir.store(at, self._address(self.addresses, i * side + j))

    def newest_pixel(self, tile):
        """Number of the first pixel that a tile of rows and columns meets, and the ones above and before it do not."""
        image, top, left = self.grid.place(tile)
        row, col = (
            first + origin + (TAPS - 1) * dilation
            for first, origin, dilation in zip((top, left), self.origins, self.grid.dilations, strict=True)
        )
        return (image * self.sizes[0] + row) * self.sizes[1] + col

    def _address(self, addresses: ir.Value, number) -> ir.Value:
        return self.b.ir.gep(addresses, [self.b.i64(number)], inbounds=True, source_etype=PTR)

    def _function(self, inside: bool) -> ir.Function:
        """transform(addresses of a tile's inputs, its row of the first matrix, elements between rows of the image).

        inside: the tile lies in the image, so that all follow from the first input, whose address is given instead.
        """
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        arguments = [PTR, PTR, I64]
        with subfunction(b, "transform_inside" if inside else "transform_input", arguments) as function:
            source = Pointer(b, function.args[0], DTYPE, "pixels")
            out, pitch = Pointer(b, function.args[1], DTYPE, "inputs"), b.int(function.args[2])
            step = self.grid.dilations[1] * plan.channels

            def read(source: Pointer, channel, mask, j: int, i: int) -> ir.Value:
                """The input on row i and column j of the tile."""
                if inside:
                    return b.load(source + (i * pitch + channel), j * step, lanes, mask)
                pixel = b.ir.load(self._address(source.value, i * side + j), typ=PTR)
                return b.load(Pointer(b, pixel, DTYPE, "pixels"), channel, lanes, mask)

            def vector(channel, mask, slot):
                if plan.axes == 1:
                    self._store_row(out + channel, [read(source, channel, mask, j, 0) for j in range(side)])
                    return
                for part in input_parts(self.pairs):
                    anew = b.hidden(source)  # registers do not hold all inputs of a tile
                    column = functools.partial(functools.partial, read, anew, channel, mask)
                    columns = [input_part(b, column(j), self.pairs, part) for j in range(side)]
                    for row, values in zip(part, zip(*columns, strict=True), strict=True):
                        self._store_row(out + (row * (side * plan.input_matrix) + channel), values)

            b.vector_loop(0, plan.channels, lanes, vector)
        return function

    def _store_row(self, to: Pointer, values: Sequence[ir.Value]) -> None:
        """The transform along a row of a tile, to a matrix for each point."""
        for point, value in enumerate(input_transform(self.b, values, self.pairs)):
            self.b.store(to, point * self.plan.input_matrix, value)
