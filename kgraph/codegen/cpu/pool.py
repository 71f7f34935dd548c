"""reduce_window: maxima, minima and sums over sliding windows, with a fused elementwise epilogue (kind "pool").

Axes that no window touches merge into a batch ahead of the windowed ones and into channels behind them; vectors run
over the channels. A unit is one position of the first windowed axis: a row of pixels of an image. Windows are clipped
to the source once per pixel; pixels whose window lies inside take a path without loops.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from llvmlite import ir

from kgraph.codegen.cpu import expressions
from kgraph.codegen.cpu.builder import Int, KernelBuilder, compute_dtype
from kgraph.codegen.cpu.scalar_ops import EMITTERS
from kgraph.codegen.cpu.strided import SizeTable, dense_strides, resolve, resolve_all
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.reductions import neutral
from kgraph.codegen.windows import COMBINE, extra_strides, groups_of, refuses, refuses_extras, take_apart
from kgraph.ir import Node
from kgraph.ir.dims import product

MOST_UNROLLED_TAPS = 16
MOST_ACCUMULATORS = 4


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node)
    if isinstance(parts, str):
        return parts
    return refuses(parts.node) or refuses_extras(parts)


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a plain reduce_window or of a fused node around one."""
    parts = take_apart(node)
    if isinstance(parts, str):
        raise ValueError(parts)
    core, x, out = parts.node, parts.source, parts.node.output
    first, last = groups_of(core)
    attrs = core.attrs
    table = SizeTable()
    axes = window_params(core, x.shape, out.shape, first, last, table)
    channels = product(x.shape[last:])
    extras = tuple((v.dtype, table.all(extra_strides(v, out.shape, (first, last)) or ())) for v in parts.extras)
    lanes = expressions.lanes(parts.expression, target)
    params = (
        attrs["kind"],
        x.dtype,
        lanes,
        axes,
        table(channels),
        extras,
        tuple(v.dtype for v in parts.outputs),
        parts.expression,
    )
    suffix = expressions.name(parts.expression)
    taps = product(attrs["window"])
    rows = product(x.shape[:first]) * (out.shape[first] if last > first else 1)
    return [
        KernelCall(
            KernelSpec("_".join(filter(None, (f"pool_{attrs['kind']}", suffix))), "pool:render_pool", params),
            [x, *parts.extras, *parts.outputs],
            outputs=len(parts.outputs),
            sizes=table.values,
            extent=rows,
            flops=out.type.size * (taps + expressions.flops(parts.expression)),
            bytes=x.type.nbytes + sum((v.type.nbytes for v in (*parts.extras, *parts.outputs)), 0),
        )
    ]


def window_params(node: Node, source: tuple, result: tuple, first: int, last: int, table: SizeTable) -> tuple:
    """The params of the axes [first, last) from which `WindowAxis.resolved` makes them again."""
    attrs = node.attrs
    return tuple(
        (
            table(source[k]),
            table(result[k]),
            attrs["window"][k],
            attrs["strides"][k],
            attrs["padding"][k][0],
            attrs["window_dilation"][k],
            attrs["base_dilation"][k],
        )
        for k in range(first, last)
    )


@dataclass
class WindowAxis:
    """One windowed axis of a kernel: sizes of source and result, the window, its placement; stride of the source."""

    size: int | Int
    out: int | Int
    window: int
    stride: int
    low: int
    window_dilation: int
    base_dilation: int
    source_stride: int | Int

    @staticmethod
    def resolved(b: KernelBuilder, params, channels) -> list[WindowAxis]:
        """The axes of a kernel, ahead of `channels` elements."""
        sizes = [resolve(b, p[0]) for p in params]
        strides = dense_strides([*sizes, channels])
        outs = [resolve(b, p[1]) for p in params]
        places = [p[2:] for p in params]
        return [
            WindowAxis(n, m, window, stride, low, window_dilation, base_dilation, t)
            for n, m, (window, stride, low, window_dilation, base_dilation), t in zip(sizes, outs, places, strides)
        ]

    def taps(self, b: KernelBuilder, position: Int):
        """(first source position of the window, first tap inside, first tap behind)."""
        start = position * self.stride - self.low
        reach = (self.size - 1) * self.base_dilation + 1
        dilation = self.window_dilation
        if self.low <= 0:
            first = 0
        else:
            first = b.ceil_div(b.max(0 - b.int(start), 0), dilation)
        last = b.min(b.ceil_div(b.max(reach - start, 0), dilation), self.window)
        return start, first, last


class PoolKernel:
    """What is known while the kernel is written."""

    def __init__(self, params, target):
        kind, self.dtype, self.lanes, axes, channels, extras, outputs, self.expression = params
        b = self.b = KernelBuilder(f"pool_{kind}", target)
        self.channels = resolve(b, channels)
        self.combine_name, self.identity = COMBINE[kind], neutral(kind, self.dtype)
        self.source = b.operand(0, self.dtype)
        self.axes = WindowAxis.resolved(b, axes, self.channels)
        self.image = self.channels
        for axis in self.axes:
            self.image = axis.size * self.image
        self.out_strides = dense_strides([*(a.out for a in self.axes), self.channels])
        self.out_image = self.channels
        for axis in self.axes:
            self.out_image = axis.out * self.out_image
        self.extras = [(b.operand(1 + k, dtype), resolve_all(b, strides)) for k, (dtype, strides) in enumerate(extras)]
        self.outputs = [b.operand(1 + len(extras) + k, dtype) for k, dtype in enumerate(outputs)]

    def combine(self, x, y):
        compute = compute_dtype(self.dtype)
        return EMITTERS[self.combine_name](self.b, [x, y], [compute] * 2, compute)

    def render(self) -> str:
        b = self.b
        with b.loop(b.begin, b.end) as unit:
            if self.axes:
                batch, row = unit // self.axes[0].out, unit % self.axes[0].out
                with ExitStack() as loops:
                    inner = [loops.enter_context(b.loop(0, a.out)) for a in self.axes[1:]]
                    self.pixel(batch, [b.int(row), *inner])
            else:
                self.pixel(unit, [])
        return b.ir_text()

    def pixel(self, batch, positions: list) -> None:
        """All channels of one position of the result."""
        b = self.b
        at: int | Int = batch * self.out_image
        for position, stride in zip(positions, self.out_strides, strict=False):
            at = at + position * stride
        windows = [axis.taps(b, b.int(p)) for axis, p in zip(self.axes, positions, strict=True)]
        base: int | Int = batch * self.image
        for axis, (start, _, _) in zip(self.axes, windows, strict=True):
            if axis.base_dilation == 1:
                base = base + start * axis.source_stride
        extra_bases = []
        for _, strides in self.extras:
            place = batch * strides[0]
            for position, stride in zip(positions, strides[1:-1], strict=True):
                place = place + position * stride
            extra_bases.append(place)

        def finish(channel, masks: list, values: list) -> None:
            self.epilogue(at, extra_bases, channel, masks, values)

        count = 1
        for axis in self.axes:
            count *= axis.window
        simple = count <= MOST_UNROLLED_TAPS and all(a.base_dilation == 1 for a in self.axes)
        if not simple:
            self.channel_blocks(lambda c, masks: finish(c, masks, self.looped(base, windows, c, masks)))
            return
        inside: ir.Value = ir.Constant(ir.IntType(1), True)
        for axis, (_, first, last) in zip(self.axes, windows, strict=True):
            inside = b.ir.and_(inside, b.int(first).equals(0))
            inside = b.ir.and_(inside, b.int(last).equals(axis.window))
        with b.if_else(inside, likely=True) as (then, otherwise):
            with then:
                self.channel_blocks(lambda c, masks: finish(c, masks, self.unrolled(base, c, masks)))
            with otherwise:
                self.channel_blocks(lambda c, masks: finish(c, masks, self.looped(base, windows, c, masks)))

    def channel_blocks(self, body) -> None:
        """Calls `body(first channel, masks)` for blocks of a few vectors that cover all channels."""
        b, lanes, channels = self.b, self.lanes, self.channels
        wide = lanes * MOST_ACCUMULATORS
        if isinstance(channels, int):
            whole = channels // wide * wide
            if whole == wide:
                body(0, [None] * MOST_ACCUMULATORS)
            elif whole:
                with b.loop(0, whole, wide) as c:
                    body(c, [None] * MOST_ACCUMULATORS)
            if channels > whole:
                full, rest = divmod(channels - whole, lanes)
                body(whole, [None] * full + ([b.tail_mask(rest, lanes)] if rest else []))
            return
        b.vector_loop(0, channels, lanes, lambda c, mask, slot: body(c, [mask]))

    def load(self, at, masks: list) -> list[ir.Value]:
        return [self.b.load(self.source, at + j * self.lanes, self.lanes, m) for j, m in enumerate(masks)]

    def unrolled(self, base, channel, masks: list) -> list[ir.Value]:
        """The window's result where all of it lies inside of the source."""
        offsets = [0]
        for axis in self.axes:
            offsets = [o + t * axis.window_dilation * axis.source_stride for o in offsets for t in range(axis.window)]
        values: list[ir.Value] = []
        for offset in offsets:
            taps = self.load(base + offset + channel, masks)
            values = taps if not values else [self.combine(x, y) for x, y in zip(values, taps, strict=True)]
        return values

    def looped(self, base, windows, channel, masks: list) -> list[ir.Value]:
        """The window's result by loops over the taps inside of the source."""
        b = self.b
        start = b.constant(self.identity, self.dtype, self.lanes)
        accumulators = [b.variable(start) for _ in masks]

        def walk(remaining: list, at) -> None:
            if not remaining:
                for variable, tap in zip(accumulators, self.load(at + channel, masks), strict=True):
                    variable.set(self.combine(variable.get(), tap))
                return
            (axis, (begin, first, last)), *rest = remaining
            with b.loop(first, last) as t:
                if axis.base_dilation == 1:
                    walk(rest, at + t * axis.window_dilation * axis.source_stride)
                    return
                place = begin + t * axis.window_dilation
                with b.if_then(b.int(place % axis.base_dilation).equals(0)):
                    walk(rest, at + place // axis.base_dilation * axis.source_stride)

        walk(list(zip(self.axes, windows, strict=True)), base)
        return [v.get() for v in accumulators]

    def epilogue(self, at, extra_bases, channel, masks: list, values: list) -> None:
        b, lanes = self.b, self.lanes
        rounded = self.dtype in ("float16", "bfloat16") and self.expression[1]
        for j, (value, mask) in enumerate(zip(values, masks, strict=True)):
            column = channel + j * lanes
            if rounded:
                value = b.from_memory(b.to_memory(value, self.dtype), self.dtype)
            operands = [value]
            for (pointer, strides), base in zip(self.extras, extra_bases, strict=True):
                if isinstance(strides[-1], int) and strides[-1] == 0:
                    operands.append(b.load_broadcast(pointer, base, lanes))
                else:
                    operands.append(b.load(pointer, base + column, lanes, mask))
            for pointer, result in zip(self.outputs, expressions.emit(b, self.expression, operands), strict=True):
                b.store(pointer, at + column, result, mask)


def render_pool(params, target) -> str:
    """LLVM IR of a pooling kernel."""
    return PoolKernel(params, target).render()
