"""Trigonometric functions and their inverses as inlined polynomial code; conventions of vector_math.py.

Arguments of sin, cos and tan are reduced exactly whatever their size: up to 2^16 (2^20 in float64) by subtracting
multiples of pi/2 in three parts, beyond that, in a branch taken if any lane asks for it, by multiplying with as many
bits of 2/pi as matter (Payne and Hanek, 1983).
"""

from __future__ import annotations

import itertools
import math

from llvmlite import ir

from kgraph.codegen.cpu import polynomials as P
from kgraph.codegen.cpu.builder import F64, I32, I64, KernelBuilder
from kgraph.codegen.cpu.vector_math import (
    INF,
    NAN,
    absolute,
    bits_of,
    copysign,
    is_f32,
    polynomial,
    round_small,
    sqrt,
    through_f64,
    to_f32,
    with_element,
)

HALF_PI = math.pi / 2
# pi/2 in three parts of full precision each.
_HALF_PI_F32 = (1.57079637050628662109375, -4.371139000186241e-08, -1.7151245100059e-15)
_HALF_PI_F64 = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33)


# -- reduction --------------------------------------------------------------------------------------------------------
def _reduce(b: KernelBuilder, x):
    """x = q pi/2 + r with |r| <= pi/4 (a little more); gives (r, q modulo 4 as integer vector)."""
    parts = _HALF_PI_F32 if is_f32(x) else _HALF_PI_F64
    n, number = round_small(b, b.mul(x, 2.0 / math.pi))
    r = x
    for part in parts:
        r = b.fma(n, -part, r)
    remainder, quadrant = b.variable(r), b.variable(b.ir.and_(number, b.constant_of(number.type, 3)))
    limit = 2.0**16 if is_f32(x) else 2.0**20
    huge = b.ir.fcmp_unordered(">=", absolute(b, x), b.constant_of(x.type, limit))  # NaN included
    with b.if_then(b.any(huge), likely=False):
        r, q = _reduce_huge(b, x)
        remainder.set(b.select(huge, r, remainder.get()))
        quadrant.set(b.select(huge, q, quadrant.get()))
    return remainder.get(), quadrant.get()


def _reduce_huge(b: KernelBuilder, x):
    """`_reduce` for large x (others give anything); infinities and NaN give NaN."""
    finite = b.compare("<", absolute(b, x), INF)
    limit = 2.0**16 if is_f32(x) else 2.0**20
    large = b.ir.and_(finite, b.compare(">=", absolute(b, x), limit))
    safe = b.select(large, absolute(b, x), b.constant_of(x.type, limit))
    narrow = bits_of(b, safe)
    wide = with_element(x, I64)
    bits = b.ir.zext(narrow, wide) if is_f32(x) else narrow
    fraction_bits, bias = (23, 127) if is_f32(x) else (52, 1023)
    constant = lambda value: b.constant_of(wide, value)
    mantissa = b.ir.or_(b.ir.and_(bits, constant((1 << fraction_bits) - 1)), constant(1 << fraction_bits))
    exponent = b.sub(b.ir.lshr(bits, constant(fraction_bits)), bias + fraction_bits)
    # x = mantissa 2^exponent: bits of 2/pi above place `exponent - 1` add multiples of 4 quadrants. The table starts
    # with 64 zeros.
    first = b.add(exponent, 64 - 2)
    word, shift = b.ir.lshr(first, constant(6)), b.ir.and_(first, constant(63))
    table = b.table("two_over_pi", P.TWO_OVER_PI, "int64")
    count = 2 if is_f32(x) else 3
    words = [b.gather(table, b.add(word, k)) for k in range(count + 1)]
    back = b.sub(63, shift)
    window = []
    for high, low in itertools.pairwise(words):
        rest = b.ir.lshr(b.ir.lshr(low, constant(1)), back)
        window.append(b.ir.or_(b.ir.shl(high, shift), rest))
    turn = _turn_f32(b, mantissa, window) if is_f32(x) else _turn_f64(b, mantissa, window)
    fraction, quadrant = turn
    r = b.mul(fraction, HALF_PI)
    r = to_f32(b, r) if is_f32(x) else r
    negative = b.compare("<", x, 0.0)
    r = b.select(negative, b.ir.fneg(r), r)
    quadrant = b.ir.and_(b.select(negative, b.ir.neg(quadrant), quadrant), constant(3))
    r = b.select(finite, r, NAN)
    return r, b.ir.trunc(quadrant, with_element(x, I32)) if is_f32(x) else quadrant


def _turn_f32(b: KernelBuilder, mantissa, window):
    """(fraction of a quadrant in [-1/2, 1/2] as float64, quadrant) of mantissa * window, whose top bit weighs 2."""
    wide = mantissa.type
    constant = lambda value: b.constant_of(wide, value)
    low = b.ir.lshr(b.mul(mantissa, b.ir.lshr(window[1], constant(32))), constant(32))
    turn = b.add(b.mul(mantissa, window[0]), low)
    quadrant = b.ir.lshr(b.add(turn, 1 << 61), constant(62))
    rest = b.sub(turn, b.ir.shl(quadrant, constant(62)))
    return b.mul(b.ir.sitofp(rest, with_element(mantissa, F64)), 2.0**-62), quadrant


def _turn_f64(b: KernelBuilder, mantissa, window):
    """As `_turn_f32`, with 128 bits of the product."""
    i128 = with_element(mantissa, ir.IntType(128))
    wide = lambda v: b.ir.zext(v, i128)
    constant = lambda value: b.constant_of(i128, value)
    m = wide(mantissa)
    low = b.ir.mul(m, wide(window[2]))
    middle = b.ir.add(b.ir.mul(m, wide(window[1])), b.ir.lshr(low, constant(64)))
    turn = b.ir.add(b.ir.shl(b.ir.mul(m, wide(window[0])), constant(64)), middle)
    quadrant = b.ir.lshr(b.ir.add(turn, constant(1 << 125)), constant(126))
    rest = b.ir.sub(turn, b.ir.shl(quadrant, constant(126)))
    negative = b.ir.icmp_signed("<", rest, constant(0))
    size = b.ir.select(negative, b.ir.neg(rest), rest)
    narrow = lambda v: b.ir.uitofp(b.ir.trunc(v, mantissa.type), with_element(mantissa, F64))
    value = b.fma(narrow(b.ir.lshr(size, constant(64))), 2.0**64, narrow(size))
    value = b.mul(value, 2.0**-126)
    return b.select(negative, b.ir.fneg(value), value), b.ir.trunc(quadrant, mantissa.type)


def _sin_reduced(b: KernelBuilder, r):
    z = b.mul(r, r)
    return b.fma(b.mul(z, r), polynomial(b, z, P.SIN_F32 if is_f32(r) else P.SIN_F64), r)


def _cos_reduced(b: KernelBuilder, r):
    z = b.mul(r, r)
    tail = polynomial(b, z, P.COS_F32 if is_f32(r) else P.COS_F64)
    half = b.mul(z, 0.5)
    head = b.sub(1.0, half)
    lost = b.sub(b.sub(1.0, head), half)
    return b.add(head, b.fma(b.mul(z, z), tail, lost))


def _odd(b: KernelBuilder, quadrant, bit: int = 1):
    return b.compare("!=", b.ir.and_(quadrant, b.constant_of(quadrant.type, bit)), 0)


def sin(b: KernelBuilder, x):
    r, q = _reduce(b, x)
    value = b.select(_odd(b, q), _cos_reduced(b, r), _sin_reduced(b, r))
    return b.select(_odd(b, q, 2), b.ir.fneg(value), value)


def cos(b: KernelBuilder, x):
    r, q = _reduce(b, x)
    value = b.select(_odd(b, q), _sin_reduced(b, r), _cos_reduced(b, r))
    return b.select(_odd(b, b.add(q, 1), 2), b.ir.fneg(value), value)


def tan(b: KernelBuilder, x):
    r, q = _reduce(b, x)
    sine, cosine = _sin_reduced(b, r), _cos_reduced(b, r)
    odd = _odd(b, q)
    return b.div(b.select(odd, b.ir.fneg(cosine), sine), b.select(odd, sine, cosine))


# -- inverses ---------------------------------------------------------------------------------------------------------
def _atan_unit(b: KernelBuilder, u):
    """atan(u) for 0 <= u <= 1."""
    z = b.mul(u, u)
    return b.fma(b.mul(z, u), polynomial(b, z, P.ATAN_F32 if is_f32(u) else P.ATAN_F64), u)


def atan(b: KernelBuilder, x):
    magnitude = absolute(b, x)
    inverted = b.compare(">", magnitude, 1.0)
    u = b.div(b.select(inverted, b.constant_of(x.type, 1.0), magnitude), b.select(inverted, magnitude, 1.0))
    value = _atan_unit(b, u)
    return copysign(b, b.select(inverted, b.sub(HALF_PI, value), value), x)


@through_f64
def atan2(b: KernelBuilder, y, x):
    """The angle of the point (x, y)."""
    ax, ay = absolute(b, x), absolute(b, y)
    steep = b.compare(">", ay, ax)
    high, low = b.select(steep, ay, ax), b.select(steep, ax, ay)
    u = b.div(low, high)
    u = b.select(b.compare("==", high, 0.0), 0.0, b.select(b.compare("==", low, INF), 1.0, u))
    value = _atan_unit(b, u)
    value = b.select(steep, b.sub(HALF_PI, value), value)
    value = b.select(b.compare("<", bits_of(b, x), 0), b.sub(math.pi, value), value)
    value = copysign(b, value, y)
    return b.select(b.ir.fcmp_unordered("uno", x, y), NAN, value)


def _asin_small(b: KernelBuilder, x):
    """asin(x) for |x| <= 1/2."""
    z = b.mul(x, x)
    return b.fma(b.mul(z, x), polynomial(b, z, P.ASIN_F64), x)


@through_f64
def asin(b: KernelBuilder, x):
    magnitude = absolute(b, x)
    small = b.compare("<", magnitude, 0.5)
    root = sqrt(b, b.mul(b.sub(1.0, magnitude), 0.5))
    inner = _asin_small(b, b.select(small, magnitude, root))
    return copysign(b, b.select(small, inner, b.fma(inner, -2.0, HALF_PI)), x)


@through_f64
def acos(b: KernelBuilder, x):
    magnitude = absolute(b, x)
    small = b.compare("<", magnitude, 0.5)
    root = sqrt(b, b.mul(b.sub(1.0, magnitude), 0.5))
    inner = _asin_small(b, b.select(small, x, root))
    twice = b.mul(inner, 2.0)
    large = b.select(b.compare("<", x, 0.0), b.sub(math.pi, twice), twice)
    return b.select(small, b.sub(HALF_PI, inner), large)


__all__ = ["acos", "asin", "atan", "atan2", "cos", "sin", "tan"]
