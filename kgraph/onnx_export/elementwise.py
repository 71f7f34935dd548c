"""Elementwise primitives in ONNX."""

from __future__ import annotations

import math

from kgraph.errors import UnsupportedError
from kgraph.ir import Node
from kgraph.onnx_export.builder import RULES, Builder, rule

_DIRECT = {
    "neg": "Neg", "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "round_nearest_even": "Round",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "logistic": "Sigmoid", "is_nan": "IsNaN", "is_inf": "IsInf",
    "logical_not": "Not", "bitwise_not": "BitwiseNot", "stop_gradient": "Identity", "optimization_barrier": "Identity",
    "relu": "Relu", "softplus": "Softplus", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow",
    "maximum": "Max", "minimum": "Min", "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor",
    "bitwise_and": "BitwiseAnd", "bitwise_or": "BitwiseOr", "bitwise_xor": "BitwiseXor", "eq": "Equal", "lt": "Less",
    "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual", "select": "Where",
}  # fmt: skip


def _direct(op: str):
    return lambda b, node, inputs: b.emit(op, *inputs)


RULES.update({name: _direct(op) for name, op in _DIRECT.items()})


@rule("convert")
def _convert(b: Builder, node: Node, inputs: list[str]):
    return b.cast(inputs[0], node.output.dtype)


@rule("ne")
def _ne(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Not", b.emit("Equal", *inputs))


@rule("is_finite")
def _is_finite(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Not", b.emit("Or", b.emit("IsNaN", inputs[0]), b.emit("IsInf", inputs[0])))


@rule("trunc")
def _trunc(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Mul", b.emit("Sign", inputs[0]), b.emit("Floor", b.emit("Abs", inputs[0])))


@rule("exp2")
def _exp2(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Pow", b.like(2.0, node.output.dtype), inputs[0])


@rule("expm1")
def _expm1(b: Builder, node: Node, inputs: list[str]):
    # Near zero by the hyperbolic tangent of half the argument, where a difference from 1 would lose digits.
    (x,), dtype = inputs, node.output.dtype
    one, two = b.like(1.0, dtype), b.like(2.0, dtype)
    half = b.emit("Tanh", b.emit("Div", x, two))
    near = b.emit("Div", b.emit("Mul", two, half), b.emit("Sub", one, half))
    return b.emit("Where", b.emit("Less", b.emit("Abs", x), one), near, b.emit("Sub", b.emit("Exp", x), one))


@rule("log1p")
def _log1p(b: Builder, node: Node, inputs: list[str]):
    (x,), dtype = inputs, node.output.dtype
    one, two = b.like(1.0, dtype), b.like(2.0, dtype)
    near = b.emit("Mul", two, b.emit("Atanh", b.emit("Div", x, b.emit("Add", x, two))))
    small = b.emit("Less", b.emit("Abs", x), b.like(0.5, dtype))
    return b.emit("Where", small, near, b.emit("Log", b.emit("Add", x, one)))


@rule("log2")
def _log2(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Div", b.emit("Log", inputs[0]), b.like(math.log(2.0), node.output.dtype))


@rule("rsqrt")
def _rsqrt(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Reciprocal", b.emit("Sqrt", inputs[0]))


@rule("cbrt")
def _cbrt(b: Builder, node: Node, inputs: list[str]):
    root = b.emit("Pow", b.emit("Abs", inputs[0]), b.like(1.0 / 3.0, node.output.dtype))
    return b.emit("Mul", b.emit("Sign", inputs[0]), root)


@rule("relu6")
def _relu6(b: Builder, node: Node, inputs: list[str]):
    dtype = node.output.dtype
    return b.emit("Min", b.emit("Max", inputs[0], b.like(0.0, dtype)), b.like(6.0, dtype))


@rule("gelu")
def _gelu(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Gelu", inputs[0], approximate="tanh" if node.attrs["approximate"] else "none")


@rule("silu")
def _silu(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Mul", inputs[0], b.emit("Sigmoid", inputs[0]))


@rule("elu")
def _elu(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Elu", inputs[0], alpha=float(node.attrs["alpha"]))


@rule("leaky_relu")
def _leaky_relu(b: Builder, node: Node, inputs: list[str]):
    return b.emit("LeakyRelu", inputs[0], alpha=float(node.attrs["negative_slope"]))


@rule("floor_divide")
def _floor_divide(b: Builder, node: Node, inputs: list[str]):
    if node.output.type.is_float:
        return b.emit("Floor", b.emit("Div", *inputs))
    # ONNX rounds integers towards zero; its remainder has the divisor's sign, and without it the division is exact.
    return b.emit("Div", b.emit("Sub", inputs[0], b.emit("Mod", *inputs)), inputs[1])


@rule("mod")
def _mod(b: Builder, node: Node, inputs: list[str]):
    if not node.output.type.is_float:
        return b.emit("Mod", *inputs)
    whole = b.emit("Floor", b.emit("Div", *inputs))
    return b.emit("Sub", inputs[0], b.emit("Mul", whole, inputs[1]))


@rule("rem")
def _rem(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Mod", *inputs, fmod=1)


@rule("hypot")
def _hypot(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Sqrt", b.emit("Add", *[b.emit("Mul", x, x) for x in inputs]))


@rule("logaddexp")
def _logaddexp(b: Builder, node: Node, inputs: list[str]):
    larger, smaller = b.emit("Max", *inputs), b.emit("Min", *inputs)
    return b.emit("Add", larger, b.emit("Softplus", b.emit("Sub", smaller, larger)))


@rule("atan2")
def _atan2(b: Builder, node: Node, inputs: list[str]):
    (y, x), dtype = inputs, node.output.dtype
    zero = b.like(0.0, dtype)
    steep = b.emit("Greater", b.emit("Abs", y), b.emit("Abs", x))
    sign = b.emit("Where", b.emit("Less", y, zero), b.like(-1.0, dtype), b.like(1.0, dtype))
    flat = b.emit("Atan", b.emit("Div", y, b.emit("Where", b.emit("Equal", x, zero), b.like(1.0, dtype), x)))
    behind = b.emit("Mul", sign, b.like(math.pi, dtype))
    flat = b.emit("Where", b.emit("Less", x, zero), b.emit("Add", flat, behind), flat)
    up = b.emit("Mul", sign, b.like(math.pi / 2, dtype))
    inverse = b.emit("Atan", b.emit("Div", x, b.emit("Where", b.emit("Equal", y, zero), b.like(1.0, dtype), y)))
    return b.emit("Where", steep, b.emit("Sub", up, inverse), flat)


@rule("shift_left", "shift_right")
def _shift(b: Builder, node: Node, inputs: list[str]):
    if not node.output.dtype.startswith("uint"):
        raise UnsupportedError("ONNX shifts unsigned integers only")
    return b.emit("BitShift", *inputs, direction="LEFT" if node.name == "shift_left" else "RIGHT")


@rule("erfc")
def _erfc(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Sub", b.like(1.0, node.output.dtype), b.emit("Erf", inputs[0]))
