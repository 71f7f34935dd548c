"""What kernels that move data share: sizes in the code, odometers over rows, row copies.

The rest, without code, is in `kgraph.codegen.strided`; it is given on from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.strided import (
    Axis,
    SizeTable,
    collapse,
    collapse_streams,
    dense_strides,
    split_rows,
    word,
)


def resolve(b: KernelBuilder, entry) -> int | Int:
    """The integer behind an entry of the params."""
    return entry if isinstance(entry, int) else b.size(entry[1])


def resolve_all(b: KernelBuilder, entries: Sequence) -> list[int | Int]:
    """The integers behind several entries of the params."""
    return [resolve(b, e) for e in entries]


def clamped_start(b: KernelBuilder, operand: int, dtype: str, limit: int | Int) -> Int:
    """A start index read from a scalar operand, held inside [0, limit]."""
    return b.max(b.min(load_index(b, b.operand(operand, dtype), 0), limit), 0)


def load_index(b: KernelBuilder, pointer: Pointer, at: int | Int) -> Int:
    """An index of any integer dtype as a 64-bit integer."""
    value = b.load(pointer, at, raw=True)
    if pointer.dtype.startswith("uint") and value.type.width < 64:
        value = b.ir.zext(value, b.i64(0).type)
    return b.int(value)


class Odometer:
    """A position in a row-major index space, with one running offset per stream.

    sizes: of each axis, outermost first (the outermost is never read). streams: per stream the stride of each axis.
    """

    def __init__(self, b: KernelBuilder, sizes: Sequence, streams: Sequence[Sequence]):
        self.b, self.sizes, self.streams = b, list(sizes), [list(s) for s in streams]
        zero = b.i64(0)
        self._index = [b.variable(zero) for _ in self.sizes]
        self._offset = [b.variable(zero) for _ in self.streams]

    def seek(self, position: Int) -> None:
        """Moves to the flat `position`."""
        b, rest = self.b, position
        offsets: list = [0] * len(self.streams)
        for axis in range(len(self.sizes) - 1, -1, -1):
            index = rest if axis == 0 else rest % self.sizes[axis]
            rest = rest if axis == 0 else rest // self.sizes[axis]
            self._index[axis].set(b.i64(index))
            offsets = [o + index * s[axis] for o, s in zip(offsets, self.streams, strict=True)]
        for variable, offset in zip(self._offset, offsets, strict=True):
            variable.set(b.i64(offset))

    def advance(self) -> None:
        """Moves to the next position."""
        self._step(len(self.sizes) - 1)

    def _step(self, axis: int) -> None:
        if axis < 0:
            return
        b = self.b
        index = self.index(axis) + 1
        for variable, strides in zip(self._offset, self.streams, strict=True):
            variable.set(b.i64(Int(b, variable.get()) + strides[axis]))
        self._index[axis].set(b.i64(index))
        if axis == 0:
            return
        with b.if_then(index.equals(self.sizes[axis]), likely=False):
            self._index[axis].set(b.i64(0))
            for variable, strides in zip(self._offset, self.streams, strict=True):
                variable.set(b.i64(Int(b, variable.get()) - self.sizes[axis] * strides[axis]))
            self._step(axis - 1)

    def index(self, axis: int) -> Int:
        """The position along an axis."""
        return Int(self.b, self._index[axis].get())

    def offset(self, stream: int = 0) -> Int:
        """The offset of a stream, in its elements."""
        return Int(self.b, self._offset[stream].get())


def lanes_for(b: KernelBuilder, dtype: str) -> int:
    """Lanes of a full vector of a word dtype."""
    return b.target.vector_bytes // itemsize(dtype)


def copy_row(b: KernelBuilder, destination: Pointer, source: Pointer, count: int | Int) -> None:
    """Copies `count` elements with vectors; the last vector overlaps the one before it instead of being masked."""
    _write_row(b, destination, count, lambda index, lanes: b.load(source, index, lanes, raw=True))


def copy_span(b: KernelBuilder, destination: Pointer, source: Pointer, count: int | Int) -> None:
    """`copy_row` for long rows: less code, a masked last vector."""
    lanes = lanes_for(b, destination.dtype)
    b.vector_loop(
        0,
        count,
        lanes,
        lambda i, mask, slot: b.store(destination, i, b.load(source, i, lanes, mask, raw=True), mask, raw=True),
        unroll=4,
    )


def fill_row(b: KernelBuilder, destination: Pointer, value: ir.Value, count: int | Int) -> None:
    """Writes one value `count` times."""
    _write_row(b, destination, count, lambda index, lanes: b.broadcast(value, lanes))


def reverse_row(b: KernelBuilder, destination: Pointer, source: Pointer, count: int | Int) -> None:
    """destination[i] = source[-i] for i below `count`."""

    def reversed_load(index, lanes):
        vector = b.load(source, 0 - b.int(index) - (lanes - 1), lanes, raw=True)
        return vector if lanes == 1 else b.shuffle(vector, None, list(range(lanes - 1, -1, -1)))

    _write_row(b, destination, count, reversed_load)


def _write_row(b: KernelBuilder, destination: Pointer, count: int | Int, value_at) -> None:
    lanes = lanes_for(b, destination.dtype)

    def write(index, width):
        b.store(destination, index, value_at(index, width), raw=True)

    if isinstance(count, int):
        while lanes > max(count, 1):
            lanes //= 2
        b.vector_loop(0, count - count % lanes, lanes, lambda i, mask, slot: write(i, lanes), unroll=4, tail=False)
        if count % lanes:
            rest = lanes
            while rest // 2 >= count % lanes:
                rest //= 2
            write(count - rest, rest)
        return
    with b.if_else(count >= lanes) as (wide, narrow):
        with wide:
            b.vector_loop(0, count, lanes, lambda i, mask, slot: write(i, lanes), unroll=4, tail=False)
            write(count - lanes, lanes)
        with narrow:
            _write_short_row(b, count, lanes // 2, write)


def _write_short_row(b: KernelBuilder, count: Int, width: int, write) -> None:
    """Fewer than 2 * width elements: two overlapping pieces of the widest width that fits."""
    if width == 0:
        return
    with b.if_else(count >= width) as (fits, shorter):
        with fits:
            write(0, width)
            if width > 1:
                write(count - width, width)
        with shorter:
            _write_short_row(b, count, width // 2, write)


__all__ = [
    "Axis",
    "Odometer",
    "SizeTable",
    "clamped_start",
    "collapse",
    "collapse_streams",
    "copy_row",
    "copy_span",
    "dense_strides",
    "fill_row",
    "lanes_for",
    "load_index",
    "resolve",
    "resolve_all",
    "reverse_row",
    "split_rows",
    "word",
]
