"""Recurrent layers in ONNX: its own operators where they have the activations, else a loop over time."""

from __future__ import annotations

from collections.abc import Callable

from kgraph.ir import Node
from kgraph.onnx_export.builder import Builder, rule
from kgraph.ops.recurrent_cells import SELU_ALPHA, SELU_SCALE

# Name, alpha, beta, where they have them: the activations of ONNX' recurrent operators.
_ACTIVATIONS = {
    "tanh": ("Tanh", None, None), "sigmoid": ("Sigmoid", None, None), "relu": ("Relu", None, None),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5), "softsign": ("Softsign", None, None),
    "softplus": ("Softplus", None, None), "elu": ("Elu", 1.0, None), "linear": ("Affine", 1.0, 0.0),
}  # fmt: skip
_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "simple": "RNN"}
# ONNX' order of the gates: input, output, forget, candidate.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (0, 1, 2), "simple": (0,)}


@rule("rnn")
def _rnn(b: Builder, node: Node, inputs: list[str]):
    names = ("activation",) if node.attrs["cell"] == "simple" else ("activation", "recurrent_activation")
    if node.attrs["has_mask"] or any(node.attrs[name] not in _ACTIVATIONS for name in names):
        return _loop(b, node, inputs)
    return _operator(b, node, inputs)


def _operator(b: Builder, node: Node, inputs: list[str]):
    attrs = node.attrs
    cell = attrs["cell"]
    outer = _ACTIVATIONS[attrs["activation"]]
    inner = _ACTIVATIONS[attrs["recurrent_activation"]] if cell != "simple" else outer
    functions = {"lstm": [inner, outer, outer], "gru": [inner, outer], "simple": [outer]}[cell]
    x, kernel, recurrent, bias, recurrent_bias, *states = inputs
    batch, steps, features = node.inputs[0].shape
    units = node.inputs[2].shape[0]

    def gates(weights: str, rows: int) -> str:
        """[rows, G * U] as [1, G * U, rows], the gates in ONNX' order."""
        parts = [columns(b, weights, g * units, units) for g in _GATES[cell]]
        return b.reshape(b.transpose(b.emit("Concat", *parts, axis=1), [1, 0]), [1, len(parts) * units, rows])

    biases = []
    for value in (bias, recurrent_bias):
        row = b.reshape(value, [1, len(_GATES[cell]) * units])
        biases += [columns(b, row, g * units, units) for g in _GATES[cell]]
    initial = [b.reshape(s, [1, batch, units]) for s in states]
    y, *last = b.emit(
        _OPERATORS[cell],
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
        activation_alpha=[alpha for _, alpha, _ in functions if alpha is not None] or None,
        activation_beta=[beta for _, _, beta in functions if beta is not None] or None,
        linear_before_reset=int(attrs["reset_after"]) if cell == "gru" else None,
    )
    sequence = b.reshape(b.transpose(y, [2, 0, 1, 3]), [batch, steps, units])
    return (sequence, *[b.reshape(s, [batch, units]) for s in last])


def columns(b: Builder, x: str, start: int, count: int) -> str:
    """Some columns of a matrix."""
    return b.emit("Slice", x, *[b.constant([v], "int64") for v in (start, start + count, 1)])


# -- a loop over time -------------------------------------------------------------------------------------------------
def _loop(b: Builder, node: Node, inputs: list[str]):
    attrs, dtype = node.attrs, node.outputs[0].dtype
    x, kernel, recurrent, bias, recurrent_bias, *states = inputs
    mask = states.pop() if attrs["has_mask"] else None
    projected = b.emit("Add", b.emit("MatMul", x, kernel), bias)
    sequences = [projected] if mask is None else [projected, b.emit("Unsqueeze", mask, b.constant([2], "int64"))]
    with b.body() as body:
        before = [b.fresh("state") for _ in states]
        now = [b.fresh("step") for _ in sequences]
        body.takes(*[(s, dtype, 2) for s in before])
        body.takes(*[(s, d, 2) for s, d in zip(now, (dtype, "bool"))])
        after = _step(b, node, now[0], before, recurrent, recurrent_bias)
        output = after[0]
        if mask is not None:
            skipped = b.like(0.0, dtype) if attrs["zero_output_for_mask"] else before[0]
            output = b.emit("Where", now[1], output, skipped)
            after = [b.emit("Where", now[1], new, old) for new, old in zip(after, before)]
        body.gives(*[(s, dtype, 2) for s in after], (b.emit("Identity", output), dtype, 2))
    *last, sequence = b.scan(body, states, sequences, 1, [int(attrs["reverse"])] * len(sequences))
    return (sequence, *last)


def _step(b: Builder, node: Node, projected: str, states: list[str], recurrent: str, bias: str) -> list[str]:
    """The states after a step, in Keras' order of the gates."""
    attrs, dtype = node.attrs, node.outputs[0].dtype
    units = node.inputs[2].shape[0]
    outer = lambda x: activate(b, attrs["activation"], x, dtype)
    inner = lambda x: activate(b, attrs["recurrent_activation"], x, dtype)
    part = lambda x, gate, count=1: columns(b, x, gate * units, count * units)
    h = states[0]
    if attrs["cell"] == "gru" and not attrs["reset_after"]:
        gates = b.emit("MatMul", h, part(recurrent, 0, 2))
        own = b.reshape(bias, [1, 3 * units])
        gates = b.emit("Add", b.emit("Add", part(projected, 0, 2), gates), part(own, 0, 2))
        update, reset = inner(part(gates, 0)), inner(part(gates, 1))
        candidate = b.emit("MatMul", b.emit("Mul", reset, h), part(recurrent, 2))
        candidate = b.emit("Add", b.emit("Add", part(projected, 2), candidate), part(own, 2))
        return [_mixed(b, update, h, outer(candidate), dtype)]
    own = b.emit("Add", b.emit("MatMul", h, recurrent), bias)
    if attrs["cell"] == "gru":
        update, reset = (inner(b.emit("Add", part(projected, g), part(own, g))) for g in (0, 1))
        candidate = b.emit("Add", part(projected, 2), b.emit("Mul", reset, part(own, 2)))
        return [_mixed(b, update, h, outer(candidate), dtype)]
    gates = b.emit("Add", projected, own)
    if attrs["cell"] == "simple":
        return [outer(gates)]
    i, f, g, o = (function(part(gates, gate)) for gate, function in enumerate((inner, inner, outer, inner)))
    cell = b.emit("Add", b.emit("Mul", f, states[1]), b.emit("Mul", i, g))
    return [b.emit("Mul", o, outer(cell)), cell]


def _mixed(b: Builder, update: str, old: str, new: str, dtype: str) -> str:
    fresh = b.emit("Mul", b.emit("Sub", b.like(1.0, dtype), update), new)
    return b.emit("Add", b.emit("Mul", update, old), fresh)


def activate(b: Builder, name: str, x: str, dtype: str) -> str:
    """One of the activations of recurrent cells."""
    clip = lambda low, high: b.emit("Min", b.emit("Max", x, b.like(low, dtype)), b.like(high, dtype))
    special: dict[str, Callable[[], str]] = {
        "linear": lambda: x,
        "relu6": lambda: clip(0.0, 6.0),
        "hard_tanh": lambda: clip(-1.0, 1.0),
        "hard_sigmoid": lambda: b.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5),
        "selu": lambda: b.emit("Selu", x, alpha=SELU_ALPHA, gamma=SELU_SCALE),
        "silu": lambda: b.emit("Mul", x, b.emit("Sigmoid", x)),
        "exponential": lambda: b.emit("Exp", x),
    }
    return special[name]() if name in special else b.emit(_ACTIVATIONS[name][0], x)
