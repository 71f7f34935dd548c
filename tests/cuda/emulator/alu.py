"""What instructions compute that work on each thread's registers alone, as functions of arrays.

Approximations of the hardware (`ex2.approx`, `rcp.approx`, ...) are exact here up to the last rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests.cuda.emulator.parse import width_of

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
DTYPES = {
    "pred": np.dtype(bool),
    **{kind: np.dtype(dtype) for kind, dtype in FLOATS.items()},
    **{f"{k}{n}": np.dtype(f"{'int' if k == 's' else 'uint'}{n}") for k in "usb" for n in (8, 16, 32, 64)},
}


class Operation(NamedTuple):
    """kinds: PTX types of the operands. result: type of the result. function: from operands to result."""

    kinds: tuple[str, ...]
    result: str
    function: Callable


def operation(opcode: str) -> Operation | None:
    """What an opcode such as `setp.lt.and.f32` stands for; None for one that is not of this kind."""
    name, *parts = opcode.split(".")
    kind = parts[-1] if parts else ""
    if name == "setp":
        return _setp(parts)
    if name == "cvt":
        return _cvt(parts)
    if name == "selp":
        return Operation((kind, kind, "pred"), kind, lambda a, b, p: np.where(p, a, b))
    if name in ("mov", "cvta"):
        return Operation((kind,), kind, lambda a: np.array(a))
    if (name == "mul" and parts[0] == "wide") or (name == "mad" and parts[0] == "wide"):
        wide = f"{kind[0]}{2 * width_of(kind) * 8}"
        kinds: tuple[str, ...] = (kind, kind) if name == "mul" else (kind, kind, wide)
        return Operation(kinds, wide, lambda a, b, c=0: (a.astype(DTYPES[wide]) * b + c).astype(DTYPES[wide]))
    if name in ("shl", "shr"):
        return Operation((kind, "u32"), kind, _left if name == "shl" else _right)
    if name in ("bfi", "bfe"):
        kinds = (kind, kind, "u32", "u32") if name == "bfi" else (kind, "u32", "u32")
        return Operation(kinds, kind, _bfi if name == "bfi" else _bfe)
    if name == "prmt" and len(parts) == 1:
        return Operation((kind,) * 3, kind, _prmt)
    if name in _COUNTS:
        return Operation((kind,), "u32", _COUNTS[name])
    if kind in FLOATS and name in _FLOAT:
        count, function = _FLOAT[name]
        return Operation((kind,) * count, kind, _finished(name, parts, kind, function))
    if kind == "pred" and name in _BITS:
        return Operation((kind,) * _BITS[name][0], kind, _LOGIC[name])
    if name in _BITS:
        count, function = _BITS[name]
        return Operation((kind,) * count, kind, function)
    if name in _INTEGER and parts[0] not in ("hi", "lo"):
        count, function = _INTEGER[name]
        return Operation((kind,) * count, kind, function)
    if name in ("mul", "mad"):
        product = _high if parts[0] == "hi" else operator.mul
        if name == "mul":
            return Operation((kind, kind), kind, product)
        return Operation((kind,) * 3, kind, lambda a, b, c: product(a, b) + c)
    return None


# -- comparisons ------------------------------------------------------------------------------------------------------
def _is_nan(a, b) -> np.ndarray:
    return (a != a) | (b != b)


_COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    "num": lambda a, b: ~_is_nan(a, b), "nan": _is_nan,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable:
    if name.endswith("u") and name not in _COMPARE:
        return lambda a, b: _COMPARE[name[:-1]](a, b) | _is_nan(a, b)
    if name == "ne" and kind in FLOATS:
        return lambda a, b: (a != b) & ~_is_nan(a, b)
    return _COMPARE[name]


def _setp(parts: list[str]) -> Operation:
    name, *parts = [part for part in parts if part != "ftz"]
    kind, compare = parts[-1], _comparison(name, parts[-1])
    if len(parts) == 1:
        return Operation((kind, kind), "pred", compare)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[parts[0]]
    return Operation((kind, kind, "pred"), "pred", lambda a, b, p: combine(compare(a, b), p))


# -- integers ---------------------------------------------------------------------------------------------------------
def _left(a, b):
    bits = a.dtype.itemsize * 8
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _right(a, b):
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b < bits, shifted, 0).astype(a.dtype)


def _mask(count, dtype) -> np.ndarray:
    """Ones in the last `count` bits."""
    bits = dtype.itemsize * 8
    ones = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(count >= bits, np.uint64((1 << bits) - 1), ones).astype(dtype)


def _bfi(a, b, position, length):
    position, length = position & 0xFF, length & 0xFF
    mask = _left(_mask(length, a.dtype), position)
    return (b & ~mask) | (_left(a, position) & mask)


def _bfe(a, position, length):
    if a.dtype.kind == "i":
        raise ValueError("bfe of signed numbers is not emulated")
    return _right(a, position & 0xFF) & _mask(length & 0xFF, a.dtype)


def _prmt(a, b, selector):
    """Four bytes of the eight of `b` and `a`, by four bits of the selector each, whose highest asks for the sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(both)
    for n in range(4):
        chosen = selector.astype(np.uint64) >> np.uint64(4 * n)
        byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        signs = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        out |= np.where(chosen & np.uint64(8), signs, byte) << np.uint64(8 * n)
    return out.astype(a.dtype)


def _high(a, b):
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(a.dtype.itemsize * 8)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), np.asarray(b).view(np.uint64)
    al, ah, bl, bh = ua & low, ua >> half, ub & low, ub >> half
    middle = ah * bl + (al * bl >> half)
    high = ah * bh + (middle >> half) + ((al * bh + (middle & low)) >> half)
    if a.dtype.kind == "u":
        return high
    return (high - np.where(a < 0, ub, 0).astype(np.uint64) - np.where(b < 0, ua, 0).astype(np.uint64)).view(a.dtype)


def _divide(a, b):
    """Towards zero. What is divided by zero is not defined; all ones, as the hardware has it."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def _remainder(a, b):
    return np.where(b == 0, a, a - _divide(a, b) * b).astype(a.dtype)


def _leading_zeros(a):
    width, count, rest = a.dtype.itemsize * 8, np.zeros(a.shape, np.uint32), a.astype(np.uint64)
    for shift in (32, 16, 8, 4, 2, 1):
        large = rest >> np.uint64(shift) != 0
        count += np.where(large, shift, 0).astype(np.uint32)
        rest = np.where(large, rest >> np.uint64(shift), rest)
    return (width - np.where(a == 0, 0, count + 1)).astype(np.uint32)


def _clipped(name: str) -> tuple[int, Callable]:
    return 2, (np.minimum if name == "min" else np.maximum)


_COUNTS = {"clz": _leading_zeros, "popc": lambda a: np.bitwise_count(a).astype(np.uint32)}
_BITS: dict[str, tuple[int, Callable]] = {
    "and": (2, operator.and_), "or": (2, operator.or_), "xor": (2, operator.xor), "not": (1, operator.invert),
}  # fmt: skip
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
_INTEGER: dict[str, tuple[int, Callable]] = {
    "add": (2, operator.add), "sub": (2, operator.sub), "div": (2, _divide), "rem": (2, _remainder),
    "min": _clipped("min"), "max": _clipped("max"), "neg": (1, operator.neg), "abs": (1, np.abs),
}  # fmt: skip


# -- floats -----------------------------------------------------------------------------------------------------------
def _fma(a, b, c):
    """Exact but for the rounding of a sum in float64, when these are float32."""
    if a.dtype == np.float64:
        return (a.astype(np.longdouble) * b + c).astype(np.float64)
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def _exact(function: Callable) -> Callable:
    """`function` of operands in float64, whose result is rounded later."""
    return lambda *operands: function(*[x.astype(np.float64) if x.dtype != np.float64 else x for x in operands])


def _sign_bits(x) -> tuple[np.ndarray, np.ndarray]:
    """The bits of floats, and those with the sign's set."""
    bits = x.view(f"u{x.dtype.itemsize}")
    return bits, bits.dtype.type(1 << (x.dtype.itemsize * 8 - 1))


def _absolute(x):
    bits, sign = _sign_bits(x)
    return (bits & ~sign).view(x.dtype)


def _negative(x):
    bits, sign = _sign_bits(x)
    return (bits ^ sign).view(x.dtype)


def _with_sign(a, b):
    """`b` with the sign of `a`."""
    (from_bits, sign), (to_bits, _) = _sign_bits(a), _sign_bits(b)
    return ((from_bits & sign) | (to_bits & ~sign)).view(b.dtype)


_FLOAT: dict[str, tuple[int, Callable]] = {
    "add": (2, _exact(operator.add)), "sub": (2, _exact(operator.sub)), "mul": (2, _exact(operator.mul)),
    "div": (2, _exact(operator.truediv)), "fma": (3, _fma), "mad": (3, _fma),
    "min": (2, np.fmin), "max": (2, np.fmax), "abs": (1, _absolute), "neg": (1, _negative), "copysign": (2, _with_sign),
    "sqrt": (1, _exact(np.sqrt)), "rcp": (1, _exact(lambda x: 1 / x)), "rsqrt": (1, _exact(lambda x: 1 / np.sqrt(x))),
    "ex2": (1, _exact(np.exp2)), "lg2": (1, _exact(np.log2)), "sin": (1, _exact(np.sin)), "cos": (1, _exact(np.cos)),
    "tanh": (1, _exact(np.tanh)),
}  # fmt: skip
_AS_THEY_ARE = ("min", "max", "abs", "neg", "copysign")


def _finished(name: str, parts: list[str], kind: str, function: Callable) -> Callable:
    """`function` with the rounding, the flush of subnormal numbers and the clamping that an opcode asks for."""
    dtype, flushes, clamps = np.dtype(FLOATS[kind]), "ftz" in parts, "sat" in parts
    mode = next((part for part in parts if part in ("rn", "rz", "rm", "rp")), "rn")

    def finish(*operands):
        if flushes:
            operands = [_flushed(x) for x in operands]
        out = function(*operands)
        if name not in _AS_THEY_ARE:
            out = rounded(out, dtype, mode)
        if flushes:
            out = _flushed(out)
        return np.where(out == out, np.clip(out, 0, 1), 0).astype(dtype) if clamps else out

    return finish


def _flushed(x):
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(0, x), x).astype(x.dtype)


def rounded(x, dtype: np.dtype, mode: str) -> np.ndarray:
    """`x` in a narrower type, rounded to the nearest, towards zero, down ("rm") or up ("rp")."""
    near = x.astype(dtype)
    if mode == "rn" or x.dtype == dtype:
        return near
    back = near.astype(x.dtype)
    too_large = back > x if mode == "rm" else back < x if mode == "rp" else np.abs(back) > np.abs(x)
    towards = np.array({"rm": -np.inf, "rp": np.inf, "rz": 0}[mode], dtype)
    return np.where(too_large, np.nextafter(near, towards), near)


# -- conversions ------------------------------------------------------------------------------------------------------
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(parts: list[str]) -> Operation:
    flags, (to, of) = parts[:-2], parts[-2:]
    if to == "tf32":
        if flags != ["rna"]:
            raise ValueError(f"cvt.{'.'.join(parts)} is not emulated")
        # The nearest with 10 bits of mantissa, halves away from zero.
        return Operation(("b32",), "b32", lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    mode = next((f for f in flags if f.startswith("r")), "rn")
    return Operation((of,), to, lambda a: _converted(a, to, of, mode, "sat" in flags, "ftz" in flags))


def _converted(a, to: str, of: str, mode: str, clamps: bool, flushes: bool):
    dtype = DTYPES[to]
    if flushes:
        a = _flushed(a)
    if to in FLOATS and of in FLOATS:
        if mode in _TO_INTEGER:
            a = _TO_INTEGER[mode](a)
        out = rounded(a, dtype, mode if mode in ("rz", "rm", "rp") else "rn")
        return np.where(out == out, np.clip(out, 0, 1), 0).astype(dtype) if clamps else out
    if to in FLOATS:
        return a.astype(dtype)
    if of in FLOATS:
        whole = _TO_INTEGER[mode](a.astype(np.float64))
        limits = np.iinfo(dtype)
        inside = (whole > limits.min) & (whole < limits.max)
        out = np.where(inside, whole, 0).astype(dtype)
        out = np.where(whole >= limits.max, limits.max, np.where(whole <= limits.min, limits.min, out))
        return np.where(whole == whole, out, 0).astype(dtype)
    if clamps:
        limits = np.iinfo(dtype)
        return np.clip(a.astype(object), limits.min, limits.max).astype(dtype)
    return a.astype(dtype)
