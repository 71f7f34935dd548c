"""The counter-based generator Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A word of a stream is a function of the key, the stream's number and the word's place, so that any word can be computed
by itself. Words come in groups of GROUP: word w of the four that Philox makes of one counter stands at place
`LANES * w + counter % LANES` of group `counter // LANES`. So LANES neighbouring words are the same word of LANES
neighbouring counters, and vector code stores them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LANES = 16  # counters of a group
GROUP = 4 * LANES
ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
# What is added to the key in each round: [rounds, 2, 1].
_KEY_STEPS = np.arange(ROUNDS, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
# Words of an eager draw from which on the native kernel is worth its loading.
NATIVE_FROM = 1 << 12
_native: Callable[[tuple[int, int], int, int], np.ndarray] | None = None
# Counters that are computed at a time: the working set stays in the second-level cache.
_CHUNK = 4096


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four random words of each counter.

    counters: uint32 [4, n], the least significant word first. key: two words below 2**32. Gives uint32 [4, n].
    """
    # Words 0 and 2 are multiplied; the upper halves of the products, mixed with words 1 and 3, are multiplied next,
    # the lower halves are mixed in next, each in the other pair's place.
    even, odd = counters[0::2].copy(), counters[1::2]
    products = [np.empty(even.shape, "<u8") for _ in range(2)]
    halves = [p.view("<u4")[::-1] for p in products]
    keys = (np.array([[key[0]], [key[1]]], np.uint64) + _KEY_STEPS).astype(np.uint32)
    for number in range(ROUNDS):
        half = halves[number % 2]
        np.multiply(even, _MULTIPLIERS, out=products[number % 2])
        np.bitwise_xor(half[:, 1::2], odd, out=even)
        even ^= keys[number]
        odd = half[:, 0::2]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def words(key: tuple[int, int], count: int, stream: int = 0) -> np.ndarray:
    """The first `count` words of a stream, uint32; by the native kernel, once a large draw has loaded it."""
    global _native
    if _native is None and count >= NATIVE_FROM:
        try:
            from kgraph.codegen.eager import random_words
        except ImportError:  # there is no compiler
            random_words = words_by_numpy
        _native = random_words
    return (_native or words_by_numpy)(key, count, stream)


def words_by_numpy(key: tuple[int, int], count: int, stream: int = 0) -> np.ndarray:
    """The first `count` words of a stream, uint32: the definition that kernels are tested against."""
    groups = -(-count // GROUP)
    out = np.empty((groups, 4, LANES), np.uint32)
    step = _CHUNK // LANES
    for first in range(0, groups, step):
        part = out[first : first + step]
        numbers = np.arange(first * LANES, (first + len(part)) * LANES, dtype=np.uint64)
        counters = np.empty((4, len(numbers)), np.uint32)
        counters[0], counters[1], counters[2], counters[3] = numbers & 0xFFFFFFFF, numbers >> 32, stream, 0
        part[:] = philox(counters, key).reshape(4, len(part), LANES).transpose(1, 0, 2)
    return out.reshape(-1)[:count]
