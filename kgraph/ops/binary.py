"""Elementwise primitives of two operands, with NumPy broadcasting: arithmetic, powers, extrema, bit operations."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import NotDifferentiable
from kgraph.ir.types import COMPLEX, FLOATS, INTS
from kgraph.ops.common import INEXACT, NUMBERS, ORDERED, REAL, dtype_of, like
from kgraph.ops.elementwise import ZERO, Binary, Unary, binary, unary

# The rules read `gradient(c, x, y, z)`: c is the cotangent of z = f(x, y). Sums over broadcast axes come after them.

NONZERO = (0.5, 3.0)

# -- arithmetic -------------------------------------------------------------------------------------------------------

add: Binary = binary("add", np.add, lambda c, x, y, z: (c, c), "x + y; ints wrap.", traits={"commutative"})
sub: Binary = binary("sub", np.subtract, lambda c, x, y, z: (c, ops.neg(c)), "x - y; ints wrap.")
mul: Binary = binary(
    "mul",
    np.multiply,
    lambda c, x, y, z: (ops.mul(c, y), ops.mul(c, x)),
    "x * y; ints wrap.",
    traits={"commutative"},
)


def _div_gradient(c, x, y, z):
    dx = ops.div(c, y)
    return dx, ops.neg(ops.mul(dx, z))


div: Binary = binary("div", np.divide, _div_gradient, "x / y, true division.", dtypes=INEXACT, y=NONZERO)


floor_divide: Binary = binary(
    "floor_divide", np.floor_divide, ZERO, "floor(x / y); 0 for ints where y is 0.", dtypes=REAL, x=(-9, 9), y=NONZERO
)
mod: Binary = binary(
    "mod",
    np.mod,
    lambda c, x, y, z: (c, ops.neg(ops.mul(c, ops.floor_divide(x, y)))),
    "x - y * floor(x / y): the remainder with y's sign; 0 for ints where y is 0.",
    dtypes=REAL,
    x=(-9, 9),
    y=NONZERO,
)
rem: Binary = binary(
    "rem",
    np.fmod,
    lambda c, x, y, z: (c, ops.neg(ops.mul(c, ops.round_nearest_even(ops.div(ops.sub(x, z), y))))),
    "x - y * trunc(x / y): the remainder with x's sign, as C's fmod; 0 for ints where y is 0.",
    dtypes=REAL,
    x=(-9, 9),
    y=NONZERO,
)

# -- powers and relatives ---------------------------------------------------------------------------------------------


def _pow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind != "i":
        return np.power(x, y)
    # NumPy refuses negative int exponents; truncation of 1 / x**-y gives 0 except for x = 1 and x = -1.
    unit = np.where(y % 2 == 0, np.abs(x), x)
    return np.where(y >= 0, np.power(x, np.maximum(y, 0)), np.where(np.abs(x) == 1, unit, 0)).astype(x.dtype)


def _pow_gradient(c, x, y, z):
    zero, one = like(x, 0), like(x, 1)
    power = ops.pow(x, ops.sub(y, one))
    dx = ops.select(ops.eq(y, zero), zero, ops.mul(y, power))
    # The derivative to y is complex for negative x; as usual it counts as zero there, and at x = 0.
    usable = ops.ne(x, zero) if dtype_of(x) in COMPLEX else ops.gt(x, zero)
    dy = ops.mul(z, ops.log(ops.select(usable, x, one)))
    return ops.mul(c, dx), ops.mul(c, dy)


pow: Binary = binary(
    "pow", _pow, _pow_gradient, "x ** y; ints with y < 0 truncate towards 0.", dtypes=NUMBERS, x=(0.2, 3.0), y=(-2, 3)
)


def _atan2_gradient(c, y, x, z):
    scale = ops.div(c, ops.add(ops.mul(x, x), ops.mul(y, y)))
    return ops.mul(scale, x), ops.neg(ops.mul(scale, y))


atan2: Binary = binary(
    "atan2",
    np.arctan2,
    _atan2_gradient,
    "The angle of the point (y, x): atan(x / y) in the quadrant of both, the first operand being the ordinate.",
    dtypes=FLOATS,
    y=NONZERO,
)


def _hypot_gradient(c, x, y, z):
    zero = like(z, 0)
    at_zero = ops.eq(z, zero)
    scale = ops.div(c, ops.select(at_zero, like(z, 1), z))
    return ops.mul(scale, x), ops.mul(scale, y)


hypot: Binary = binary(
    "hypot",
    np.hypot,
    _hypot_gradient,
    "sqrt(x*x + y*y) without overflow.",
    dtypes=FLOATS,
    y=NONZERO,
    traits={"commutative"},
)


def _logaddexp_gradient(c, x, y, z):
    # Where z is infinite the differences would be NaN; against 0 they give the right limits for -inf.
    safe = ops.select(ops.is_inf(z), like(z, 0), z)
    return ops.mul(c, ops.exp(ops.sub(x, safe))), ops.mul(c, ops.exp(ops.sub(y, safe)))


logaddexp: Binary = binary(
    "logaddexp",
    np.logaddexp,
    _logaddexp_gradient,
    "log(exp(x) + exp(y)) without overflow.",
    dtypes=FLOATS,
    traits={"commutative"},
)
nextafter: Binary = binary(
    "nextafter",
    np.nextafter,
    NotDifferentiable("it moves by one unit in the last place"),
    "The next representable value after x towards y.",
    dtypes=FLOATS,
    widen=False,
)

# -- extrema ----------------------------------------------------------------------------------------------------------


def _extremum_gradient(beats):
    def gradient(c, x, y, z):
        zero = like(c, 0)
        tie = ops.select(ops.eq(x, y), ops.mul(c, like(c, 0.5)), zero)
        return ops.select(beats(x, y), c, tie), ops.select(beats(y, x), c, tie)

    return gradient


maximum: Binary = binary(
    "maximum",
    np.maximum,
    _extremum_gradient(lambda a, b: ops.gt(a, b)),
    "The greater of x and y, NaN where either is NaN; the derivative is shared at ties.",
    dtypes=ORDERED,
    traits={"commutative"},
)
minimum: Binary = binary(
    "minimum",
    np.minimum,
    _extremum_gradient(lambda a, b: ops.lt(a, b)),
    "The lesser of x and y, NaN where either is NaN; the derivative is shared at ties.",
    dtypes=ORDERED,
    traits={"commutative"},
)

# -- bit operations ---------------------------------------------------------------------------------------------------

_INT_RESULT = NotDifferentiable("its result is an int")


def _bits(name: str, reference, doc: str, traits=()):
    return binary(name, reference, _INT_RESULT, doc, dtypes=INTS, traits=traits)


bitwise_and: Binary = _bits("bitwise_and", np.bitwise_and, "x & y.", {"commutative"})
bitwise_or: Binary = _bits("bitwise_or", np.bitwise_or, "x | y.", {"commutative"})
bitwise_xor: Binary = _bits("bitwise_xor", np.bitwise_xor, "x ^ y.", {"commutative"})
bitwise_not: Unary = unary("bitwise_not", np.bitwise_not, _INT_RESULT, "~x.", dtypes=INTS)
shift_left: Binary = _bits("shift_left", np.left_shift, "x << y; 0 where y is not in [0, bits of x).")
shift_right: Binary = _bits(
    "shift_right",
    np.right_shift,
    "x >> y, arithmetic for signed x and logical for unsigned x; where y is not in [0, bits of x) only sign bits stay.",
)
