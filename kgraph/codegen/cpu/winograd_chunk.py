"""Filters that a Winograd kernel transforms itself: those of one panel, a chunk of the channels at a time.

Transformed filters take 16 or 36 numbers for 9 taps. Where a model's filters come from memory, to read the taps and
transform them costs less than to read what was made of them ahead of calls, and the taps need not be there twice.
"""

from __future__ import annotations

from fractions import Fraction

from llvmlite import ir

from kgraph.codegen.cpu.builder import PTR, KernelBuilder, Pointer
from kgraph.codegen.cpu.epilogue import subfunction
from kgraph.codegen.cpu.winograd_plan import DTYPE, WinogradPlan
from kgraph.codegen.cpu.winograd_transform import filter_transform
from kgraph.ops.winograd import TAPS

SHARE = 0.3  # of the second-level cache that a chunk of transformed filters takes


def chunk_of(channels: int, points: int, width: int, target) -> int:
    """Channels of a chunk: an equal part of all of them, for panels of `width` filters; 0 where there is none."""
    most = int(SHARE * target.l2_bytes) // (points * width * 4)
    parts = next((n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= most), 0)
    return channels // parts if parts else 0


class FilterTransform:
    """The code of the transform. The weight is packed in panels, a row for each tap and channel."""

    def __init__(self, b: KernelBuilder, plan: WinogradPlan, weight: Pointer, to: Pointer):
        """to: room for the transformed filters of a chunk, a matrix [channels of the chunk, width] for each point."""
        self.b, self.plan, self.weight, self.to = b, plan, weight, to
        self.pairs = tuple(Fraction(p) for p in plan.pairs)
        self.taps = TAPS**plan.axes
        self.functions: dict[int, ir.Function] = {}

    def first_row(self, panel, vectors: int, tap, channel) -> Pointer:
        """Where the row of a tap and a channel lies in a panel of so many vectors."""
        plan = self.plan
        at = self.weight + panel * (self.taps * plan.channels * plan.width)
        return at + (tap * plan.channels + channel) * (vectors * plan.lanes)

    def transform(self, panel, vectors: int, channel) -> None:
        """Transforms the filters of a panel for the chunk that begins at `channel`."""
        if vectors not in self.functions:
            self.functions[vectors] = self._function(vectors)
        at = self.first_row(panel, vectors, 0, channel)
        self.b.ir.call(self.functions[vectors], [at.value, self.to.value])

    def _function(self, vectors: int) -> ir.Function:
        b, plan, lanes, side = self.b, self.plan, self.plan.lanes, self.plan.side
        width = vectors * lanes
        tap_pitch = plan.channels * width
        with subfunction(b, f"transform_filters_{vectors}", [PTR] * 2) as function:
            taps, out = (Pointer(b, p, DTYPE, s) for p, s in zip(function.args, ("taps", "filters"), strict=True))
            with b.loop(0, plan.chunk * width, lanes) as at:
                g = [b.load(taps, at + tap * tap_pitch, lanes) for tap in range(self.taps)]
                if plan.axes == 2:
                    columns = [filter_transform(b, g[j::TAPS], self.pairs) for j in range(TAPS)]
                    rows = [filter_transform(b, [column[i] for column in columns], self.pairs) for i in range(side)]
                    transformed = [value for row in rows for value in row]
                else:
                    transformed = filter_transform(b, g, self.pairs)
                for point, value in enumerate(transformed):
                    b.store(out, at + point * plan.filters_matrix, value)
        return function
