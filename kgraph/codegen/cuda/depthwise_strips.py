"""Depthwise convolutions whose geometry is known at compile time: a thread has a tile of positions (`strips`) of one
filter, whose weights it reads once. Neighbouring threads have neighbouring filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.cuda.strips import Strip, Tile, at_least_1
from kgraph.codegen.expressions import compute_dtype
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

TILES = ((4, 4), (2, 4), (1, 4), (1, 2))  # positions of a thread along the two innermost axes
THREADS = 256  # that a multiprocessor is left by tiles, if there are as many
MOST_PRODUCTS = 400  # of a tile; the loops over more are not unrolled
MOST_REGISTERS = 140  # for elements, weights and sums
BLOCK = 128  # threads: where each has many registers, more of such blocks fit
TEMPLATE = "kgraph.codegen.cuda.depthwise_strips:render_strips"


class StripPlan(NamedTuple):
    """Params of `render_strips`. multiplied: whether a channel may have several filters.

    Sizes of the kernel: images, channels, filters per channel; for each axis the result's size, the image's, and the
    element that minus the padding is.
    """

    name: str
    dtype: str
    accumulate: str
    strips: tuple[Strip, ...]
    multiplied: bool
    indices: str
    finish: tuple


def block_of(target) -> int:
    """The threads of a block."""
    return min(target.block, BLOCK)


def strip_sizes(node: Node) -> list:
    """The sizes of the axes; see `StripPlan`."""
    sizes: list = []
    for n, (low, _) in enumerate(node.attrs["padding"]):
        sizes += [node.output.shape[n + 1], node.inputs[0].shape[n + 1], -low // node.attrs["lhs_dilation"][n]]
    return sizes


def choose_strips(node: Node, target) -> tuple[Strip, ...] | None:
    """The largest tile that leaves the multiprocessors enough threads, else the smallest one that is unrolled. Sizes
    that are not known count as many."""
    attrs, window = node.attrs, node.inputs[1].shape[:-2]
    lows = [low for low, _ in attrs["padding"]]
    geometry = (window, attrs["strides"], attrs["rhs_dilation"], attrs["lhs_dilation"], lows)
    if any(isinstance(n, Dim) for along in geometry for n in along):
        return None
    chosen = None
    for tile in TILES:
        counts = ((1,) * len(window) + tile)[-len(window) :]
        strips = tuple(Strip.make(*numbers) for numbers in zip(counts, *geometry, strict=True))
        positions, taps = product([s.length for s in strips]), product(window)
        elements = product([s.span[1] for s in strips])
        if positions * taps > MOST_PRODUCTS or positions + taps + elements > MOST_REGISTERS:
            continue
        chosen = strips
        busy = threads(node.output.shape, strips)
        if isinstance(busy, Dim) or busy >= THREADS * target.num_sms:
            break
    return chosen


def threads(shape: Sequence, strips: Sequence[Strip]):
    """How many a result of this shape keeps busy."""
    tiles = product([ceil_div(n, s.length) for n, s in zip(shape[1:-1], strips, strict=True)])
    return shape[0] * tiles * shape[-1]


def render_strips(params: tuple, target) -> str:
    plan = StripPlan(*params)
    strips = [Strip(*s) for s in plan.strips]
    k = KernelSource(plan.name, target, block_of(target), plan.indices)
    x, w = k.operand(plan.dtype), k.operand(plan.dtype)
    finish = Finish(k, *plan.finish)
    images, channels, multiplier = (k.size() for _ in range(3))
    outs, sizes, starts = zip(*([k.size() for _ in range(3)] for _ in strips))
    filters = k.let(k.mul(channels, multiplier), "filters") if plan.multiplied else channels
    counts = [k.let(k.ceil_div(out, s.length), "strips") for out, s in zip(outs, strips)]
    total = k.let(k.product([images, *counts, filters]), "total")
    *counts, filters, multiplier = (at_least_1(k, n) for n in (*counts, filters, multiplier))
    tile = Tile(k, strips, plan.accumulate)
    weights, sums = k.local(plan.accumulate, tile.taps), k.local(plan.accumulate, tile.size)
    zero = k.literal(0, plan.accumulate)
    convert = lambda value: scalar_ops.convert(k, value, compute_dtype(plan.dtype), plan.accumulate)
    with k.grid_stride(total) as i:
        image, *numbers, column = k.coordinates(i, [images, *counts, filters])
        channel = k.let(k.div(column, multiplier), "channel") if plan.multiplied else column
        with tile.each(tile.taps) as t:
            at = f"int64(int64({t}) * int64({filters}) + int64({column}))"
            k.store(weights, t, convert(k.load(w, at)))
        finish.begin(column)
        tile.place(numbers, starts)
        tile.read(x, image, sizes, channels, channel, convert, zero)
        with tile.each(tile.size) as n:
            k.store(sums, n, zero)
        with tile.meetings() as (position, tap, element):
            added = f"{k.load(sums, position)} + {k.load(tile.elements, element)} * {k.load(weights, tap)}"
            is_float = scalar_ops.is_float(plan.accumulate)
            k.store(sums, position, added if is_float else f"{plan.accumulate}({added})")
        with tile.positions(outs) as (position, places):
            pixel = k.let(k.offset([image, *places], [images, *outs], [True] * (1 + len(outs))), "pixel")
            finish.store(k.load(sums, position), pixel, column, filters)
    return k.text()
