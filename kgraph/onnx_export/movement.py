"""Shapes, creation, slices and padding in ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Node
from kgraph.onnx_export.builder import Builder, rule

_FURTHEST = np.iinfo(np.int64).min  # a slice with this end goes back to the first element


@rule("reshape")
def _reshape(b: Builder, node: Node, inputs: list[str]):
    return b.reshape(inputs[0], node.attrs["shape"])


@rule("transpose")
def _transpose(b: Builder, node: Node, inputs: list[str]):
    return b.transpose(inputs[0], node.attrs["permutation"])


@rule("broadcast_to")
def _broadcast_to(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Expand", inputs[0], b.sizes(node.attrs["shape"]))


@rule("full")
def _full(b: Builder, node: Node, inputs: list[str]):
    value = b.constant(node.attrs["value"], node.output.dtype)
    return b.emit("Expand", value, b.sizes(node.attrs["shape"])) if node.attrs["shape"] else value


@rule("iota")
def _iota(b: Builder, node: Node, inputs: list[str]):
    shape, axis = node.attrs["shape"], node.attrs["axis"]
    scalar = b.emit("Squeeze", b.size(shape[axis]), b.constant([0], "int64"))
    count = b.emit("Range", b.constant(0, "int64"), scalar, b.constant(1, "int64"))
    column = b.reshape(b.cast(count, node.output.dtype), [-1] + [1] * (len(shape) - 1 - axis % len(shape)))
    return b.emit("Expand", column, b.sizes(shape))


@rule("dim_value")
def _dim_value(b: Builder, node: Node, inputs: list[str]):
    size = b.emit("Squeeze", b.size(node.attrs["dim"]), b.constant([0], "int64"))
    return b.cast(size, node.output.dtype)


@rule("slice")
def _slice(b: Builder, node: Node, inputs: list[str]):
    start, limit, stride = (node.attrs[name] for name in ("start", "limit", "stride"))
    shape = node.inputs[0].shape
    axes = [a for a, s in enumerate(shape) if (start[a], limit[a], stride[a]) != (0, s, 1)]
    if not axes:
        return b.emit("Identity", inputs[0])
    parts = [b.sizes([values[a] for a in axes]) for values in (start, limit)]
    return b.emit("Slice", inputs[0], *parts, b.constant(axes, "int64"), b.sizes([stride[a] for a in axes]))


@rule("rev")
def _rev(b: Builder, node: Node, inputs: list[str]):
    axes = np.array(node.attrs["axes"], np.int64)
    if not axes.size:
        return b.emit("Identity", inputs[0])
    ones = np.ones_like(axes)
    return b.emit(
        "Slice", inputs[0], b.constant(-ones), b.constant(_FURTHEST * ones), b.constant(axes), b.constant(-ones)
    )


@rule("pad")
def _pad(b: Builder, node: Node, inputs: list[str]):
    x, value = inputs
    interior = node.attrs["interior"]
    if any(interior):
        x = spread(b, x, node.inputs[0].shape, interior, value)
    return b.emit("Pad", x, b.sizes([*node.attrs["low"], *node.attrs["high"]]), value)


def spread(b: Builder, x: str, shape: Sequence[int | Dim], gaps: Sequence[int], value: str) -> str:
    """Puts `gaps` values between neighbours along each axis: pads a new axis behind it, merges both, cuts the end."""
    sizes = list(shape)
    for axis, gap in enumerate(gaps):
        if not gap:
            continue
        behind = b.reshape(x, [*sizes[: axis + 1], 1, *sizes[axis + 1 :]])
        ends = np.zeros(2 * (len(sizes) + 1), np.int64)
        ends[len(sizes) + 1 + axis + 1] = gap
        padded = b.emit("Pad", behind, b.constant(ends), value)
        merged = b.reshape(padded, [*sizes[:axis], sizes[axis] * (gap + 1), *sizes[axis + 1 :]])
        x = b.emit("Slice", merged, *[b.constant([v], "int64") for v in (0, -gap, axis)])
        sizes[axis] = (sizes[axis] - 1) * (gap + 1) + 1
    return x


@rule("pad_mirror")
def _pad_mirror(b: Builder, node: Node, inputs: list[str]):
    (x,), mode = inputs, node.attrs["mode"]
    low, high, shape = node.attrs["low"], node.attrs["high"], node.inputs[0].shape
    if not any(isinstance(s, Dim) for s, *ends in zip(shape, low, high) if ends != [0, 0]):
        for axis, (size, *ends) in enumerate(zip(shape, low, high)):
            if ends != [0, 0]:
                x = b.emit("Gather", x, b.constant(np.pad(np.arange(size), ends, mode)), axis=axis)
        return x
    if mode != "edge":  # the others repeat where the padding is longer than the axis, which ONNX does not
        raise UnsupportedError(f"padding of mode {mode!r} along an axis whose size is known when it runs")
    return b.emit("Pad", x, b.sizes([*low, *high]), mode=mode)


@rule("concatenate")
def _concatenate(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Concat", *inputs, axis=node.attrs["axis"])


@rule("dynamic_slice")
def _dynamic_slice(b: Builder, node: Node, inputs: list[str]):
    x, *starts = inputs
    shape = node.attrs["shape"]
    begin = _starts(b, starts, node.inputs[0].shape, shape)
    end = b.emit("Add", begin, b.sizes(shape))
    return b.emit("Slice", x, begin, end, b.constant(np.arange(len(shape), dtype=np.int64)))


def _starts(b: Builder, starts: Sequence[str], whole: Sequence, window: Sequence) -> str:
    """Where a window begins, inside of the whole."""
    begins = []
    for start, size, full in zip(starts, window, whole, strict=True):
        at = b.reshape(b.cast(start, "int64"), [1])
        begins.append(b.emit("Max", b.emit("Min", at, b.size(full - size)), b.constant([0], "int64")))
    return b.emit("Concat", *begins, axis=0)


@rule("dynamic_update_slice")
def _dynamic_update_slice(b: Builder, node: Node, inputs: list[str]):
    x, update, *starts = inputs
    whole, window = node.inputs[0].shape, node.inputs[1].shape
    if not starts:
        return b.emit("Identity", update)
    begin = _starts(b, starts, whole, window)
    end = b.emit("Sub", b.emit("Sub", b.sizes(whole), begin), b.sizes(window))
    ends = b.emit("Concat", begin, end, axis=0)
    inside = b.emit("Pad", b.emit("Expand", b.constant(1, "int32"), b.sizes(window)), ends, b.constant(0, "int32"))
    moved = b.emit("Pad", update, ends)
    return b.emit("Where", b.cast(inside, "bool"), moved, x)
