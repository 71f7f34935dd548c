"""Elementwise primitives of one operand: arithmetic, rounding, exponentials, trigonometry, special functions."""

from __future__ import annotations

import math

import numpy as np
from scipy import special as sp

from kgraph import ops
from kgraph.ir import NotDifferentiable
from kgraph.ir.types import COMPLEX, FLOATS
from kgraph.ops.common import NUMBERS, REAL_OF, Array, dtype_of, like
from kgraph.ops.elementwise import ZERO, Unary, unary

# The rules read `gradient(c, x, y)`: c is the cotangent of y = f(x).

# -- arithmetic and rounding ------------------------------------------------------------------------------------------

neg: Unary = unary("neg", np.negative, lambda c, x, y: ops.neg(c), "-x; unsigned ints wrap.", dtypes=NUMBERS)
abs: Unary = unary(
    "abs",
    np.abs,
    lambda c, x, y: _abs_gradient(c, x),
    "|x|, the magnitude of a complex number.",
    dtypes=NUMBERS,
    result=lambda dtype: REAL_OF.get(dtype, dtype),
)
sign: Unary = unary(
    "sign",
    np.sign,
    lambda c, x, y: _sign_gradient(c, x, y),
    "-1, 0 or 1 (x/|x| for complex x); NaN stays NaN.",
    dtypes=NUMBERS,
)
floor: Unary = unary("floor", np.floor, ZERO, "The greatest integer not above x.", dtypes=FLOATS)
ceil: Unary = unary("ceil", np.ceil, ZERO, "The least integer not below x.", dtypes=FLOATS)
trunc: Unary = unary("trunc", np.trunc, ZERO, "x without its fraction.", dtypes=FLOATS)
round_nearest_even: Unary = unary(
    "round_nearest_even", np.rint, ZERO, "The nearest integer, halves to even.", dtypes=FLOATS
)


def _sign_gradient(c: Array, x: Array, y: Array) -> Array | None:
    if dtype_of(x) not in COMPLEX:
        return None
    # y = x / |x|: what c has along y does not change it.
    length = ops.abs(x)
    inverse = ops.div(like(length, 1), ops.select(ops.eq(length, like(length, 0)), like(length, 1), length))
    along = ops.real(ops.mul(c, y))
    rest = ops.sub(c, ops.mul(ops.complex(along, like(along, 0)), ops.conj(y)))
    return ops.mul(rest, ops.complex(inverse, like(inverse, 0)))


def _abs_gradient(c: Array, x: Array) -> Array:
    if dtype_of(x) not in COMPLEX:
        return ops.mul(c, ops.sign(x))
    return ops.mul(ops.complex(c, like(c, 0)), ops.conj(ops.sign(x)))


# -- exponentials and roots -------------------------------------------------------------------------------------------

POSITIVE = (0.1, 4.0)

exp: Unary = unary("exp", np.exp, lambda c, x, y: ops.mul(c, y), "e ** x.")
exp2: Unary = unary(
    "exp2", np.exp2, lambda c, x, y: ops.mul(c, ops.mul(y, like(x, math.log(2)))), "2 ** x.", dtypes=FLOATS
)
expm1: Unary = unary("expm1", np.expm1, lambda c, x, y: ops.mul(c, ops.add(y, like(x, 1))), "e ** x - 1, exact near 0.")
log: Unary = unary("log", np.log, lambda c, x, y: ops.div(c, x), "Natural logarithm.", domain=POSITIVE)
log2: Unary = unary(
    "log2",
    np.log2,
    lambda c, x, y: ops.div(c, ops.mul(x, like(x, math.log(2)))),
    "Logarithm to base 2.",
    dtypes=FLOATS,
    domain=POSITIVE,
)
log1p: Unary = unary(
    "log1p",
    np.log1p,
    lambda c, x, y: ops.div(c, ops.add(x, like(x, 1))),
    "log(1 + x), exact near 0.",
    domain=(-0.8, 4.0),
)
sqrt: Unary = unary(
    "sqrt", np.sqrt, lambda c, x, y: ops.div(ops.mul(c, like(c, 0.5)), y), "Square root.", domain=POSITIVE
)
rsqrt: Unary = unary(
    "rsqrt",
    lambda x: x.dtype.type(1) / np.sqrt(x),
    lambda c, x, y: ops.mul(ops.mul(c, like(c, -0.5)), ops.div(y, x)),
    "1 / sqrt(x).",
    domain=POSITIVE,
)
cbrt: Unary = unary(
    "cbrt",
    np.cbrt,
    lambda c, x, y: ops.div(c, ops.mul(like(x, 3), ops.mul(y, y))),
    "Cube root, negative for negative x.",
    dtypes=FLOATS,
    domain=(0.2, 8.0),
)

# -- trigonometry -----------------------------------------------------------------------------------------------------


def _one_minus_square(x: Array) -> Array:
    # (1 - x)(1 + x) keeps its digits near 1, where 1 - x*x cancels.
    return ops.mul(ops.sub(like(x, 1), x), ops.add(like(x, 1), x))


def _one_plus_square(x: Array) -> Array:
    return ops.add(like(x, 1), ops.mul(x, x))


INSIDE = (-0.9, 0.9)

sin: Unary = unary("sin", np.sin, lambda c, x, y: ops.mul(c, ops.cos(x)), "Sine of radians.", domain=(-7, 7))
cos: Unary = unary("cos", np.cos, lambda c, x, y: ops.neg(ops.mul(c, ops.sin(x))), "Cosine of radians.", domain=(-7, 7))
tan: Unary = unary(
    "tan", np.tan, lambda c, x, y: ops.mul(c, _one_plus_square(y)), "Tangent of radians.", domain=(-1.2, 1.2)
)
asin: Unary = unary(
    "asin",
    np.arcsin,
    lambda c, x, y: ops.mul(c, ops.rsqrt(_one_minus_square(x))),
    "Angle in [-pi/2, pi/2] whose sine is x; NaN outside of [-1, 1].",
    domain=INSIDE,
)
acos: Unary = unary(
    "acos",
    np.arccos,
    lambda c, x, y: ops.neg(ops.mul(c, ops.rsqrt(_one_minus_square(x)))),
    "Angle in [0, pi] whose cosine is x; NaN outside of [-1, 1].",
    domain=INSIDE,
)
atan: Unary = unary(
    "atan",
    np.arctan,
    lambda c, x, y: ops.div(c, _one_plus_square(x)),
    "Angle in (-pi/2, pi/2) whose tangent is x.",
    domain=INSIDE,
)
sinh: Unary = unary("sinh", np.sinh, lambda c, x, y: ops.mul(c, ops.cosh(x)), "Hyperbolic sine.")
cosh: Unary = unary("cosh", np.cosh, lambda c, x, y: ops.mul(c, ops.sinh(x)), "Hyperbolic cosine.")
tanh: Unary = unary("tanh", np.tanh, lambda c, x, y: ops.mul(c, _one_minus_square(y)), "Hyperbolic tangent.")
asinh: Unary = unary(
    "asinh", np.arcsinh, lambda c, x, y: ops.mul(c, ops.rsqrt(_one_plus_square(x))), "Inverse of sinh.", domain=INSIDE
)
acosh: Unary = unary(
    "acosh",
    np.arccosh,
    lambda c, x, y: ops.mul(c, ops.mul(ops.rsqrt(ops.sub(x, like(x, 1))), ops.rsqrt(ops.add(x, like(x, 1))))),
    "Inverse of cosh; NaN below 1.",
    domain=(1.2, 6.0),
)
atanh: Unary = unary(
    "atanh",
    np.arctanh,
    lambda c, x, y: ops.div(c, _one_minus_square(x)),
    "Inverse of tanh; NaN outside of [-1, 1].",
    domain=INSIDE,
)

# -- special functions ------------------------------------------------------------------------------------------------


def _gaussian(x: Array) -> Array:
    """The derivative of erf, 2/sqrt(pi) * exp(-x**2)."""
    return ops.mul(like(x, 2 / math.sqrt(math.pi)), ops.exp(ops.neg(ops.mul(x, x))))


def _trigamma(x: Array) -> Array:
    """The derivative of digamma: reflection below 1/2, recurrence up to at least 8.5, then the asymptotic series."""
    one = like(x, 1)
    reflected = ops.lt(x, like(x, 0.5))
    z = ops.select(reflected, ops.sub(one, x), x)
    total: Array = like(x, 0)
    for _ in range(8):
        total = ops.add(total, ops.div(one, ops.mul(z, z)))
        z = ops.add(z, one)
    inverse = ops.div(one, z)
    square_ = ops.mul(inverse, inverse)
    series: Array = like(x, 0)
    for bernoulli in (5 / 66, -1 / 30, 1 / 42, -1 / 30, 1 / 6):
        series = ops.mul(square_, ops.add(like(x, bernoulli), series))
    # 1/z + 1/(2 z^2) + sum of B_2k / z^(2k+1)
    value = ops.add(total, ops.add(inverse, ops.add(ops.mul(like(x, 0.5), square_), ops.mul(inverse, series))))
    ratio = ops.div(like(x, math.pi), ops.sin(ops.mul(like(x, math.pi), x)))
    return ops.select(reflected, ops.sub(ops.mul(ratio, ratio), value), value)


erf: Unary = unary("erf", sp.erf, lambda c, x, y: ops.mul(c, _gaussian(x)), "Error function.", dtypes=FLOATS)
erfc: Unary = unary("erfc", sp.erfc, lambda c, x, y: ops.neg(ops.mul(c, _gaussian(x))), "1 - erf(x).", dtypes=FLOATS)
erf_inv: Unary = unary(
    "erf_inv",
    sp.erfinv,
    lambda c, x, y: ops.mul(c, ops.mul(like(x, math.sqrt(math.pi) / 2), ops.exp(ops.mul(y, y)))),
    "Inverse of erf; NaN outside of [-1, 1].",
    dtypes=FLOATS,
    domain=INSIDE,
)
lgamma: Unary = unary(
    "lgamma",
    sp.gammaln,
    lambda c, x, y: ops.mul(c, ops.digamma(x)),
    "log |gamma(x)|; infinite at 0, -1, -2 ...",
    dtypes=FLOATS,
    domain=(0.2, 6.0),
    tolerance=3e-6,
)
digamma: Unary = unary(
    "digamma",
    sp.digamma,
    lambda c, x, y: ops.mul(c, _trigamma(x)),
    "The derivative of lgamma.",
    dtypes=FLOATS,
    domain=(0.2, 6.0),
    tolerance=3e-6,
)

# -- classification ---------------------------------------------------------------------------------------------------


def _classify(name: str, reference, doc: str):
    return unary(name, reference, NotDifferentiable("its result is bool"), doc, result="bool")


is_finite: Unary = _classify("is_finite", np.isfinite, "Whether x is neither infinite nor NaN.")
is_nan: Unary = _classify("is_nan", np.isnan, "Whether x is NaN.")
is_inf: Unary = _classify("is_inf", np.isinf, "Whether x is infinite.")
