"""Reductions, orders, softmax and normalisations in ONNX."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Node
from kgraph.onnx_export.builder import RULES, Builder, rule

_DIRECT = {"reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def _reduction(op: str):
    return lambda b, node, inputs: b.reduce(op, inputs[0], node.attrs["axes"], node.attrs["keepdims"])


RULES.update({name: _reduction(op) for name, op in _DIRECT.items()})


@rule("reduce_and", "reduce_or")
def _logical(b: Builder, node: Node, inputs: list[str]):
    op = "ReduceMin" if node.name == "reduce_and" else "ReduceMax"
    return b.cast(b.reduce(op, b.cast(inputs[0], "int32"), node.attrs["axes"], node.attrs["keepdims"]), "bool")


@rule("logsumexp")
def _logsumexp(b: Builder, node: Node, inputs: list[str]):
    return b.reduce("ReduceLogSumExp", inputs[0], node.attrs["axes"], node.attrs["keepdims"])


@rule("argmax", "argmin")
def _arg(b: Builder, node: Node, inputs: list[str]):
    op = "ArgMax" if node.name == "argmax" else "ArgMin"
    return b.cast(b.emit(op, inputs[0], axis=node.attrs["axis"], keepdims=0), node.output.dtype)


@rule("cumsum")
def _cumsum(b: Builder, node: Node, inputs: list[str]):
    axis = b.constant(node.attrs["axis"], "int64")
    return b.emit("CumSum", inputs[0], axis, reverse=int(node.attrs["reverse"]))


def _ordered(b: Builder, x: str, axis: int, count: str, largest: bool) -> list[str]:
    return b.emit("TopK", x, count, outputs=2, axis=axis, largest=int(largest), sorted=1)


@rule("sort")
def _sort(b: Builder, node: Node, inputs: list[str]):
    axis = node.attrs["axis"]
    return _ordered(b, inputs[0], axis, b.size(node.inputs[0].shape[axis]), node.attrs["descending"])[0]


@rule("argsort")
def _argsort(b: Builder, node: Node, inputs: list[str]):
    axis = node.attrs["axis"]
    order = _ordered(b, inputs[0], axis, b.size(node.inputs[0].shape[axis]), node.attrs["descending"])[1]
    return b.cast(order, node.output.dtype)


@rule("top_k")
def _top_k(b: Builder, node: Node, inputs: list[str]):
    values, indices = _ordered(b, inputs[0], -1, b.constant([node.attrs["k"]], "int64"), True)
    return values, b.cast(indices, node.outputs[1].dtype)


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
