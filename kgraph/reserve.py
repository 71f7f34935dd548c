"""Memory for prepared weights, asked for ahead.

The first touch of a page costs the system more than packing takes to fill it. What a model's weights need is known
before its graph is, and while Python traces the model, the other cores have nothing to do.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np

from kgraph.runtime.threads import get_num_threads

LINE = 64
# Below this, starting a thread is not worth it.
LEAST_BYTES = 8 << 20
_PAGE = 4096
# What is written at once: a large page.
_STEP = 2 << 20
_MADV_DONTNEED = 4


def aligned_bytes(nbytes: int) -> np.ndarray:
    """Memory that begins at a cache line; uint8[nbytes]."""
    block = np.empty(nbytes + LINE, np.uint8)
    first = -block.ctypes.data % LINE
    return block[first : first + nbytes]


def give_back() -> None:
    """Give the system the pages of freed memory that the C library keeps.

    Such as those of the arrays that a model's weights were set from. Prepared weights would not take their place, being
    blocks of their own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Reserve:
    """A block of memory whose pages a thread asks for, until somebody takes the block."""

    def __init__(self, nbytes: int):
        """nbytes: how much; too little for what it costs, or a single thread, gives none."""
        large = nbytes >= LEAST_BYTES and sys.platform.startswith("linux")
        wanted = large and get_num_threads() > 1
        if large and not wanted:
            give_back()
        self._block: np.ndarray | None = aligned_bytes(nbytes) if wanted else None
        self._taken = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="kgraph-reserve", daemon=True) if wanted else None
        if self._thread is not None:
            self._thread.start()

    def _ask(self) -> None:
        block = self._block
        if block is None:
            return
        give_back()
        # By writing, since to ask with `madvise` locks the map of all memory against the other threads.
        for start in range(0, block.nbytes, _STEP):
            if self._taken.is_set():
                return
            ctypes.memset(block.ctypes.data + start, 0, min(_STEP, block.nbytes - start))

    def take(self, nbytes: int) -> np.ndarray:
        """As much of the block as there is, up to `nbytes`; from now on it is the caller's. uint8."""
        self._taken.set()
        if self._thread is not None:
            self._thread.join()
        block, self._block = self._block, None
        if block is None or nbytes == 0:
            return aligned_bytes(0)
        left = -(-(block.ctypes.data + nbytes) // _PAGE) * _PAGE
        excess = (block.ctypes.data + block.nbytes) // _PAGE * _PAGE - left
        if excess > 0:
            madvise = ctypes.CDLL(None).madvise
            madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
            madvise(left, excess, _MADV_DONTNEED)
        return block[:nbytes]


__all__ = ["LINE", "Reserve", "aligned_bytes", "give_back"]
