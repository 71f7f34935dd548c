"""Cotangents of the weights of depthwise convolutions.

A block takes a piece of the positions, some neighbouring filters and all taps. Its threads stand side by side over the
filters and in lanes over tiles of positions (`strips`), whose elements and cotangents they read once; each keeps one
sum per tap, and the lanes' sums are added in order at the end. Where the window is too large or its geometry not known,
lanes take single positions and blocks up to `TAPS` taps. `conv_filter` cuts the positions and adds the pieces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.conv_geometry import inside, read_axes
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.strips import Strip, Tile, at_least_1, block_of, choose_strips
from kgraph.codegen.expressions import compute_dtype
from kgraph.ir import Dim, Node, np_dtype
from kgraph.ir.dims import ceil_div, product

TAPS = 9  # sums of a thread that takes single positions


def takes(node: Node) -> bool:
    """Whether each filter sees one channel."""
    return node.attrs["feature_groups"] > 1 and node.output.shape[-2] == 1


class Plan(NamedTuple):
    """Params of `render_filter`, whose sizes are those of `conv_filter.FilterPlan`, with tiles for positions.

    strips: the tile, or None for single positions. rank: spatial axes. block: threads of one. taps, width: taps and
    filters of a block. output: dtype of what is stored.
    """

    name: str
    dtype: str
    accumulate: str
    strips: tuple[Strip, ...] | None
    rank: int
    block: int
    taps: int
    width: int
    indices: str
    output: str = ""

    @property
    def template(self) -> str:
        return "kgraph.codegen.cuda.conv_filter_depthwise:render_filter"

    def chunks(self, most: int) -> int:
        """How often the lanes of a piece should take positions or tiles, if `most` times single positions."""
        return most if self.strips is None else max(most // product([s.length for s in self.strips]), 2)

    @staticmethod
    def make(node: Node, accumulate: str, target) -> tuple[Plan, int, Any, int, int]:
        """(plan, blocks that a piece needs, positions or tiles, how many of them a block takes at a time, threads)."""
        x, cotangent = node.inputs
        taps, filters = product(node.attrs["window"]), node.output.shape[-1]
        width = min(target.group, 1 << (filters - 1).bit_length())
        index = index_type([x.type.size, cotangent.type.size])
        # The sums of all taps pass through shared memory.
        block = block_of(target)
        fits = taps * block * np_dtype(accumulate).itemsize <= target.shared_bytes
        strips = _strips_of(node, accumulate, target) if fits else None
        block = target.block if strips is None else block
        at_once = taps if strips is not None else min(taps, TAPS)
        rank = x.type.rank - 2
        plan = Plan("depthwise_filter_gradient", x.dtype, accumulate, strips, rank, block, at_once, width, index)
        outs = cotangent.shape[1:-1]
        counts = outs if strips is None else [ceil_div(n, s.length) for n, s in zip(outs, strips, strict=True)]
        blocks = -(-taps // at_once) * -(-filters // width)
        return plan, blocks, x.shape[0] * product(counts), block // width, block


def _strips_of(node: Node, accumulate: str, target) -> tuple[Strip, ...] | None:
    """The tile of a thread; None where the geometry is not known, or no tile is small enough."""
    attrs, window = node.attrs, node.attrs["window"]
    lows = [low for low, _ in attrs["padding"]]
    geometry = [*zip(window, attrs["strides"], attrs["rhs_dilation"], (1,) * len(window), lows, strict=True)]
    if any(isinstance(n, Dim) for along in geometry for n in along):
        return None
    return choose_strips(geometry, node.inputs[1].shape, accumulate, target, further=product(window))


def render_filter(params: tuple, target) -> str:
    plan = Plan(*params)
    lanes = plan.block // plan.width
    k = KernelSource(plan.name, target, plan.block, plan.indices)
    x, cotangent, out = k.operand(plan.dtype), k.operand(plan.dtype), k.operand(plan.output)
    images, _, multiplier, channels = (k.size() for _ in range(4))
    axes = read_axes(k, False, [k.size() for _ in range(plan.rank)])
    pieces, piece = k.size(), k.size()
    taps = k.let(k.product([axis.window for axis in axes]), "taps")
    filters = k.let(k.mul(channels, multiplier), "filters")
    slabs, tap_groups = k.let(k.ceil_div(filters, plan.width)), k.let(k.ceil_div(taps, plan.taps))
    shared = k.shared(plan.accumulate, plan.taps * plan.block)
    sums = k.local(plan.accumulate, plan.taps)
    walk = (_Positions if plan.strips is None else _Tiles)(k, plan, x, cotangent, images, axes, channels, filters)
    thread = k.thread()
    slot, lane = k.let(k.mod(thread, plan.width), "slot"), k.let(k.div(thread, plan.width), "lane")
    each_tap = lambda: k.range(0, k.i(plan.taps), 1)
    multiplier = at_least_1(k, multiplier)
    with k.block_stride(k.let(k.product([pieces, tap_groups, slabs]), "total")) as item:
        number, tap_group, slab = k.coordinates(item, [pieces, tap_groups, slabs])
        first_tap = k.let(k.mul(tap_group, plan.taps), "first_tap")
        first_filter = k.let(k.mul(slab, plan.width), "first_filter")
        column = k.let(k.add(first_filter, slot), "column")
        channel = k.let(k.div(column, multiplier), "channel")
        start = k.let(k.mul(number, piece), "start")
        end = k.add(start, piece)
        end = k.let(f"({end} if {end} < {walk.count} else {walk.count})", "end")
        with each_tap() as t:
            k.store(sums, t, k.literal(0, plan.accumulate))
        walk.begin(first_tap, taps)
        with k.suite(f"if {column} < {filters}:"), k.range(k.add(start, lane), end, lanes) as at:
            walk.add(sums, at, column, channel)
        with each_tap() as t:
            k.store(shared, k.add(k.mul(t, plan.block), thread), k.load(sums, t))
        k.synchronise()
        with k.range(thread, k.i(plan.taps * plan.width), plan.block) as n:
            tap, slot = k.let(k.div(n, plan.width), "tap"), k.let(k.mod(n, plan.width), "slot")
            to_tap, column = k.let(k.add(first_tap, tap), "to_tap"), k.let(k.add(first_filter, slot), "column")
            with k.suite(f"if {to_tap} < {taps} and {column} < {filters}:"):
                total = k.fresh("total")
                k.line(f"{total} = {k.literal(0, plan.accumulate)}")
                with k.range(0, k.i(lanes), 1) as other:
                    at = k.add(k.mul(tap, plan.block), k.add(k.mul(other, plan.width), slot))
                    k.line(f"{total} = {total} + {k.load(shared, at)}")
                value = k.let(scalar_ops.convert(k, total, plan.accumulate, compute_dtype(plan.output)))
                k.store(out, k.add(k.mul(k.add(k.mul(number, taps), to_tap), filters), column), value)
        k.synchronise()  # before the next sums take the array
    return k.text()


class _Walk:
    """What threads do with the positions of images. count: of what lanes take one by one."""

    def __init__(self, k: KernelSource, plan: Plan, x: Operand, cotangent: Operand, images, axes, channels, filters):
        self.k, self.plan, self.x, self.cotangent = k, plan, x, cotangent
        self.images, self.axes, self.channels, self.filters = images, axes, channels, filters
        self.sizes, self.outs = [axis.size for axis in axes], [axis.out for axis in axes]

    def _convert(self, value: str) -> str:
        return scalar_ops.convert(self.k, value, compute_dtype(self.plan.dtype), self.plan.accumulate)


class _Tiles(_Walk):
    """Tiles of positions; a block has all taps."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        k, strips = self.k, [Strip(*s) for s in self.plan.strips]
        self.tile = Tile(k, strips, self.plan.accumulate)
        self.given = k.local(self.plan.accumulate, self.tile.size)
        counts = [k.let(k.ceil_div(out, s.length), "strips") for out, s in zip(self.outs, strips)]
        self.count = k.let(k.product([self.images, *counts]), "tiles")
        self.counts = [at_least_1(k, n) for n in counts]

    def begin(self, first_tap: str, taps: str) -> None:
        """Nothing, since taps are known."""

    def add(self, sums: Operand, at: str, column: str, channel: str) -> None:
        """Adds the products of tile `at` to the sums. What positions that are not there have is 0."""
        k, tile, zero = self.k, self.tile, self.k.literal(0, self.plan.accumulate)
        image, *numbers = k.coordinates(at, [self.images, *self.counts])
        tile.place(numbers, [axis.start for axis in self.axes])
        with tile.all_positions(self.outs) as (position, places, is_there):
            pixel = k.offset([image, *places], [self.images, *self.outs], [True] * (1 + len(places)))
            pixel = k.let(f"({k.add(k.mul(pixel, self.filters), column)} if {is_there} else {column})", "pixel")
            k.store(self.given, position, f"({self._convert(k.load(self.cotangent, pixel))} if {is_there} else {zero})")
        tile.read(self.x, image, self.sizes, self.channels, channel, self._convert, zero)
        with tile.meetings() as (position, tap, element):
            added = f"{k.load(tile.elements, element)} * {k.load(self.given, position)}"
            k.store(sums, tap, f"{k.load(sums, tap)} + {added}")


class _Positions(_Walk):
    """Single positions, and the taps of a group; all geometry is in run-time sizes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        k, plan = self.k, self.plan
        self.count = k.let(k.product([self.images, *self.outs]), "positions")
        self.away, *self.reaches = [k.local(plan.indices, plan.taps) for _ in range(plan.rank + 1)]

    def begin(self, first_tap: str, taps: str) -> None:
        """Takes up the taps from the first one on: how far from that of tap 0 they find their element."""
        k, spanned = self.k, [True] * len(self.axes)
        with k.range(0, k.i(self.plan.taps), 1) as t:
            # Taps behind the last one meet what tap 0 meets; their sums are not stored.
            tap = k.let(k.add(first_tap, t), "tap")
            tap = k.let(f"({tap} if {tap} < {taps} else {k.i(0)})", "tap")
            met = k.coordinates(tap, [axis.window for axis in self.axes])
            steps = [k.let(k.mul(at, a.reach)) for at, a in zip(met, self.axes)]
            for array, step in zip(self.reaches, steps):
                k.store(array, t, step)
            k.store(self.away, t, k.mul(k.offset(steps, self.sizes, spanned), self.channels))

    def add(self, sums: Operand, at: str, column: str, channel: str) -> None:
        """Adds the products of position `at` to the sums."""
        k, spanned = self.k, [True] * (1 + len(self.axes))
        image, *qs = k.coordinates(at, [self.images, *self.outs])
        places = [k.let(k.add(k.mul(q, a.stride), a.start), "place") for q, a in zip(qs, self.axes)]
        offset = k.mul(k.offset([image, *places], [self.images, *self.sizes], spanned), self.channels)
        offset = k.let(k.add(offset, channel), "offset")
        given = k.let(self._convert(k.load(self.cotangent, k.add(k.mul(at, self.filters), column))))
        with k.range(0, k.i(self.plan.taps), 1) as t:
            met = [k.let(k.add(place, k.load(r, t)), "place") for place, r in zip(places, self.reaches)]
            with k.suite(f"if {' and '.join(inside(k, p, size) for p, size in zip(met, self.sizes))}:"):
                value = self._convert(k.load(self.x, k.add(offset, k.load(self.away, t))))
                k.store(sums, t, f"{k.load(sums, t)} + {value} * {given}")
