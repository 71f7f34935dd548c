"""Elementwise primitives in ONNX."""

from __future__ import annotations

import math

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Node
from kgraph.ir.types import np_dtype
from kgraph.onnx_export.builder import RULES, Builder, element_type, rule

_DIRECT = {
    "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "round_nearest_even": "Round",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "logistic": "Sigmoid", "is_nan": "IsNaN", "is_inf": "IsInf",
    "logical_not": "Not", "bitwise_not": "BitwiseNot", "stop_gradient": "Identity", "optimization_barrier": "Identity",
    "softplus": "Softplus", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor",
    "bitwise_and": "BitwiseAnd", "bitwise_or": "BitwiseOr", "bitwise_xor": "BitwiseXor",
}  # fmt: skip
_ORDERS = {"lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual"}


def _direct(op: str):
    return lambda b, node, inputs: b.emit(op, *inputs)


RULES.update({name: _direct(op) for name, op in _DIRECT.items()})


def _order(op: str):
    """A comparison; ONNX orders no bools."""

    def emit(b: Builder, node: Node, inputs: list[str]):
        return b.emit(op, *([b.cast(x, "int32") for x in inputs] if node.inputs[0].dtype == "bool" else inputs))

    return emit


RULES.update({name: _order(op) for name, op in _ORDERS.items()})


@rule("maximum", "minimum")
def _extremum(b: Builder, node: Node, inputs: list[str]):
    larger = node.name == "maximum"
    if node.output.dtype == "bool":
        return b.emit("Or" if larger else "And", *inputs)
    return b.emit("Max" if larger else "Min", *inputs)


@rule("select")
def _select(b: Builder, node: Node, inputs: list[str]):
    if node.output.dtype != "bool":
        return b.emit("Where", *inputs)
    which, yes, no = inputs
    return b.emit("Or", b.emit("And", which, yes), b.emit("And", b.emit("Not", which), no))


@rule("custom_gradient")
def _custom_gradient(b: Builder, node: Node, inputs: list[str]):
    return [b.emit("Identity", x) for x in inputs[: node.attrs["num_results"]]]


@rule("neg")
def _neg(b: Builder, node: Node, inputs: list[str]):
    if node.output.dtype.startswith("uint"):
        return b.cast(b.emit("Neg", b.cast(inputs[0], "int64")), node.output.dtype)
    return b.emit("Neg", inputs[0])


@rule("relu")
def _relu(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Identity" if node.output.dtype.startswith("uint") else "Relu", inputs[0])


@rule("pow")
def _pow(b: Builder, node: Node, inputs: list[str]):
    if node.output.type.is_float:
        return b.emit("Pow", *inputs)
    # By squaring, bit after bit of the exponent: integers wrap around, where ONNX leaves open what happens.
    x, signed = (b.cast(x, "int64") for x in inputs)
    known = b.arrays.get(inputs[1])
    bits = 63 if known is None else max(int(abs(known.astype(int)).max(initial=0)).bit_length(), 1)
    one, two, zero = (b.like(v, "int64") for v in (1, 2, 0))
    base, exponent, result = x, b.emit("Abs", signed), one
    for bit in range(bits):
        odd = b.emit("Equal", b.emit("Mod", exponent, two), one)
        result = b.emit("Mul", result, b.emit("Where", odd, base, one))
        if bit + 1 < bits:
            base, exponent = b.emit("Mul", base, base), b.emit("Div", exponent, two)
    if not node.output.dtype.startswith("uint"):  # 1 / x ** y towards zero is 0, but for 1 and -1
        vanishes = b.emit("Not", b.emit("Equal", b.emit("Abs", x), one))
        vanishes = b.emit("And", b.emit("Less", signed, zero), vanishes)
        result = b.emit("Where", vanishes, zero, result)
    return b.cast(result, node.output.dtype)


@rule("convert")
def _convert(b: Builder, node: Node, inputs: list[str]):
    dtype = node.output.dtype
    element_type(dtype)
    if not node.inputs[0].type.is_float or node.output.type.is_float or dtype == "bool":
        return b.cast(inputs[0], dtype)
    return _saturated(b, inputs[0], node.inputs[0].dtype, dtype)


def _saturated(b: Builder, x: str, source: str, dtype: str) -> str:
    """Floats as integers: what is out of range becomes the nearest integer that there is, NaN 0. ONNX says nothing."""
    if dtype == "uint64":
        raise UnsupportedError("floats as uint64")
    if source in ("float16", "bfloat16"):
        x, source = b.cast(x, "float32"), "float32"
    x = b.emit("Where", b.emit("IsNaN", x), b.like(0.0, source), x)
    limits = np.iinfo(np_dtype(dtype))
    low, high = b.constant(limits.min, "int64"), b.constant(limits.max, "int64")
    whole = b.cast(x, "int64")
    whole = b.emit("Where", b.emit("GreaterOrEqual", x, b.like(float(limits.max), source)), high, whole)
    whole = b.emit("Where", b.emit("LessOrEqual", x, b.like(float(limits.min), source)), low, whole)
    return b.cast(whole, dtype) if dtype != "int64" else whole


@rule("bitcast_convert")
def _bitcast_convert(b: Builder, node: Node, inputs: list[str]):
    asks = [_asks_for_negative_zero(use) for use in b.uses.get(node.output, [])]
    if not asks or not all(asks):
        raise UnsupportedError("bitcast_convert, as ONNX has no operator for the bits of numbers")
    return ""  # only read by comparisons, which have another form


def _asks_for_negative_zero(node: Node) -> bool:
    """Whether a node compares the bits of floats with those of the negative zero."""
    if node.name != "eq":
        return False
    bits, pattern = sorted(node.inputs, key=lambda v: v.node is None or v.node.name != "bitcast_convert")
    if bits.node is None or bits.node.name != "bitcast_convert" or not bits.node.inputs[0].type.is_float:
        return False
    known = pattern.node.attrs.get("value") if pattern.node is not None else None
    return known is not None and bool(np.all(np.asarray(known) == np.iinfo(np_dtype(bits.dtype)).min))


@rule("eq")
def _eq(b: Builder, node: Node, inputs: list[str]):
    if not _asks_for_negative_zero(node):
        return b.emit("Equal", *inputs)
    (x,) = (v.node.inputs[0] for v in node.inputs if v.node is not None and v.node.name == "bitcast_convert")
    zero = b.like(0.0, x.dtype)
    return b.emit("And", b.emit("Equal", b.names[x], zero), _is_negative(b, b.names[x], zero))


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
        # As in NumPy: the remainder is taken off first, so that the quotient is whole but for rounding.
        dtype = node.output.dtype
        rest, moves = _remainder(b, node, inputs)
        quotient = b.emit("Div", b.emit("Sub", inputs[0], rest), inputs[1])
        quotient = b.emit("Where", moves, b.emit("Sub", quotient, b.like(1.0, dtype)), quotient)
        zero = b.emit("Equal", inputs[1], b.like(0.0, dtype))
        return b.emit("Where", zero, b.emit("Div", *inputs), b.emit("Round", quotient))
    # ONNX rounds integers towards zero; its remainder has the divisor's sign, and without it the division is exact.
    return b.emit("Div", b.emit("Sub", inputs[0], b.emit("Mod", *inputs)), inputs[1])


@rule("mod")
def _mod(b: Builder, node: Node, inputs: list[str]):
    if not node.output.type.is_float:
        return b.emit("Mod", *inputs)
    rest, moves = _remainder(b, node, inputs)
    return b.emit("Where", moves, b.emit("Add", rest, inputs[1]), rest)


def _remainder(b: Builder, node: Node, inputs: list[str]) -> tuple[str, str]:
    """The exact remainder of a division of floats towards zero, and where its sign is not the divisor's."""
    zero = b.like(0.0, node.output.dtype)
    rest = b.emit("Mod", *inputs, fmod=1)
    other = b.emit("Xor", b.emit("Less", rest, zero), b.emit("Less", inputs[1], zero))
    return rest, b.emit("And", other, b.emit("Not", b.emit("Equal", rest, zero)))


@rule("rem")
def _rem(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Mod", *inputs, fmod=1)


@rule("hypot")
def _hypot(b: Builder, node: Node, inputs: list[str]):
    # The larger one is taken out, so that no square overflows.
    dtype = node.output.dtype
    sides = [b.emit("Abs", x) for x in inputs]
    larger, smaller = b.emit("Max", *sides), b.emit("Min", *sides)
    one = b.like(1.0, dtype)
    ratio = b.emit("Div", smaller, b.emit("Where", b.emit("Equal", larger, b.like(0.0, dtype)), one, larger))
    length = b.emit("Mul", larger, b.emit("Sqrt", b.emit("Add", one, b.emit("Mul", ratio, ratio))))
    infinite = b.emit("Or", *[b.emit("IsInf", x) for x in sides])
    return b.emit("Where", infinite, b.like(math.inf, dtype), length)


@rule("logaddexp")
def _logaddexp(b: Builder, node: Node, inputs: list[str]):
    return logaddexp(b, inputs, node.output.dtype)


def logaddexp(b: Builder, inputs: list[str], dtype: str) -> str:
    """log(exp(x) + exp(y)) of two floats."""
    larger, smaller = b.emit("Max", *inputs), b.emit("Min", *inputs)
    apart = b.emit("Sub", smaller, larger)
    apart = b.emit("Where", b.emit("Equal", smaller, larger), b.like(0.0, dtype), apart)  # inf - inf
    return b.emit("Add", larger, b.emit("Softplus", apart))


@rule("atan2")
def _atan2(b: Builder, node: Node, inputs: list[str]):
    dtype = node.output.dtype
    zero = b.like(0.0, dtype)
    both = b.emit("And", *[b.emit("IsInf", v) for v in inputs])  # the direction of infinities is that of their signs
    y, x = (b.emit("Where", both, b.emit("Sign", v), v) for v in inputs)
    steep = b.emit("Greater", b.emit("Abs", y), b.emit("Abs", x))
    sign = b.emit("Where", _is_negative(b, y, zero), b.like(-1.0, dtype), b.like(1.0, dtype))
    flat = b.emit("Atan", b.emit("Div", y, b.emit("Where", b.emit("Equal", x, zero), b.like(1.0, dtype), x)))
    behind = b.emit("Mul", sign, b.like(math.pi, dtype))
    flat = b.emit("Where", _is_negative(b, x, zero), b.emit("Add", flat, behind), flat)
    up = b.emit("Mul", sign, b.like(math.pi / 2, dtype))
    inverse = b.emit("Atan", b.emit("Div", x, b.emit("Where", b.emit("Equal", y, zero), b.like(1.0, dtype), y)))
    return b.emit("Where", steep, b.emit("Sub", up, inverse), flat)


def _is_negative(b: Builder, x: str, zero: str) -> str:
    """Whether numbers are negative, or the negative zero."""
    return b.emit("Or", b.emit("Less", x, zero), b.emit("Less", b.emit("Reciprocal", x), zero))


@rule("shift_left", "shift_right")
def _shift(b: Builder, node: Node, inputs: list[str]):
    dtype = node.output.dtype
    direction = "LEFT" if node.name == "shift_left" else "RIGHT"
    if dtype.startswith("uint"):
        return b.emit("BitShift", *inputs, direction=direction)
    # ONNX shifts unsigned integers only. To the right, ones move in behind a sign where its complement gets zeros.
    x, count = b.cast(inputs[0], "int64"), b.cast(b.cast(inputs[1], "int64"), "uint64")
    negative = b.emit("Less", x, b.like(0, "int64"))
    if direction == "RIGHT":
        x = b.emit("Where", negative, b.emit("BitwiseNot", x), x)
    x = b.cast(b.emit("BitShift", b.cast(x, "uint64"), count, direction=direction), "int64")
    if direction == "RIGHT":
        x = b.emit("Where", negative, b.emit("BitwiseNot", x), x)
    return b.cast(x, dtype)


@rule("erfc")
def _erfc(b: Builder, node: Node, inputs: list[str]):
    return b.emit("Sub", b.like(1.0, node.output.dtype), b.emit("Erf", inputs[0]))
