"""The kernel of convolutions as implicit matrix products.

Rows are output pixels (of all images, phase by phase), columns the filters of a group, and the depth is taps times
channels. The block keeps in shared memory where each of its rows meets its first tap; a tap then adds a distance that
all rows share. Chunks of the depth lie within a tap and cover some channels; where channels are few they go over taps
and channels as one line ("flat"), so that a first layer's three channels fill them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from kgraph.codegen.cuda.conv_geometry import Walk, inside, read_axes, walk
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.cuda.tensor_cores import tile_product
from kgraph.codegen.cuda.tiles import Side, Tile


class ConvPlan(NamedTuple):
    """Params of `render_conv`. rank: spatial axes. flat: see the module's docstring; not with `dilated` images.

    groups: how many channels of the image and filters of the weights are fetched together.
    split: whether the depth is cut in pieces, of which each leaves sums of its own; not with dilated images. tensor:
    instruction of tensor cores, or "".
    Sizes of the kernel: images, channels and filters of a group, groups, the result's spatial sizes, `axis_sizes`, and
    with `split` the number of pieces and the chunks of a piece.
    """

    name: str
    dtype: str
    accumulate: str
    rank: int
    dilated: bool
    flat: bool
    split: bool
    tile: Tile
    tensor: str
    indices: str
    finish: tuple
    groups: tuple[int, int]


def render_conv(params: tuple, target) -> str:
    plan = ConvPlan(*params)
    return _Conv(plan, target).render()


class _Conv:
    """What is known while the kernel is written."""

    def __init__(self, plan: ConvPlan, target):
        self.plan, tile = plan, Tile(*plan.tile)
        k = self.k = KernelSource(plan.name, target, tile.block, plan.indices)
        self.x, self.w = k.operand(plan.dtype), k.operand(plan.dtype)
        self.finish = Finish(k, *plan.finish)
        self.images, self.channels, self.filters, self.groups = (k.size() for _ in range(4))
        self.axes = read_axes(k, plan.dilated, [k.size() for _ in range(plan.rank)])
        self.pieces, self.piece = (k.size(), k.size()) if plan.split else ("", "")
        self.all_channels = k.let(k.mul(self.channels, self.groups), "channels")
        self.all_filters = k.let(k.mul(self.filters, self.groups), "filters")
        left, right = plan.groups
        self.product = tile_product(k, tile, plan.accumulate, plan.tensor, Side(False, left), Side(True, right))
        self.product.left_panel.read(self.x)
        self.product.right_panel.read(self.w)
        self.pixel = k.shared(k.index, tile.rows)
        self.offset = k.shared(k.index, tile.rows)
        self.places = [k.shared(k.index, tile.rows) for _ in self.axes]

    def render(self) -> str:
        k, tile = self.k, self.product.tile
        phases = [axis.period for axis in self.axes if axis.period]
        most = [k.ceil_div(axis.out, axis.period) if axis.period else axis.out for axis in self.axes]
        row_tiles = k.let(k.ceil_div(k.product([self.images, *most]), tile.rows), "row_tiles")
        column_tiles = k.let(k.ceil_div(self.filters, tile.columns), "column_tiles")
        outer = [self.pieces, self.groups] if self.pieces else [self.groups]
        tiles = [*outer, *phases, row_tiles, column_tiles]
        with k.block_stride(k.let(k.product(tiles), "total")) as item:
            *numbers, row_tile, column_tile = k.coordinates(item, tiles)
            self.number = numbers.pop(0) if self.pieces else ""
            group = numbers.pop(0)
            walks = [walk(k, axis, number) for axis, number in zip(self.axes, numbers or [""] * len(self.axes))]
            self.group = group
            self.first_row = k.let(k.mul(row_tile, tile.rows), "first_row")
            self.first_column = k.let(k.mul(column_tile, tile.columns), "first_column")
            rows = k.let(k.product([self.images, *(w.count for w in walks)]), "rows")
            self.place_rows(walks, rows)
            k.synchronise()
            self.sum(walks)
            self.store(rows)
            k.synchronise()  # before the next rows take their places
        return k.text()

    def place_rows(self, walks: list[Walk], rows: str) -> None:
        """Leaves in shared memory which pixel each row is, and where it meets its first tap."""
        k, rank = self.k, len(walks)
        with k.range(self.product.thread, k.i(self.product.tile.rows), k.block) as r:
            row = k.let(k.add(self.first_row, r), "row")
            with k.suite(f"if {row} < {rows}:"):
                image, *qs = k.coordinates(row, [self.images, *(w.count for w in walks)])
                places = [k.let(w.place(k, q), "place") for w, q in zip(walks, qs)]
                outs = [w.position(k, q) for w, q in zip(walks, qs)]
                pixel = k.offset([image, *outs], [self.images, *(a.out for a in self.axes)], [True] * (rank + 1))
                k.store(self.pixel, r, pixel)
                sizes = [self.images, *(a.size for a in self.axes)]
                at = k.mul(k.offset([image, *places], sizes, [True] * (rank + 1)), self.all_channels)
                k.store(self.offset, r, k.add(at, k.mul(self.group, self.channels)))
                for kept, place in zip(self.places, places):
                    k.store(kept, r, place)
            with k.suite("else:"):
                k.store(self.places[0], r, self.axes[0].size)  # meets nothing
                for kept in self.places[1:]:
                    k.store(kept, r, k.i(0))

    def sum(self, walks: list[Walk]) -> None:
        k, tile = self.k, self.product.tile
        taps = k.let(k.product([w.taps for w in walks]), "taps")
        depth = k.let(k.mul(taps, self.channels), "depth")
        if self.plan.flat:
            begin, chunks = self.part(k.let(k.ceil_div(depth, tile.depth), "chunks"))
            start = k.fresh("start")
            k.line(f"{start} = {k.mul(begin, tile.depth)}")

            def fetch_flat() -> None:
                at = k.let(k.add(start, self.product.left_panel.near), "at")
                tap, channel = k.let(k.div(at, self.channels), "tap"), k.let(k.mod(at, self.channels), "channel")
                numbers = k.coordinates(tap, [w.taps for w in walks])
                self.fetch_left(walks, numbers, channel, f"{at} < {depth}")
                with self.product.right_panel.each() as (n, number, column):
                    at = k.let(k.add(start, number), "at")
                    self.fetch_right(n, column, at, f"{at} < {depth}")
                k.line(f"{start} = {k.add(start, tile.depth)}")

            self.product.run(chunks, fetch_flat)
            return
        each = k.let(k.ceil_div(self.channels, tile.depth), "each")
        begin, chunks = self.part(k.let(k.mul(taps, each), "chunks"))
        first = k.fresh("first_channel")
        numbers = [k.fresh("tap") for _ in walks]
        starts = [k.i(0) for _ in (first, *numbers)]
        if self.plan.split:
            starts = [k.mul(k.mod(begin, each), tile.depth)]
            starts += k.coordinates(k.let(k.div(begin, each), "tap"), [w.taps for w in walks])
        for name, at in zip((first, *numbers), starts):
            k.line(f"{name} = {at}")

        def fetch() -> None:
            channel = k.let(k.add(first, self.product.left_panel.near), "channel")
            self.fetch_left(walks, numbers, channel, f"{channel} < {self.channels}")
            windows = [axis.window for axis in self.axes]
            taps = [w.tap(k, t) for w, t in zip(walks, numbers)]
            line = k.let(k.mul(k.offset(taps, windows, [True] * len(taps)), self.channels), "line")
            with self.product.right_panel.each() as (n, number, column):
                channel = k.let(k.add(first, number), "channel")
                self.fetch_right(n, column, k.add(line, channel), f"{channel} < {self.channels}")
            self.advance(first, numbers, walks)

        self.product.run(chunks, fetch)

    def part(self, chunks: str) -> tuple[str, str]:
        """(first chunk, number of chunks) of the piece."""
        k = self.k
        if not self.plan.split:
            return k.i(0), chunks
        begin = k.let(k.mul(self.number, self.piece), "begin")
        rest = k.let(f"({k.sub(chunks, begin)} if {begin} < {chunks} else {k.i(0)})", "rest")
        return begin, k.let(f"({self.piece} if {self.piece} < {rest} else {rest})", "chunks")

    def advance(self, first: str, numbers: list[str], walks: list[Walk]) -> None:
        """The next chunk: further channels, else the next tap."""
        k = self.k
        k.line(f"{first} = {k.add(first, self.product.tile.depth)}")
        with ExitStack() as carries:
            carries.enter_context(k.suite(f"if {first} >= {self.channels}:"))
            k.line(f"{first} = {k.i(0)}")
            for n in reversed(range(len(numbers))):
                k.line(f"{numbers[n]} = {k.add(numbers[n], 1)}")
                if n:
                    carries.enter_context(k.suite(f"if {numbers[n]} >= {walks[n].taps}:"))
                    k.line(f"{numbers[n]} = {k.i(0)}")

    def fetch_left(self, walks: list[Walk], numbers: list[str], channel: str, condition: str) -> None:
        """The image's elements of one channel under one tap, for the rows that the thread fetches."""
        k = self.k
        reaches = [k.let(k.mul(t, w.reach), "away") for w, t in zip(walks, numbers)]
        sizes = [axis.size for axis in self.axes]
        away = k.let(k.add(k.mul(k.offset(reaches, sizes, [True] * len(sizes)), self.all_channels), channel), "away")
        with self.product.left_panel.each() as (n, row, _):
            met = [k.let(k.add(k.load(p, row), r), "place") for p, r in zip(self.places, reaches)]
            conditions = [condition, *(inside(k, place, size) for place, size in zip(met, sizes))]
            index = lambda: k.add(k.load(self.offset, row), away)
            self.product.left_panel.fetch(n, conditions, self.x, index)

    def fetch_right(self, n: str, column: str, line: str, condition: str) -> None:
        """A weight, number n of the thread: line is its tap and channel."""
        k = self.k
        column = k.let(k.add(self.first_column, column), "column")
        at = lambda: k.add(k.add(k.mul(line, self.all_filters), k.mul(self.group, self.filters)), column)
        conditions = [condition, f"{column} < {self.filters}"]
        self.product.right_panel.fetch(n, conditions, self.w, at)

    def store(self, rows: str) -> None:
        k = self.k

        def visit(row: str, column: str, value: str) -> None:
            column = k.let(k.add(self.first_column, column), "column")
            with k.suite(f"if {k.add(self.first_row, row)} < {rows} and {column} < {self.filters}:"):
                column = k.let(k.add(k.mul(self.group, self.filters), column), "column")
                pixel = k.load(self.pixel, row)
                if self.plan.split:
                    pixels = k.product([self.images, *(axis.out for axis in self.axes)])
                    pixel = k.let(k.add(k.mul(self.number, pixels), pixel), "pixel")
                self.finish.store(value, pixel, column, self.all_filters)

        self.product.results(visit)
