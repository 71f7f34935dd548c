"""Depthwise convolutions: every channel by itself, with a fused epilogue.

Where the geometry is known at compile time and the window is small, `depthwise_strips` has the kernel. In that of this
module a thread has one element of the result; neighbours have neighbouring filters, so they read neighbouring elements
of image and weight. With input dilation each element meets the taps of its phase only.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from kgraph.codegen.contractions import Parts, accumulate_dtype
from kgraph.codegen.cuda import depthwise_strips, scalar_ops
from kgraph.codegen.cuda.conv_geometry import axis_sizes, inside, is_dilated, read_axes, walk
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.cuda.strips import block_of, threads_of
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.ir.dims import ceil_div, product


class DepthwisePlan(NamedTuple):
    """Params of `render_depthwise`. rank: spatial axes.

    Sizes of the kernel: images, channels, filters per channel, the result's spatial sizes, then `axis_sizes`.
    """

    name: str
    dtype: str
    accumulate: str
    rank: int
    dilated: bool
    indices: str
    finish: tuple


def call(parts: Parts, target) -> KernelCall:
    """The call that computes the node."""
    node = parts.node
    x, w = node.inputs
    window, channels, filters = w.shape[:-2], x.shape[-1], w.shape[-1]
    name, accumulate = "depthwise" + parts.name, accumulate_dtype(x.dtype, parts.result.dtype)
    dilated = is_dilated(node)
    indices, finish = index_type([x.type.size, parts.result.size]), Finish.params(parts, accumulate)
    sizes = [x.shape[0], channels, filters // node.attrs["feature_groups"]]
    strips = depthwise_strips.strips_of(node, accumulate, target)
    plan: DepthwisePlan | depthwise_strips.StripPlan
    if strips is not None:
        multiplied = filters != channels
        plan = depthwise_strips.StripPlan(name, x.dtype, accumulate, strips, multiplied, indices, finish)
        template, block = depthwise_strips.TEMPLATE, block_of(target)
        sizes += depthwise_strips.strip_sizes(node)
        threads = threads_of(parts.result.shape, strips)
    else:
        plan = DepthwisePlan(name, x.dtype, accumulate, len(window), dilated, indices, finish)
        template, block = "kgraph.codegen.cuda.depthwise:render_depthwise", target.block
        sizes += [*parts.result.shape[1:-1], *axis_sizes(node, window)]
        threads = parts.result.size
    met = x.shape[1:-1] if dilated else parts.result.shape[1:-1]
    return KernelCall(
        spec=KernelSpec(name, template, tuple(plan)),
        operands=[*parts.operands, *(v for _, v in parts.extras), *parts.outputs],
        outputs=len(parts.outputs),
        sizes=sizes,
        extent=ceil_div(threads, block),
        flops=2 * x.shape[0] * product(met) * product(window) * filters,
        bytes=x.type.nbytes + w.type.nbytes + sum((v.type.nbytes for v in parts.outputs), start=0),
        notes={"inplace": parts.inplace(2)},
        launch=Launch(block),
    )


def render_depthwise(params: tuple, target) -> str:
    plan = DepthwisePlan(*params)
    k = KernelSource(plan.name, target, target.block, plan.indices)
    x, w = k.operand(plan.dtype), k.operand(plan.dtype)
    finish = Finish(k, *plan.finish)
    images, channels, multiplier = (k.size() for _ in range(3))
    axes = read_axes(k, plan.dilated, [k.size() for _ in range(plan.rank)])
    outs, windows = [axis.out for axis in axes], [axis.window for axis in axes]
    spanned = [True] * len(axes)
    filters = k.let(k.mul(channels, multiplier), "filters")
    compute, zero = compute_dtype(plan.dtype), k.literal(0, plan.accumulate)
    with k.grid_stride(k.let(k.product([images, *outs, filters]), "total")) as i:
        pixel, column = k.let(k.div(i, filters), "pixel"), k.let(k.mod(i, filters), "column")
        channel = k.let(k.div(column, multiplier), "channel")
        image, *positions = k.coordinates(pixel, [images, *outs])
        walks, places = [], []
        for axis, position in zip(axes, positions):
            # With input dilation the position is a phase of its own, of which this is the first one.
            walks.append(walk(k, axis, position))
            places.append(k.let(walks[-1].place(k, k.i(0) if plan.dilated else position), "place"))
        total = k.fresh("sum")
        k.line(f"{total} = {zero}")
        with ExitStack() as loops:
            taps, met = [], []
            for axis, along, place in zip(axes, walks, places):
                t = loops.enter_context(k.range(0, along.taps, 1))
                met.append(k.let(k.add(place, k.mul(t, along.reach)), "place"))
                loops.enter_context(k.suite(f"if {inside(k, met[-1], axis.size)}:"))
                taps.append(along.tap(k, t))
            at = k.add(
                k.mul(k.offset([image, *met], [images, *(a.size for a in axes)], [True, *spanned]), channels), channel
            )
            weight = k.add(k.mul(k.offset(taps, windows, spanned), filters), column)
            x_value, w_value = (
                scalar_ops.convert(k, k.load(operand, index), compute, plan.accumulate)
                for operand, index in ((x, at), (w, weight))
            )
            summed = f"{total} + {x_value} * {w_value}"
            k.line(f"{total} = {summed if scalar_ops.is_float(plan.accumulate) else f'{plan.accumulate}({summed})'}")
        finish.store(total, pixel, column, filters)
    return k.text()
