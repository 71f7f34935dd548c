"""The geometry of a convolution, axis by axis: which input elements each output position meets, under which taps.

In the general case (stride s, input dilation ld, window dilation rd, padding low), output position o meets tap k at the
element (o * s + k * rd - low) / ld of the input, if that is a whole number. Positions with the same remainder modulo
the period ld / gcd(s, ld) meet the same taps: they form a *phase*, an ordinary convolution of its own. Without input
dilation there is one phase. So transposed convolutions multiply no zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class AxisPhase(NamedTuple):
    """One phase along one axis: position `q` of the phase is output position `phase + q * period`.

    It meets `taps` taps `first_tap`, `first_tap + tap_step`, ... Tap number t falls on the input element
    `q * step + origin + t * reach`. origin: `int`, or None where the padding is symbolic (then `-low`).
    """

    phase: int
    period: int
    first_tap: int
    tap_step: int
    taps: int
    step: int
    origin: int | None
    reach: int

    @property
    def grid(self) -> int:
        """Distance of input elements that are met at all; a copy of the input may leave out the others."""
        return math.gcd(self.step, self.reach if self.taps > 1 else 0)

    @property
    def copy_step(self) -> int:
        """`step` in elements of such a copy."""
        return self.step // self.grid

    @property
    def copy_reach(self) -> int:
        """`reach` in elements of such a copy."""
        return self.reach // self.grid if self.taps > 1 else 0

    def copy_extent(self, positions: int):
        """Elements of the copy that `positions` consecutive positions meet."""
        return (positions - 1) * self.copy_step + (max(self.taps, 1) - 1) * self.copy_reach + 1


def axis_phases(
    window: int, stride: int, low: int | None, input_dilation: int, window_dilation: int
) -> list[AxisPhase]:
    """The phases along one axis. low: padding before the first element; None if symbolic, without input dilation."""
    if input_dilation == 1:
        return [AxisPhase(0, 1, 0, 1, window, stride, None if low is None else -low, window_dilation)]
    if low is None:
        raise ValueError("input dilation needs a static padding")
    period = input_dilation // math.gcd(stride, input_dilation)
    tap_step = input_dilation // math.gcd(window_dilation, input_dilation)
    out = []
    for phase in range(period):
        start = phase * stride - low
        met = [k for k in range(min(window, tap_step)) if (start + k * window_dilation) % input_dilation == 0]
        first = met[0] if met else 0
        taps = len(range(first, window, tap_step)) if met else 0
        origin = (start + first * window_dilation) // input_dilation if met else 0
        reach = tap_step * window_dilation // input_dilation
        out.append(AxisPhase(phase, period, first, tap_step, taps, period * stride // input_dilation, origin, reach))
    return out
