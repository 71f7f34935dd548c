"""Cotangents of the weights of depthwise convolutions.

A block takes a piece of the positions, some neighbouring filters and up to `TAPS` taps. Its threads stand side by side
over the filters and in lanes over the positions; each keeps one sum per tap, and the lanes' sums are added in order at
the end. `conv_filter` cuts the positions and adds the pieces.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.conv_geometry import inside, read_axes
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.expressions import compute_dtype
from kgraph.ir import Node
from kgraph.ir.dims import product

TAPS = 9  # sums of a thread


def takes(node: Node) -> bool:
    """Whether each filter sees one channel."""
    return node.attrs["feature_groups"] > 1 and node.output.shape[-2] == 1


class Plan(NamedTuple):
    """Params of `render_filter`, whose sizes are those of `conv_filter.FilterPlan`.

    rank: spatial axes. taps: of a block. width: filters of a block. output: dtype of what is stored.
    """

    name: str
    dtype: str
    accumulate: str
    rank: int
    taps: int
    width: int
    indices: str
    output: str = ""

    @property
    def template(self) -> str:
        return "kgraph.codegen.cuda.conv_filter_depthwise:render_filter"

    @staticmethod
    def make(node: Node, accumulate: str, target) -> tuple[Plan, int, int, int]:
        """(plan, blocks that a piece needs, positions that a block takes at a time, its threads)."""
        x, cotangent = node.inputs
        taps, filters = product(node.attrs["window"]), node.output.shape[-1]
        width = min(target.group, 1 << (filters - 1).bit_length())
        index = index_type([x.type.size, cotangent.type.size])
        plan = Plan("depthwise_filter_gradient", x.dtype, accumulate, x.type.rank - 2, min(taps, TAPS), width, index)
        return plan, -(-taps // plan.taps) * -(-filters // width), target.block // width, target.block


def render_filter(params: tuple, target) -> str:
    plan = Plan(*params)
    lanes = target.block // plan.width
    k = KernelSource(plan.name, target, target.block, plan.indices)
    x, cotangent, out = k.operand(plan.dtype), k.operand(plan.dtype), k.operand(plan.output)
    images, _, multiplier, channels = (k.size() for _ in range(4))
    axes = read_axes(k, False, [k.size() for _ in range(plan.rank)])
    pieces, piece = k.size(), k.size()
    sizes, outs = [axis.size for axis in axes], [axis.out for axis in axes]
    windows, spanned = [axis.window for axis in axes], [True] * len(axes)
    positions = k.let(k.product([images, *outs]), "positions")
    taps, filters = k.let(k.product(windows), "taps"), k.let(k.mul(channels, multiplier), "filters")
    slabs, tap_groups = k.let(k.ceil_div(filters, plan.width)), k.let(k.ceil_div(taps, plan.taps))
    shared = k.shared(plan.accumulate, plan.taps * target.block)
    sums = k.local(plan.accumulate, plan.taps)
    away, *reaches = [k.local(plan.indices, plan.taps) for _ in range(plan.rank + 1)]
    thread = k.thread()
    slot, lane = k.let(k.mod(thread, plan.width), "slot"), k.let(k.div(thread, plan.width), "lane")
    each_tap = lambda: k.range(0, k.i(plan.taps), 1)
    with k.block_stride(k.let(k.product([pieces, tap_groups, slabs]), "total")) as item:
        number, tap_group, slab = k.coordinates(item, [pieces, tap_groups, slabs])
        first_tap = k.let(k.mul(tap_group, plan.taps), "first_tap")
        first_filter = k.let(k.mul(slab, plan.width), "first_filter")
        column = k.let(k.add(first_filter, slot), "column")
        channel = k.let(k.div(column, multiplier), "channel")
        start = k.let(k.mul(number, piece), "start")
        end = k.add(start, piece)
        end = k.let(f"({end} if {end} < {positions} else {positions})", "end")
        with each_tap() as t:
            k.store(sums, t, k.literal(0, plan.accumulate))
            # Taps behind the last one meet what tap 0 meets; their sums are not stored.
            tap = k.let(k.add(first_tap, t), "tap")
            tap = k.let(f"({tap} if {tap} < {taps} else {k.i(0)})", "tap")
            steps = [k.let(k.mul(at, a.reach)) for at, a in zip(k.coordinates(tap, windows), axes)]
            for array, step in zip(reaches, steps):
                k.store(array, t, step)
            k.store(away, t, k.mul(k.offset(steps, sizes, spanned), channels))
        with k.suite(f"if {column} < {filters}:"), k.range(k.add(start, lane), end, lanes) as at:
            image, *qs = k.coordinates(at, [images, *outs])
            places = [k.let(k.add(k.mul(q, a.stride), a.start), "place") for q, a in zip(qs, axes)]
            offset = k.mul(k.offset([image, *places], [images, *sizes], [True, *spanned]), channels)
            offset = k.let(k.add(offset, channel), "offset")
            given = k.load(cotangent, k.add(k.mul(at, filters), column))
            given = k.let(scalar_ops.convert(k, given, compute_dtype(plan.dtype), plan.accumulate))
            with each_tap() as t:
                met = [k.let(k.add(place, k.load(r, t)), "place") for place, r in zip(places, reaches)]
                with k.suite(f"if {' and '.join(inside(k, p, size) for p, size in zip(met, sizes))}:"):
                    value = k.load(x, k.add(offset, k.load(away, t)))
                    value = scalar_ops.convert(k, value, compute_dtype(plan.dtype), plan.accumulate)
                    k.store(sums, t, f"{k.load(sums, t)} + {value} * {given}")
        with each_tap() as t:
            k.store(shared, k.add(k.mul(t, target.block), thread), k.load(sums, t))
        k.synchronise()
        with k.range(thread, k.i(plan.taps * plan.width), target.block) as n:
            tap, slot = k.let(k.div(n, plan.width), "tap"), k.let(k.mod(n, plan.width), "slot")
            to_tap, column = k.let(k.add(first_tap, tap), "to_tap"), k.let(k.add(first_filter, slot), "column")
            with k.suite(f"if {to_tap} < {taps} and {column} < {filters}:"):
                total = k.fresh("total")
                k.line(f"{total} = {k.literal(0, plan.accumulate)}")
                with k.range(0, k.i(lanes), 1) as other:
                    at = k.add(k.mul(tap, target.block), k.add(k.mul(other, plan.width), slot))
                    k.line(f"{total} = {total} + {k.load(shared, at)}")
                value = k.let(scalar_ops.convert(k, total, plan.accumulate, compute_dtype(plan.output)))
                k.store(out, k.add(k.mul(k.add(k.mul(number, taps), to_tap), filters), column), value)
        k.synchronise()  # before the next sums take the array
    return k.text()
