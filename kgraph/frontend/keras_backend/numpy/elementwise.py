"""Functions of one tensor, element by element."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from keras.src.backend.common.variables import standardize_dtype

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    convert,
    dtype_of,
    filled,
    floatx,
    is_complex,
    is_float,
    not_a_number,
    reshape_to,
    scalar,
    to_bool,
    to_inexact,
    widened,
)
from kgraph.frontend.keras_backend.sparse import SparseTensor
from kgraph.frontend.keras_backend.sparse_rules import linear, on_entries, zero_preserving
from kgraph.ir import Traced


def _unsigned(x: Tensor) -> bool:
    return dtype_of(x) == "bool" or dtype_of(x).startswith("uint")


def _integer_to_floatx(x: Tensor) -> Tensor:
    x = convert_to_tensor(x)
    return x if is_float(x) or is_complex(x) else convert(x, floatx())


# -- magnitude and sign ---------------------------------------------------------------------------------------------
@zero_preserving
def absolute(x: Tensor) -> Tensor:
    """|x|; real for complex x."""
    x = convert_to_tensor(x)
    return x if _unsigned(x) else ops.abs(x)


def abs(x: Tensor) -> Tensor:
    """|x|; real for complex x."""
    return absolute(x)


@zero_preserving
def fabs(x: Tensor) -> Tensor:
    """|x| in floating point."""
    return ops.abs(to_inexact(x))


@linear
def negative(x: Tensor) -> Tensor:
    """-x."""
    return ops.neg(convert_to_tensor(x))


@zero_preserving
def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays NaN."""
    x = convert_to_tensor(x)
    return x if dtype_of(x) == "bool" else ops.sign(x)


@zero_preserving
def signbit(x: Tensor) -> Tensor:
    """Whether the sign bit is set, which tells -0.0 from 0.0."""
    x = convert_to_tensor(x)
    if _unsigned(x):
        return filled(x.shape, False, "bool")
    if is_float(x):
        x = ops.bitcast_convert(x, dtype=f"int{8 * np.dtype(x.dtype).itemsize}")
    return ops.lt(x, scalar(0, x))


@zero_preserving
def square(x: Tensor) -> Tensor:
    """x²."""
    x = convert_to_tensor(x)
    x = convert(x, "int32") if dtype_of(x) == "bool" else x
    return ops.mul(x, x)


def reciprocal(x: Tensor) -> Tensor:
    """1/x."""
    x = to_inexact(x)
    return ops.div(scalar(1, x), x)


# -- exponentials, logarithms, roots --------------------------------------------------------------------------------
def exp(x: Tensor) -> Tensor:
    """e to the power of x."""
    return ops.exp(_integer_to_floatx(x))


def exp2(x: Tensor) -> Tensor:
    """2 to the power of x."""
    return ops.exp2(_integer_to_floatx(x))


@zero_preserving
def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, accurate near 0."""
    return ops.expm1(_integer_to_floatx(x))


def log(x: Tensor) -> Tensor:
    """The natural logarithm."""
    return ops.log(to_inexact(x))


def log10(x: Tensor) -> Tensor:
    """The logarithm to base 10."""
    x = to_inexact(x)
    return ops.mul(ops.log(x), scalar(1 / math.log(10), x))


@zero_preserving
def log1p(x: Tensor) -> Tensor:
    """log(1 + x), accurate near 0."""
    return ops.log1p(to_inexact(x))


def log2(x: Tensor) -> Tensor:
    """The logarithm to base 2."""
    return ops.log2(to_inexact(x))


@zero_preserving
def sqrt(x: Tensor) -> Tensor:
    """The square root."""
    return ops.sqrt(to_inexact(x))


def cbrt(x: Tensor) -> Tensor:
    """The real cube root."""
    return ops.cbrt(to_inexact(x))


# -- trigonometry ---------------------------------------------------------------------------------------------------
@zero_preserving
def sin(x: Tensor) -> Tensor:
    """The sine of x radians."""
    return ops.sin(to_inexact(x))


def cos(x: Tensor) -> Tensor:
    """The cosine of x radians."""
    return ops.cos(to_inexact(x))


@zero_preserving
def tan(x: Tensor) -> Tensor:
    """The tangent of x radians."""
    return ops.tan(to_inexact(x))


@zero_preserving
def arcsin(x: Tensor) -> Tensor:
    """The inverse sine, in radians."""
    return ops.asin(to_inexact(x))


def arccos(x: Tensor) -> Tensor:
    """The inverse cosine, in radians."""
    return ops.acos(to_inexact(x))


@zero_preserving
def arctan(x: Tensor) -> Tensor:
    """The inverse tangent, in radians."""
    return ops.atan(to_inexact(x))


@zero_preserving
def sinh(x: Tensor) -> Tensor:
    """The hyperbolic sine."""
    return ops.sinh(to_inexact(x))


def cosh(x: Tensor) -> Tensor:
    """The hyperbolic cosine."""
    return ops.cosh(to_inexact(x))


@zero_preserving
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return ops.tanh(to_inexact(x))


@zero_preserving
def arcsinh(x: Tensor) -> Tensor:
    """The inverse hyperbolic sine."""
    return ops.asinh(to_inexact(x))


def arccosh(x: Tensor) -> Tensor:
    """The inverse hyperbolic cosine."""
    return ops.acosh(to_inexact(x))


@zero_preserving
def arctanh(x: Tensor) -> Tensor:
    """The inverse hyperbolic tangent."""
    return ops.atanh(to_inexact(x))


def sinc(x: Tensor) -> Tensor:
    """sin(pi x) / (pi x), 1 at 0."""
    x = to_inexact(x)
    zero = ops.eq(x, scalar(0, x))
    scaled = ops.mul(ops.select(zero, scalar(1, x), x), scalar(math.pi, x))
    return ops.select(zero, scalar(1, x), ops.div(ops.sin(scaled), scaled))


def deg2rad(x: Tensor) -> Tensor:
    """Degrees to radians."""
    x = to_inexact(x)
    return ops.mul(x, scalar(math.pi / 180, x))


def rad2deg(x: Tensor) -> Tensor:
    """Radians to degrees."""
    x = to_inexact(x)
    return ops.mul(x, scalar(180 / math.pi, x))


def angle(x: Tensor) -> Tensor:
    """The argument of a complex number in radians; 0 or pi for real x."""
    x = to_inexact(x)
    if is_complex(x):
        return ops.atan2(ops.imag(x), ops.real(x))
    turned = ops.select(ops.lt(x, scalar(0, x)), scalar(math.pi, x), scalar(0, x))
    return ops.select(ops.is_nan(x), x, turned)


# Coefficients, lowest degree first, of the polynomials 9.8.1 and 9.8.2 of Abramowitz and Stegun, "Handbook of
# Mathematical Functions" (1964), in (x/3.75)² for |x| <= 3.75 and in 3.75/|x| above; relative error below 2.2e-7.
_I0_SMALL = (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813)
_I0_LARGE = (
    0.39894228,
    0.01328592,
    0.00225319,
    -0.00157565,
    0.00916281,
    -0.02057706,
    0.02635537,
    -0.01647633,
    0.00392377,
)


def _polynomial(x: Tensor, coefficients: tuple) -> Tensor:
    out: Tensor = scalar(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        out = ops.add(ops.mul(out, x), scalar(c, x))
    return out


def i0(x: Tensor) -> Tensor:
    """The modified Bessel function of the first kind of order 0."""
    x = to_inexact(x)
    dtype = dtype_of(x)
    size = ops.abs(widened(x))
    limit = scalar(3.75, size)
    is_small = ops.le(size, limit)
    ratio = ops.div(ops.select(is_small, size, scalar(0, size)), limit)
    small = _polynomial(ops.mul(ratio, ratio), _I0_SMALL)
    above = ops.maximum(size, limit)
    large = ops.div(ops.mul(ops.exp(above), _polynomial(ops.div(limit, above), _I0_LARGE)), ops.sqrt(above))
    return convert(ops.select(is_small, small, large), dtype)


# -- rounding -------------------------------------------------------------------------------------------------------
@zero_preserving
def ceil(x: Tensor) -> Tensor:
    """The smallest integer of at least x, in floating point."""
    return ops.ceil(to_inexact(x))


@zero_preserving
def floor(x: Tensor) -> Tensor:
    """The largest integer of at most x, in floating point."""
    return ops.floor(to_inexact(x))


def trunc(x: Tensor) -> Tensor:
    """x rounded towards 0; integers stay as they are."""
    x = convert_to_tensor(x)
    return ops.trunc(x) if is_float(x) else x


def round(x: Tensor, decimals: int = 0) -> Tensor:
    """x rounded to the nearest multiple of 10**-decimals, halves to even."""
    if type(x) is SparseTensor:
        return on_entries(lambda values: round(values, decimals), x)
    x = convert_to_tensor(x)
    dtype = dtype_of(x)
    if not is_float(x):
        if decimals >= 0:
            return x
        x = convert(x, floatx())
    if decimals == 0:
        return ops.round_nearest_even(x)
    x = widened(x)
    # Multiplying and dividing by the same exact power of ten keeps what is already round unchanged.
    factor = scalar(10.0 ** math.fabs(decimals), x)
    scale, unscale = (ops.mul, ops.div) if decimals > 0 else (ops.div, ops.mul)
    return convert(unscale(ops.round_nearest_even(scale(x, factor)), factor), dtype)


# -- questions ------------------------------------------------------------------------------------------------------
def isfinite(x: Tensor) -> Tensor:
    """Where x is neither infinite nor NaN."""
    x = convert_to_tensor(x)
    if is_complex(x):
        return ops.logical_and(ops.is_finite(ops.real(x)), ops.is_finite(ops.imag(x)))
    return ops.is_finite(x) if is_float(x) else filled(x.shape, True, "bool")


@zero_preserving
def isinf(x: Tensor) -> Tensor:
    """Where x is infinite."""
    x = convert_to_tensor(x)
    if is_complex(x):
        return ops.logical_or(ops.is_inf(ops.real(x)), ops.is_inf(ops.imag(x)))
    return ops.is_inf(x) if is_float(x) else filled(x.shape, False, "bool")


@zero_preserving
def isnan(x: Tensor) -> Tensor:
    """Where x is NaN."""
    x = convert_to_tensor(x)
    if is_complex(x):
        return ops.logical_or(ops.is_nan(ops.real(x)), ops.is_nan(ops.imag(x)))
    return not_a_number(x)


def isneginf(x: Tensor) -> Tensor:
    """Where x is minus infinity."""
    x = convert_to_tensor(x)
    return ops.eq(x, scalar(-math.inf, x)) if is_float(x) else filled(x.shape, False, "bool")


def isposinf(x: Tensor) -> Tensor:
    """Where x is plus infinity."""
    x = convert_to_tensor(x)
    return ops.eq(x, scalar(math.inf, x)) if is_float(x) else filled(x.shape, False, "bool")


def isreal(x: Tensor) -> Tensor:
    """Where x has no imaginary part."""
    x = convert_to_tensor(x)
    if is_complex(x):
        part = ops.imag(x)
        return ops.eq(part, scalar(0, part))
    return filled(x.shape, True, "bool")


def logical_not(x: Tensor) -> Tensor:
    """Where x is 0 or false."""
    return ops.logical_not(to_bool(x))


def bitwise_invert(x: Tensor) -> Tensor:
    """Every bit of x flipped; the negation of booleans."""
    x = convert_to_tensor(x)
    return ops.logical_not(x) if dtype_of(x) == "bool" else ops.bitwise_not(x)


def bitwise_not(x: Tensor) -> Tensor:
    """Every bit of x flipped; the negation of booleans."""
    return bitwise_invert(x)


# -- parts, representation ------------------------------------------------------------------------------------------
@linear
def real(x: Tensor) -> Tensor:
    """The real part."""
    x = convert_to_tensor(x)
    return ops.real(x) if is_complex(x) else x


@linear
def imag(x: Tensor) -> Tensor:
    """The imaginary part; zeros for real x."""
    x = convert_to_tensor(x)
    return ops.imag(x) if is_complex(x) else filled(x.shape, 0, dtype_of(x))


@linear
def conjugate(x: Tensor) -> Tensor:
    """The complex conjugate; x itself where it is real."""
    x = convert_to_tensor(x)
    return ops.conj(x) if is_complex(x) else x


def conj(x: Tensor) -> Tensor:
    """The complex conjugate; x itself where it is real."""
    return conjugate(x)


def nan_to_num(x: Tensor, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Tensor:
    """x with NaN, inf and -inf replaced; the infinities by the dtype's extremes where no value is given."""
    x = convert_to_tensor(x)
    if is_complex(x):
        return ops.complex(nan_to_num(ops.real(x), nan, posinf, neginf), nan_to_num(ops.imag(x), nan, posinf, neginf))
    if not is_float(x):
        return x
    largest = _largest(dtype_of(x))
    high = scalar(largest if posinf is None else posinf, x)
    low = scalar(-largest if neginf is None else neginf, x)
    out = ops.select(ops.eq(x, scalar(math.inf, x)), high, x)
    out = ops.select(ops.eq(x, scalar(-math.inf, x)), low, out)
    return ops.select(ops.is_nan(x), scalar(nan, x), out)


def _largest(dtype: str) -> float:
    return float(ml_dtypes.finfo(standardize_dtype(dtype)).max)


@linear
def copy(x: Tensor) -> Tensor:
    """A tensor of its own memory; a value under trace is immutable and stands for itself."""
    x = convert_to_tensor(x)
    return x if isinstance(x, Traced) else np.array(x)


def view(x: Tensor, dtype: str | None = None) -> Tensor:
    """The same bytes read as another dtype; the last axis shrinks or grows where the item sizes differ."""
    x = convert_to_tensor(x)
    if dtype is None or standardize_dtype(dtype) == dtype_of(x):
        return x
    dtype = standardize_dtype(dtype)
    old, new = np.dtype(x.dtype).itemsize, convert_to_tensor(0, dtype).dtype.itemsize
    if old == new:
        return ops.bitcast_convert(x, dtype=dtype)
    if x.ndim == 0:
        raise ValueError(f"view: a tensor of rank 0 of {dtype_of(x)} cannot be read as {dtype}, of another item size")
    *lead, last = x.shape
    # As in StableHLO: narrowing adds a last axis of the ratio, widening takes one away.
    if old > new:
        return reshape_to(ops.bitcast_convert(x, dtype=dtype), (*lead, last * (old // new)))
    ratio = new // old
    if last % ratio != 0:
        raise ValueError(f"view: the last axis, {last}, does not divide into items of {dtype} of {ratio} elements")
    return ops.bitcast_convert(reshape_to(x, (*lead, last // ratio, ratio)), dtype=dtype)
