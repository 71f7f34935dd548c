"""Transforms the inputs that tiles of a Winograd convolution meet: as part of its kernel, or ahead of it.

Ahead where few tiles are shared by many panels of filters, so that no thread transforms what another one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from llvmlite import ir

from kgraph.codegen.cpu.builder import PTR, KernelBuilder, Pointer
from kgraph.codegen.cpu.epilogue import subfunction
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.winograd_plan import DTYPE, Tiling, WinogradPlan
from kgraph.codegen.cpu.winograd_transform import input_transform


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
        # What is never written together has a name of its own, so that LLVM may reorder accesses. Zeros stand in for
        # inputs beyond the image: they are read through the same addresses.
        self.x = Pointer(b, b.operand(0, DTYPE).value, DTYPE, "pixels")
        self.zeros = Pointer(b, b.scratch(DTYPE, offsets["zeros"]).value, DTYPE, "pixels")
        self.stage = Pointer(b, b.scratch(DTYPE, offsets["stage"]).value, DTYPE, "stage")
        self.addresses = b.scratch(DTYPE, offsets["addresses"]).value
        zero = b.constant(0, DTYPE, plan.lanes)
        b.vector_loop(0, plan.channels, plan.lanes, lambda i, mask, slot: b.store(self.zeros, i, zero, mask))
        self.function = self._function()

    def transform(self, first, tiles, to: Pointer, row=0) -> None:
        """Transforms what the tiles from `first` on meet, to rows from `row` on of the matrices at `to`.

        tiles: how many, in whole register tiles. Those beyond the last one meet zeros.
        """
        b, plan, side = self.b, self.plan, self.plan.side
        high, wide = self.sizes
        with b.loop(0, tiles) as tile:
            image, top, left = self.grid.place(first + tile)
            first_row, first_col = b.int(top + self.origins[0]), b.int(left + self.origins[1])
            down, right = self.grid.dilations
            columns = [first_col + j * right for j in range(side)]
            columns_inside = [b.ir.and_(c >= 0, c < wide) for c in columns]
            with b.loop(0, self.rows) as i:
                r = first_row + i * down
                inside = b.ir.and_(b.ir.and_(r >= 0, r < high), b.int(first + tile) < self.grid.count)
                line = self.x + ((image * high + r) * wide) * plan.channels
                for j, c in enumerate(columns):
                    at = b.ir.select(
                        b.ir.and_(inside, columns_inside[j]), (line + c * plan.channels).value, self.zeros.value
                    )
                    b.ir.store(at, self._address(self.addresses, i * side + j))
            out = to + (tile + row) * plan.input_pitch
            b.ir.call(self.function, [self.addresses, self.stage.value, out.value])

    def _address(self, addresses: ir.Value, number) -> ir.Value:
        return self.b.ir.gep(addresses, [self.b.i64(number)], inbounds=True, source_etype=PTR)

    def _function(self) -> ir.Function:
        """transform(addresses of a tile's inputs, room for one channel vector of them, its row of the first matrix)."""
        b, plan, side, lanes = self.b, self.plan, self.plan.side, self.plan.lanes
        with subfunction(b, "transform_input", [PTR] * 3) as function:
            addresses, *at = function.args
            stage, out = (Pointer(b, p, DTYPE, s) for p, s in zip(at, ("stage", "inputs"), strict=True))

            def inputs(numbers, channel, mask) -> list:
                pixels = [b.ir.load(self._address(addresses, number), typ=PTR) for number in numbers]
                return [b.load(Pointer(b, p, DTYPE, "pixels"), channel, lanes, mask) for p in pixels]

            def transform(x: list, to: Pointer, step: int) -> None:
                for i, value in enumerate(input_transform(b, x, self.pairs)):
                    b.store(to, i * step, value)

            def vector(channel, mask, slot):
                if plan.axes == 1:
                    transform(inputs(range(side), channel, mask), out + channel, plan.input_matrix)
                    return
                with b.loop(0, side) as j:
                    column = inputs([j + i * side for i in range(side)], channel, mask)
                    transform(column, stage + j * lanes, side * lanes)
                with b.loop(0, side) as i:
                    row = [b.load(stage + i * (side * lanes), j * lanes, lanes) for j in range(side)]
                    transform(row, out + (i * (side * plan.input_matrix) + channel), plan.input_matrix)

            b.vector_loop(0, plan.channels, lanes, vector)
        return function
