"""What transforms will meet in memory, asked for while products are made: memory has nothing else to do then.

The tiles of an image read and write short pieces of many rows, which prefetchers do not foresee and a transform's
arithmetic does not hide. So with each point of the products, some lines of each tile are requested: of the inputs that
the next unit of work transforms, and of where the outputs of this one go. Along one axis, prefetchers do as well.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.winograd_inputs import InputTransform, TileGrid
from kgraph.codegen.cpu.winograd_plan import WinogradPlan

LINE_BYTES = 64


class _Source(NamedTuple):
    """Memory of a tile's pixels, `pitch` elements each; `asked` of them from `first` on are asked for.

    pixels: table of the tiles' first pixels. pitches: of a tile's rows and columns, in pixels. turn, turns: of the
    units that share the work.
    """

    at: Pointer
    pitch: object
    first: object
    asked: int
    pixels: Pointer
    pitches: tuple
    turn: object = 0
    turns: int = 1


class Requests:
    """The code that asks. out_sizes: rows and columns of the outputs. offset: of the table in scratch."""

    def __init__(self, b: KernelBuilder, plan: WinogradPlan, grid: TileGrid, out_sizes: tuple, offset: int):
        self.b, self.plan, self.grid, self.out_sizes = b, plan, grid, out_sizes
        table = Pointer(b, b.scratch("int64", offset).value, "int64", "pixels of tiles")
        self.following, self.outputs = table, table + plan.block
        self.sources: list[_Source] = []

    def begin(self, first, tiles, column, group, groups: int, inputs: InputTransform | None) -> None:
        """For the unit of `tiles` tiles from `first` on, and of filters from `column` on: a group of `groups`.

        inputs: what transforms those of the next unit, if they are to be asked for.
        """
        b, plan, grid = self.b, self.plan, self.grid
        high, wide = self.out_sizes
        with b.loop(0, tiles) as tile:
            image, row, col = grid.place(first + tile)
            b.store(self.outputs, tile, ((image * high + row) * wide + col).value)
            if inputs is not None:
                following = b.min(first + plan.block + tile, grid.count - 1)
                b.store(self.following, tile, inputs.newest_pixel(following).value)
        epilogue = Epilogue(*plan.epilogue)
        read = [(number, dtype) for kind, number, dtype in epilogue.inputs if kind == "full"]
        columns = resolve(b, epilogue.columns)
        count = min(plan.group * plan.width, plan.filters)
        pitches = tuple(resolve_all(b, plan.out_pitches))
        self.sources = [
            _Source(b.operand(number, dtype), columns, column, count, self.outputs, pitches)
            for number, dtype in (*read, *epilogue.outputs)
        ]
        if inputs is not None:
            down, right = grid.dilations
            pitches = (inputs.sizes[1] * down, right)
            turn = group, groups
            self.sources.append(_Source(inputs.x, plan.channels, 0, plan.channels, self.following, pitches, *turn))

    def ask(self, point, tiles) -> None:
        """The share of a point, for all tiles of the unit."""
        b = self.b
        shares = [self._share(source, point) for source in self.sources]
        with b.loop(0, tiles) as tile:
            for source, elements in zip(self.sources, shares, strict=True):
                at = source.at + b.int(b.load(source.pixels, tile)) * source.pitch
                for element in elements:
                    b.prefetch(at, element, locality=2)

    def _share(self, source: _Source, point) -> list:
        """Elements, from a tile's first pixel on, of the lines that are asked for with a point."""
        b, plan = self.b, self.plan
        line = LINE_BYTES // itemsize(source.at.dtype)
        lines = -(-source.asked // line)
        total = plan.outputs**2 * lines
        share = -(-total // (plan.points * source.turns))
        elements = []
        for i in range(share):
            number = b.min((point * source.turns + source.turn) * share + i, total - 1)
            pixel = number // lines
            row, col = pixel // plan.outputs, pixel % plan.outputs
            pixels = row * source.pitches[0] + col * source.pitches[1]
            elements.append(pixels * source.pitch + source.first + number % lines * line)
        return elements
