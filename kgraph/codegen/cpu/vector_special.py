"""Powers, remainders, inverse hyperbolic and special functions as inlined code; conventions of vector_math.py.

Nearly all compute in float64 whatever the operands. lgamma and digamma keep 4 ulp except near their zeros, where the
absolute error stays below 1e-14 (so float32 results are right to the last bits there too).
"""

from __future__ import annotations

import math

from kgraph.codegen.cpu import polynomials as P
from kgraph.codegen.cpu.builder import KernelBuilder
from kgraph.codegen.cpu.vector_math import (
    INF,
    LN2,
    NAN,
    absolute,
    bits_of,
    copysign,
    exp,
    float_of,
    floor,
    int_to_float,
    is_f32,
    log,
    log1p,
    polynomial,
    round_small,
    scale_by_power,
    split_mantissa,
    sqrt,
    through_f64,
)
from kgraph.codegen.cpu.vector_trig import cos, sin

# -- powers ---------------------------------------------------------------------------------------------------------


def _log_double(b: KernelBuilder, x):
    """log(x) of positive finite float64 as an unevaluated sum (high, low), good to about 2^-64."""
    m, e = split_mantissa(b, x)
    n = int_to_float(b, e, x)
    f = b.sub(m, 1.0)
    # s = f / (2 + f) in two parts; log(1 + f) = s (2 + 2/3 z + z^2 P(z)) with z = s^2.
    below = b.add(f, 2.0)
    below_low = b.sub(f, b.sub(below, 2.0))
    s = b.div(f, below)
    s_low = b.div(b.fma(b.ir.fneg(s), below_low, b.fma(b.ir.fneg(s), below, f)), below)
    z = b.mul(s, s)
    z_low = b.fma(s, s, b.ir.fneg(z))
    z_low = b.fma(b.mul(s, 2.0), s_low, z_low)
    third, third_low = 2.0 / 3.0, 3.700743415417188e-17
    t = b.mul(z, third)
    t_low = b.add(b.fma(z, third, b.ir.fneg(t)), b.fma(z, third_low, b.mul(z_low, third)))
    w = b.mul(b.mul(z, z), polynomial(b, z, P.POW_LOG_F64))
    u = b.add(t, w)
    u_low = b.add(b.add(b.sub(t, u), w), t_low)
    v = b.add(u, 2.0)
    v_low = b.add(b.add(b.sub(2.0, v), u), u_low)
    product = b.mul(s, v)
    product_low = b.add(b.fma(s, v, b.ir.fneg(product)), b.fma(s, v_low, b.mul(s_low, v)))
    whole = b.mul(n, 0.6931471803691238)  # exact: the constant ends in zeros
    high = b.add(whole, product)
    rest = b.fma(n, 1.9082149292705877e-10, product_low)
    low = b.add(b.add(b.sub(whole, high), product), rest)
    # n == 0 or a product greater than the whole: the difference above is exact either way up to one rounding.
    total = b.add(high, low)
    return total, b.add(b.sub(high, total), low)


@through_f64
def pow(b: KernelBuilder, x, y):
    """x ** y with the special cases of C's pow."""
    magnitude = absolute(b, x)
    regular = b.ir.and_(b.compare(">", magnitude, 0.0), b.compare("<", magnitude, INF))
    high, low = _log_double(b, b.select(regular, magnitude, 1.0))
    extreme = b.select(b.compare("==", magnitude, 0.0), b.constant_of(x.type, -INF), magnitude)
    high, low = b.select(regular, high, extreme), b.select(regular, low, 0.0)
    product = b.mul(y, high)
    product_low = b.fma(y, low, b.fma(y, high, b.ir.fneg(product)))
    tame = b.compare("<", absolute(b, product), 800.0)
    e = exp(b, product)
    value = b.select(tame, b.fma(e, b.select(tame, product_low, 0.0), e), e)
    value = b.select(b.compare("==", magnitude, 1.0), 1.0, value)
    whole = b.compare("==", b.intrinsic("llvm.trunc", y), y)
    half = b.mul(y, 0.5)
    odd = b.ir.and_(whole, b.compare("!=", b.intrinsic("llvm.trunc", half), half))
    negative = b.compare("<", bits_of(b, x), 0)
    value = b.select(b.ir.and_(negative, odd), b.ir.fneg(value), value)
    undefined = b.ir.and_(b.ir.and_(b.compare("<", x, 0.0), b.compare(">", x, -INF)), b.compare("!=", y, y))
    not_whole = b.ir.xor(whole, b.constant_of(whole.type, 1))
    undefined = b.ir.or_(undefined, b.ir.and_(b.ir.and_(b.compare("<", x, 0.0), b.compare(">", x, -INF)), not_whole))
    undefined = b.ir.or_(undefined, b.ir.fcmp_unordered("uno", x, y))
    value = b.select(undefined, NAN, value)
    one = b.ir.or_(b.compare("==", y, 0.0), b.compare("==", x, 1.0))
    return b.select(one, 1.0, value)


@through_f64
def cbrt(b: KernelBuilder, x):
    magnitude = absolute(b, x)
    regular = b.ir.and_(b.compare(">", magnitude, 0.0), b.compare("<", magnitude, INF))
    m, e = split_mantissa(b, b.select(regular, magnitude, 1.0))
    # e = 3 third + rest with rest in {0, 1, 2}.
    whole = floor(b, b.mul(b.add(int_to_float(b, e, x), 0.5), 1.0 / 3.0))
    _, third = round_small(b, whole)
    rest = b.sub(e, b.mul(third, 3))
    a = b.mul(m, float_of(b, b.ir.shl(b.add(rest, 1023), b.constant_of(rest.type, 52)), x))
    t = polynomial(b, a, P.CBRT_START)
    for _ in range(2):  # Halley's iteration triples the number of right digits
        cube = b.mul(b.mul(t, t), t)
        t = b.fma(t, b.div(b.sub(a, cube), b.fma(cube, 2.0, a)), t)
    value = scale_by_power(b, t, third)
    return b.select(regular, copysign(b, value, x), x)


@through_f64
def hypot(b: KernelBuilder, x, y):
    """sqrt(x*x + y*y) without overflow; infinite if an operand is, even against NaN."""
    ax, ay = absolute(b, x), absolute(b, y)
    larger = b.compare(">", ax, ay)
    high, low = b.select(larger, ax, ay), b.select(larger, ay, ax)
    _, e = split_mantissa(b, b.select(b.ir.and_(b.compare(">", high, 0.0), b.compare("<", high, INF)), high, 1.0))
    down = b.ir.neg(e)
    high, low = scale_by_power(b, high, down), scale_by_power(b, low, down)
    value = scale_by_power(b, sqrt(b, b.fma(high, high, b.mul(low, low))), e)
    infinite = b.ir.or_(b.compare("==", ax, INF), b.compare("==", ay, INF))
    value = b.select(b.ir.fcmp_unordered("uno", x, y), NAN, value)
    return b.select(infinite, INF, value)


# -- remainders -----------------------------------------------------------------------------------------------------
def _remainder_step(b: KernelBuilder, r, divisor):
    """r - floor(r / divisor) divisor, exact for 0 <= r / divisor < 2^52."""
    quotient = b.intrinsic("llvm.trunc", b.div(r, divisor))
    rest = b.fma(b.ir.fneg(quotient), divisor, r)
    rest = b.select(b.compare("<", rest, 0.0), b.add(rest, divisor), rest)
    return b.select(b.compare(">=", rest, divisor), b.sub(rest, divisor), rest)


def _fmod_steps(b: KernelBuilder, x, y, turns: int):
    ax, ay = absolute(b, x), absolute(b, y)
    usable = b.ir.and_(b.ir.and_(b.compare("<", ax, INF), b.compare(">", ay, 0.0)), b.compare("<", ay, INF))
    divisor = b.select(usable, ay, 1.0)
    remainder = b.variable(b.select(usable, ax, 0.0))
    far = b.compare(">=", b.mul(remainder.get(), 2.0**-50), divisor)
    with b.if_then(b.any(far), likely=False):
        _, low = split_mantissa(b, divisor)
        with b.loop(0, turns):
            r = remainder.get()
            _, high = split_mantissa(b, b.select(b.compare(">", r, 0.0), r, 1.0))
            lift = b.sub(b.sub(high, low), 48)
            lift = b.select(b.compare(">", lift, 0), lift, 0)
            stepped = _remainder_step(b, r, scale_by_power(b, divisor, lift))
            remainder.set(b.select(b.compare(">=", r, divisor), stepped, r))
    value = copysign(b, _remainder_step(b, remainder.get(), divisor), x)
    value = b.select(b.ir.and_(b.compare("==", ay, INF), b.compare("<", ax, INF)), x, value)
    invalid = b.ir.or_(b.ir.fcmp_unordered("uno", x, y), b.ir.or_(b.compare("==", ax, INF), b.compare("==", ay, 0.0)))
    return b.select(invalid, NAN, value)


def fmod(b: KernelBuilder, x, y):
    """The remainder with x's sign, exact, as C's fmod."""
    # Each turn takes 47 bits of the quotient; exponents of float32 differ by at most 277, of float64 by 2098.
    turns = 7 if is_f32(x) else 46
    return through_f64(lambda b, x, y: _fmod_steps(b, x, y, turns))(b, x, y)


def floor_divmod(b: KernelBuilder, x, y):
    """(floor(x / y), remainder with y's sign), in step with each other as in Python; y == 0 gives (x / y, NaN)."""
    remainder = fmod(b, x, y)
    quotient = b.div(b.sub(x, remainder), y)
    uneven = b.compare("!=", remainder, 0.0)
    opposite = b.ir.xor(b.compare("<", y, 0.0), b.compare("<", remainder, 0.0))
    adjust = b.ir.and_(uneven, opposite)
    quotient = b.select(adjust, b.sub(quotient, 1.0), quotient)
    moved = b.select(adjust, b.add(remainder, y), remainder)
    moved = b.select(uneven, moved, copysign(b, b.constant_of(x.type, 0.0), y))
    below = floor(b, quotient)
    below = b.select(b.compare(">", b.sub(quotient, below), 0.5), b.add(below, 1.0), below)
    ratio = b.div(x, y)
    below = b.select(b.compare("!=", quotient, 0.0), below, copysign(b, b.constant_of(x.type, 0.0), ratio))
    zero = b.compare("==", y, 0.0)
    return b.select(zero, ratio, below), b.select(zero, NAN, moved)


# -- hyperbolic inverses and relatives ------------------------------------------------------------------------------
@through_f64
def asinh(b: KernelBuilder, x):
    a = absolute(b, x)
    large = b.compare(">", a, 2.0**28)
    safe = b.select(large, 1.0, a)
    square = b.mul(safe, safe)
    small = log1p(b, b.add(safe, b.div(square, b.add(sqrt(b, b.add(square, 1.0)), 1.0))))
    return copysign(b, b.select(large, b.add(log(b, a), LN2), small), x)


@through_f64
def acosh(b: KernelBuilder, x):
    large = b.compare(">", x, 2.0**28)
    t = b.sub(b.select(large, 2.0, x), 1.0)
    small = log1p(b, b.add(t, sqrt(b, b.fma(t, t, b.mul(t, 2.0)))))
    value = b.select(large, b.add(log(b, x), LN2), small)
    return b.select(b.compare("<", x, 1.0), NAN, value)


@through_f64
def atanh(b: KernelBuilder, x):
    a = absolute(b, x)
    return copysign(b, b.mul(log1p(b, b.div(b.mul(a, 2.0), b.sub(1.0, a))), 0.5), x)


def logaddexp(b: KernelBuilder, x, y):
    """log(e^x + e^y)"""
    high = b.select(b.compare(">", x, y), x, y)
    value = b.add(high, log1p(b, exp(b, b.ir.fneg(absolute(b, b.sub(x, y))))))
    return b.select(b.compare("==", x, y), b.add(x, LN2), value)


def nextafter(b: KernelBuilder, x, y, dtype: str):
    """The next representable value of `dtype` after x towards y."""
    half = dtype in ("float16", "bfloat16")
    bits = b.to_memory(x, dtype) if half else bits_of(b, x)
    back = (lambda v: b.from_memory(v, dtype)) if half else (lambda v: float_of(b, v, x))
    inwards = b.ir.xor(b.compare("<", y, x), b.compare("<", bits, 0))  # towards smaller magnitude
    moved = back(b.select(inwards, b.sub(bits, 1), b.add(bits, 1)))
    least = copysign(b, back(b.constant_of(bits.type, 1)), y)
    value = b.select(b.compare("==", x, 0.0), least, moved)
    value = b.select(b.compare("==", x, y), y, value)
    return b.select(b.ir.fcmp_unordered("uno", x, y), NAN, value)


# -- error function's inverse, gamma function's relatives -----------------------------------------------------------
@through_f64
def erf_inv(b: KernelBuilder, x):
    a = absolute(b, x)
    z = b.mul(x, x)
    small = b.mul(x, polynomial(b, z, P.ERF_INV_SMALL))
    q = sqrt(b, b.ir.fneg(log(b, b.sub(1.0, a))))
    q = b.select(b.compare(">", q, 6.1), 6.1, q)  # only |x| = 1 lies beyond
    middle = polynomial(b, b.sub(q, 2.0), P.ERF_INV_MIDDLE)
    fit = b.select(b.compare("<", q, 3.05), middle, polynomial(b, b.sub(q, 4.5), P.ERF_INV_LARGE))
    value = b.select(b.compare("<", a, 0.75), small, copysign(b, b.mul(q, fit), x))
    value = b.select(b.compare("==", a, 1.0), copysign(b, b.constant_of(x.type, INF), x), value)
    return b.select(b.ir.fcmp_unordered(">", a, b.constant_of(x.type, 1.0)), NAN, value)


_SHIFT = 10  # the asymptotic series are used from here on
# B_2k / (2k (2k-1)) of Stirling's series and B_2k / 2k of digamma's.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
_DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12, -3617 / 8160)


def _nearest(b: KernelBuilder, x):
    """x's distance from the nearest integer, exact."""
    return b.sub(x, b.intrinsic("llvm.nearbyint", x))


def _lgamma_positive(b: KernelBuilder, x):
    product = b.constant_of(x.type, 1.0)
    for _ in range(_SHIFT):
        small = b.compare("<", x, float(_SHIFT))
        product = b.select(small, b.mul(product, x), product)
        x = b.select(small, b.add(x, 1.0), x)
    inverse = b.div(1.0, x)
    series = b.mul(inverse, polynomial(b, b.mul(inverse, inverse), _STIRLING))
    logarithm = log(b, x)
    stirling = b.add(b.fma(b.sub(x, 0.5), b.sub(logarithm, 1.0), 0.5 * math.log(2 * math.pi) - 0.5), series)
    value = b.sub(stirling, log(b, product))
    return b.select(b.compare("==", x, INF), INF, value)


@through_f64
def lgamma(b: KernelBuilder, x):
    """log |gamma(x)|"""
    reflected = b.compare("<", x, 0.5)
    value = _lgamma_positive(b, b.select(reflected, b.sub(1.0, x), x))
    sine = absolute(b, sin(b, b.mul(_nearest(b, x), math.pi)))
    mirrored = b.sub(b.sub(math.log(math.pi), log(b, sine)), value)
    value = b.select(reflected, mirrored, value)
    pole = b.ir.and_(b.compare("<=", x, 0.0), b.compare("==", floor(b, x), x))
    value = b.select(b.ir.or_(b.compare("==", x, 1.0), b.compare("==", x, 2.0)), 0.0, value)
    value = b.select(pole, INF, value)
    return b.select(b.compare("==", x, -INF), x, value)  # as SciPy has it; C's lgamma gives +inf


def _digamma_positive(b: KernelBuilder, x):
    total = b.constant_of(x.type, 0.0)
    for _ in range(_SHIFT):
        small = b.compare("<", x, float(_SHIFT))
        total = b.select(small, b.add(total, b.div(1.0, x)), total)
        x = b.select(small, b.add(x, 1.0), x)
    inverse = b.div(1.0, x)
    square = b.mul(inverse, inverse)
    series = b.fma(inverse, 0.5, b.mul(square, polynomial(b, square, _DIGAMMA)))
    return b.sub(b.sub(log(b, x), series), total)


@through_f64
def digamma(b: KernelBuilder, x):
    """The logarithmic derivative of the gamma function."""
    reflected = b.compare("<", x, 0.5)
    value = _digamma_positive(b, b.select(reflected, b.sub(1.0, x), x))
    angle = b.mul(_nearest(b, x), math.pi)
    cotangent = b.div(cos(b, angle), sin(b, angle))
    value = b.select(reflected, b.fma(cotangent, -math.pi, value), value)
    pole = b.ir.and_(b.compare("<", x, 0.0), b.compare("==", floor(b, x), x))
    value = b.select(pole, NAN, value)
    return b.select(b.compare("==", x, 0.0), copysign(b, b.constant_of(x.type, INF), b.ir.fneg(x)), value)
