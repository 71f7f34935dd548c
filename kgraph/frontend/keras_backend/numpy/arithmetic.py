"""Arithmetic and bit operations of two tensors, element by element."""

from __future__ import annotations

import math

import numpy as np
from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.core import while_loop
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    broadcast,
    broadcast_sizes,
    convert,
    dtype_of,
    is_float,
    promote,
    promote_inexact,
    scalar,
    widened,
)


def _promote_bool_to_int(x1: Tensor, x2: Tensor) -> list[Tensor]:
    x1, x2 = promote(x1, x2)
    return [convert(x, "int32") for x in (x1, x2)] if dtype_of(x1) == "bool" else [x1, x2]


@sparse_rules.union
def add(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 + x2; `or` of booleans."""
    x1, x2 = promote(x1, x2)
    return ops.logical_or(x1, x2) if dtype_of(x1) == "bool" else ops.add(x1, x2)


@sparse_rules.union
def subtract(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 - x2. Raises TypeError for two booleans."""
    x1, x2 = promote(x1, x2)
    if dtype_of(x1) == "bool":
        raise TypeError("subtract: booleans have no difference; use `logical_xor`, or cast them to integers")
    return ops.sub(x1, x2)


@sparse_rules.intersection
def multiply(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 * x2; `and` of booleans."""
    x1, x2 = promote(x1, x2)
    return ops.logical_and(x1, x2) if dtype_of(x1) == "bool" else ops.mul(x1, x2)


@sparse_rules.division
def divide(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 / x2 in floating point."""
    return ops.div(*promote_inexact(x1, x2))


def true_divide(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 / x2 in floating point."""
    return divide(x1, x2)


@sparse_rules.division
def divide_no_nan(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 / x2 in floating point, 0 where x2 is 0; its gradient is free of NaN as well."""
    x1, x2 = promote_inexact(x1, x2)
    is_zero = ops.eq(x2, scalar(0, x2))
    quotient = ops.div(x1, ops.select(is_zero, scalar(1, x2), x2))
    return ops.select(is_zero, scalar(0, x1), quotient)


def floor_divide(x1: Tensor, x2: Tensor) -> Tensor:
    """The largest integer of at most x1 / x2."""
    return ops.floor_divide(*_promote_bool_to_int(x1, x2))


def mod(x1: Tensor, x2: Tensor) -> Tensor:
    """The remainder of `floor_divide`; it has the sign of x2."""
    return ops.mod(*_promote_bool_to_int(x1, x2))


def fmod(x1: Tensor, x2: Tensor) -> Tensor:
    """The remainder of the division rounded towards 0; it has the sign of x1."""
    return ops.rem(*_promote_bool_to_int(x1, x2))


def power(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 to the power of x2."""
    if type(x2) in (int, float) and x2 == 2:
        x1, _ = _promote_bool_to_int(x1, x2)
        return ops.mul(x1, x1)
    return ops.pow(*_promote_bool_to_int(x1, x2))


@sparse_rules.union
def maximum(x1: Tensor, x2: Tensor) -> Tensor:
    """The larger of two; NaN where one is NaN."""
    x1, x2 = promote(x1, x2)
    return ops.logical_or(x1, x2) if dtype_of(x1) == "bool" else ops.maximum(x1, x2)


@sparse_rules.union
def minimum(x1: Tensor, x2: Tensor) -> Tensor:
    """The smaller of two; NaN where one is NaN."""
    x1, x2 = promote(x1, x2)
    return ops.logical_and(x1, x2) if dtype_of(x1) == "bool" else ops.minimum(x1, x2)


def _ignoring_nan(x1: Tensor, x2: Tensor, chosen: Tensor) -> Tensor:
    if not is_float(x1):
        return chosen
    return ops.select(ops.is_nan(x1), x2, ops.select(ops.is_nan(x2), x1, chosen))


@sparse_rules.union
def fmax(x1: Tensor, x2: Tensor) -> Tensor:
    """The larger of two; the other one where one is NaN."""
    x1, x2 = promote(x1, x2)
    return _ignoring_nan(x1, x2, maximum(x1, x2))


@sparse_rules.union
def fmin(x1: Tensor, x2: Tensor) -> Tensor:
    """The smaller of two; the other one where one is NaN."""
    x1, x2 = promote(x1, x2)
    return _ignoring_nan(x1, x2, minimum(x1, x2))


def clip(x: Tensor, x_min: Tensor, x_max: Tensor) -> Tensor:
    """x limited to [x_min, x_max], in the dtype of x (int32 for booleans); None leaves a side open."""
    x = convert_to_tensor(x)
    if dtype_of(x) == "bool":
        x = convert(x, "int32")
    dtype = dtype_of(x)
    for bound, choose in ((x_min, ops.maximum), (x_max, ops.minimum)):
        if bound is None:
            continue
        if type(bound) is int and not is_float(x):
            # A bound beyond the dtype's range does not wrap around.
            info = np.iinfo(dtype)
            bound = scalar(min(max(bound, int(info.min)), int(info.max)), x)
        x = choose(*promote(x, bound))
    return convert(x, dtype)


def hypot(x1: Tensor, x2: Tensor) -> Tensor:
    """sqrt(x1² + x2²) without overflow."""
    return ops.hypot(*promote_inexact(x1, x2))


def arctan2(x1: Tensor, x2: Tensor) -> Tensor:
    """The angle of the point (x2, x1), in (-pi, pi]."""
    return ops.atan2(*promote_inexact(x1, x2))


def heaviside(x1: Tensor, x2: Tensor) -> Tensor:
    """0 where x1 < 0, x2 where it is 0, 1 where it is positive."""
    x1, x2 = promote_inexact(x1, x2)
    zero, one = scalar(0, x1), scalar(1, x1)
    step = ops.select(ops.lt(x1, zero), zero, ops.select(ops.gt(x1, zero), one, x2))
    return ops.select(ops.is_nan(x1), x1, step)


def nextafter(x1: Tensor, x2: Tensor) -> Tensor:
    """The next number of the dtype after x1 in the direction of x2."""
    return ops.nextafter(*promote_inexact(x1, x2))


def logaddexp(x1: Tensor, x2: Tensor) -> Tensor:
    """log(exp(x1) + exp(x2)) without overflow."""
    return ops.logaddexp(*promote_inexact(x1, x2))


def logaddexp2(x1: Tensor, x2: Tensor) -> Tensor:
    """log2(2**x1 + 2**x2) without overflow."""
    x1, x2 = promote_inexact(x1, x2)
    difference = ops.neg(ops.abs(ops.sub(x1, x2)))
    tail = ops.mul(ops.log1p(ops.exp2(difference)), scalar(math.log2(math.e), x1))
    # Equal operands, infinities among them, whose difference is NaN, have exactly 1 as their tail.
    tail = ops.select(ops.eq(x1, x2), scalar(1, x1), tail)
    return ops.add(ops.maximum(x1, x2), tail)


def ldexp(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 * 2**x2, exact also where 2**x2 alone would overflow. Raises TypeError unless x2 is of an integer dtype."""
    x1, x2 = convert_to_tensor(x1), convert_to_tensor(x2)
    if dtype_of(x2) not in dtypes.INT_TYPES:
        raise TypeError(f"ldexp exponent must be an integer type. Received: x2 dtype={x2.dtype}")
    dtype = dtypes.result_type(x1.dtype, x2.dtype, float)
    out = widened(convert(x1, dtype))
    exponent = convert(x2, "int32")
    # The exponent is spent in three steps that are powers of two in range, built from their bits.
    for _ in range(3):
        step = ops.minimum(ops.maximum(exponent, scalar(-126, exponent)), scalar(127, exponent))
        bits = ops.shift_left(ops.add(step, scalar(127, step)), scalar(23, step))
        out = ops.mul(out, convert(ops.bitcast_convert(bits, dtype="float32"), dtype_of(out)))
        exponent = ops.sub(exponent, step)
    return convert(out, dtype)


def gcd(x1: Tensor, x2: Tensor) -> Tensor:
    """The greatest common divisor of integers, by Euclid's algorithm."""
    x1, x2 = _integers("gcd", x1, x2)
    shape = broadcast_sizes(x1.shape, x2.shape)
    signed = not dtype_of(x1).startswith("uint")
    a, b = (broadcast(ops.abs(x) if signed else x, shape) for x in (x1, x2))
    axes = tuple(range(len(shape)))

    def go_on(a, b):
        return ops.reduce_or(ops.ne(b, scalar(0, b)), axes=axes, keepdims=False)

    def step(a, b):
        done = ops.eq(b, scalar(0, b))
        rest = ops.rem(a, ops.select(done, scalar(1, b), b))
        return ops.select(done, a, b), ops.select(done, b, rest)

    return while_loop(go_on, step, (a, b))[0]


def lcm(x1: Tensor, x2: Tensor) -> Tensor:
    """The least common multiple of integers, 0 where one is 0."""
    x1, x2 = _integers("lcm", x1, x2)
    if not dtype_of(x1).startswith("uint"):
        x1, x2 = ops.abs(x1), ops.abs(x2)
    divisor = gcd(x1, x2)
    divisor = ops.maximum(divisor, scalar(1, divisor))
    return ops.mul(ops.floor_divide(x1, divisor), x2)


def _integers(function: str, x1: Tensor, x2: Tensor) -> list[Tensor]:
    x1, x2 = promote(x1, x2)
    if dtype_of(x1) not in dtypes.INT_TYPES:
        raise TypeError(f"{function}: expected integers. Received: {dtype_of(x1)}")
    return [x1, x2]


# -- bits -----------------------------------------------------------------------------------------------------------
def bitwise_and(x: Tensor, y: Tensor) -> Tensor:
    """The bits set in both."""
    x, y = promote(x, y)
    return ops.logical_and(x, y) if dtype_of(x) == "bool" else ops.bitwise_and(x, y)


def bitwise_or(x: Tensor, y: Tensor) -> Tensor:
    """The bits set in either."""
    x, y = promote(x, y)
    return ops.logical_or(x, y) if dtype_of(x) == "bool" else ops.bitwise_or(x, y)


def bitwise_xor(x: Tensor, y: Tensor) -> Tensor:
    """The bits set in one of the two."""
    x, y = promote(x, y)
    return ops.logical_xor(x, y) if dtype_of(x) == "bool" else ops.bitwise_xor(x, y)


def bitwise_left_shift(x: Tensor, y: Tensor) -> Tensor:
    """x with its bits moved y places up."""
    return ops.shift_left(*_shift_operands(x, y))


def left_shift(x: Tensor, y: Tensor) -> Tensor:
    """x with its bits moved y places up."""
    return bitwise_left_shift(x, y)


def bitwise_right_shift(x: Tensor, y: Tensor) -> Tensor:
    """x with its bits moved y places down; the sign is kept."""
    return ops.shift_right(*_shift_operands(x, y))


def right_shift(x: Tensor, y: Tensor) -> Tensor:
    """x with its bits moved y places down; the sign is kept."""
    return bitwise_right_shift(x, y)


def _shift_operands(x: Tensor, y: Tensor) -> list[Tensor]:
    return _promote_bool_to_int(x, y)
