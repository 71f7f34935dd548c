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
from kgraph.codegen.cpu.winograd_plan import DTYPE, Tiling, WinogradPlan
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

    def __init__(self, b: KernelBuilder, plan: Tiling):
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
        # Zeros stand in for inputs beyond the image; tiles that meet some are copied. All is read by the same code.
        self.x = Pointer(b, b.operand(0, DTYPE).value, DTYPE, "pixels")
        self.zeros = Pointer(b, b.scratch(DTYPE, offsets["zeros"]).value, DTYPE, "pixels")
        self.border = Pointer(b, b.scratch(DTYPE, offsets["border"]).value, DTYPE, "pixels")
        zero = b.constant(0, DTYPE, plan.lanes)
        b.vector_loop(0, plan.channels, plan.lanes, lambda i, mask, slot: b.store(self.zeros, i, zero, mask))
        self.function = self._function()

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
                    self._call(line, pitch, right * plan.channels, out)
                with otherwise:
                    self._copy(first + tile, image, first_row, first_col)
                    self._call(self.border, plan.side * plan.border_pitch, plan.border_pitch, out)

    def _call(self, source: Pointer, row_pitch, col_pitch, out: Pointer) -> None:
        b = self.b
        b.ir.call(self.function, [source.value, b.i64(row_pitch), b.i64(col_pitch), out.value])

    def _copy(self, tile, image, first_row, first_col) -> None:
        """Copies the inputs of a tile, with zeros beyond the image."""
        b, plan = self.b, self.plan
        high, wide = self.sizes
        down, right = self.grid.dilations
        with b.loop(0, self.rows) as i, b.loop(0, plan.side) as j:
            r, c = first_row + i * down, first_col + j * right
            limits = r >= 0, r < high, c >= 0, c < wide
            inside = functools.reduce(b.ir.and_, limits, b.int(tile) < self.grid.count)
            pixel = self.x + ((image * high + r) * wide + c) * plan.channels
            at = Pointer(b, b.ir.select(inside, pixel.value, self.zeros.value), DTYPE, "pixels")
            to = self.border + (i * plan.side + j) * plan.border_pitch

            def copy(channel, mask, slot, at=at, to=to) -> None:
                b.store(to, channel, b.load(at, channel, plan.lanes, mask))

            b.vector_loop(0, plan.channels, plan.lanes, copy)

    def newest_pixel(self, tile):
        """Number of the first pixel that a tile of rows and columns meets, and the ones above and before it do not."""
        image, top, left = self.grid.place(tile)
        row, col = (
            first + origin + (TAPS - 1) * dilation
            for first, origin, dilation in zip((top, left), self.origins, self.grid.dilations, strict=True)
        )
        return (image * self.sizes[0] + row) * self.sizes[1] + col

    def _function(self) -> ir.Function:
        """transform(a tile's first input, elements between its rows, and its columns, its row of the first matrix)."""
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        with subfunction(b, "transform_input", [PTR, I64, I64, PTR]) as function:
            source, out = (Pointer(b, function.args[i], DTYPE, s) for i, s in ((0, "pixels"), (3, "inputs")))
            row_pitch, col_pitch = b.int(function.args[1]), b.int(function.args[2])

            def read(source: Pointer, channel, mask, j: int, i: int) -> ir.Value:
                """The input on row i and column j of the tile."""
                return b.load(source + (i * row_pitch + channel), j * col_pitch, lanes, mask)

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
