"""The elementwise primitives as source text: one form each, in the table `FORMS`.

A form is `form(k, xs, dtypes, dtype, **attrs)`: texts of the operands in compute form (each a variable or a literal),
their dtypes, and the result's dtype; it gives the text of the result, and may write lines to the KernelSource `k`
before. float16 and bfloat16 are float32 here; only `convert` rounds to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kgraph.codegen.expressions import compute_dtype
from kgraph.ir.types import FLOATS

FORMS: dict[str, Callable[..., str]] = {}

# Functions of one or more floats that libdevice has, by primitive name.
_C_NAMES = {
    **{n: n for n in "exp exp2 expm1 log log2 log1p sinh cosh tanh sqrt sin cos tan asin acos atan atan2".split()},
    **{n: n for n in "asinh acosh atanh cbrt hypot erf erfc floor ceil trunc rsqrt".split()},
    "round_nearest_even": "rint",
    "erf_inv": "erfinv",
}
# All names of libdevice that forms and families may use; `device_functions` defines them.
LIBRARY = frozenset(
    name + suffix
    for name in (*_C_NAMES.values(), "fmod", "fabs", "copysign", "nextafter", "pow", "lgamma", "fma")
    for suffix in ("", "f")
) | frozenset("float_as_int int_as_float double_as_longlong longlong_as_double half2float float2half_rn".split())


def form(k, name: str, xs: Sequence[str], dtypes: Sequence[str], dtype: str, attrs: Sequence = ()) -> str:
    """The text of primitive `name` on `xs`."""
    return FORMS[name](k, list(xs), list(dtypes), dtype, **dict(attrs))


def _register(*names: str):
    def register(function):
        for name in names:
            FORMS[name] = function
        return function

    return register


def is_float(dtype: str) -> bool:
    return dtype in FLOATS


def is_signed(dtype: str) -> bool:
    return dtype.startswith("int")


def bits(dtype: str) -> int:
    """The width of a dtype in memory."""
    return np.dtype(compute_dtype(dtype)).itemsize * 8


def suffix(dtype: str) -> str:
    """C's suffix of functions on this float dtype."""
    return "" if dtype == "float64" else "f"


def literal(value: Any, dtype: str) -> str:
    """A constant in compute form. value: a number, or the text of a float that is no plain number ("nan", "-0.0")."""
    dtype = compute_dtype(dtype)
    if dtype == "bool":
        return str(bool(value))
    if not is_float(dtype):
        value = int(value) % (1 << bits(dtype))
        return f"{dtype}({value - (1 << bits(dtype)) if is_signed(dtype) and value >> bits(dtype) - 1 else value})"
    return f"{dtype}({float(value)!r})"


def zero(dtype: str) -> str:
    return literal(0, dtype)


def from_memory(text: str, dtype: str) -> str:
    """The compute form of what a buffer holds."""
    if dtype == "bool":
        return f"({text} != uint8(0))"
    if dtype == "float16":
        return f"half_to_float({text})"
    if dtype == "bfloat16":
        return f"bfloat16_to_float({text})"
    return text


def to_memory(text: str, dtype: str) -> str:
    """What a buffer holds for a value in compute form."""
    if dtype == "bool":
        return f"(uint8(1) if {text} else uint8(0))"
    if dtype == "float16":
        return f"float_to_half({text})"
    if dtype == "bfloat16":
        return f"float_to_bfloat16({text})"
    return text


def _choose(condition: str, yes: str, no: str) -> str:
    return f"({yes} if {condition} else {no})"


# -- functions of libdevice -------------------------------------------------------------------------------------------
def _library_function(name: str) -> Callable[..., str]:
    def form(k, xs, dtypes, dtype):
        return f"{name}{suffix(dtype)}({', '.join(xs)})"

    return form


for _name, _c_name in _C_NAMES.items():
    FORMS[_name] = _library_function(_c_name)


@_register("lgamma")
def _lgamma(k, xs, dtypes, dtype):
    (x,) = xs  # C's function gives +inf at -inf
    return _choose(f"{x} == {literal('-inf', dtype)}", x, f"lgamma{suffix(dtype)}({x})")


@_register("digamma")
def _digamma(k, xs, dtypes, dtype):
    return f"{compute_dtype(dtype)}(digamma(float64({xs[0]})))"


@_register("logistic")
def _logistic(k, xs, dtypes, dtype):
    one = literal(1, dtype)
    return f"({one} / ({one} + exp{suffix(dtype)}(-{xs[0]})))"


@_register("silu")
def _silu(k, xs, dtypes, dtype):
    (x,) = xs
    product = f"{x} / ({literal(1, dtype)} + exp{suffix(dtype)}(-{x}))"
    return _choose(f"{x} == {literal('-inf', dtype)}", zero(dtype), product)


@_register("softplus")
def _softplus(k, xs, dtypes, dtype):
    (x,), s = xs, suffix(dtype)
    return f"({_choose(f'{x} > {zero(dtype)}', x, zero(dtype))} + log1p{s}(exp{s}(-fabs{s}({x}))))"


@_register("logaddexp")
def _logaddexp(k, xs, dtypes, dtype):
    (x, y), s = xs, suffix(dtype)
    high = _choose(f"{x} > {y}", x, y)
    apart = f"({high} + log1p{s}(exp{s}(-fabs{s}({x} - {y}))))"
    return _choose(f"{x} == {y}", f"({x} + {literal(math.log(2), dtype)})", apart)


@_register("gelu")
def _gelu(k, xs, dtypes, dtype, approximate):
    (x,), s = xs, suffix(dtype)
    c = lambda value: literal(value, dtype)
    if approximate:
        inner = f"{c(math.sqrt(2 / math.pi))} * ({x} + {c(0.044715)} * {x} * {x} * {x})"
        value = f"{c(0.5)} * {x} * ({c(1)} + tanh{s}({inner}))"
    else:  # erfc keeps its digits where 1 + erf cancels
        value = f"{c(0.5)} * {x} * erfc{s}(-{x} * {c(math.sqrt(0.5))})"
    return _choose(f"{x} == {c('-inf')}", zero(dtype), value)


# -- sign and magnitude -----------------------------------------------------------------------------------------------
@_register("neg")
def _neg(k, xs, dtypes, dtype):
    (x,) = xs
    return f"(-{x})" if is_float(dtype) else f"{dtype}({zero(dtype)} - {x})"


@_register("abs")
def _abs(k, xs, dtypes, dtype):
    (x,) = xs
    if is_float(dtype):
        return f"fabs{suffix(dtype)}({x})"
    return _choose(f"{x} < {zero(dtype)}", _neg(k, xs, dtypes, dtype), x) if is_signed(dtype) else x


@_register("sign")
def _sign(k, xs, dtypes, dtype):
    (x,) = xs
    rest = _choose(f"{x} < {zero(dtype)}", literal(-1, dtype), x) if is_float(dtype) or is_signed(dtype) else x
    return _choose(f"{x} > {zero(dtype)}", literal(1, dtype), rest)


@_register("is_nan")
def _is_nan(k, xs, dtypes, dtype):
    return f"({xs[0]} != {xs[0]})" if is_float(dtypes[0]) else "False"


@_register("is_inf")
def _is_inf(k, xs, dtypes, dtype):
    return f"({_abs(k, xs, dtypes, dtypes[0])} == {literal('inf', dtypes[0])})" if is_float(dtypes[0]) else "False"


@_register("is_finite")
def _is_finite(k, xs, dtypes, dtype):
    return f"({_abs(k, xs, dtypes, dtypes[0])} < {literal('inf', dtypes[0])})" if is_float(dtypes[0]) else "True"


@_register("nextafter")
def _nextafter(k, xs, dtypes, dtype):
    x, y = xs
    if dtype in ("float32", "float64"):
        return f"nextafter{suffix(dtype)}({x}, {y})"
    # One step of the bits: towards larger magnitude where y lies on the outer side of x.
    from_bits = lambda text: from_memory(text, dtype)
    step = _choose(f"({y} > {x}) == ({x} > {zero(dtype)})", "int32(1)", "int32(-1)")
    moved = from_bits(f"uint16(int32({to_memory(x, dtype)}) + {step})")
    least = f"copysignf({from_bits('uint16(1)')}, {y})"
    value = _choose(f"{x} == {y}", y, _choose(f"{x} == {zero(dtype)}", least, moved))
    return _choose(f"{x} != {x} or {y} != {y}", literal("nan", dtype), value)


# -- arithmetic -------------------------------------------------------------------------------------------------------
def _arithmetic(name: str, symbol: str, logical: str) -> None:
    def form(k, xs, dtypes, dtype):
        x, y = xs
        if dtype == "bool":
            return f"({x} {logical} {y})"
        return f"({x} {symbol} {y})" if is_float(dtype) else f"{dtype}({x} {symbol} {y})"

    FORMS[name] = form


_arithmetic("add", "+", "or")
_arithmetic("sub", "-", "!=")
_arithmetic("mul", "*", "and")


@_register("div")
def _div(k, xs, dtypes, dtype):
    return f"({xs[0]} / {xs[1]})"


def _int_quotient(k, x: str, y: str, dtype: str) -> str:
    """The quotient rounded down, in a variable; 0 where y is 0. The least integer divided by -1 wraps."""
    special = f"{y} == {zero(dtype)}" + (f" or {y} == {literal(-1, dtype)}" if is_signed(dtype) else "")
    safe = k.let(_choose(special, literal(1, dtype), y))
    quotient = f"{dtype}({x} // {safe})"
    if is_signed(dtype):
        quotient = _choose(f"{y} == {literal(-1, dtype)}", f"{dtype}({zero(dtype)} - {x})", quotient)
    return k.let(_choose(f"{y} == {zero(dtype)}", zero(dtype), quotient))


@_register("floor_divide")
def _floor_divide(k, xs, dtypes, dtype):
    x, y = xs
    if not is_float(dtype):
        return _int_quotient(k, x, y, dtype)
    s, none = suffix(dtype), zero(dtype)
    rest = k.let(f"fmod{s}({x}, {y})")
    exact = f"({x} - {rest}) / {y}"
    opposite = f"{rest} != {none} and ({y} < {none}) != ({rest} < {none})"
    quotient = k.let(_choose(opposite, f"({exact} - {literal(1, dtype)})", f"({exact})"))
    below = k.let(f"floor{s}({quotient})")
    below = k.let(_choose(f"{quotient} - {below} > {literal(0.5, dtype)}", f"({below} + {literal(1, dtype)})", below))
    signed = _choose(f"{quotient} != {none}", below, f"copysign{s}({none}, {x} / {y})")
    return _choose(f"{y} == {none}", f"({x} / {y})", signed)


@_register("mod")
def _mod(k, xs, dtypes, dtype):
    x, y = xs
    if not is_float(dtype):
        quotient = _int_quotient(k, x, y, dtype)
        return _choose(f"{y} == {zero(dtype)}", zero(dtype), f"{dtype}({x} - {dtype}({quotient} * {y}))")
    s, none = suffix(dtype), zero(dtype)
    rest = k.let(f"fmod{s}({x}, {y})")
    moved = _choose(f"({y} < {none}) != ({rest} < {none})", f"({rest} + {y})", rest)
    return _choose(f"{rest} != {none}", moved, f"copysign{s}({none}, {y})")


@_register("rem")
def _rem(k, xs, dtypes, dtype):
    x, y = xs
    if is_float(dtype):
        return f"fmod{suffix(dtype)}({x}, {y})"
    rest = _mod(k, xs, dtypes, dtype)
    if not is_signed(dtype):
        return rest
    rest = k.let(rest)
    opposite = f"{rest} != {zero(dtype)} and ({x} < {zero(dtype)}) != ({rest} < {zero(dtype)})"
    return _choose(opposite, f"{dtype}({rest} - {y})", rest)


# -- extrema ----------------------------------------------------------------------------------------------------------
def extremum(x: str, y: str, dtype: str, greater: bool) -> str:
    """The greater (lesser) of both; NaN where either is NaN."""
    if dtype == "bool":
        return f"({x} {'or' if greater else 'and'} {y})"
    wins = f"{x} {'>' if greater else '<'} {y}"
    return _choose(f"{wins} or {x} != {x}" if is_float(dtype) else wins, x, y)


@_register("maximum")
def _maximum(k, xs, dtypes, dtype):
    return extremum(*xs, dtype, greater=True)


@_register("minimum")
def _minimum(k, xs, dtypes, dtype):
    return extremum(*xs, dtype, greater=False)


# -- comparisons, logic, selection ------------------------------------------------------------------------------------
def _comparison(name: str, symbol: str) -> None:
    FORMS[name] = lambda k, xs, dtypes, dtype: f"({xs[0]} {symbol} {xs[1]})"


for _name, _symbol in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    _comparison(_name, _symbol)


def _logic(name: str, symbol: str, logical: str) -> None:
    def form(k, xs, dtypes, dtype):
        x, y = xs
        return f"({x} {logical} {y})" if dtype == "bool" else f"{dtype}({x} {symbol} {y})"

    FORMS["bitwise_" + name] = FORMS["logical_" + name] = form


_logic("and", "&", "and")
_logic("or", "|", "or")
_logic("xor", "^", "!=")


@_register("logical_not", "bitwise_not")
def _not(k, xs, dtypes, dtype):
    return f"(not {xs[0]})" if dtype == "bool" else f"{dtype}(~{xs[0]})"


@_register("select")
def _select(k, xs, dtypes, dtype):
    return _choose(*xs)


def _shift(x: str, y: str, dtype: str, symbol: str, outside: str) -> str:
    """A shift whose count may leave [0, width)."""
    width = literal(bits(dtype), dtype)
    inside = f"{y} < {width}" + (f" and {y} >= {zero(dtype)}" if is_signed(dtype) else "")
    return _choose(inside, f"{dtype}({x} {symbol} {y})", outside)


@_register("shift_left")
def _shift_left(k, xs, dtypes, dtype):
    return _shift(*xs, dtype, "<<", zero(dtype))


@_register("shift_right")
def _shift_right(k, xs, dtypes, dtype):
    x, y = xs
    outside = zero(dtype)
    if is_signed(dtype):
        outside = _choose(f"{x} < {zero(dtype)}", literal(-1, dtype), zero(dtype))
    return _shift(x, y, dtype, ">>", outside)


# -- activations ------------------------------------------------------------------------------------------------------
@_register("relu")
def _relu(k, xs, dtypes, dtype):
    return extremum(xs[0], zero(dtype), dtype, greater=True)


@_register("relu6")
def _relu6(k, xs, dtypes, dtype):
    low = k.let(extremum(xs[0], zero(dtype), dtype, greater=True))
    return extremum(low, literal(6, dtype), dtype, greater=False)


@_register("leaky_relu")
def _leaky_relu(k, xs, dtypes, dtype, negative_slope):
    (x,) = xs
    return _choose(f"{x} > {zero(dtype)}", x, f"({x} * {literal(negative_slope, dtype)})")


@_register("elu")
def _elu(k, xs, dtypes, dtype, alpha):
    (x,) = xs
    return _choose(f"{x} > {zero(dtype)}", x, f"(expm1{suffix(dtype)}({x}) * {literal(alpha, dtype)})")


# -- conversions ------------------------------------------------------------------------------------------------------
@_register("convert")
def _convert(k, xs, dtypes, dtype):
    return convert(k, xs[0], dtypes[0], dtype)


def convert(k, x: str, source: str, target: str) -> str:
    """x in another dtype: floats to ints truncate and saturate, narrowing ints wrap, anything but 0 is true."""
    if source == target:
        return x
    if target == "bool":
        return f"({x} != {zero(source)})"
    if source == "bool":
        return _choose(x, literal(1, target), zero(target))
    if is_float(target):
        x = x if compute_dtype(source) == compute_dtype(target) else f"{compute_dtype(target)}({x})"
        return round_to(x, target)
    if is_float(source):
        return _float_to_int(x, compute_dtype(source), target)
    return f"{target}({x})"


def round_to(x: str, dtype: str) -> str:
    """A float32 rounded to float16 or bfloat16 precision; other dtypes pass."""
    return x if compute_dtype(dtype) == dtype else from_memory(to_memory(x, dtype), dtype)


def _float_to_int(x: str, source: str, target: str) -> str:
    """Truncation towards 0 and saturation; NaN gives 0."""
    limits = ml_dtypes.iinfo(target)
    inside = _choose(f"{x} == {x}", f"{target}({x})", zero(target))
    # float(max) may round up to a value that does not fit: from there on the maximum is taken.
    low = _choose(f"{x} <= {literal(float(limits.min), source)}", literal(limits.min, target), inside)
    return _choose(f"{x} >= {literal(float(limits.max), source)}", literal(limits.max, target), low)


@_register("bitcast_convert")
def _bitcast_convert(k, xs, dtypes, dtype):
    (x,), (source,) = xs, dtypes
    return _from_bits(_to_bits(x, source), dtype)


def _to_bits(x: str, dtype: str) -> str:
    """The bits of a value as an unsigned integer of its width."""
    if dtype == "float32":
        return f"uint32(float_as_int({x}))"
    if dtype == "float64":
        return f"uint64(double_as_longlong({x}))"
    if is_float(dtype) or dtype == "bool":
        return to_memory(x, dtype)
    return f"uint{bits(dtype)}({x})"


def _from_bits(text: str, dtype: str) -> str:
    if dtype == "float32":
        return f"int_as_float(int32({text}))"
    if dtype == "float64":
        return f"longlong_as_double(int64({text}))"
    if is_float(dtype) or dtype == "bool":
        return from_memory(text, dtype)
    return f"{dtype}({text})"


# -- powers -----------------------------------------------------------------------------------------------------------
@_register("pow")
def _pow(k, xs, dtypes, dtype):
    x, y = xs
    if not is_float(dtype):
        return _int_pow(k, x, y, dtype)
    c = lambda value: literal(value, dtype)
    if y == c(2):
        return f"({x} * {x})"
    if y == c(1):
        return x
    if y == c(3):
        return f"({x} * {x} * {x})"
    if y == c(-1):
        return f"({c(1)} / {x})"
    if y == c(0.5):  # pow gives +0 and inf where sqrt gives -0 and NaN
        return _choose(f"{x} == {c('-inf')}", c("inf"), f"(sqrt{suffix(dtype)}({x}) + {zero(dtype)})")
    return f"pow{suffix(dtype)}({x}, {y})"


def _int_pow(k, x: str, y: str, dtype: str) -> str:
    """x ** y, wrapping; a negative exponent truncates 1 / x**-y towards 0."""
    one = literal(1, dtype)
    if not is_signed(dtype):
        return f"{dtype}(int_pow({x}, {y}, {one}))"
    positive = k.let(_choose(f"{y} < {zero(dtype)}", zero(dtype), y))
    power = k.let(f"{dtype}(int_pow({x}, {positive}, {one}))")
    minus = _choose(f"{dtype}({y} & {one}) != {zero(dtype)}", literal(-1, dtype), one)
    unit = _choose(f"{x} == {one}", one, _choose(f"{x} == {literal(-1, dtype)}", minus, zero(dtype)))
    return _choose(f"{y} < {zero(dtype)}", unit, power)
