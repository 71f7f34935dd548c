"""Tiles of positions of windows, for kernels whose geometry is known at compile time.

A tile is a strip of neighbouring positions along each windowed axis. A thread reads the elements that its tile meets
into an array once, for all positions and taps that meet them. The array is in registers, since all loops over it are
unrolled. Tiles that meet nothing but elements of the image are told from those at its border once, so that they read
without tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from kgraph.codegen.cuda.conv_geometry import inside, period
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.ir import Dim, np_dtype
from kgraph.ir.dims import ceil_div, product

TILES = ((4, 4), (2, 4), (1, 4), (1, 2))  # positions of a thread along the two innermost axes
FEW = 8  # channels, below which threads had better be neighbours along the innermost axis
THREADS = 256  # that a multiprocessor is left by tiles, if there are as many
MOST_UNROLLED = 400  # pairs of a position and a tap
MOST_REGISTERS = 140  # for arrays, of four bytes
BLOCK = 128  # threads: where each has many registers, more of such blocks fit


class Strip(NamedTuple):
    """Positions of a thread along one axis: `length` of them, from a multiple of it on.

    window, stride, reach: taps, distance of positions and of taps. dilation: of the image. rest: what minus the padding
    is beyond a whole element.
    """

    length: int
    window: int
    stride: int
    reach: int
    dilation: int
    rest: int

    @staticmethod
    def make(length: int, window: int, stride: int, reach: int, dilation: int, low: int) -> Strip:
        """A strip of at least `length` positions, such that each begins at a whole element. low: padding."""
        multiple = period(stride, dilation)
        return Strip(ceil_div(length, multiple) * multiple, window, stride, reach, dilation, -low % dilation)

    @property
    def step(self) -> int:
        """Elements from one strip to the next."""
        return self.length * self.stride // self.dilation

    @property
    def span(self) -> tuple[int, int]:
        """The first element that the strip meets, and how many there are from there to the last one."""
        taps = itertools.product(range(self.length), range(self.window))
        places = [position * self.stride + tap * self.reach + self.rest for position, tap in taps]
        met = [place // self.dilation for place in places if place % self.dilation == 0]
        return (min(met), max(met) - min(met) + 1) if met else (0, 1)


def choose_strips(
    geometry: Sequence[tuple], shape: Sequence, dtype: str, target, further: int = 0
) -> tuple[Strip, ...] | None:
    """The largest tile that leaves the multiprocessors enough threads, else the smallest one that is unrolled; None
    where there is none.

    geometry: (window, stride, reach, dilation, low padding) of each axis, as in `Strip`. shape: of the result, whose
    first axis is of images and whose last one of channels; sizes that are not known count as many. A thread has a
    number of `dtype` for each element and each position, and `further` ones.
    """
    if not geometry:
        return None
    few = isinstance(shape[-1], int) and shape[-1] < FEW
    chosen = None
    for tile in TILES:
        lengths = ((1,) * len(geometry) + (tile[::-1] if few else tile))[-len(geometry) :]
        strips = tuple(Strip.make(length, *along) for length, along in zip(lengths, geometry, strict=True))
        positions, taps = product([s.length for s in strips]), product([s.window for s in strips])
        if positions * taps > MOST_UNROLLED:
            continue
        numbers = positions + product([s.span[1] for s in strips]) + further
        if numbers * ceil_div(np_dtype(dtype).itemsize, 4) > MOST_REGISTERS:
            continue
        chosen = strips
        threads = threads_of(shape, strips)
        if isinstance(threads, Dim) or threads >= THREADS * target.num_sms:
            break
    return chosen


def threads_of(shape: Sequence, strips: Sequence[Strip]):
    """How many a result of this shape keeps busy."""
    tiles = product([ceil_div(n, s.length) for n, s in zip(shape[1:-1], strips, strict=True)])
    return shape[0] * tiles * shape[-1]


def block_of(target) -> int:
    """The threads of a block."""
    return min(target.block, BLOCK)


class Tile:
    """The tile of a thread. dtype: of the array of its elements.

    numbers: of the tile along each axis; begins: the first element it meets there, which may have wrapped.
    """

    def __init__(self, k: KernelSource, strips: Sequence[Strip], dtype: str):
        self.k, self.strips = k, strips
        self.spans = [strip.span[1] for strip in strips]
        self.size = product([strip.length for strip in strips])
        self.taps = product([strip.window for strip in strips])
        self.elements = k.local(dtype, product(self.spans))
        self.numbers: list[str] = []
        self.begins: list[str] = []

    def each(self, count: int):
        """A loop over numbers below `count`, which is unrolled."""
        return self.k.range(0, self.k.i(count), 1)

    def place(self, numbers: Sequence[str], starts: Sequence[str]) -> None:
        """Takes up the tile with these numbers. starts: the element that minus the padding is, along each axis."""
        k = self.k
        self.numbers = list(numbers)
        self.begins = [
            k.let(k.add(k.add(k.mul(number, s.step), start), s.span[0]), "begin")
            for number, start, s in zip(numbers, starts, self.strips, strict=True)
        ]

    def read(
        self,
        x: Operand,
        image: str,
        sizes: Sequence[str],
        channels: str,
        channel: str,
        convert: Callable[[str], str],
        outside: str,
    ) -> None:
        """Reads the elements of one channel of an image. convert: of what is read. outside: what other places hold."""
        k, begins = self.k, self.begins
        pixel = k.offset([image, *begins], [image, *sizes], [True] * (1 + len(sizes)))
        base = k.let(k.add(k.mul(pixel, channels), channel), "base")
        pitches = [channels]
        for size in sizes[:0:-1]:
            pitches.insert(0, k.let(k.mul(pitches[0], size), "pitch"))
        with self.each(product(self.spans)) as n:
            k.store(self.elements, n, outside)
        ends = [(begin, k.add(begin, span - 1)) for begin, span in zip(begins, self.spans)]
        with k.suite(f"if {' and '.join(inside(k, at, size) for pair, size in zip(ends, sizes) for at in pair)}:"):
            # In 64 bits every address is a sum of the one before it.
            at, pitches_64 = k.let(f"int64({base})"), [k.let(f"int64({pitch})", "pitch") for pitch in pitches]
            with ExitStack() as loops:
                number = ""
                for span, pitch in zip(self.spans, pitches_64):
                    n = loops.enter_context(self.each(span))
                    at = k.let(f"int64({at} + int64(int64({n}) * {pitch}))")
                    number = self._join(number, span, n)
                k.store(self.elements, number, convert(k.load(x, at)))
        with k.suite(f"elif {' and '.join(f'{size} > {k.i(0)}' for size in sizes)}:"), ExitStack() as loops:
            at, number, conditions = base, "", []
            for begin, size, span, pitch in zip(begins, sizes, self.spans, pitches):
                n = loops.enter_context(self.each(span))
                at = k.let(k.add(at, k.mul(n, pitch)))
                number = self._join(number, span, n)
                conditions.append(k.let(inside(k, k.add(begin, n), size), "inside"))
            # Any element in place of one that is not there costs less than a branch, if there is one.
            condition = k.let(" and ".join(conditions), "inside")
            value = k.load(x, k.let(f"({at} if {condition} else {channel})"))
            k.store(self.elements, number, f"({convert(value)} if {condition} else {outside})")

    @contextmanager
    def meetings(self) -> Iterator[tuple[str, str, str]]:
        """Loops over all positions and the taps that meet elements there: (position, tap, number of the element)."""
        position = tap = element = ""
        with ExitStack() as loops:
            for strip, span in zip(self.strips, self.spans):
                p = loops.enter_context(self.each(strip.length))
                t, at = loops.enter_context(self._taps(strip, p))
                position, tap = self._join(position, strip.length, p), self._join(tap, strip.window, t)
                element = self._join(element, span, at)
            yield position, tap, element

    def reduce(self, first: str, combine: Callable[[str, str], str]) -> Operand:
        """The windows' elements combined, by position in the tile. One axis after the other: what is made of the taps
        along the first ones serves all positions along the others. first: what no elements give."""
        k, source = self.k, self.elements
        lengths = [strip.length for strip in self.strips]
        for axis, strip in enumerate(self.strips):
            before, behind = product(lengths[:axis]), product(self.spans[axis + 1 :])
            result = k.local(source.dtype, before * strip.length * behind)
            with ExitStack() as loops:
                b, p, a = (loops.enter_context(self.each(n)) for n in (before, strip.length, behind))
                to = k.let(k.add(k.mul(k.add(k.mul(b, strip.length), p), behind), a))
                k.store(result, to, first)
                with self._taps(strip, p) as (_, element):
                    at = k.add(k.mul(k.add(k.mul(b, self.spans[axis]), element), behind), a)
                    k.store(result, to, combine(k.load(result, to), k.load(source, at)))
            source = result
        return source

    @contextmanager
    def _taps(self, strip: Strip, position: str) -> Iterator[tuple[str, str]]:
        """A loop over the taps that meet elements at a position along one axis: (tap, element)."""
        k = self.k
        with ExitStack() as loops:
            tap = loops.enter_context(self.each(strip.window))
            at = k.let(k.add(k.add(k.mul(position, strip.stride), k.mul(tap, strip.reach)), strip.rest))
            if strip.dilation > 1:
                loops.enter_context(k.suite(f"if {k.mod(at, strip.dilation)} == {k.i(0)}:"))
                at = k.div(at, strip.dilation)
            yield tap, k.let(k.sub(at, strip.span[0]))

    @contextmanager
    def positions(self, outs: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Loops over the positions that are there: (number in the tile, place along each axis). outs: their numbers."""
        k, position, places = self.k, "", []
        with ExitStack() as loops:
            for number, strip, out in zip(self.numbers, self.strips, outs):
                p = loops.enter_context(self.each(strip.length))
                position = self._join(position, strip.length, p)
                places.append(k.let(k.add(k.mul(number, strip.length), p), "at"))
                if strip.length > 1:
                    loops.enter_context(k.suite(f"if {places[-1]} < {out}:"))
            yield position, places

    @contextmanager
    def all_positions(self, outs: Sequence[str]) -> Iterator[tuple[str, list[str], str]]:
        """Loops over all positions: what `positions` gives, and the condition that they are there."""
        k, position, places, conditions = self.k, "", [], []
        with ExitStack() as loops:
            for number, strip, out in zip(self.numbers, self.strips, outs):
                p = loops.enter_context(self.each(strip.length))
                position = self._join(position, strip.length, p)
                places.append(k.let(k.add(k.mul(number, strip.length), p), "at"))
                conditions.append(f"{places[-1]} < {out}")
            yield position, places, k.let(" and ".join(conditions), "inside")

    def _join(self, number: str, size: int, further: str) -> str:
        """The number in an array that has one more axis."""
        k = self.k
        return k.let(k.add(k.mul(number, size), further) if number else further)


def at_least_1(k: KernelSource, n: str) -> str:
    """A size that is divided by: Numba tests whether a divisor is 0 unless it can see that it is not."""
    return k.let(f"({n} if {n} > {k.i(1)} else {k.i(1)})")


__all__ = ["Strip", "Tile", "at_least_1", "block_of", "choose_strips", "threads_of"]
