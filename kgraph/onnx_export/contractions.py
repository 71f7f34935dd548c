"""Products, convolutions, pooling, resampling and attention in ONNX.

Images lie with their channels last in kgraph and first in ONNX: transposes stand around each operator, which the
runtime that reads the file may cancel.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Node
from kgraph.ir.dims import product
from kgraph.onnx_export.builder import Builder, rule
from kgraph.onnx_export.movement import spread
from kgraph.ops.attention import MASKED
from kgraph.ops.resize import weight_matrix


@rule("dot_general")
def _dot_general(b: Builder, node: Node, inputs: list[str]):
    attrs, (lhs, rhs) = node.attrs, node.inputs
    if attrs.get("preferred_dtype"):
        inputs = [b.cast(x, node.output.dtype) for x in inputs]
    l_rank, r_rank = lhs.type.rank, rhs.type.rank
    batch = tuple(range(len(attrs["lhs_batch"])))
    plain = attrs["lhs_batch"] == attrs["rhs_batch"] == batch and attrs["lhs_contract"] == (l_rank - 1,)
    if plain and attrs["rhs_contract"] == (len(batch),) and r_rank == len(batch) + 2:
        if l_rank == r_rank or (not batch and l_rank > 1):
            return b.emit("MatMul", *inputs)
    letters = iter(string.ascii_lowercase)
    left, right = [""] * l_rank, [""] * r_rank
    for name in ("batch", "contract"):
        for i, j in zip(attrs[f"lhs_{name}"], attrs[f"rhs_{name}"], strict=True):
            left[i] = right[j] = next(letters)
    shared = [left[i] for i in attrs["lhs_batch"]]
    free: list[str] = []
    for labels in (left, right):
        for axis, label in enumerate(labels):
            if not label:
                labels[axis] = next(letters)
                free.append(labels[axis])
    equation = f"{''.join(left)},{''.join(right)}->{''.join(shared + free)}"
    return b.emit("Einsum", *inputs, equation=equation)


def channels_first(rank: int) -> list[int]:
    """The permutation from channels last."""
    return [0, rank - 1, *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    """The permutation from channels first."""
    return [0, *range(2, rank), 1]


@rule("conv")
def _conv(b: Builder, node: Node, inputs: list[str]):
    attrs, rank = node.attrs, node.output.type.rank
    spatial = rank - 2
    x, gaps = inputs[0], attrs["lhs_dilation"]
    if any(d != 1 for d in gaps):
        y = _transposed(b, node, inputs)
        if y:
            return y
        x = spread(b, x, node.inputs[0].shape, [0, *(d - 1 for d in gaps), 0], b.like(0.0, node.output.dtype))
    padding = attrs["padding"]
    if not _is_plain(padding):
        edges = [(0, 0), *padding, (0, 0)]
        x = b.emit("Pad", x, b.sizes([p[side] for side in (0, 1) for p in edges]))
        padding = [(0, 0)] * spatial
    x = b.transpose(x, channels_first(rank))
    weights = b.transpose(inputs[1], [spatial + 1, spatial, *range(spatial)])
    y = b.emit(
        "Conv",
        x,
        weights,
        strides=list(attrs["strides"]),
        pads=[p[side] for side in (0, 1) for p in padding],
        group=attrs["feature_groups"],
        dilations=list(attrs["rhs_dilation"]),
    )
    return b.transpose(y, channels_last(rank))


def _is_plain(padding) -> bool:
    """Whether ONNX' convolution and pooling take it: known now, and nothing is cut off."""
    return all(not isinstance(p, Dim) and p >= 0 for edges in padding for p in edges)


def _transposed(b: Builder, node: Node, inputs: list[str]) -> str | None:
    """A convolution over a spread input as ONNX' transposed one, which slides the flipped kernel; None if it is not."""
    attrs, rank = node.attrs, node.output.type.rank
    spatial = rank - 2
    known = not any(isinstance(p, Dim) for edges in attrs["padding"] for p in edges)
    if any(s != 1 for s in attrs["strides"]) or attrs["feature_groups"] != 1 or not known:
        return None
    sizes = node.inputs[1].shape[:spatial]
    reach = [d * (k - 1) for d, k in zip(attrs["rhs_dilation"], sizes)]
    begin, end = ([r - p[side] for r, p in zip(reach, attrs["padding"])] for side in (0, 1))
    more = [max(0, -e) for e in end]
    if min(begin) < 0 or any(m >= s for m, s in zip(more, attrs["lhs_dilation"])):
        return None  # more padding than the kernel is long
    flipped = b.emit(
        "Slice",
        inputs[1],
        b.constant(-np.ones(spatial, np.int64)),
        b.constant(np.full(spatial, np.iinfo(np.int64).min)),
        b.constant(np.arange(spatial)),
        b.constant(-np.ones(spatial, np.int64)),
    )
    y = b.emit(
        "ConvTranspose",
        b.transpose(inputs[0], channels_first(rank)),
        b.transpose(flipped, [spatial, spatial + 1, *range(spatial)]),
        strides=list(attrs["lhs_dilation"]),
        pads=[*begin, *(max(0, e) for e in end)],
        output_padding=more,
        dilations=list(attrs["rhs_dilation"]),
    )
    return b.transpose(y, channels_last(rank))


@rule("reduce_window")
def _reduce_window(b: Builder, node: Node, inputs: list[str]):
    attrs, dtype, (x,) = node.attrs, node.output.dtype, inputs
    shape, kind = list(node.inputs[0].shape), attrs["kind"]
    rank = len(shape)
    if not node.output.type.is_float:  # ONNX pools floats
        if np.dtype(dtype).itemsize > 4:
            raise UnsupportedError(f"windows over {dtype}")
        x, dtype = b.cast(x, "float64"), "float64"
    if kind == "min":
        x = b.emit("Neg", x)
    # Gaps, and padding that is longer than the window, are filled beforehand.
    fill = b.like(0.0 if kind == "sum" else -np.inf, dtype)
    base, padding = attrs["base_dilation"], list(attrs["padding"])
    if any(d != 1 for d in base):
        x = spread(b, x, shape, [d - 1 for d in base], fill)
        shape = [(s - 1) * d + 1 for s, d in zip(shape, base)]
    if not _is_plain(padding) or any(max(p) >= w for p, w in zip(padding, attrs["window"])):
        x = b.emit("Pad", x, b.sizes([p[side] for side in (0, 1) for p in padding]), fill)
        shape = [s + p[0] + p[1] for s, p in zip(shape, padding)]
        padding = [(0, 0)] * rank
    keys = ("window", "strides", "window_dilation")
    moved = [a for a in range(rank) if any(attrs[k][a] != 1 for k in keys) or padding[a] != (0, 0)]
    still = [a for a in range(rank) if a not in moved]
    if len(moved) > 3:
        raise UnsupportedError("windows over more than three axes")
    moved = moved or still[:1]
    still = [a for a in still if a not in moved]
    order = [*still, *moved]
    x = b.transpose(x, order)
    usual = len(still) == 2  # batch and channels
    if not usual:
        x = b.reshape(x, [product(shape[a] for a in still), 1, *(shape[a] for a in moved)])
    options: dict[str, Any] = {
        "kernel_shape": [attrs["window"][a] for a in moved],
        "strides": [attrs["strides"][a] for a in moved],
        "dilations": [attrs["window_dilation"][a] for a in moved],
        "pads": [padding[a][side] for side in (0, 1) for a in moved],
    }
    if kind == "sum":
        count = b.like(float(np.prod(attrs["window"])), dtype)
        y = b.emit("Mul", b.emit("AveragePool", x, count_include_pad=1, **options), count)
    else:
        y = b.emit("MaxPool", x, **options)
    if not usual:
        y = b.reshape(y, [node.output.shape[a] for a in order])
    y = b.transpose(y, [order.index(a) for a in range(rank)])
    y = b.emit("Neg", y) if kind == "min" else y
    return y if dtype == node.output.dtype else b.cast(y, node.output.dtype)


@rule("resize")
def _resize(b: Builder, node: Node, inputs: list[str]):
    method, size = node.attrs["method"], node.attrs["size"]
    batch, *spatial, channels = node.inputs[0].shape
    rank = len(spatial) + 2
    known = not any(isinstance(s, Dim) for s in (*spatial, *size))
    smaller = not known or any(s < n for s, n in zip(size, spatial))
    if method == "nearest":
        options: dict[str, Any] = {"mode": "nearest", "nearest_mode": "round_prefer_ceil"}
    elif method == "bilinear" and rank == 4 and not (node.attrs["antialias"] and smaller):
        options = {"mode": "linear"}
    elif known:
        return _resize_by_products(b, node, inputs[0])
    else:
        raise UnsupportedError(f"resize by {method!r} from or to sizes that are known when it runs")
    x = b.transpose(inputs[0], channels_first(rank))
    sizes = b.sizes([batch, channels, *size])
    y = b.emit("Resize", x, "", "", sizes, coordinate_transformation_mode="half_pixel", **options)
    return b.transpose(y, channels_last(rank))


@rule("resize_weights")
def _resize_weights(b: Builder, node: Node, inputs: list[str]):
    attrs = node.attrs
    if any(isinstance(attrs[size], Dim) for size in ("in_size", "out_size")):
        raise UnsupportedError("weights of a resize from or to sizes that are known when it runs")
    weights = weight_matrix(attrs["in_size"], attrs["out_size"], attrs["method"], attrs["antialias"])
    return b.constant(weights, node.output.dtype)


def _resize_by_products(b: Builder, node: Node, x: str) -> str:
    """Resampling of one axis after the other by the matrix of its weights."""
    shape, attrs = list(node.inputs[0].shape), node.attrs
    for axis, size in enumerate(attrs["size"], start=1):
        if size == shape[axis]:
            continue
        weights = weight_matrix(shape[axis], size, attrs["method"], attrs["antialias"])
        flat = b.reshape(x, [product(shape[:axis]), shape[axis], product(shape[axis + 1 :])])
        shape[axis] = size
        x = b.reshape(b.emit("MatMul", b.constant(weights.T, node.output.dtype), flat), shape)
    return x


@rule("attention")
def _attention(b: Builder, node: Node, inputs: list[str]):
    attrs, dtype = node.attrs, node.output.dtype
    q, k, v, *rest = inputs
    mask = rest.pop(0) if attrs["has_mask"] else None
    bias = rest.pop(0) if attrs["has_bias"] else None
    batch, queries, heads, _ = node.inputs[0].shape
    keys, key_heads = node.inputs[1].shape[1:3]

    def by_head(x: str, value) -> str:
        """[B, S, K, D] as [B, H, S, D], every head of K serving H / K of them."""
        x = b.transpose(x, [0, 2, 1, 3])
        if heads == key_heads:
            return x
        depth, share = value.shape[3], heads // key_heads
        x = b.emit("Expand", b.reshape(x, [batch, key_heads, 1, keys, depth]), b.constant([1, 1, share, 1, 1], "int64"))
        return b.reshape(x, [batch, heads, keys, depth])

    q = b.transpose(q, [0, 2, 1, 3])
    k, v = by_head(k, node.inputs[1]), by_head(v, node.inputs[2])
    scores = b.emit("MatMul", q, b.transpose(k, [0, 1, 3, 2]))
    scores = b.emit("Mul", scores, b.like(attrs["scale"], dtype))
    if bias is not None:
        scores = b.emit("Add", scores, bias)
    masked = b.like(max(MASKED, 0.5 * float(np.finfo("float16" if dtype == "float16" else "float32").min)), dtype)
    if attrs["is_causal"]:
        position = [_positions(b, size) for size in (queries, keys)]
        causal = b.emit("GreaterOrEqual", b.reshape(position[0], [-1, 1]), position[1])
        mask = causal if mask is None else b.emit("And", mask, causal)
    if mask is not None:
        scores = b.emit("Where", mask, scores, masked)
    return b.transpose(b.emit("MatMul", b.emit("Softmax", scores, axis=-1), v), [0, 2, 1, 3])


def _positions(b: Builder, size) -> str:
    scalar = b.emit("Squeeze", b.size(size), b.constant([0], "int64"))
    return b.emit("Range", b.constant(0, "int64"), scalar, b.constant(1, "int64"))
