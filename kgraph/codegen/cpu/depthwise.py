"""Depthwise convolutions: every channel by itself, vectors along the channels, with a fused epilogue.

One unit of work is one row of output positions, of a block of channels where the weights of all would not stay in the
first-level cache from one row to the next. A tile is some neighbouring positions times one vector of channels; each
input vector is loaded once per row of the window and used for all positions that it meets. Nothing is copied: rows of
the window outside of the image are left out of the loop over rows, and positions at the sides have code of their own
without the taps that are outside. Images of symbolic width test each tap of the positions at the sides.

With input dilation (the cotangent of the input of a strided convolution) rows and positions of a tile meet the taps of
their phase only, see `conv_geometry`: tiles are whole periods, so which taps these are is known to the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from kgraph.codegen.cpu.builder import Int, KernelBuilder, itemsize
from kgraph.codegen.cpu.conv_geometry import axis_phases
from kgraph.codegen.cpu.epilogue import Epilogue, Finisher, Parts
from kgraph.codegen.cpu.pack import accumulate_dtype, widen
from kgraph.codegen.cpu.products import multiply_add
from kgraph.codegen.cpu.strided import SizeTable, resolve, resolve_all
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir import Dim, Node
from kgraph.ir.dims import product

MOST_SEGMENTS = 8  # kinds of tiles along a row, beyond which sides test their taps at run time
MOST_UNROLLED = 49  # taps along a row whose code is written out
MOST_PHASES = 4  # per axis
CACHE_LINE = 64
BLOCKED_IMAGE = 1 << 20  # bytes, up to which an image is walked through once for each block of channels
LARGE_IMAGE = 1 << 20  # bytes, from which on the next tile's input is asked for ahead of its use


def takes(node: Node) -> bool:
    """Whether a grouped conv node has one channel per group, and no input dilation that makes many phases."""
    w, attrs = node.inputs[1], node.attrs
    for stride, dilation, (low, _) in zip(attrs["strides"], attrs["lhs_dilation"], attrs["padding"], strict=True):
        if dilation != 1 and (isinstance(low, Dim) or dilation // math.gcd(stride, dilation) > MOST_PHASES):
            return False
    return w.shape[-2] == 1 and w.shape[-3] <= MOST_UNROLLED


class DepthwisePlan(NamedTuple):
    """Params of `render_depthwise`: three spatial axes. Sizes are `int` or ("size", slot).

    origins: minus the padding below, per axis. window: taps; steps, reaches, dilations: strides, window dilations and
    input dilations. multiplier: filters per channel. positions: of a tile. prefetch: whether input is asked for ahead.
    """

    accumulate: str
    dtype: str
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    channels: int
    multiplier: int
    window: tuple
    steps: tuple
    reaches: tuple
    dilations: tuple
    positions: int
    block: int
    prefetch: bool
    lanes: int
    epilogue: tuple


def lower_parts(parts: Parts, target) -> list[KernelCall]:
    """The call that computes the node."""
    node = parts.node
    x, w = node.inputs
    attrs, missing = node.attrs, 5 - x.type.rank
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    channels, filters = x.shape[-1], w.shape[-1]
    table = SizeTable()

    def three(values, fill) -> tuple:
        return (fill,) * missing + tuple(values)

    lows = [p[0] for p in attrs["padding"]]
    dilations = three(attrs["lhs_dilation"], 1)
    period = dilations[2] // math.gcd(dilations[2], attrs["strides"][-1])
    positions = 7 if target.num_vector_registers >= 32 else 4
    if period > 1:
        positions = -(-positions // period) * period
    out_sizes, block = three(parts.result.shape[1:-1], 1), _block(node, target)
    plan = DepthwisePlan(
        accumulate=accumulate,
        dtype=x.dtype,
        sizes=table.all(three(x.shape[1:-1], 1)),
        out_sizes=table.all(out_sizes),
        origins=table.all(three([-low for low in lows], 0)),
        channels=channels,
        multiplier=filters // channels,
        window=three(w.shape[:-2], 1),
        steps=three(attrs["strides"], 1),
        reaches=three(attrs["rhs_dilation"], 1),
        dilations=dilations,
        positions=positions,
        block=block,
        prefetch=_reads_ahead(node),
        lanes=target.vector_bytes // itemsize(accumulate),
        epilogue=tuple(parts.epilogue(accumulate, filters, 2)),
    )
    units = x.shape[0] * (out_sizes[0] * out_sizes[1]) * (filters // block)
    met = x.shape[1:-1] if product(dilations) > 1 else out_sizes  # positions that meet every tap, about
    return [
        KernelCall(
            spec=KernelSpec("depthwise" + parts.name, "kgraph.codegen.cpu.depthwise:render_depthwise", tuple(plan)),
            operands=[*parts.operands, *(v for _, v in parts.extras), *parts.outputs],
            outputs=len(parts.outputs),
            sizes=list(table.values),
            extent=units,
            flops=2 * x.shape[0] * product(met) * filters * product(plan.window),
            bytes=x.type.nbytes + w.type.nbytes + sum(v.type.nbytes for v in parts.outputs),
            scratch_bytes=plan.positions * target.vector_bytes,
            notes={"inplace": parts.inplace(2)},
        )
    ]


def _block(node: Node, target) -> int:
    """Filters of a unit: all, except where the weights of all would not stay in the first-level cache.

    Then a divisor in whole cache lines, of which the rows that a row of results reads and their weights take no more
    than half that cache; large images, which come from memory row by row, are not taken apart.
    """
    x, w = node.inputs
    filters, spatial, taps = w.shape[-1], x.shape[1:-1], product(w.shape[:-2])
    size, room = itemsize(x.dtype), target.l1_bytes // 2
    if any(isinstance(n, Dim) for n in spatial) or product(spatial) * filters * size > BLOCKED_IMAGE:
        return filters
    if taps * filters * size <= room:
        return filters
    fitting = room // ((product(w.shape[:-3]) * spatial[-1] + taps) * size)
    line = CACHE_LINE // size
    blocks = [n for n in range(line, filters, line) if filters % n == 0]
    return max([n for n in blocks if n <= fitting], default=min(blocks, default=filters))


def _reads_ahead(node: Node) -> bool:
    """Whether input is asked for ahead: where images come from memory. Strides would make too many requests."""
    x, attrs = node.inputs[0], node.attrs
    if any(isinstance(n, Dim) for n in x.shape[1:]) or any(s != 1 for s in (*attrs["strides"], *attrs["lhs_dilation"])):
        return False
    return product(x.shape[1:]) * itemsize(x.dtype) >= LARGE_IMAGE


def render_depthwise(params: tuple, target) -> str:
    """Kernel (x, weight, extras..., outputs...); see `DepthwisePlan`."""
    b = KernelBuilder("depthwise", target)
    _Depthwise(b, DepthwisePlan(*params)).emit()
    return b.ir_text()


class _Taps(NamedTuple):
    """What one position meets along an axis: for t in [lo, hi) tap `first_tap + t * tap_step` falls on input element
    `start + t * reach`."""

    lo: Int | int
    hi: Int | int
    start: Int | int
    reach: int
    first_tap: Int | int
    tap_step: int


class _Depthwise:
    """Emits the loops of a depthwise convolution."""

    def __init__(self, b: KernelBuilder, plan: DepthwisePlan):
        self.b, self.plan = b, plan
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.origins = resolve_all(b, plan.origins)
        self.x, self.weight = b.operand(0, plan.dtype), b.operand(1, plan.dtype)
        self.filters = plan.channels * plan.multiplier
        self.epilogue = Epilogue(*plan.epilogue)
        self.finisher = Finisher(b, self.epilogue, plan.accumulate, plan.lanes, (0, 1))

    def emit(self) -> None:
        b = self.b
        blocks = self.filters // self.plan.block
        with b.loop(b.begin, b.end) as unit:
            row, rest = unit % self.out_sizes[1], unit // self.out_sizes[1]
            plane, rest = rest % self.out_sizes[0], rest // self.out_sizes[0]
            block, self.image = (0, rest) if blocks == 1 else (rest % blocks, rest // blocks)
            self.taps = [self._axis_taps(axis, at) for axis, at in ((0, plane), (1, row))]
            self.first_filter = block * self.plan.block
            self.first_pixel = ((self.image * self.out_sizes[0] + plane) * self.out_sizes[1] + row) * self.out_sizes[2]
            segments = self._segments()
            if segments is None:
                self._dynamic_row()
            else:
                for first, count, size, taps in segments:
                    self._repeat(first, count, size, lambda p, k, taps=taps: taps[p][k])

    def _axis_taps(self, axis: int, position) -> _Taps:
        """The taps along `axis` that `position` meets inside of the image."""
        b, plan = self.b, self.plan
        low = None if plan.dilations[axis] == 1 else -plan.origins[axis]
        phases = axis_phases(plan.window[axis], plan.steps[axis], low, plan.dilations[axis], plan.reaches[axis])
        number, turn = position % len(phases), position // len(phases)

        def pick(values: list):
            chosen = values[0]
            for n, value in enumerate(values[1:], 1):
                if value is not chosen and value != chosen:
                    here = b.int(number).equals(n)
                    chosen = Int(b, b.ir.select(here, b.i64(value), b.i64(chosen)))
            return chosen

        origin = self.origins[axis] if low is None else pick([p.origin for p in phases])
        start, reach = turn * phases[0].step + origin, phases[0].reach
        count = pick([p.taps for p in phases])
        lo = b.min(b.ceil_div(b.max(0 - start, 0), reach), count)
        hi = b.min(b.ceil_div(b.max(self.sizes[axis] - start, 0), reach), count)
        return _Taps(lo, hi, start, reach, pick([p.first_tap for p in phases]), phases[0].tap_step)

    def _repeat(self, first, count, size: int, present: Callable) -> None:
        """`count` tiles of one kind, the first at position `first`."""
        if isinstance(count, int) and count == 1:
            self._tile(first, size, present)
        else:
            with self.b.loop(first, first + count * size, size) as position:
                self._tile(position, size, present)

    def _segments(self) -> list[tuple] | None:
        """(first position, tiles, positions of a tile, which taps are inside): a row of static width in tiles."""
        plan = self.plan
        width, out_width, origin = self.sizes[2], self.out_sizes[2], self.origins[2]
        if not (isinstance(width, int) and isinstance(out_width, int) and isinstance(origin, int)):
            return None
        segments: list[list] = []
        position = 0
        while position < out_width:
            size = min(plan.positions, out_width - position)
            starts = [(position + p) * plan.steps[2] + origin for p in range(size)]
            taps = tuple(
                tuple(self._meets(start + k * plan.reaches[2], width) for k in range(plan.window[2]))
                for start in starts
            )
            if segments and segments[-1][2:] == [size, taps]:
                segments[-1][1] += 1
            else:
                segments.append([position, 1, size, taps])
            position += size
        return [tuple(s) for s in segments] if len(segments) <= MOST_SEGMENTS else None

    def _meets(self, at: int, width: int) -> bool:
        """Whether place `at` of a row of the dilated image is an element of the image."""
        dilation = self.plan.dilations[2]
        return at % dilation == 0 and 0 <= at // dilation < width

    def _dynamic_row(self) -> None:
        """Positions at the sides one by one, with tests; those between in whole tiles, then singly."""
        b, plan = self.b, self.plan
        step, reach, window, origin = plan.steps[2], plan.reaches[2], plan.window[2], self.origins[2]
        out_width = self.out_sizes[2]
        dilation = plan.dilations[2]
        period = dilation // math.gcd(dilation, step)
        # All taps are inside from `inner` on (first tap not below 0) and before `outer` (last tap below the width).
        inner = b.ceil_div(b.ceil_div(b.max(0 - origin, 0), step), period) * period
        inner = b.min(inner, out_width)
        last_tap = (window - 1) * reach
        extent = self.sizes[2] if dilation == 1 else (self.sizes[2] - 1) * dilation + 1
        outer = b.min(b.ceil_div(b.max(extent - last_tap - origin, 0), step), out_width)
        outer = b.max(outer, inner)
        size = plan.positions
        tiles = (outer - inner) // size
        whole = inner + tiles * size
        always = lambda p, k: dilation == 1 or (p * step + plan.origins[2] + k * reach) % dilation == 0
        for first, stop, width, present in (
            (0, inner, 1, None),
            (inner, whole, size, always),
            (whole, outer, 1, always if dilation == 1 else None),
            (outer, out_width, 1, None),
        ):
            with b.loop(first, stop, width) as position:
                self._tile(position, width, present)

    def _tile(self, position, size: int, present: Callable | None) -> None:
        """`size` positions from `position` on, all channels. present(p, k): whether position p meets tap k inside of
        the image; None tests it at run time."""
        b, plan = self.b, self.plan

        def channels(place, mask, slot) -> None:
            c = self.first_filter + place
            zero = b.constant(0, plan.accumulate, plan.lanes)
            acc = [b.variable(zero) for _ in range(size)]
            deep, high = self.taps
            if plan.prefetch:
                self._prefetch(position, size, c)
            with b.loop(deep.lo, deep.hi) as td, b.loop(high.lo, high.hi) as th:
                d, h = deep.start + td * deep.reach, high.start + th * high.reach
                kd, kh = deep.first_tap + td * deep.tap_step, high.first_tap + th * high.tap_step
                line = ((self.image * self.sizes[0] + d) * self.sizes[1] + h) * self.sizes[2]
                self._row(acc, line, position, (kd * plan.window[1] + kh) * plan.window[2], c, mask, present)
            buffers, sizes = b.function.args[:2]
            if self.epilogue.in_registers:
                bound = self.epilogue.bind(b, buffers, lambda e: resolve(b, e), c, [mask], plan.lanes)
                for p in range(size):
                    bound.apply((self.first_pixel + position + p, [acc[p].get()]))
                return
            sums = b.scratch(plan.accumulate)
            for p in range(size):
                b.store(sums, p * plan.lanes, acc[p].get())
            pixel, masked = self.first_pixel + position, mask is not None
            self.finisher.call(buffers, sizes, sums, pixel, c, self.filters - c, (1, size), 1, masked)

        b.vector_loop(0, plan.block, plan.lanes, channels)

    def _prefetch(self, position, size: int, c) -> None:
        """Asks for the input of the next tile, on the row that no earlier row of positions has met."""
        b, plan = self.b, self.plan
        deep, high = self.taps
        d, h = (axis.start + (axis.hi - 1) * axis.reach for axis in (deep, high))
        line = ((self.image * self.sizes[0] + d) * self.sizes[1] + h) * self.sizes[2]
        following = position + size + ((plan.window[2] - 1) * plan.reaches[2] + self.origins[2])
        for element in range(size):
            b.prefetch(self.x, (line + (following + element)) * plan.channels + c // plan.multiplier)

    def _row(self, acc: list, line, position, taps, c, mask, present) -> None:
        """Adds one row of the window, with tap number `taps` first and on input row `line`, to positions of a tile."""
        b, plan = self.b, self.plan
        step, dilation = plan.steps[2], plan.dilations[2]
        # Input elements are counted from `first`, which may lie outside of the image. With dilation the origin is
        # static, and tiles begin with whole periods.
        first, origin = position * step + self.origins[2], 0
        if dilation != 1:
            period = dilation // math.gcd(dilation, step)
            first, origin = position // period * (period * step // dilation), plan.origins[2]
        weights: dict[int, object] = {}
        inputs: dict[int, object] = {}

        def load_weight(k: int):
            value = b.load(self.weight, (taps + k) * self.filters + c, plan.lanes, mask)
            return widen(b, value, plan.dtype, plan.accumulate)

        def weight(k: int):
            if k not in weights:
                weights[k] = load_weight(k)
            return weights[k]

        def element(offset: int):
            if offset not in inputs:
                inputs[offset] = self._load(line + first + offset, c, mask)
            return inputs[offset]

        for k in range(plan.window[2]):
            for p, variable in enumerate(acc):
                if present is None:
                    place = b.int((position + p) * step + self.origins[2] + k * plan.reaches[2])
                    at = place // dilation
                    inside = b.ir.and_(place >= 0, b.int(at) < self.sizes[2])
                    if dilation > 1:
                        inside = b.ir.and_(inside, (place % dilation).equals(0))
                    with b.if_then(inside):
                        variable.set(multiply_add(b, self._load(line + at, c, mask), load_weight(k), variable.get()))
                elif present(p, k):
                    offset = (origin + p * step + k * plan.reaches[2]) // dilation
                    variable.set(multiply_add(b, element(offset), weight(k), variable.get()))

    def _load(self, pixel, c, mask):
        """The channels that filters c, c + 1, ... read, of one input pixel."""
        b, plan = self.b, self.plan
        at = self.x + pixel * plan.channels
        if plan.multiplier == 1:
            value = b.load(at, c, plan.lanes, mask)
        else:
            # Lanes beyond the last filter read the last channel; their results are not stored.
            scalars = [
                b.load(at, b.min(Int(b, b.i64(c)) + lane, self.filters - 1) // plan.multiplier)
                for lane in range(plan.lanes)
            ]
            value = b.vector(scalars)
        return widen(b, value, plan.dtype, plan.accumulate)
