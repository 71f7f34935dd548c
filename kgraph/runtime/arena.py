"""Where buffers lie in an arena: offsets such that buffers alive at the same time do not overlap, with a small peak."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Interval:
    """A buffer of `nbytes` that must keep its content from step `first` to step `last`, both included."""

    nbytes: int
    first: int
    last: int


def lower_bound(intervals: Sequence[Interval]) -> int:
    """The most bytes (each buffer rounded up to ALIGNMENT) alive at one step: no arena is smaller."""
    changes: dict[int, int] = {}
    for interval in intervals:
        size = _rounded(interval.nbytes)
        changes[interval.first] = changes.get(interval.first, 0) + size
        changes[interval.last + 1] = changes.get(interval.last + 1, 0) - size
    peak = alive = 0
    for step in sorted(changes):
        alive += changes[step]
        peak = max(peak, alive)
    return peak


def plan_arena(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Offsets (multiples of ALIGNMENT) of the buffers, in their order, and the size of the arena.

    Orders of placement are tried until one meets the lower bound, and the smallest arena is kept: by size, which suits
    a few large buffers of mixed lifetimes, by time, which suits chains, and by size times lifetime. Each buffer goes
    into the smallest gap that holds it (best fit).
    """
    bound = lower_bound(intervals)
    by_time = sorted(range(len(intervals)), key=lambda i: (intervals[i].first, -intervals[i].nbytes))
    by_size = sorted(range(len(intervals)), key=lambda i: (-intervals[i].nbytes, intervals[i].first))
    by_span = sorted(
        range(len(intervals)),
        key=lambda i: (-intervals[i].nbytes * (intervals[i].last - intervals[i].first + 1), intervals[i].first),
    )
    best: tuple[list[int], int] | None = None
    for order in (by_size, by_time, by_span):
        offsets, peak = _place(intervals, order)
        if best is None or peak < best[1]:
            best = offsets, peak
        if peak <= bound:
            break
    assert best is not None
    return best


def _place(intervals: Sequence[Interval], order: list[int]) -> tuple[list[int], int]:
    offsets = [0] * len(intervals)
    placed: list[tuple[int, int, int, int]] = []  # (offset, end, first, last), sorted by offset
    peak = 0
    for index in order:
        interval = intervals[index]
        size, first, last = _rounded(interval.nbytes), interval.first, interval.last
        if size == 0:
            continue
        position, chosen, smallest = 0, -1, 0
        for offset, end, other_first, other_last in placed:
            if other_first > last or other_last < first:
                continue
            gap = offset - position
            if gap >= size and (chosen < 0 or gap < smallest):
                chosen, smallest = position, gap
            if end > position:
                position = end
        if chosen < 0:
            chosen = position
        offsets[index] = chosen
        peak = max(peak, chosen + size)
        bisect.insort(placed, (chosen, chosen + size, first, last))
    return offsets, peak


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
