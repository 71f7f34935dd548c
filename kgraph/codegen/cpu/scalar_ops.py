"""Code of the elementwise primitives on LLVM scalars and vectors: one emitter each, in the table `EMITTERS`.

An emitter is `emitter(b, xs, dtypes, dtype, **attrs)`: operands in compute form, their dtypes, the result's dtype; it
gives the result in compute form. float16 and bfloat16 are float32 here; only `convert` rounds to them.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from kgraph.codegen.cpu import vector_math as vm
from kgraph.codegen.cpu import vector_special, vector_trig
from kgraph.codegen.cpu.builder import (
    F64,
    MEMORY_TYPES,
    KernelBuilder,
    compute_dtype,
    element_type,
    is_float,
    lanes_of,
)

EMITTERS: dict[str, Callable] = {}


def emitter(*names: str):
    def register(function):
        for name in names:
            EMITTERS[name] = function
        return function

    return register


def is_signed(dtype: str) -> bool:
    return dtype.startswith("int")


def is_float_dtype(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def integer(b: KernelBuilder, like: ir.Value, value: int) -> ir.Constant:
    return b.constant_of(like.type, value)


# -- float functions of vector_math ---------------------------------------------------------------------------------
def _float_functions(module, names: str) -> None:
    for name in names.split():
        function = getattr(module, name)
        EMITTERS[name] = lambda b, xs, dtypes, dtype, function=function: function(b, *xs)


_float_functions(vm, "exp exp2 expm1 log log2 log1p sinh cosh tanh erf erfc logistic softplus silu sqrt")
_float_functions(vector_trig, "sin cos tan asin acos atan atan2")
_float_functions(vector_special, "cbrt hypot asinh acosh atanh logaddexp erf_inv lgamma digamma")


def _rounding(name: str, intrinsic: str) -> None:
    EMITTERS[name] = lambda b, xs, dtypes, dtype: b.intrinsic(intrinsic, xs[0])


_rounding("floor", "llvm.floor")
_rounding("ceil", "llvm.ceil")
_rounding("trunc", "llvm.trunc")
_rounding("round_nearest_even", "llvm.nearbyint")


@emitter("rsqrt")
def _rsqrt(b, xs, dtypes, dtype):
    return b.div(1.0, vm.sqrt(b, xs[0]))


# -- sign and magnitude ---------------------------------------------------------------------------------------------
@emitter("neg")
def _neg(b, xs, dtypes, dtype):
    (x,) = xs
    return b.ir.fneg(x) if is_float(x) else b.ir.neg(x)


@emitter("abs")
def _abs(b, xs, dtypes, dtype):
    (x,) = xs
    if is_float(x):
        return vm.absolute(b, x)
    if not is_signed(dtype):
        return x
    return b.select(b.compare("<", x, 0), b.ir.neg(x), x)


@emitter("sign")
def _sign(b, xs, dtypes, dtype):
    (x,) = xs
    if is_float(x):
        one = b.constant_of(x.type, 1.0)
        value = b.select(b.compare(">", x, 0.0), one, b.select(b.compare("<", x, 0.0), -1.0, x))
        return b.select(b.compare("==", x, 0.0), 0.0, value)
    positive = b.compare(">" if is_signed(dtype) else "!=", x, 0)
    value = b.ir.zext(positive, x.type) if x.type != positive.type else positive
    return b.select(b.compare("<", x, 0), -1, value) if is_signed(dtype) else value


@emitter("is_nan")
def _is_nan(b, xs, dtypes, dtype):
    (x,) = xs
    return b.ir.fcmp_unordered("uno", x, x) if is_float(x) else b.constant(False, "bool", lanes_of(x))


@emitter("is_inf")
def _is_inf(b, xs, dtypes, dtype):
    (x,) = xs
    return b.compare("==", vm.absolute(b, x), vm.INF) if is_float(x) else b.constant(False, "bool", lanes_of(x))


@emitter("is_finite")
def _is_finite(b, xs, dtypes, dtype):
    (x,) = xs
    return b.compare("<", vm.absolute(b, x), vm.INF) if is_float(x) else b.constant(True, "bool", lanes_of(x))


@emitter("nextafter")
def _nextafter(b, xs, dtypes, dtype):
    return vector_special.nextafter(b, *xs, dtype)


# -- arithmetic -----------------------------------------------------------------------------------------------------
@emitter("add")
def _add(b, xs, dtypes, dtype):
    return b.ir.or_(*xs) if dtype == "bool" else b.add(*xs)


@emitter("sub")
def _sub(b, xs, dtypes, dtype):
    return b.sub(*xs)


@emitter("mul")
def _mul(b, xs, dtypes, dtype):
    return b.ir.and_(*xs) if dtype == "bool" else b.mul(*xs)


@emitter("div")
def _div(b, xs, dtypes, dtype):
    return b.div(*xs)


def _int_quotient(b: KernelBuilder, x, y, dtype: str):
    """The quotient rounded towards 0; y == 0 gives some value without a trap."""
    signed = is_signed(dtype)
    zero, one = integer(b, y, 0), integer(b, y, 1)
    special = b.compare("==", y, zero)
    if signed:  # the least integer divided by -1 does not fit: dividing by -1 is negation
        minus = b.compare("==", y, -1)
        special = b.ir.or_(special, minus)
    safe = b.select(special, one, y)
    width = element_type(x).width
    if width <= 32 and lanes_of(x) > 1:  # there are no vector instructions; 53 bits give the exact quotient
        doubles = ir.VectorType(F64, x.type.count)
        convert, back = (b.ir.sitofp, b.ir.fptosi) if signed else (b.ir.uitofp, b.ir.fptoui)
        quotient = back(b.div(convert(x, doubles), convert(safe, doubles)), x.type)
    else:
        quotient = (b.ir.sdiv if signed else b.ir.udiv)(x, safe)
    return b.select(minus, b.ir.neg(x), quotient) if signed else quotient


def _int_division(b: KernelBuilder, x, y, dtype: str, floors: bool):
    """(quotient, remainder), both 0 where y is 0."""
    quotient = _int_quotient(b, x, y, dtype)
    remainder = b.sub(x, b.mul(quotient, y))
    if floors and is_signed(dtype):
        opposite = b.compare("<", b.ir.xor(remainder, y), 0)
        adjust = b.ir.and_(b.compare("!=", remainder, 0), opposite)
        quotient = b.select(adjust, b.sub(quotient, 1), quotient)
        remainder = b.select(adjust, b.add(remainder, y), remainder)
    zero = b.compare("==", y, 0)
    return b.select(zero, 0, quotient), b.select(zero, 0, remainder)


@emitter("rem")
def _rem(b, xs, dtypes, dtype):
    return vector_special.fmod(b, *xs) if is_float(xs[0]) else _int_division(b, *xs, dtype, floors=False)[1]


@emitter("mod")
def _mod(b, xs, dtypes, dtype):
    x, y = xs
    if not is_float(x):
        return _int_division(b, x, y, dtype, floors=True)[1]
    return vector_special.floor_divmod(b, x, y)[1]


@emitter("floor_divide")
def _floor_divide(b, xs, dtypes, dtype):
    x, y = xs
    if not is_float(x):
        return _int_division(b, x, y, dtype, floors=True)[0]
    return vector_special.floor_divmod(b, x, y)[0]


# -- extrema --------------------------------------------------------------------------------------------------------
def extremum(b: KernelBuilder, x, y, dtype: str, greater: bool):
    """The greater (lesser) of both; NaN where either is NaN."""
    symbol = ">" if greater else "<"
    if dtype == "bool":
        return (b.ir.or_ if greater else b.ir.and_)(x, y)
    if not is_float(x):
        return b.select(b.compare(symbol, x, y, signed=is_signed(dtype)), x, y)
    if isinstance(x, ir.Constant):
        x, y = y, x
    if isinstance(y, ir.Constant) and not vm.is_nan_constant(y):
        # A NaN in x fails the comparison and passes; with the constant second this is one instruction.
        return b.select(b.compare("<" if greater else ">", x, y), y, x)
    return b.select(b.ir.fcmp_unordered("uno", x, x), x, b.select(b.compare(symbol, x, y), x, y))


@emitter("maximum")
def _maximum(b, xs, dtypes, dtype):
    return extremum(b, *xs, dtype, greater=True)


@emitter("minimum")
def _minimum(b, xs, dtypes, dtype):
    return extremum(b, *xs, dtype, greater=False)


# -- comparisons, logic, selection ----------------------------------------------------------------------------------
def _comparison(name: str, symbol: str) -> None:
    def emit(b, xs, dtypes, dtype):
        return b.compare(symbol, *xs, signed=is_signed(dtypes[0]))

    EMITTERS[name] = emit


for _name, _symbol in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    _comparison(_name, _symbol)


@emitter("logical_and", "bitwise_and")
def _and(b, xs, dtypes, dtype):
    return b.ir.and_(*xs)


@emitter("logical_or", "bitwise_or")
def _or(b, xs, dtypes, dtype):
    return b.ir.or_(*xs)


@emitter("logical_xor", "bitwise_xor")
def _xor(b, xs, dtypes, dtype):
    return b.ir.xor(*xs)


@emitter("logical_not", "bitwise_not")
def _not(b, xs, dtypes, dtype):
    (x,) = xs
    return b.ir.xor(x, b.constant_of(x.type, -1))


@emitter("select")
def _select(b, xs, dtypes, dtype):
    return b.ir.select(*xs)


def _shift(b: KernelBuilder, x, y, left: bool, signed: bool):
    """A shift whose count may leave [0, width): then 0, or all sign bits."""
    width = element_type(x).width
    inside = b.compare("<", y, width, signed=False)
    count = b.select(inside, y, 0)
    if left:
        return b.select(inside, b.ir.shl(x, count), 0)
    if signed:
        return b.ir.ashr(x, b.select(inside, y, width - 1))
    return b.select(inside, b.ir.lshr(x, count), 0)


@emitter("shift_left")
def _shift_left(b, xs, dtypes, dtype):
    return _shift(b, *xs, left=True, signed=False)


@emitter("shift_right")
def _shift_right(b, xs, dtypes, dtype):
    return _shift(b, *xs, left=False, signed=is_signed(dtype))


# -- activations ----------------------------------------------------------------------------------------------------
@emitter("relu")
def _relu(b, xs, dtypes, dtype):
    (x,) = xs
    return extremum(b, x, b.constant_of(x.type, 0), dtype, greater=True)


@emitter("relu6")
def _relu6(b, xs, dtypes, dtype):
    (x,) = xs
    low = extremum(b, x, b.constant_of(x.type, 0), dtype, greater=True)
    return extremum(b, low, b.constant_of(x.type, 6), dtype, greater=False)


@emitter("leaky_relu")
def _leaky_relu(b, xs, dtypes, dtype, negative_slope):
    (x,) = xs
    return b.select(b.compare(">", x, 0.0), x, b.mul(x, negative_slope))


@emitter("elu")
def _elu(b, xs, dtypes, dtype, alpha):
    (x,) = xs
    return b.select(b.compare(">", x, 0.0), x, b.mul(vm.expm1(b, x), alpha))


@emitter("gelu")
def _gelu(b, xs, dtypes, dtype, approximate):
    return vm.gelu(b, xs[0], approximate)


# -- conversions ----------------------------------------------------------------------------------------------------
@emitter("convert")
def _convert(b, xs, dtypes, dtype):
    return convert(b, xs[0], dtypes[0], dtype)


def convert(b: KernelBuilder, x, source: str, target: str):
    """x in another dtype: floats to ints truncate and saturate, narrowing ints wrap, anything but 0 is true."""
    if source == target:
        return x
    wanted = b.type(target, lanes_of(x))
    if target == "bool":
        return b.compare("!=", x, 0)
    if is_float_dtype(target):
        if source == "bool":
            out = b.select(x, b.constant_of(wanted, 1.0), b.constant_of(wanted, 0.0))
        elif not is_float_dtype(source):
            out = (b.ir.sitofp if is_signed(source) else b.ir.uitofp)(x, wanted)
        elif element_type(x) == element_type(b.constant_of(wanted, 0.0)):
            out = x
        else:
            out = b.ir.fptrunc(x, wanted) if element_type(x) == F64 else b.ir.fpext(x, wanted)
        return round_to(b, out, target)
    if is_float_dtype(source):
        return _float_to_int(b, x, target, wanted)
    width, source_width = MEMORY_TYPES[target].width, element_type(x).width
    if width < source_width:
        return b.ir.trunc(x, wanted)
    if width == source_width:
        return x
    return (b.ir.sext if is_signed(source) else b.ir.zext)(x, wanted)


def _float_to_int(b: KernelBuilder, x, target: str, wanted: ir.Type):
    """Truncation towards 0 and saturation; NaN gives 0."""
    width = MEMORY_TYPES[target].width
    if width < 32:  # LLVM would take vectors apart
        low, high = (-(1 << width - 1), (1 << width - 1) - 1) if is_signed(target) else (0, (1 << width) - 1)
        x = b.select(b.compare("==", x, x), x, 0.0)
        x = b.select(b.compare(">", x, float(low)), x, float(low))
        x = b.select(b.compare("<", x, float(high)), x, float(high))
        return b.ir.trunc(b.ir.fptosi(x, b.type("int32", lanes_of(x))), wanted)
    name = "llvm.fptosi.sat" if is_signed(target) else "llvm.fptoui.sat"
    return b.convert_intrinsic(name, x, wanted)


def round_to(b: KernelBuilder, x, dtype: str):
    """A float32 rounded to float16 or bfloat16 precision; other dtypes pass."""
    if compute_dtype(dtype) == dtype:
        return x
    return b.from_memory(b.to_memory(x, dtype), dtype)


@emitter("bitcast_convert")
def _bitcast_convert(b, xs, dtypes, dtype):
    bits = b.to_memory(xs[0], dtypes[0])
    element = MEMORY_TYPES[dtype]
    wanted = element if lanes_of(bits) == 1 else ir.VectorType(element, lanes_of(bits))
    return b.from_memory(b.ir.bitcast(bits, wanted), dtype)


# -- powers ---------------------------------------------------------------------------------------------------------
@emitter("pow")
def _pow(b, xs, dtypes, dtype):
    x, y = xs
    if not is_float(x):
        return _int_pow(b, x, y, is_signed(dtype))
    exponent = vm.splat_value(y)
    if exponent == 2.0:
        return b.mul(x, x)
    if exponent == 1.0:
        return x
    if exponent == 3.0:
        return b.mul(b.mul(x, x), x)
    if exponent == -1.0:
        return b.div(1.0, x)
    if exponent == 0.5:  # pow gives +0 and inf where sqrt gives -0 and NaN
        return b.select(b.compare("==", x, -vm.INF), vm.INF, b.add(vm.sqrt(b, x), 0.0))
    return vector_special.pow(b, x, y)


def _int_pow(b: KernelBuilder, x, y, signed: bool):
    """x ** y by squaring, wrapping; a negative exponent truncates 1 / x**-y towards 0."""
    result, base, exponent = b.variable(integer(b, x, 1)), b.variable(x), b.variable(y)
    with b.loop(0, element_type(x).width):
        odd = b.compare("!=", b.ir.and_(exponent.get(), integer(b, x, 1)), 0)
        result.set(b.select(odd, b.mul(result.get(), base.get()), result.get()))
        base.set(b.mul(base.get(), base.get()))
        exponent.set(b.ir.lshr(exponent.get(), integer(b, x, 1)))
    if not signed:
        return result.get()
    odd = b.compare("!=", b.ir.and_(y, integer(b, x, 1)), 0)
    one = b.ir.zext(b.compare("==", x, 1), x.type)
    unit = b.select(b.compare("==", x, -1), b.select(odd, integer(b, x, -1), 1), one)
    return b.select(b.compare("<", y, 0), unit, result.get())
