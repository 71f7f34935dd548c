"""What the elementwise, reduction and normalisation families share: coordinates, loops over rows, order of memory.

How nodes are taken apart is that of `kgraph.codegen.regions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from kgraph.codegen.cpu.builder import I32, Int, KernelBuilder, itemsize
from kgraph.codegen.cpu.scalar_ops import convert
from kgraph.codegen.regions import (
    Leaf,
    body_of,
    collapse,
    inplace_pairs,
    kernel_name,
    leaves_and_nodes,
    needed,
    spans_of,
    total_bytes,
    used_inputs,
)

__all__ = [
    "Leaf",
    "Odometer",
    "body_of",
    "bound_of",
    "collapse",
    "coordinate",
    "dot",
    "inplace_pairs",
    "keep_order",
    "kernel_name",
    "leaves_and_nodes",
    "needed",
    "row_strides",
    "spans_of",
    "total_bytes",
    "used_inputs",
]


def row_strides(b: KernelBuilder, sizes: Sequence, spans: Sequence[bool]) -> list:
    """Strides in elements of a dense operand along the collapsed axes; 0 where it is broadcast."""
    out: list = [0] * len(sizes)
    step: int | Int = 1
    for axis in reversed(range(len(sizes))):
        if spans[axis]:
            out[axis] = step
            step = sizes[axis] * step
    return out


def coordinate(b: KernelBuilder, position, dtype: str, lanes: int, along_lanes: bool) -> ir.Value:
    """The index `position` as data of `dtype`; counting up from it over the lanes if `along_lanes`."""
    wide = dtype in ("int64", "uint64", "float64")
    base = b.i64(position)
    if not wide:
        base = b.ir.trunc(base, I32)
    value = b.broadcast(base, lanes)
    if along_lanes and lanes > 1:
        value = b.add(value, b.lane_numbers("int64" if wide else "int32", lanes))
    return convert(b, value, "int64" if wide else "int32", dtype)


def bound_of(size) -> int:
    """A power of two not below a known size (so that many sizes share a kernel); 0 for a run-time size."""
    return 1 << max(size - 1, 0).bit_length() if isinstance(size, int) else 0


class Odometer:
    """Indices of the outer axes while rows are visited in order; no division but at the start."""

    def __init__(self, b: KernelBuilder, sizes: Sequence, first: int | Int):
        self.b, self.sizes = b, list(sizes)
        rest: int | Int = first
        starts = []
        for axis in reversed(range(len(sizes))):
            if axis == 0:
                starts.append(rest)
            else:
                starts.append(rest % sizes[axis])
                rest = rest // sizes[axis]
        self.slots = [b.variable(b.i64(s)) for s in reversed(starts)]

    def indices(self) -> list[Int]:
        return [self.b.int(s.get()) for s in self.slots]

    def advance(self) -> None:
        """To the next row."""
        self._advance(len(self.slots) - 1)

    def _advance(self, axis: int) -> None:
        if axis < 0:
            return
        b, slot = self.b, self.slots[axis]
        following = b.int(slot.get()) + 1
        slot.set(following.value)
        if axis == 0:
            return
        with b.if_then(following >= self.sizes[axis]):
            slot.set(b.i64(0))
            self._advance(axis - 1)


def dot(indices: Sequence, strides: Sequence):
    """sum(index * stride)"""
    out: int | Int = 0
    for index, stride in zip(indices, strides, strict=True):
        if not (isinstance(stride, int) and stride == 0):
            out = index * stride + out
    return out


def keep_order(b: KernelBuilder, leaves: Sequence[tuple], pointers: Sequence, outputs: Sequence) -> None:
    """For several outputs: no promise about operands that `inplace_pairs` lets them overwrite.

    leaves: (dtype, spans, is_coordinate) of each pointer.
    """
    if len(outputs) == 1:
        return
    for out in outputs:
        for pointer, (dtype, spans, _) in zip(pointers, leaves, strict=True):
            if pointer is not None and all(spans) and itemsize(dtype) == itemsize(out.dtype):
                b.may_share(out, pointer)
