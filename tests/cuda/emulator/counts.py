"""Counts what a launch asks of the hardware: instructions of warps, sectors of memory, passes of shared memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes that memory is read and written in
BANKS = 32  # of shared memory, of four bytes each


@dataclass
class Counts:
    """Of one launch of `grid` blocks of `block` threads.

    instructions: of warps, by the first part of the opcode and the type (`fma.f32`). sectors: that warps ask for at
    loads and stores of global memory, each counted once per instruction. bytes: that threads ask for there.
    touched: bytes of all different sectors. passes: of shared memory, one for each word that an instruction of a warp
    wants of the same bank; accesses: instructions of warps on shared memory. local_bytes: of a thread's arrays that are
    not in registers. Dicts are by "ld" and "st".
    """

    grid: int
    block: int
    instructions: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)
    passes: int = 0
    accesses: int = 0
    local_bytes: int = 0
    _seen: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"ld": [], "st": []}, repr=False)

    def access_global(self, what: str, at: np.ndarray, width: int, warp: np.ndarray) -> None:
        """at: addresses. width: bytes of each. warp: of each thread."""
        first = at // SECTOR
        wanted = np.unique(warp.astype(np.uint64) << np.uint64(40) | first)
        self.sectors[what] += len(wanted) * max(width // SECTOR, 1)
        self.bytes[what] += len(at) * width
        self._seen[what].append(np.unique(first))

    def access_shared(self, at: np.ndarray, warp: np.ndarray) -> None:
        words = np.unique(warp.astype(np.uint64) << np.uint64(32) | at // 4)
        banks = (words >> np.uint64(32)) * np.uint64(BANKS) + words % BANKS
        of_bank, count = np.unique(banks, return_counts=True)
        order = of_bank // BANKS
        starts = np.flatnonzero(np.diff(order, prepend=order[:1] - 1))
        self.passes += int(np.maximum.reduceat(count, starts).sum())
        self.accesses += len(starts)

    def finish(self) -> None:
        for what, seen in self._seen.items():
            if seen:
                self.touched[what] = len(np.unique(np.concatenate(seen))) * SECTOR
        self._seen = {"ld": [], "st": []}
