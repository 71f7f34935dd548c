"""Elementary functions as inlined polynomial code on LLVM scalars and vectors, float32 and float64.

Every function takes the KernelBuilder and values in compute form and works for any lane count. The code is free of
branches, calls nothing, needs no fast-math flag, and treats infinities, NaN, signed zeros and denormals as IEEE 754
asks. Largest errors, measured by tests/codegen/test_vector_math.py: 2 ulp for exp, log, tanh, logistic and erf in
float32, 4 ulp for the rest. Trigonometric functions are in vector_trig.py, rarer ones in vector_special.py.
"""

from __future__ import annotations

import functools
import math

from llvmlite import ir

from kgraph.codegen.cpu import polynomials as P
from kgraph.codegen.cpu.builder import F32, F64, I32, I64, KernelBuilder, element_type

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
INF = math.inf
NAN = math.nan


# -- helpers --------------------------------------------------------------------------------------------------------
def is_f32(x: ir.Value) -> bool:
    return element_type(x) == F32


def with_element(x: ir.Value, element: ir.Type) -> ir.Type:
    """The type of x with another element type."""
    return ir.VectorType(element, x.type.count) if isinstance(x.type, ir.VectorType) else element


def to_f64(b: KernelBuilder, x):
    return b.ir.fpext(x, with_element(x, F64))


def to_f32(b: KernelBuilder, x):
    return b.ir.fptrunc(x, with_element(x, F32))


def through_f64(function):
    """Float32 operands are computed in float64 and rounded back: half the speed, correct to nearly the last bit."""

    @functools.wraps(function)
    def wrapped(b, *xs):
        if is_f32(xs[0]):
            return to_f32(b, function(b, *(to_f64(b, x) for x in xs)))
        return function(b, *xs)

    return wrapped


def polynomial(b: KernelBuilder, x, coefficients):
    """Horner evaluation, constant term first in `coefficients`."""
    out = b.constant_of(x.type, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        out = b.fma(out, x, c)
    return out


def bits_of(b: KernelBuilder, x):
    """The float's bits as a signed integer of its width."""
    return b.ir.bitcast(x, with_element(x, I32 if is_f32(x) else I64))


def float_of(b: KernelBuilder, bits, like):
    return b.ir.bitcast(bits, like.type)


def absolute(b: KernelBuilder, x):
    return b.intrinsic("llvm.fabs", x)


def copysign(b: KernelBuilder, magnitude, sign):
    return b.intrinsic("llvm.copysign", magnitude, sign)


def sqrt(b: KernelBuilder, x):
    return b.intrinsic("llvm.sqrt", x)


def floor(b: KernelBuilder, x):
    return b.intrinsic("llvm.floor", x)


def clamp_keep_nan(b: KernelBuilder, x, low, high):
    """x limited to [low, high]; NaN stays NaN."""
    x = b.select(b.compare("<", x, low), b.constant_of(x.type, low), x)
    return b.select(b.compare(">", x, high), b.constant_of(x.type, high), x)


def round_small(b: KernelBuilder, x, factor: float = 1.0):
    """(round-to-even of factor x as float, as integer) for products below 2^22 (2^51 in float64); NaN: some integer."""
    magic = 1.5 * 2.0 ** (23 if is_f32(x) else 52)
    shifted = b.add(x, magic) if factor == 1.0 else b.fma(x, factor, magic)
    magic_bits = 0x4B400000 if is_f32(x) else 0x4338000000000000
    return b.sub(shifted, magic), b.sub(bits_of(b, shifted), magic_bits)


def power_of_two(b: KernelBuilder, n, like):
    """2^n as float for an integer n in the range of normal exponents."""
    bias, shift = (127, 23) if is_f32(like) else (1023, 52)
    return float_of(b, b.ir.shl(b.add(n, bias), b.constant_of(n.type, shift)), like)


def scale_by_power(b: KernelBuilder, x, n):
    """x * 2^n, where n may leave the exponent range by a factor of two (overflow and denormals come out right)."""
    half = b.ir.ashr(n, b.constant_of(n.type, 1))
    return b.mul(b.mul(x, power_of_two(b, half, x)), power_of_two(b, b.sub(n, half), x))


# -- exponentials ---------------------------------------------------------------------------------------------------
def _ln2_parts(x):
    """ln 2 as a part with trailing zeros and a rest."""
    return (0.693145751953125, 1.428606765330187e-06) if is_f32(x) else (0.6931471803691238, 1.9082149292705877e-10)


def _reduce_exp(b: KernelBuilder, x):
    """x = n ln2 + r with |r| <= ln2 / 2; gives (r, n as integer, n as float)."""
    high, low = _ln2_parts(x)
    n, number = round_small(b, x, LOG2E)
    return b.fma(n, -low, b.fma(n, -high, x)), number, n


def _expm1_reduced(b: KernelBuilder, r):
    """exp(r) - 1 for |r| <= ln2 / 2."""
    tail = polynomial(b, r, P.EXP_F32 if is_f32(r) else P.EXP_F64)
    return b.fma(b.mul(r, r), tail, r)


def _exp_reduced(b: KernelBuilder, r):
    """exp(r) for |r| <= ln2 / 2."""
    return polynomial(b, r, (1.0, 1.0, *(P.EXP_F32 if is_f32(r) else P.EXP_F64)))


def _exp_limits(x) -> tuple[float, float]:
    """Arguments beyond which exp is 0 or infinity."""
    return (-104.0, 90.0) if is_f32(x) else (-746.0, 711.0)


_SIXTEENTHS = tuple(2.0 ** (k / 16) for k in range(16))


def _exp_by_table(b: KernelBuilder, x):
    """e^x = y 2^(n/16 rounded down) of float32 with y in about [1, 2); gives (y, n as integer, n as float).

    A table of 16 powers in a register leaves |r| <= ln2 / 32 and a cubic polynomial.
    """
    magic = 1.5 * 2.0**23
    shifted = b.fma(x, 16 * LOG2E, magic)
    n, number = b.sub(shifted, magic), bits_of(b, shifted)
    r = b.fma(n, 1.190408937473605e-10, b.fma(n, -0.043321698904037476, x))
    tail = b.fma(b.mul(r, r), b.fma(r, 1.0 / 6.0, 0.5), r)
    power = b.look_up(_SIXTEENTHS, number)
    return b.fma(power, tail, power), number, n


def exp(b: KernelBuilder, x, shift: int = 0):
    """e^x * 2^shift (the shift spares an overflow in sinh and cosh)."""
    x = clamp_keep_nan(b, x, *_exp_limits(x))
    if is_f32(x) and b.can_look_up(x):
        y, _, n = _exp_by_table(b, x)
        return b.scale(y, b.fma(n, 0.0625, float(shift)))
    r, n, _ = _reduce_exp(b, x)
    return scale_by_power(b, _exp_reduced(b, r), b.add(n, shift) if shift else n)


def exp_nonpositive(b: KernelBuilder, x):
    """e^x for x <= 0 where results below the normal range may be flushed to 0 (softmax); NaN stays NaN."""
    if is_f32(x) and b.can_look_up(x):
        flushed = b.compare("<", x, -87.0)
        return b.select(flushed, 0.0, _exp_normal(b, b.select(flushed, b.constant_of(x.type, -87.0), x)))
    low = -88.0 if is_f32(x) else -709.0  # n is -127 (-1023) there, whose power has the bits of zero
    r, n, _ = _reduce_exp(b, b.select(b.compare("<", x, low), b.constant_of(x.type, low), x))
    return b.mul(_exp_reduced(b, r), power_of_two(b, n, x))


def _exp_normal(b: KernelBuilder, x):
    """e^x where the result is in the normal range."""
    if is_f32(x) and b.can_look_up(x):
        y, n, _ = _exp_by_table(b, x)
        exponent = b.ir.shl(b.ir.and_(n, b.constant_of(n.type, -16)), b.constant_of(n.type, 19))
        # The bits of the shift's magic number above n's own fall off on the left.
        return float_of(b, b.add(bits_of(b, y), exponent), x)
    r, n, _ = _reduce_exp(b, x)
    exponent = b.ir.shl(n, b.constant_of(n.type, 23 if is_f32(x) else 52))
    return float_of(b, b.add(bits_of(b, _exp_reduced(b, r)), exponent), x)


def exp2(b: KernelBuilder, x):
    x = clamp_keep_nan(b, x, *((-151.0, 129.0) if is_f32(x) else (-1076.0, 1025.0)))
    n, number = round_small(b, x)
    r = b.sub(x, n)
    value = b.fma(r, polynomial(b, r, P.EXP2_F32 if is_f32(x) else P.EXP2_F64), 1.0)
    return scale_by_power(b, value, number)


def _quarter_expm1(b: KernelBuilder, x):
    """(e^x - 1) / 4, accurate near 0; the quarter spares overflows in sinh."""
    limited = clamp_keep_nan(b, x, *((-19.0, 89.5) if is_f32(x) else (-40.0, 710.5)))
    r, n, _ = _reduce_exp(b, limited)
    scale = power_of_two(b, b.sub(n, 2), x)
    return b.fma(scale, _expm1_reduced(b, r), b.sub(scale, 0.25))


def expm1(b: KernelBuilder, x):
    value = b.mul(_quarter_expm1(b, x), 4.0)
    tiny = 1e-9 if is_f32(x) else 1e-17
    return b.select(b.compare("<", absolute(b, x), tiny), x, value)


def _logistic_limits(x) -> tuple[float, float]:
    """Arguments beyond which the logistic function is 0 or 1."""
    return (-110.0, 60.0) if is_f32(x) else (-746.0, 600.0)


def logistic(b: KernelBuilder, x):
    """1 / (1 + e^-x), with full relative accuracy for negative x."""
    # Numerator and denominator carry a factor 2^-32 (2^-64) by which e^-x stays finite down to denormal results.
    shift = 32 if is_f32(x) else 64
    r, n, _ = _reduce_exp(b, b.ir.fneg(clamp_keep_nan(b, x, *_logistic_limits(x))))
    one = b.constant_of(x.type, 2.0**-shift)
    return b.div(one, b.fma(_exp_reduced(b, r), power_of_two(b, b.sub(n, shift), x), one))


def tanh(b: KernelBuilder, x):
    twice = b.mul(absolute(b, x), 2.0)
    limit = b.constant_of(x.type, 20.0 if is_f32(x) else 40.0)
    r, n, _ = _reduce_exp(b, b.select(b.compare(">", twice, limit), limit, twice))
    scale = power_of_two(b, n, x)
    t = b.fma(scale, _expm1_reduced(b, r), b.sub(scale, 1.0))  # e^2|x| - 1, accurate near 0; tanh |x| = t / (t + 2)
    return copysign(b, b.div(t, b.add(t, 2.0)), x)


def sinh(b: KernelBuilder, x):
    magnitude = absolute(b, x)
    quarter = _quarter_expm1(b, magnitude)  # t/4; sinh = t/2 + t/2 / (t + 1)
    half = b.mul(quarter, 2.0)
    other = b.div(half, b.fma(half, 2.0, 1.0))
    value = b.select(b.compare("==", half, INF), half, b.add(half, other))
    tiny = 1e-4 if is_f32(x) else 1e-9
    return copysign(b, b.select(b.compare("<", magnitude, tiny), magnitude, value), x)


def cosh(b: KernelBuilder, x):
    half = exp(b, absolute(b, x), shift=-1)
    return b.add(half, b.div(b.constant_of(x.type, 0.25), half))


# -- logarithms -----------------------------------------------------------------------------------------------------
def split_mantissa(b: KernelBuilder, x):
    """x = m 2^e with m in [sqrt(1/2), sqrt(2)), for positive finite x (denormals too); gives (m, e as integer)."""
    if is_f32(x):
        lift, smallest, shift, mask, root = 23, 2.0**-126, 23, 0x7FFFFF, 0x3F3504F3
    else:
        lift, smallest, shift, mask, root = 52, 2.0**-1022, 52, (1 << 52) - 1, 0x3FE6A09E667F3BCD
    denormal = b.compare("<", x, smallest)
    bits = bits_of(b, b.select(denormal, b.mul(x, 2.0**lift), x))
    moved = b.sub(bits, root)
    e = b.ir.ashr(moved, b.constant_of(moved.type, shift))
    m = float_of(b, b.add(b.ir.and_(moved, b.constant_of(moved.type, mask)), root), x)
    return m, b.select(denormal, b.sub(e, lift), e)


def _log_special(b: KernelBuilder, x, value, zero=-INF):
    """The results of a logarithm outside of the positive finite numbers (`x` is what the logarithm is taken of)."""
    special = b.select(b.compare("==", x, 0.0), b.constant_of(x.type, zero), b.constant_of(x.type, NAN))
    special = b.select(b.ir.fcmp_unordered(">", x, b.constant_of(x.type, 0.0)), x, special)  # +inf and NaN
    regular = b.ir.and_(b.compare(">", x, 0.0), b.compare("<", x, INF))
    return b.select(regular, value, special)


def int_to_float(b: KernelBuilder, n, like):
    return b.ir.sitofp(n, like.type)


def _log_of_parts(b: KernelBuilder, f, n):
    """log(1 + f) + n ln 2 for 1 + f in [sqrt(1/2), sqrt(2)) and n a float."""
    high, low = _ln2_parts(f)
    square = b.mul(f, f)
    if is_f32(f):
        tail = b.mul(b.mul(square, f), polynomial(b, f, P.LOG_F32))
        return b.fma(n, high, b.add(f, b.fma(square, -0.5, b.fma(n, low, tail))))
    s = b.div(f, b.add(f, 2.0))
    z = b.mul(s, s)
    tail = b.mul(z, polynomial(b, z, P.LOG_F64))  # log(1+f) = 2s + s tail = f - s (f - tail), f = 2s + s f
    half_square = b.mul(square, 0.5)
    inner = b.fma(s, b.add(half_square, tail), b.mul(n, low))
    return b.fma(n, high, b.sub(f, b.sub(half_square, inner)))


def log(b: KernelBuilder, x):
    m, e = split_mantissa(b, x)
    return _log_special(b, x, _log_of_parts(b, b.sub(m, 1.0), int_to_float(b, e, x)))


def log1p(b: KernelBuilder, x):
    u = b.add(x, 1.0)
    m, e = split_mantissa(b, u)
    # What rounding took from 1 + x comes back scaled by 2^-e.
    lost = b.select(b.compare(">", x, 1.0), b.sub(1.0, b.sub(u, x)), b.sub(x, b.sub(u, 1.0)))
    limit = b.constant_of(e.type, 120)
    e_small = b.select(b.compare("<", e, limit), e, limit)
    f = b.fma(lost, power_of_two(b, b.ir.neg(e_small), x), b.sub(m, 1.0))
    value = _log_special(b, u, _log_of_parts(b, f, int_to_float(b, e, x)))
    return b.select(b.compare("==", u, 1.0), x, value)


def log2(b: KernelBuilder, x):
    m, e = split_mantissa(b, x)
    f = b.sub(m, 1.0)
    n = int_to_float(b, e, x)
    if is_f32(x):
        tail = b.mul(f, b.add(b.mul(f, polynomial(b, f, P.LOG2_F32)), 1.925963033500e-08))
        return _log_special(b, x, b.add(n, b.fma(f, 1.4426950216293335, tail)))
    natural = _log_of_parts(b, f, b.constant_of(x.type, 0.0))
    product = b.mul(natural, LOG2E)
    low = b.add(b.fma(natural, LOG2E, b.ir.fneg(product)), b.mul(natural, 2.0355273740931033e-17))
    return _log_special(b, x, b.add(n, b.add(product, low)))


def softplus(b: KernelBuilder, x):
    """log(1 + e^x)"""
    positive = b.select(b.compare("<", x, 0.0), b.constant_of(x.type, 0.0), x)
    return b.add(positive, log1p(b, exp(b, b.ir.fneg(absolute(b, x)))))


# -- error function -------------------------------------------------------------------------------------------------
def _erfc_positive(b: KernelBuilder, x):
    """erfc(x) in float64 for 0.45 <= x <= 28."""
    t = b.div(b.sub(x, 4.0), b.add(x, 4.0))
    scaled = b.div(polynomial(b, t, P.ERFC_F64), b.fma(x, 2.0, 1.0))
    # exp(-x^2) with the rounding error of the square put right to first order.
    square = b.mul(x, x)
    error = b.fma(x, x, b.ir.fneg(square))
    return b.mul(exp(b, b.ir.fneg(square)), b.fma(b.ir.fneg(error), scaled, scaled))


def _erf_by_pieces(b: KernelBuilder, x):
    """erf of float32 from 16 short polynomials, for machines that look their coefficients up in registers."""
    magnitude = absolute(b, x)
    limited = b.select(b.compare(">", magnitude, 3.874), b.constant_of(x.type, 3.874), magnitude)
    shifted = b.fma(limited, 4.0, 2.0**23)
    t = b.fma(b.sub(shifted, 2.0**23), -0.25, limited)
    piece = bits_of(b, shifted)
    value = b.look_up(P.ERF_PIECES[-1], piece)
    for row in reversed(P.ERF_PIECES[1:-1]):
        value = b.fma(value, t, b.look_up(row, piece))
    value = b.add(b.fma(value, t, t), b.look_up(P.ERF_PIECES[0], piece))
    return copysign(b, b.select(b.compare(">", magnitude, 3.92), 1.0, value), x)


# Beyond this, erf is 1 in float32.
_ERFC_LIMIT = 3.95


def _erfc_f32(b: KernelBuilder, magnitude):
    """erfc(min(x, _ERFC_LIMIT)) of float32 x >= 0."""
    limited = b.select(b.compare(">", magnitude, _ERFC_LIMIT), b.constant_of(magnitude.type, _ERFC_LIMIT), magnitude)
    return _exp_normal(b, b.mul(limited, polynomial(b, limited, P.ERFC_F32)))


def erf(b: KernelBuilder, x):
    if is_f32(x) and b.can_look_up(x):
        return _erf_by_pieces(b, x)
    magnitude = absolute(b, x)
    small = b.fma(x, polynomial(b, b.mul(x, x), P.ERF_SMALL_F32 if is_f32(x) else P.ERF_SMALL_F64), x)
    if is_f32(x):
        tail = _erfc_f32(b, magnitude)
    else:
        limited = b.select(b.compare(">", magnitude, 6.0), b.constant_of(x.type, 6.0), magnitude)
        tail = _erfc_positive(b, limited)
    large = copysign(b, b.sub(1.0, tail), x)
    return b.select(b.compare(">", magnitude, 1.0), large, small)


@through_f64
def erfc(b: KernelBuilder, x):
    limited = clamp_keep_nan(b, absolute(b, x), 0.45, 28.0)
    tail = _erfc_positive(b, limited)
    large = b.select(b.compare("<", x, 0.0), b.sub(2.0, tail), tail)
    small = b.sub(1.0, b.fma(x, polynomial(b, b.mul(x, x), P.ERF_SMALL_F64), x))
    return b.select(b.compare("<", absolute(b, x), 0.46875), small, large)


def silu(b: KernelBuilder, x):
    """x / (1 + e^-x)"""
    low, _ = _logistic_limits(x)
    x = b.select(b.compare("<", x, low), b.constant_of(x.type, low), x)  # no infinity times 0
    return b.mul(x, logistic(b, x))


def gelu(b: KernelBuilder, x, approximate: bool = False):
    """x Phi(x); with `approximate` by the tanh formula."""
    if approximate:
        low = -40.0  # the result is 0 far before
        x = b.select(b.compare("<", x, low), b.constant_of(x.type, low), x)
        factor = 2.0 * math.sqrt(2.0 / math.pi)
        inner = b.mul(x, b.fma(b.mul(x, x), 0.044715 * factor, factor))
        return b.mul(x, logistic(b, inner))  # 0.5 (1 + tanh(u)) = logistic(2u)
    if is_f32(x) and not b.can_look_up(x):
        return _gelu_by_erfc(b, x)
    half = b.mul(x, 0.5)
    value = b.fma(half, erf(b, b.mul(x, math.sqrt(0.5))), half)
    return b.select(b.compare("==", x, -INF), 0.0, value)


def _gelu_by_erfc(b: KernelBuilder, x):
    """x Phi(x) of float32, from the tail that `erf` computes as well: the gradient next to it costs little more."""
    magnitude = absolute(b, b.mul(x, math.sqrt(0.5)))
    tail = _erfc_f32(b, magnitude)
    value = b.mul(b.mul(x, 0.5), b.select(b.compare("<", x, 0.0), tail, b.sub(2.0, tail)))
    positive = b.select(b.compare("<", x, 0.0), b.constant_of(x.type, 0.0), x)
    return b.select(b.compare(">", magnitude, _ERFC_LIMIT), positive, value)


# -- constants in expressions ---------------------------------------------------------------------------------------
def splat_value(x: ir.Value) -> float | None:
    """The Python value of a constant that is the same in every lane, else None."""
    if not isinstance(x, ir.Constant):
        return None
    value = x.constant
    if isinstance(value, list | tuple):
        parts = [getattr(v, "constant", v) for v in value]
        if any(p != parts[0] for p in parts):
            return None
        value = parts[0]
    return value if isinstance(value, int | float) else None


def is_nan_constant(x: ir.Constant) -> bool:
    value = splat_value(x)
    return value is None or math.isnan(value)
