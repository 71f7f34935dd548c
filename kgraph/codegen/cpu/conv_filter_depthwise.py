"""Cotangents of depthwise weights: for each tap the sum over all positions of input times cotangent, per channel.

A unit is one row of the window's taps, one vector of channels, and a chunk of rows of output positions; the sums of the
taps stay in registers. Chunks have a fixed length and their sums are added in order by a second kernel, so that results
do not depend on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder, itemsize
from kgraph.codegen.cpu.conv_filter_kernel import narrow, total_call
from kgraph.codegen.cpu.pack import accumulate_dtype, widen
from kgraph.codegen.cpu.products import multiply_add
from kgraph.codegen.cpu.strided import SizeTable, resolve, resolve_all
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product

CHUNK_POSITIONS = 1024  # of a chunk, about
MOST_TAPS = 24  # along a row of the window, whose sums are kept in registers
LEAST_SUMS = 9  # in registers, so that multiply-adds do not wait for each other


def takes(node: Node) -> bool:
    """Whether a conv_filter_gradient node is of a depthwise convolution with one filter per channel."""
    x, cotangent = node.inputs
    window, groups = node.attrs["window"], node.attrs["feature_groups"]
    channels = (x.shape[-1], cotangent.shape[-1])
    return groups > 1 and channels == (groups, groups) and window[-1] <= MOST_TAPS


class GradientPlan(NamedTuple):
    """Params of `render_sums`: three spatial axes. Sizes are `int` or ("size", slot).

    images: of the batch. origins: minus the padding below, per axis. window: taps; steps, reaches: strides and window
    dilations. chunk: rows of output positions that a unit sums.
    """

    accumulate: str
    dtype: str
    out_dtype: str
    images: int | tuple
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    channels: int
    window: tuple
    steps: tuple
    reaches: tuple
    chunk: int
    lanes: int


def lower(node: Node, target) -> list[KernelCall]:
    """One call that sums chunks, and one that adds the chunks' sums where there are several."""
    x, cotangent = node.inputs
    attrs, missing = node.attrs, 5 - x.type.rank
    accumulate = accumulate_dtype(x.dtype, node.output.dtype)
    lanes = target.vector_bytes // itemsize(accumulate)
    channels = x.shape[-1]

    def three(values, fill) -> tuple:
        return (fill,) * missing + tuple(values)

    out_sizes, window = three(cotangent.shape[1:-1], 1), three(attrs["window"], 1)
    rows = x.shape[0] * (out_sizes[0] * out_sizes[1])
    width = out_sizes[2]
    chunk = 16 if isinstance(width, Dim) else max(CHUNK_POSITIONS // max(width, 1), 1)
    chunks = ceil_div(rows, chunk)
    if isinstance(chunks, int):
        chunks = max(chunks, 1)
    single = isinstance(chunks, int) and chunks == 1
    partial = Temporary(TensorType((chunks, *node.output.shape), accumulate))
    table = SizeTable()
    plan = GradientPlan(
        accumulate=accumulate,
        dtype=x.dtype,
        out_dtype=node.output.dtype if single else accumulate,
        images=table(x.shape[0]),
        sizes=table.all(three(x.shape[1:-1], 1)),
        out_sizes=table.all(out_sizes),
        origins=table.all(three([-low for low, _ in attrs["padding"]], 0)),
        channels=channels,
        window=window,
        steps=three(attrs["strides"], 1),
        reaches=three(attrs["rhs_dilation"], 1),
        chunk=chunk,
        lanes=lanes,
    )
    sums = KernelCall(
        spec=KernelSpec(
            "depthwise_filter_gradient", "kgraph.codegen.cpu.conv_filter_depthwise:render_sums", tuple(plan)
        ),
        operands=[x, cotangent, node.output if single else partial],
        outputs=1,
        sizes=list(table.values),
        extent=chunks * (window[0] * window[1] * -(-channels // lanes)),
        flops=2 * rows * width * channels * product(window),
        bytes=x.type.nbytes + cotangent.type.nbytes,
    )
    if single:
        return [sums]
    return [sums, total_call(partial, node.output, chunks, target)]


def render_sums(params: tuple, target) -> str:
    """x[images, *sizes, channels], cotangent[images, *out_sizes, channels] -> sums[chunks, *window, channels]."""
    b = KernelBuilder("depthwise_filter_gradient", target)
    _Sums(b, GradientPlan(*params)).emit()
    return b.ir_text()


class _Sums:
    """Emits the loops over a chunk's positions."""

    def __init__(self, b: KernelBuilder, plan: GradientPlan):
        self.b, self.plan = b, plan
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.origins = resolve_all(b, plan.origins)
        self.x, self.cotangent = b.operand(0, plan.dtype), b.operand(1, plan.dtype)
        self.sums = b.operand(2, plan.out_dtype)
        self.taps = plan.window[2]
        # Neighbouring positions add to sums of their own.
        self.copies = -(-LEAST_SUMS // self.taps)

    def emit(self) -> None:
        b, plan, taps = self.b, self.plan, self.taps
        blocks = -(-plan.channels // plan.lanes)
        tap_rows = plan.window[0] * plan.window[1]
        rows = resolve(b, plan.images) * self.out_sizes[0] * self.out_sizes[1]
        inner, outer = self._inside()
        zero = b.constant(0, plan.accumulate, plan.lanes)
        with b.loop(b.begin, b.end) as unit:
            block, rest = unit % blocks, unit // blocks
            tap_row, chunk = rest % tap_rows, rest // tap_rows
            self.channel = b.int(b.i64(block)) * plan.lanes
            self.mask = None if plan.channels % plan.lanes == 0 else self._mask()
            acc = [[b.variable(zero) for _ in range(taps)] for _ in range(self.copies)]
            with b.loop(chunk * plan.chunk, b.min((chunk + 1) * plan.chunk, rows)) as row:
                self._row(row, tap_row, inner, outer, acc)
            first = (chunk * tap_rows + tap_row) * taps
            for k in range(taps):
                total = acc[0][k].get()
                for copy in acc[1:]:
                    total = b.add(total, copy[k].get())
                at = (first + k) * plan.channels + self.channel
                b.store(self.sums, at, narrow(b, total, plan.out_dtype), self.mask)

    def _mask(self):
        return self.b.tail_mask(self.plan.channels - self.channel, self.plan.lanes)

    def _inside(self) -> tuple:
        """[inner, outer): positions of a row all of whose taps lie inside of the image."""
        b, plan = self.b, self.plan
        step, origin, width = plan.steps[2], self.origins[2], self.out_sizes[2]
        last_tap = (self.taps - 1) * plan.reaches[2]
        inner = b.min(b.ceil_div(b.max(0 - origin, 0), step), width)
        outer = b.min(b.ceil_div(b.max(self.sizes[2] - last_tap - origin, 0), step), width)
        return inner, b.max(outer, inner)

    def _row(self, row, tap_row, inner, outer, acc: list) -> None:
        """Adds one row of output positions, where its row of taps meets the image."""
        b, plan = self.b, self.plan
        high, plane = row % self.out_sizes[1], row // self.out_sizes[1]
        deep, image = plane % self.out_sizes[0], plane // self.out_sizes[0]
        kh, kd = tap_row % plan.window[1], tap_row // plan.window[1]
        h = b.int(b.i64(high * plan.steps[1] + self.origins[1] + kh * plan.reaches[1]))
        d = b.int(b.i64(deep * plan.steps[0] + self.origins[0] + kd * plan.reaches[0]))
        inside = b.ir.and_(h >= 0, h < self.sizes[1])
        inside = b.ir.and_(inside, b.ir.and_(d >= 0, d < self.sizes[0]))
        width, copies = self.out_sizes[2], self.copies
        with b.if_then(inside):
            line = ((image * self.sizes[0] + d) * self.sizes[1] + h) * self.sizes[2]
            whole = inner + (outer - inner) // copies * copies
            for start, stop, count, tested in (
                (0, inner, 1, True),
                (inner, whole, copies, False),
                (whole, outer, 1, False),
                (outer, width, 1, True),
            ):
                if isinstance(start, int) and isinstance(stop, int) and start >= stop:
                    continue
                with b.loop(start, stop, count) as position:
                    self._positions(row * width + position, line, position, count, tested, acc)

    def _positions(self, pixel, line, position, count: int, tested: bool, acc: list) -> None:
        """Adds `count` neighbouring positions. tested: taps may lie outside of the image."""
        b, plan = self.b, self.plan
        first = b.int(b.i64(position * plan.steps[2] + self.origins[2]))
        loaded: dict[int, object] = {}
        for p in range(count):
            value = self._load(self.cotangent, pixel + p)
            for k in range(self.taps):
                offset = p * plan.steps[2] + k * plan.reaches[2]
                total = acc[p][k]
                if tested:
                    at = first + offset
                    with b.if_then(b.ir.and_(at >= 0, at < self.sizes[2])):
                        total.set(multiply_add(b, self._load(self.x, line + at), value, total.get()))
                    continue
                if offset not in loaded:
                    loaded[offset] = self._load(self.x, line + (first + offset))
                total.set(multiply_add(b, loaded[offset], value, total.get()))

    def _load(self, operand, pixel):
        """A unit's channels of one pixel, in the dtype of the sums."""
        b, plan = self.b, self.plan
        value = b.load(operand, pixel * plan.channels + self.channel, plan.lanes, self.mask)
        return widen(b, value, plan.dtype, plan.accumulate)
