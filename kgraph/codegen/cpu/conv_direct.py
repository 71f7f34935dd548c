"""Convolutions straight from their definition: what no faster algorithm takes.

Serves windows or channels of symbolic size (the gradients of filters are such convolutions), input dilation with a
symbolic padding, and input dilations of many phases. One unit of work is one output position; vectors run along the
filters, which are read in place; every tap is tested for lying on an element of the image.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue, Parts
from kgraph.codegen.cpu.pack import accumulate_dtype, widen
from kgraph.codegen.cpu.products import multiply_add
from kgraph.codegen.cpu.strided import SizeTable, resolve, resolve_all
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir.dims import product

VECTORS = 4  # of filters at a time: independent sums hide the latency of multiply-add


class DirectPlan(NamedTuple):
    """Params of `render_direct`: three spatial axes. Sizes are `int` or ("size", slot).

    channels, filters: per group. origins: minus the padding below, per axis. strides, input_dilation, window_dilation:
    per axis.
    """

    accumulate: str
    dtype: str
    sizes: tuple
    out_sizes: tuple
    window: tuple
    origins: tuple
    strides: tuple
    input_dilation: tuple
    window_dilation: tuple
    groups: int
    channels: int | tuple
    filters: int | tuple
    lanes: int
    epilogue: tuple


def lower_parts(parts: Parts, target) -> list[KernelCall]:
    """The call that computes the node."""
    node = parts.node
    x, w = node.inputs
    attrs, missing = node.attrs, 5 - x.type.rank
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    groups = attrs["feature_groups"]
    table = SizeTable()

    def three(values, fill) -> tuple:
        return table.all((fill,) * missing + tuple(values))

    plan = DirectPlan(
        accumulate=accumulate,
        dtype=x.dtype,
        sizes=three(x.shape[1:-1], 1),
        out_sizes=three(parts.result.shape[1:-1], 1),
        window=three(w.shape[:-2], 1),
        origins=three([-p[0] for p in attrs["padding"]], 0),
        strides=three(attrs["strides"], 1),
        input_dilation=three(attrs["lhs_dilation"], 1),
        window_dilation=three(attrs["rhs_dilation"], 1),
        groups=groups,
        channels=table(w.shape[-2]),
        filters=table(w.shape[-1] // groups),
        lanes=target.vector_bytes // itemsize(accumulate),
        epilogue=tuple(parts.epilogue(accumulate, table(w.shape[-1]), 2)),
    )
    pixels = product(parts.result.shape[:-1])
    return [
        KernelCall(
            spec=KernelSpec("conv_direct" + parts.name, "kgraph.codegen.cpu.conv_direct:render_direct", tuple(plan)),
            operands=[*parts.operands, *(v for _, v in parts.extras), *parts.outputs],
            outputs=len(parts.outputs),
            sizes=list(table.values),
            extent=pixels,
            flops=2 * pixels * product(w.shape),
            bytes=x.type.nbytes + w.type.nbytes + sum(v.type.nbytes for v in parts.outputs),
            notes={"inplace": parts.inplace(2)},
        )
    ]


def render_direct(params: tuple, target) -> str:
    """Kernel (x, weight, extras..., outputs...); see `DirectPlan`."""
    b = KernelBuilder("conv_direct", target)
    _Direct(b, DirectPlan(*params)).emit()
    return b.ir_text()


class _Direct:
    """Emits the loops of a convolution by its definition."""

    def __init__(self, b: KernelBuilder, plan: DirectPlan):
        self.b, self.plan = b, plan
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.window, self.origins = resolve_all(b, plan.window), resolve_all(b, plan.origins)
        self.channels, self.filters = resolve(b, plan.channels), resolve(b, plan.filters)
        self.x, self.weight = b.operand(0, plan.dtype), b.operand(1, plan.dtype)
        self.epilogue = Epilogue(*plan.epilogue)

    def emit(self) -> None:
        b, plan = self.b, self.plan
        wide = VECTORS * plan.lanes
        with b.loop(b.begin, b.end) as pixel:
            rest = pixel
            place: list = []
            for size in reversed(self.out_sizes):
                place.insert(0, rest % size)
                rest = rest // size
            self.pixel, self.image, self.place = pixel, rest, place
            with b.loop(0, plan.groups) as group:
                whole = self.filters // wide * wide
                with b.loop(0, whole, wide) as f:
                    self._filters(group, f, [None] * VECTORS)
                b.vector_loop(whole, self.filters, plan.lanes, lambda f, mask, slot: self._filters(group, f, [mask]))

    def _filters(self, group, first, masks: list) -> None:
        """The sums of `len(masks)` vectors of filters of a group, from filter `first` on."""
        b, plan = self.b, self.plan
        all_filters = self.filters * plan.groups
        column = group * self.filters + first
        zero = b.constant(0, plan.accumulate, plan.lanes)
        acc = [b.variable(zero) for _ in masks]

        def channel_loop(line, tap) -> None:
            source = self.x + (line * (self.channels * plan.groups) + group * self.channels)
            with b.loop(0, self.channels) as c:
                x = b.broadcast(widen(b, b.load(source, c), plan.dtype, plan.accumulate), plan.lanes)
                row = (tap * self.channels + c) * all_filters + column
                for j, mask in enumerate(masks):
                    w = b.load(self.weight, row + j * plan.lanes, plan.lanes, mask)
                    acc[j].set(multiply_add(b, x, widen(b, w, plan.dtype, plan.accumulate), acc[j].get()))

        def axis_loop(axis: int, line, tap) -> None:
            if axis == 3:
                channel_loop(line, tap)
                return
            dilation = plan.input_dilation[axis]
            start = self.place[axis] * plan.strides[axis] + self.origins[axis]
            with b.loop(0, self.window[axis]) as k:
                at = b.int(start + k * plan.window_dilation[axis])
                element = at // dilation
                inside = b.ir.and_(at >= 0, b.int(element) < self.sizes[axis])
                if dilation > 1:
                    inside = b.ir.and_(inside, (at % dilation).equals(0))
                with b.if_then(inside):
                    axis_loop(axis + 1, line * self.sizes[axis] + element, tap * self.window[axis] + k)

        axis_loop(0, self.image, 0)
        bound = self.epilogue.bind(b, b.function.args[0], lambda e: resolve(b, e), column, masks, plan.lanes)
        bound.apply((self.pixel, [a.get() for a in acc]))
