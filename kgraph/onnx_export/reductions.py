"""Reductions, orders, softmax and normalisations in ONNX."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Node
from kgraph.onnx_export.builder import Builder, rule
from kgraph.onnx_export.elementwise import logaddexp

_OPERATORS = {
    "reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_and": "ReduceMin", "reduce_or": "ReduceMax",
}  # fmt: skip


@rule(*_OPERATORS)
def _reduction(b: Builder, node: Node, inputs: list[str]):
    (x,), dtype = inputs, node.output.dtype
    axes, keepdims = node.attrs["axes"], node.attrs["keepdims"]
    if dtype == "bool":
        found = b.reduce(_OPERATORS[node.name], b.cast(x, "int32"), axes, keepdims)
        return b.emit("Greater", found, b.like(0, "int32"))  # nothing at all gives the least or the greatest integer
    if dtype in ("int8", "int16", "uint8", "uint16"):  # ONNX adds up 32 bits and more
        return b.cast(b.reduce(_OPERATORS[node.name], b.cast(x, "int64"), axes, keepdims), dtype)
    return b.reduce(_OPERATORS[node.name], x, axes, keepdims)


@rule("logsumexp")
def _logsumexp(b: Builder, node: Node, inputs: list[str]):
    return b.reduce("ReduceLogSumExp", inputs[0], node.attrs["axes"], node.attrs["keepdims"])


@rule("argmax", "argmin")
def _arg(b: Builder, node: Node, inputs: list[str]):
    op = "ArgMax" if node.name == "argmax" else "ArgMin"
    x = b.cast(inputs[0], "int32") if node.inputs[0].dtype == "bool" else inputs[0]
    return b.cast(b.emit(op, x, axis=node.attrs["axis"], keepdims=0), node.output.dtype)


@rule("cumsum")
def _cumsum(b: Builder, node: Node, inputs: list[str]):
    axis = b.constant(node.attrs["axis"], "int64")
    return b.emit("CumSum", inputs[0], axis, reverse=int(node.attrs["reverse"]))


def _ordered(b: Builder, node: Node, x: str, axis: int, count: str, largest: bool) -> list[str]:
    """(values, indices) in order; of equal elements the first comes first."""
    logical = node.inputs[0].dtype == "bool"
    x = b.cast(x, "int32") if logical else x
    values, indices = b.emit("TopK", x, count, outputs=2, axis=axis, largest=int(largest), sorted=1)
    return [b.cast(values, "bool") if logical else values, indices]


@rule("sort")
def _sort(b: Builder, node: Node, inputs: list[str]):
    axis = node.attrs["axis"]
    return _ordered(b, node, inputs[0], axis, b.size(node.inputs[0].shape[axis]), node.attrs["descending"])[0]


@rule("argsort")
def _argsort(b: Builder, node: Node, inputs: list[str]):
    axis = node.attrs["axis"]
    order = _ordered(b, node, inputs[0], axis, b.size(node.inputs[0].shape[axis]), node.attrs["descending"])[1]
    return b.cast(order, node.output.dtype)


@rule("top_k")
def _top_k(b: Builder, node: Node, inputs: list[str]):
    values, indices = _ordered(b, node, inputs[0], -1, b.size(node.attrs["k"]), True)
    return values, b.cast(indices, node.outputs[1].dtype)


# Operator that takes one more element in, and what it starts with.
_CUMULATIVE = {
    "cumprod": ("Mul", 1.0), "cummax": ("Max", -np.inf), "cummin": ("Min", np.inf), "cumlogsumexp": ("", -np.inf),
}  # fmt: skip


@rule(*_CUMULATIVE)
def _cumulative(b: Builder, node: Node, inputs: list[str]):
    op, start = _CUMULATIVE[node.name]
    (x,), dtype, axis = inputs, node.output.dtype, node.attrs["axis"]
    logical = dtype == "bool"
    if not node.output.type.is_float:
        limits = np.iinfo("int64")
        start = 1 if op == "Mul" else (limits.min if op == "Max" else limits.max)
        x, dtype = b.cast(x, "int64"), "int64"
    shape = [s for a, s in enumerate(node.output.shape) if a != axis]
    first = b.emit("Expand", b.constant(start, dtype), b.sizes(shape))
    with b.body() as body:
        state, element = b.fresh("state"), b.fresh("element")
        body.takes((state, dtype, len(shape)), (element, dtype, len(shape)))
        result = b.emit(op, state, element) if op else logaddexp(b, [state, element], dtype)
        body.gives((result, dtype, len(shape)), (b.emit("Identity", result), dtype, len(shape)))
    direction = [int(node.attrs["reverse"])]
    _, y = b.scan(body, [first], [x], axis, direction)
    return b.cast(y, "bool" if logical else node.output.dtype) if dtype != node.output.dtype else y


@rule("searchsorted")
def _searchsorted(b: Builder, node: Node, inputs: list[str]):
    sequence, values = inputs
    if node.inputs[0].dtype == "bool":
        sequence, values = b.cast(sequence, "int32"), b.cast(values, "int32")
    column = b.emit("Unsqueeze", values, b.constant([-1], "int64"))
    if node.attrs["side"] == "left":
        before = b.emit("Less", sequence, column)
        if node.inputs[0].type.is_float:  # NaN comes last
            before = b.emit("Or", before, b.emit("And", b.emit("IsNaN", column), b.emit("Equal", sequence, sequence)))
    else:
        before = b.emit("LessOrEqual", sequence, column)
        if node.inputs[0].type.is_float:
            before = b.emit("Or", before, b.emit("IsNaN", column))
    return b.cast(b.reduce("ReduceSum", b.cast(before, "int64"), [node.output.type.rank], False), node.output.dtype)


# -- softmax and normalisation ----------------------------------------------------------------------------------------
def _axes(node: Node) -> list[int]:
    axis = node.attrs["axis"]
    return [axis] if isinstance(axis, int) else list(axis)


@rule("softmax", "log_softmax")
def _softmax(b: Builder, node: Node, inputs: list[str]):
    (x,), axes = inputs, _axes(node)
    if len(axes) == 1:
        return b.emit("Softmax" if node.name == "softmax" else "LogSoftmax", x, axis=axes[0])
    log = b.emit("Sub", x, b.reduce("ReduceLogSumExp", x, axes, True))
    return b.emit("Exp", log) if node.name == "softmax" else log


def mean(b: Builder, x: str, axes) -> str:
    """The mean over axes, which stay with size 1."""
    return b.reduce("ReduceMean", x, axes, True)


def _centred_and_scale(b: Builder, x: str, axes, epsilon: float, dtype: str) -> tuple[str, str]:
    """(x - mean, the standard deviation)"""
    centred = b.emit("Sub", x, mean(b, x, axes))
    variance = mean(b, b.emit("Mul", centred, centred), axes)
    return centred, b.emit("Sqrt", b.emit("Add", variance, b.like(epsilon, dtype)))


@rule("batch_norm")
def _batch_norm(b: Builder, node: Node, inputs: list[str]):
    x, *statistics = inputs
    axis, rank = node.attrs["axis"], node.output.type.rank
    shape = [node.inputs[1].shape[0]] + [1] * (rank - 1 - axis % rank)
    average, variance, gamma, beta = (b.reshape(s, shape) for s in statistics)
    epsilon = b.like(node.attrs["epsilon"], node.inputs[2].dtype)
    scale = b.emit("Div", gamma, b.emit("Sqrt", b.emit("Add", variance, epsilon)))
    shift = b.emit("Sub", beta, b.emit("Mul", average, scale))
    return b.emit("Add", b.emit("Mul", x, scale), shift)


@rule("layer_norm")
def _layer_norm(b: Builder, node: Node, inputs: list[str]):
    x, gamma, beta = inputs
    axes, shape = node.attrs["axes"], node.inputs[0].shape
    first = len(shape) - len(axes)
    if tuple(sorted(axes)) == tuple(range(first, len(shape))) and node.inputs[1].shape == shape[first:]:
        return b.emit("LayerNormalization", x, gamma, beta, axis=first, epsilon=float(node.attrs["epsilon"]))
    centred, scale = _centred_and_scale(b, x, axes, node.attrs["epsilon"], node.output.dtype)
    return b.emit("Add", b.emit("Mul", b.emit("Div", centred, scale), gamma), beta)


@rule("rms_norm")
def _rms_norm(b: Builder, node: Node, inputs: list[str]):
    x, gamma = inputs
    square = mean(b, b.emit("Mul", x, x), node.attrs["axes"])
    scale = b.emit("Sqrt", b.emit("Add", square, b.like(node.attrs["epsilon"], node.output.dtype)))
    return b.emit("Mul", b.emit("Div", x, scale), gamma)


@rule("group_norm")
def _group_norm(b: Builder, node: Node, inputs: list[str]):
    x, gamma, beta = inputs
    shape, groups = node.inputs[0].shape, node.attrs["groups"]
    apart = b.reshape(x, [*shape[:-1], groups, shape[-1] // groups])
    axes = [*range(1, len(shape) - 1), len(shape)]
    centred, scale = _centred_and_scale(b, apart, axes, node.attrs["epsilon"], node.output.dtype)
    whole = b.reshape(b.emit("Div", centred, scale), shape)
    return b.emit("Add", b.emit("Mul", whole, gamma), beta)


@rule("moments")
def _moments(b: Builder, node: Node, inputs: list[str]):
    axes = node.attrs["axes"]
    average = mean(b, inputs[0], axes)
    centred = b.emit("Sub", inputs[0], average)
    variance = b.reduce("ReduceMean", b.emit("Mul", centred, centred), axes, False)
    return b.emit("Squeeze", average, b.constant(np.int64(axes))), variance
