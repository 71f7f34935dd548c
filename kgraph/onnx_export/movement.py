"""Shapes, slices, gathers and scatters in ONNX."""

from __future__ import annotations

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Node
from kgraph.onnx_export.builder import Builder, rule

_FURTHEST = np.iinfo(np.int64).min  # a slice with this end goes back to the first element
_REDUCTIONS = {"update": "none", "add": "add", "mul": "mul", "max": "max", "min": "min"}


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
    return b.emit("Slice", inputs[0], *parts, b.constant(np.int64(axes)), b.sizes([stride[a] for a in axes]))


@rule("rev")
def _rev(b: Builder, node: Node, inputs: list[str]):
    axes = np.int64(node.attrs["axes"])
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
    for axis, gap in enumerate(interior):
        if gap:
            x = _spread(b, node, x, value, axis, gap)
    return b.emit("Pad", x, b.sizes([*node.attrs["low"], *node.attrs["high"]]), value)


def _spread(b: Builder, node: Node, x: str, value: str, axis: int, gap: int) -> str:
    """Puts `gap` values between neighbours along an axis: pads a new axis behind it, merges both, and cuts the end."""
    shape = list(node.inputs[0].shape)
    done = [(s - 1) * (g + 1) + 1 for s, g in zip(shape[:axis], node.attrs["interior"])]
    behind = b.reshape(x, [*done, shape[axis], 1, *shape[axis + 1 :]])
    ends = np.zeros(2 * (len(shape) + 1), np.int64)
    ends[len(shape) + 1 + axis + 1] = gap
    padded = b.emit("Pad", behind, b.constant(ends), value)
    merged = b.reshape(padded, [*done, shape[axis] * (gap + 1), *shape[axis + 1 :]])
    parts = [b.constant([0], "int64"), b.constant([-gap], "int64"), b.constant([axis], "int64")]
    return b.emit("Slice", merged, *parts)


@rule("pad_mirror")
def _pad_mirror(b: Builder, node: Node, inputs: list[str]):
    mode = node.attrs["mode"]
    if mode not in ("reflect", "edge", "wrap"):
        raise UnsupportedError(f"ONNX has no padding of mode {mode!r}")
    return b.emit("Pad", inputs[0], b.sizes([*node.attrs["low"], *node.attrs["high"]]), mode=mode)


@rule("concatenate")
def _concatenate(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Concat", *inputs, axis=node.attrs["axis"])


@rule("dynamic_slice")
def _dynamic_slice(b: Builder, node: Node, inputs: list[str]):
    x, *starts = inputs
    shape, whole = node.attrs["shape"], node.inputs[0].shape
    zero = b.constant([0], "int64")
    begins = []
    for start, size, full in zip(starts, shape, whole, strict=True):
        at = b.reshape(b.cast(start, "int64"), [1])
        begins.append(b.emit("Max", b.emit("Min", at, b.size(full - size)), zero))
    begin = b.emit("Concat", *begins, axis=0)
    end = b.emit("Add", begin, b.sizes(shape))
    return b.emit("Slice", x, begin, end, b.constant(np.arange(len(shape), dtype=np.int64)))


def _within(b: Builder, indices: str, size: int | Dim) -> str:
    """Indices as int64: negative ones count from the end, once; what is still out of range is clamped."""
    wide, count, zero = b.cast(indices, "int64"), b.size(size), b.constant([0], "int64")
    wide = b.emit("Where", b.emit("Less", wide, zero), b.emit("Add", wide, count), wide)
    last = b.emit("Sub", count, b.constant([1], "int64"))
    return b.emit("Max", b.emit("Min", wide, last), zero)


@rule("take")
def _take(b: Builder, node: Node, inputs: list[str]):
    x, indices = inputs
    axis, mode = node.attrs["axis"], node.attrs["mode"]
    size = node.inputs[0].shape[axis]
    if mode == "fill":
        raise UnsupportedError("take with mode 'fill'")
    if mode == "wrap":
        wide = b.emit("Mod", b.cast(indices, "int64"), b.size(size))
    else:
        wide = _within(b, indices, size)
    if not node.inputs[1].shape:
        wide = b.reshape(wide, [])
    return b.emit("Gather", x, wide, axis=axis)


@rule("take_along_axis")
def _take_along_axis(b: Builder, node: Node, inputs: list[str]):
    axis = node.attrs["axis"]
    x, indices = node.inputs
    rest = [s for a, s in enumerate(x.shape) if a != axis], [s for a, s in enumerate(indices.shape) if a != axis]
    if rest[0] != rest[1]:
        raise UnsupportedError("take_along_axis that broadcasts")
    return b.emit("GatherElements", inputs[0], _within(b, inputs[1], x.shape[axis]), axis=axis)


@rule("gather_nd")
def _gather_nd(b: Builder, node: Node, inputs: list[str]):
    return b.emit("GatherND", inputs[0], _within_each(b, node, inputs[1]))


def _within_each(b: Builder, node: Node, indices: str) -> str:
    """Indices [..., k] into the first k axes, clamped per axis."""
    sizes = b.sizes(node.inputs[0].shape[: node.inputs[1].shape[-1]])
    wide, zero = b.cast(indices, "int64"), b.constant([0], "int64")
    wide = b.emit("Where", b.emit("Less", wide, zero), b.emit("Add", wide, sizes), wide)
    return b.emit("Max", b.emit("Min", wide, b.emit("Sub", sizes, b.constant([1], "int64"))), zero)


@rule("scatter_nd")
def _scatter_nd(b: Builder, node: Node, inputs: list[str]):
    reduction = _REDUCTIONS[node.attrs["reduction"]]
    return b.emit("ScatterND", inputs[0], b.cast(inputs[1], "int64"), inputs[2], reduction=reduction)


@rule("scatter_along_axis")
def _scatter_along_axis(b: Builder, node: Node, inputs: list[str]):
    reduction = _REDUCTIONS[node.attrs["reduction"]]
    return b.emit(
        "ScatterElements",
        inputs[0],
        b.cast(inputs[1], "int64"),
        inputs[2],
        axis=node.attrs["axis"],
        reduction=reduction,
    )
