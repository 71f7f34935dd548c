"""Depthwise convolutions whose geometry is known at compile time: a thread has a tile of positions (`strips`) of one
filter, whose weights it reads once. Neighbouring threads have neighbouring filters."""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.cuda.strips import Strip, Tile, at_least_1, block_of, choose_strips
from kgraph.codegen.expressions import compute_dtype
from kgraph.ir import Dim, Node
from kgraph.ir.dims import product

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


def strip_sizes(node: Node) -> list:
    """The sizes of the axes; see `StripPlan`."""
    sizes: list = []
    for n, (low, _) in enumerate(node.attrs["padding"]):
        sizes += [node.output.shape[n + 1], node.inputs[0].shape[n + 1], -low // node.attrs["lhs_dilation"][n]]
    return sizes


def strips_of(node: Node, accumulate: str, target) -> tuple[Strip, ...] | None:
    """The tile of a thread; None where the geometry is not known, or no tile is small enough."""
    attrs, window = node.attrs, node.inputs[1].shape[:-2]
    lows = [low for low, _ in attrs["padding"]]
    geometry = [*zip(window, attrs["strides"], attrs["rhs_dilation"], attrs["lhs_dilation"], lows, strict=True)]
    if any(isinstance(n, Dim) for along in geometry for n in along):
        return None
    return choose_strips(geometry, node.output.shape, accumulate, target, further=product(window))


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
