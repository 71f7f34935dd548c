"""Products, convolutions, pooling, resampling, attention and recurrent layers in ONNX.

Images lie with their channels last in kgraph and first in ONNX: transposes stand around each operator, which the
runtime that reads the file may cancel.
"""

from __future__ import annotations

import string

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Node
from kgraph.onnx_export.builder import Builder, rule
from kgraph.ops.attention import MASKED


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
    x = b.transpose(inputs[0], channels_first(rank))
    kernel = [*range(spatial)]
    low, high = ([p[side] for p in attrs["padding"]] for side in (0, 1))
    common = {"group": attrs["feature_groups"], "dilations": list(attrs["rhs_dilation"])}
    if all(d == 1 for d in attrs["lhs_dilation"]):
        weights = b.transpose(inputs[1], [spatial + 1, spatial, *kernel])
        y = b.emit("Conv", x, weights, strides=list(attrs["strides"]), pads=[*low, *high], **common)
        return b.transpose(y, channels_last(rank))
    if any(s != 1 for s in attrs["strides"]) or attrs["feature_groups"] != 1:
        raise UnsupportedError("a transposed convolution with strides or groups")
    # ONNX' transposed convolution slides the flipped kernel over the spread input.
    sizes = node.inputs[1].shape[:spatial]
    reach = [d * (k - 1) for d, k in zip(attrs["rhs_dilation"], sizes)]
    begin, end = [r - p for r, p in zip(reach, low)], [r - p for r, p in zip(reach, high)]
    more = [max(0, -e) for e in end]
    if min(begin) < 0 or any(m >= s for m, s in zip(more, attrs["lhs_dilation"])):
        raise UnsupportedError("a transposed convolution with more padding than its kernel is long")
    flipped = b.emit(
        "Slice",
        inputs[1],
        b.constant(-np.ones(spatial, np.int64)),
        b.constant(np.full(spatial, np.iinfo(np.int64).min)),
        b.constant(np.arange(spatial)),
        b.constant(-np.ones(spatial, np.int64)),
    )
    weights = b.transpose(flipped, [spatial, spatial + 1, *kernel])
    pads = [*begin, *(max(0, e) for e in end)]
    strides = list(attrs["lhs_dilation"])
    y = b.emit("ConvTranspose", x, weights, strides=strides, pads=pads, output_padding=more, **common)
    return b.transpose(y, channels_last(rank))


@rule("reduce_window")
def _reduce_window(b: Builder, node: Node, inputs: list[str]):
    attrs, rank = node.attrs, node.output.type.rank
    outer = [0, rank - 1]
    keys = ("window", "strides", "window_dilation")
    if (
        rank < 3
        or any(attrs[key][a] != 1 for key in keys for a in outer)
        or any(d != 1 for d in attrs["base_dilation"])
    ):
        raise UnsupportedError("windows over the batch or the channels, or with gaps in what they slide over")
    if any(attrs["padding"][a] != (0, 0) for a in outer) or attrs["kind"] == "min":
        raise UnsupportedError("windows with such padding, or their minimum")
    inner = slice(1, rank - 1)
    x = b.transpose(inputs[0], channels_first(rank))
    padding = attrs["padding"][inner]
    shape = {
        "kernel_shape": list(attrs["window"][inner]),
        "strides": list(attrs["strides"][inner]),
        "dilations": list(attrs["window_dilation"][inner]),
        "pads": [p[0] for p in padding] + [p[1] for p in padding],
    }
    if attrs["kind"] == "max":
        y = b.emit("MaxPool", x, **shape)
    else:
        count = b.like(float(np.prod(attrs["window"])), node.output.dtype)
        y = b.emit("Mul", b.emit("AveragePool", x, count_include_pad=1, **shape), count)
    return b.transpose(y, channels_last(rank))


@rule("resize")
def _resize(b: Builder, node: Node, inputs: list[str]):
    method, rank = node.attrs["method"], node.output.type.rank
    modes = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}
    if method not in modes:
        raise UnsupportedError(f"resize by {method!r}")
    batch, *_, channels = node.inputs[0].shape
    x = b.transpose(inputs[0], channels_first(rank))
    sizes = b.sizes([batch, channels, *node.attrs["size"]])
    options = {"nearest_mode": "round_prefer_ceil"} if method == "nearest" else {}
    if method == "bicubic":
        options = {"cubic_coeff_a": -0.5, "exclude_outside": 1}
    y = b.emit(
        "Resize",
        x,
        "",
        "",
        sizes,
        mode=modes[method],
        coordinate_transformation_mode="half_pixel",
        antialias=int(bool(node.attrs["antialias"]) and method != "nearest"),
        **options,
    )
    return b.transpose(y, channels_last(rank))


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
        x = b.emit(
            "Expand", b.reshape(x, [batch, key_heads, 1, keys, depth]), b.constant(np.int64([1, 1, share, 1, 1]))
        )
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


# Name, alpha, beta.
_ACTIVATIONS = {
    "tanh": ("Tanh", 0.0, 0.0), "sigmoid": ("Sigmoid", 0.0, 0.0), "relu": ("Relu", 0.0, 0.0),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5), "softsign": ("Softsign", 0.0, 0.0),
    "softplus": ("Softplus", 0.0, 0.0), "elu": ("Elu", 1.0, 0.0), "linear": ("Affine", 1.0, 0.0),
}  # fmt: skip
_CELLS = {"lstm": "LSTM", "gru": "GRU", "simple": "RNN"}
# ONNX' order of the gates: input, output, forget, candidate.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (0, 1, 2), "simple": (0,)}


@rule("rnn")
def _rnn(b: Builder, node: Node, inputs: list[str]):
    attrs = node.attrs
    cell = attrs["cell"]
    if attrs["has_mask"]:
        raise UnsupportedError("a recurrent layer with a mask")
    names = {
        "lstm": ("recurrent_activation", "activation", "activation"),
        "gru": ("recurrent_activation", "activation"),
    }
    wanted = [attrs[name] for name in names.get(cell, ("activation",))]
    unknown = [a for a in wanted if a not in _ACTIVATIONS]
    if unknown:
        raise UnsupportedError(f"a recurrent layer with the activation {unknown[0]!r}")
    functions = [_ACTIVATIONS[a] for a in wanted]
    x, kernel, recurrent, bias, recurrent_bias, *states = inputs
    units = node.inputs[2].shape[0]
    features = node.inputs[0].shape[2]

    def gates(weights: str, rows: int) -> str:
        """[rows, G * U] as [1, G * U, rows], the gates in ONNX' order."""
        parts = [_columns(b, weights, g * units, units) for g in _GATES[cell]]
        return b.reshape(b.transpose(b.emit("Concat", *parts, axis=1), [1, 0]), [1, len(parts) * units, rows])

    biases = []
    for value in (bias, recurrent_bias):
        row = b.reshape(value, [1, len(_GATES[cell]) * units])
        biases += [_columns(b, row, g * units, units) for g in _GATES[cell]]
    batch = node.inputs[0].shape[0]
    initial = [b.reshape(s, [1, batch, units]) for s in states]
    y, *last = b.emit(
        _CELLS[cell],
        b.transpose(x, [1, 0, 2]),
        gates(kernel, features),
        gates(recurrent, units),
        b.emit("Concat", *biases, axis=1),
        "",
        *initial,
        outputs=3 if cell == "lstm" else 2,
        hidden_size=units,
        direction="reverse" if attrs["reverse"] else "forward",
        activations=[f for f, _, _ in functions],
        activation_alpha=[alpha for _, alpha, _ in functions],
        activation_beta=[beta for _, _, beta in functions],
        linear_before_reset=int(attrs["reset_after"]) if cell == "gru" else None,
    )
    sequence = b.reshape(b.transpose(y, [2, 0, 1, 3]), [batch, node.inputs[0].shape[1], units])
    return (sequence, *[b.reshape(s, [batch, units]) for s in last])


def _columns(b: Builder, x: str, start: int, count: int) -> str:
    parts = [b.constant([v], "int64") for v in (start, start + count, 1)]
    return b.emit("Slice", x, *parts)
