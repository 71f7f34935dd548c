"""Which steps are shared between threads, and where all threads must meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# What one thread does in a nanosecond, roughly: between matrix products (100) and scalar code (2), and memory between
# second-level cache and DRAM. Too low is the safer side: sharing a short step costs less than not sharing a long one.
_FLOPS_PER_NS = 40.0
_BYTES_PER_NS = 16.0
# A thread is not worth having for less than this.
_NS_PER_THREAD = 1500.0
_FORK_NS = 4000.0
# Each thread adds this to a meeting: all of them count on one cache line.
_MEETING_NS_PER_THREAD = 150.0
# More chunks than threads balance the load, but each should be worth its claim and the kernel's set-up.
_NS_PER_CHUNK = 15000.0
_MAX_CHUNKS_PER_THREAD = 4
# Long extents are cut at multiples of this, so that chunks begin on cache lines and vector tails are rare.
_GRAIN = 64
_MIN_GRAINS_PER_CHUNK = 16
# So many grains that share work, or a multiple of the threads, are as good as even.
_ENOUGH_GRAINS_PER_THREAD = 8


@dataclass
class StepCost:
    """What a step does: flops and bytes in total, and units that can be shared out.

    grain: so many units in a row share what the first one of a chunk makes; 0 as 1.
    """

    flops: int
    bytes: int
    extent: int
    grain: int = 0

    @property
    def nanoseconds(self) -> float:
        """Estimated time on one thread."""
        return max(self.flops / _FLOPS_PER_NS, self.bytes / _BYTES_PER_NS)


def choose_threads(costs: Iterable[StepCost], limit: int) -> list[int]:
    """Threads of each step, at most `limit`. All 1 where the fork would cost more than it saves."""
    out = []
    saved = 0.0
    for cost in costs:
        time = cost.nanoseconds
        # The square root minimises time / threads + threads * _MEETING_NS_PER_THREAD.
        best = int((time / _MEETING_NS_PER_THREAD) ** 0.5)
        threads = min(limit, cost.extent, int(time / _NS_PER_THREAD), best)
        threads = max(threads, 1)
        if threads > 1:
            saved += time * (1 - 1 / threads) - threads * _MEETING_NS_PER_THREAD
        out.append(threads)
    return out if saved > _FORK_NS else [1] * len(out)


def choose_chunks(cost: StepCost, threads: int) -> tuple[int, int]:
    """(chunks per thread, grain) of a step that `threads` threads share; no chunk is empty."""
    if threads == 1:
        return 1, 1
    chunks = int(cost.nanoseconds / (threads * _NS_PER_CHUNK))
    if cost.grain > 1:
        grains = cost.extent // cost.grain
        if grains and (grains % threads == 0 or grains >= _ENOUGH_GRAINS_PER_THREAD * threads):
            return max(1, min(chunks, _MAX_CHUNKS_PER_THREAD, grains // threads)), cost.grain
        # Few and uneven: a range for each thread is cut through a grain at its ends only.
        return 1, 1
    chunks = max(1, min(chunks, _MAX_CHUNKS_PER_THREAD, cost.extent // threads))
    coarse = cost.extent // (_GRAIN * threads * chunks) >= _MIN_GRAINS_PER_CHUNK
    return chunks, _GRAIN if coarse else 1


Range = tuple[int, int]


def place_barriers(threads: list[int], reads: list[list[Range]], writes: list[list[Range]]) -> list[bool]:
    """For each step whether all threads must meet before it.

    reads, writes: byte ranges [begin, end) of each step in one address space of all memory that steps write. Steps on
    one thread all run on thread 0, in order; any two other steps that touch the same bytes, one of them writing, must
    have a barrier in between.
    """
    barriers = []
    # Accesses since the last barrier: by all threads, and by thread 0 alone.
    shared_reads: list[Range] = []
    shared_writes: list[Range] = []
    own_reads: list[Range] = []
    own_writes: list[Range] = []
    for n, read, write in zip(threads, reads, writes):
        conflict = _overlap(write, shared_reads) or _overlap(write, shared_writes) or _overlap(read, shared_writes)
        if n > 1:
            conflict = (
                conflict or _overlap(write, own_reads) or _overlap(write, own_writes) or _overlap(read, own_writes)
            )
        if conflict:
            for ranges in (shared_reads, shared_writes, own_reads, own_writes):
                ranges.clear()
        barriers.append(conflict)
        (shared_reads if n > 1 else own_reads).extend(read)
        (shared_writes if n > 1 else own_writes).extend(write)
    return barriers


def _overlap(a: list[Range], b: list[Range]) -> bool:
    for first, end in a:
        for other, other_end in b:
            if first < other_end and other < end:
                return True
    return False
