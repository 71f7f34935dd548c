"""Gathers and scatters in ONNX, whose indices must be in range: ours are brought there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.ir import Dim, Node
from kgraph.ir.types import np_dtype
from kgraph.onnx_export.builder import Builder, rule

_REDUCTIONS = {"update": "none", "add": "add", "mul": "mul", "max": "max", "min": "min"}


def _from_end(b: Builder, indices: str, sizes: str) -> str:
    """Indices as int64; negative ones count from the end, once."""
    wide = b.cast(indices, "int64")
    return b.emit("Where", b.emit("Less", wide, b.like(0, "int64")), b.emit("Add", wide, sizes), wide)


def _clamped(b: Builder, indices: str, sizes: str) -> str:
    last = b.emit("Sub", sizes, b.constant([1], "int64"))
    return b.emit("Max", b.emit("Min", indices, last), b.constant([0], "int64"))


def _outside(b: Builder, indices: str, sizes: str) -> str:
    """Whether indices from the start are out of range."""
    return b.emit("Or", b.emit("Less", indices, b.like(0, "int64")), b.emit("GreaterOrEqual", indices, sizes))


@rule("take")
def _take(b: Builder, node: Node, inputs: list[str]):
    (x, indices), axis = inputs, node.attrs["axis"]
    size, shape, dtype = b.size(node.inputs[0].shape[axis]), node.inputs[1].shape, node.output.dtype
    if node.attrs["mode"] == "wrap":
        inside = b.emit("Mod", b.cast(indices, "int64"), size)
    else:
        wide = _from_end(b, indices, size)
        inside = _clamped(b, wide, size)
    if not shape:
        inside = b.reshape(inside, [])
    found = b.emit("Gather", x, inside, axis=axis)
    if node.attrs["mode"] != "fill":
        return found
    missing = b.reshape(_outside(b, wide, size), [*shape, *[1] * (node.inputs[0].type.rank - 1 - axis)])
    if dtype == "bool":
        return b.emit("Or", found, missing)
    if node.output.type.is_float:
        return b.emit("Where", missing, b.like(np.nan, dtype), found)
    limits = np.iinfo(np_dtype(dtype))
    return b.emit("Where", missing, b.constant(limits.min or limits.max, dtype), found)


@rule("take_along_axis")
def _take_along_axis(b: Builder, node: Node, inputs: list[str]):
    axis, (x, indices) = node.attrs["axis"], inputs
    own, asked, given = node.inputs[0].shape, node.inputs[1].shape, node.output.shape
    if [s for a, s in enumerate(own) if a != axis] != [s for a, s in enumerate(asked) if a != axis]:
        x = b.emit("Expand", x, b.sizes([own[a] if a == axis else s for a, s in enumerate(given)]))
        indices = b.emit("Expand", indices, b.sizes(given))
    size = b.size(own[axis])
    return b.emit("GatherElements", x, _clamped(b, _from_end(b, indices, size), size), axis=axis)


@rule("gather_nd")
def _gather_nd(b: Builder, node: Node, inputs: list[str]):
    sizes = b.sizes(node.inputs[0].shape[: node.inputs[1].shape[-1]])
    return b.emit("GatherND", inputs[0], _clamped(b, _from_end(b, inputs[1], sizes), sizes))


@rule("scatter_nd")
def _scatter_nd(b: Builder, node: Node, inputs: list[str]):
    base, indices, updates = inputs
    shape, depth = node.inputs[0].shape, node.inputs[1].shape[-1]
    reduction = _REDUCTIONS[node.attrs["reduction"]]
    if not depth or _in_range(b, indices, shape[:depth]):
        return b.emit("ScatterND", base, b.cast(indices, "int64"), updates, reduction=reduction)
    sizes = b.sizes(shape[:depth])
    wide = _from_end(b, indices, sizes)
    wrong = b.reduce("ReduceMax", b.cast(_outside(b, wide, sizes), "int32"), [node.inputs[1].type.rank - 1], True)
    behind = b.sizes([shape[0], *[0] * (depth - 1)])
    wide = b.emit("Where", b.cast(wrong, "bool"), behind, wide)
    longer = _longer(b, base, node.inputs[0].type.rank, 0)
    return _cut(b, b.emit("ScatterND", longer, wide, updates, reduction=reduction), shape, 0)


@rule("scatter_along_axis")
def _scatter_along_axis(b: Builder, node: Node, inputs: list[str]):
    (base, indices, updates), axis = inputs, node.attrs["axis"]
    shape = node.inputs[0].shape
    options = {"axis": axis, "reduction": _REDUCTIONS[node.attrs["reduction"]]}
    if _in_range(b, indices, shape[axis : axis + 1]):
        return b.emit("ScatterElements", base, b.cast(indices, "int64"), updates, **options)
    size = b.size(shape[axis])
    wide = _from_end(b, indices, size)
    wide = b.emit("Where", _outside(b, wide, size), size, wide)
    longer = _longer(b, base, len(shape), axis)
    return _cut(b, b.emit("ScatterElements", longer, wide, updates, **options), shape, axis)


def _in_range(b: Builder, indices: str, sizes: Sequence[int | Dim]) -> bool:
    """Whether indices are constants that are all in range."""
    if indices not in b.arrays or any(isinstance(s, Dim) for s in sizes):
        return False
    known = b.arrays[indices].astype("int64")
    return bool(np.all((known >= -np.array(sizes)) & (known < np.array(sizes))))


def _longer(b: Builder, x: str, rank: int, axis: int) -> str:
    """One more place along an axis, for updates whose index is out of range."""
    return b.emit("Pad", x, b.constant([int(i == rank + axis) for i in range(2 * rank)], "int64"))


def _cut(b: Builder, x: str, shape: Sequence[int | Dim], axis: int) -> str:
    return b.emit("Slice", x, b.constant([0], "int64"), b.size(shape[axis]), b.constant([axis], "int64"))
