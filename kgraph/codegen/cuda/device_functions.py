"""What the source of CUDA kernels calls: types, the functions of libdevice under their C names, and some of our own.

Float functions carry C's suffix: `expf` takes and gives float32, `exp` float64. Buffers of float16 and bfloat16 hold
their bits as uint16, buffers of bool hold uint8; the functions below convert. Under Numba's simulator the same names
stand for NumPy's functions on scalars. Our own functions are inlined: compiling one apart would ask for a GPU.
"""

from __future__ import annotations

import math

import numpy as np
from numba import config, cuda

from kgraph.codegen.cuda import mma

SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))

float32, float64 = np.float32, np.float64
int8, int16, int32, int64 = np.int8, np.int16, np.int32, np.int64
uint8, uint16, uint32, uint64 = np.uint8, np.uint16, np.uint32, np.uint64
inf, nan = math.inf, math.nan

# C name of the double version -> NumPy's or SciPy's name.
FLOAT_FUNCTIONS = {
    **dict.fromkeys("exp exp2 expm1 log log2 log1p sinh cosh tanh sqrt sin cos tan cbrt hypot fmod floor ceil".split()),
    **dict.fromkeys("trunc rint fabs copysign nextafter".split()),
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "atan2": "arctan2",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "pow": "power",
    "erf": "scipy.erf",
    "erfc": "scipy.erfc",
    "erfinv": "scipy.erfinv",
    "lgamma": "scipy.gammaln",
}
_SINGLE = {"rsqrt", "fma"}


def device():
    """Decorates a function that kernels call; in the simulator it stays a Python function."""
    return (lambda function: function) if SIMULATED else cuda.jit(device=True, inline="always")


def _simulated_functions() -> dict:
    """NumPy's functions under the names of libdevice."""
    from scipy import special

    found: dict = {}
    for name, other in FLOAT_FUNCTIONS.items():
        module, _, attribute = (other or name).rpartition(".")
        found[name] = found[name + "f"] = getattr(special if module else np, attribute)
    # On scalars, `np.power` takes square roots for x ** 0.5, which differ from C's pow at -inf.
    found["pow"] = found["powf"] = lambda x, y: np.power([x], [y], dtype=type(x))[0]
    found["rsqrt"] = found["rsqrtf"] = lambda x: type(x)(1) / np.sqrt(x)
    found["fma"] = found["fmaf"] = lambda x, y, z: type(x)(float(x) * float(y) + float(z))
    found["float_as_int"] = lambda x: np.float32(x).view(np.int32)
    found["int_as_float"] = lambda x: np.int32(x).view(np.float32)
    found["double_as_longlong"] = lambda x: np.float64(x).view(np.int64)
    found["longlong_as_double"] = lambda x: np.int64(x).view(np.float64)
    found["half2float"] = lambda x: np.uint16(x).view(np.float16).astype(np.float32)
    found["float2half_rn"] = lambda x: np.float32(x).astype(np.float16).view(np.int16)
    return found


def _libdevice_functions() -> dict:
    from numba.cuda import libdevice

    names = [n + suffix for n in (*FLOAT_FUNCTIONS, *_SINGLE) for suffix in ("", "f")]
    names += "float_as_int int_as_float double_as_longlong longlong_as_double half2float float2half_rn".split()
    return {name: getattr(libdevice, name) for name in names}


def _simulated_same_place(a, b) -> bool:
    return a.address == b.address


def _compiled_same_place():
    """A function that says whether two buffers begin at one address: pointers of kernels do not compare."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def same_place(typing, a, b):
        def generate(context, builder, signature, given):
            return builder.icmp_unsigned("==", *[builder.ptrtoint(p, ir.IntType(64)) for p in given])

        return types.boolean(a, b), generate

    return same_place


def _simulated_group(count: int):
    return lambda source, index: tuple(source[index + type(index)(n)] for n in range(count))


def _compiled_group(count: int):
    """A function that reads `count` neighbours of a buffer or a shared array as one word, to which they are aligned."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load_group(typing, source, index):
        def generate(context, builder, signature, given):
            pointer, number = given
            if isinstance(source, types.Array):
                pointer = context.make_array(source)(context, builder, pointer).data
            element = context.get_data_type(source.dtype)
            width = context.get_abi_sizeof(element) * count
            number = number if number.type.width == 64 else builder.zext(number, ir.IntType(64))
            pointer = builder.bitcast(builder.gep(pointer, [number]), ir.VectorType(element, count).as_pointer())
            vector = builder.load(pointer, align=width)
            parts = [builder.extract_element(vector, ir.Constant(ir.IntType(32), n)) for n in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(source.dtype, count)(source, index), generate

    return load_group


def _simulated_store_group(target, index, values) -> None:
    view = target.view(values[0].dtype)
    for n, value in enumerate(values):
        view[int(index) + n] = value


def _compiled_store_group():
    """A function that writes a tuple to neighbours in a shared array as one word, to which they are aligned. The array
    may be one of wider elements: places are those of elements like the values."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store_group(typing, target, index, values):
        def generate(context, builder, signature, given):
            pointer, number, parts = given
            element = context.get_data_type(values.dtype)
            pointer = context.make_array(target)(context, builder, pointer).data
            pointer = builder.bitcast(pointer, element.as_pointer())
            number = number if number.type.width == 64 else builder.zext(number, ir.IntType(64))
            kind = ir.VectorType(element, values.count)
            vector = ir.Constant(kind, ir.Undefined)
            for n in range(values.count):
                part = builder.extract_value(parts, n)
                vector = builder.insert_element(vector, part, ir.Constant(ir.IntType(32), n))
            pointer = builder.bitcast(builder.gep(pointer, [number]), kind.as_pointer())
            builder.store(vector, pointer, align=context.get_abi_sizeof(element) * values.count)
            return context.get_dummy_value()

        return types.void(target, index, values), generate

    return store_group


def _compiled_is_aligned():
    """A function that says whether a buffer begins at a multiple of 16 bytes."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def is_aligned(typing, buffer):
        def generate(context, builder, signature, given):
            word = ir.IntType(64)
            rest = builder.and_(builder.ptrtoint(given[0], word), ir.Constant(word, 15))
            return builder.icmp_unsigned("==", rest, ir.Constant(word, 0))

        return types.boolean(buffer), generate

    return is_aligned


_FUNCTIONS = _simulated_functions() if SIMULATED else _libdevice_functions()
globals().update(_FUNCTIONS)
# Tensor cores: in the simulator lanes multiply in turns, by one function for all instructions.
_MMA = mma.simulated_functions() if SIMULATED else mma.compiled_functions()
put_half, to_tfloat32, multiply_lanes = (_MMA.get(n) for n in ("put_half", "to_tfloat32", "multiply_lanes"))
mma_float16, mma_bfloat16 = _MMA.get("mma_float16"), _MMA.get("mma_bfloat16")
mma_float16_short, mma_tfloat32 = _MMA.get("mma_float16_short"), _MMA.get("mma_tfloat32")
same_place = _simulated_same_place if SIMULATED else _compiled_same_place()
is_aligned = (lambda buffer: buffer.address % 16 == 0) if SIMULATED else _compiled_is_aligned()
store_group = _simulated_store_group if SIMULATED else _compiled_store_group()
load2, load4 = map(_simulated_group if SIMULATED else _compiled_group, (2, 4))
# Those that the functions below call.
float_as_int, int_as_float = _FUNCTIONS["float_as_int"], _FUNCTIONS["int_as_float"]
half2float, float2half_rn = _FUNCTIONS["half2float"], _FUNCTIONS["float2half_rn"]
copysign, floor, rint = _FUNCTIONS["copysign"], _FUNCTIONS["floor"], _FUNCTIONS["rint"]
log, sin, cos = _FUNCTIONS["log"], _FUNCTIONS["sin"], _FUNCTIONS["cos"]


# -- representations --------------------------------------------------------------------------------------------------
@device()
def float_bits(x):
    """The bits of a float32."""
    return uint32(float_as_int(x))


@device()
def bits_float(bits):
    """The float32 of these bits."""
    return int_as_float(int32(bits))


@device()
def half_to_float(bits):
    """The float32 of a float16's bits."""
    return half2float(bits)


@device()
def float_to_half(x):
    """The bits of the float16 nearest to a float32, ties to even."""
    return uint16(float2half_rn(x))


@device()
def bfloat16_to_float(bits):
    """The float32 of a bfloat16's bits."""
    return int_as_float(int32(uint32(uint32(bits) << uint32(16))))


@device()
def float_to_bfloat16(x):
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = uint32(float_as_int(x))
    rounded = uint32(bits + uint32(uint32(0x7FFF) + uint32(uint32(bits >> uint32(16)) & uint32(1))))
    quiet = uint32(bits | uint32(0x400000))
    return uint16(uint32(quiet if x != x else rounded) >> uint32(16))


# -- groups of elements -----------------------------------------------------------------------------------------------
@device()
def load2_if(aligned, source, index):
    """Two neighbours of a buffer, as one word where it is aligned to its groups."""
    if aligned:
        return load2(source, index)
    return source[index], source[index + 1]


@device()
def load4_if(aligned, source, index):
    """Four neighbours of a buffer, as one word where it is aligned to its groups."""
    if aligned:
        return load4(source, index)
    return source[index], source[index + 1], source[index + 2], source[index + 3]


# -- functions without a counterpart in libdevice ---------------------------------------------------------------------
@device()
def digamma(x):
    """The logarithmic derivative of the gamma function, float64: reflection, recurrence up to 10, asymptotic series."""
    if x == 0.0:
        return copysign(float64(inf), -x)
    if x < 0.0 and floor(x) == x:
        return float64(nan)
    y = 1.0 - x if x < 0.5 else x
    total = float64(0.0)
    for _ in range(10):
        if y < 10.0:
            total += 1.0 / y
            y += 1.0
    inverse = 1.0 / y
    square = inverse * inverse
    # B_2k / 2k, Horner's rule
    series = float64(-3617.0 / 8160.0)
    series = series * square + 1.0 / 12.0
    series = series * square - 691.0 / 32760.0
    series = series * square + 1.0 / 132.0
    series = series * square - 1.0 / 240.0
    series = series * square + 1.0 / 252.0
    series = series * square - 1.0 / 120.0
    series = series * square + 1.0 / 12.0
    value = log(y) - (0.5 * inverse + series * square) - total
    if x < 0.5:
        angle = (x - rint(x)) * float64(math.pi)
        value -= math.pi * cos(angle) / sin(angle)
    return value


@device()
def int_pow(x, y, one):
    """x ** y for y >= 0 by squaring; one: of x's type. Whoever calls it casts to that type, in which it wraps."""
    result, base, exponent = one, x, uint64(y)
    while exponent != uint64(0):
        if uint64(exponent & uint64(1)) != uint64(0):
            result = result * base
        base = base * base
        exponent = uint64(exponent >> uint64(1))
    return result


# -- random words -----------------------------------------------------------------------------------------------------
@device()
def philox(low, high, stream, key0, key1):
    """The four words of Philox 4x32-10 (`kgraph.ops.philox`) for the counter (low, high, stream, 0); all are uint32."""
    a, b, c, d = low, high, stream, uint32(0)
    for _ in range(10):
        first = uint64(uint64(a) * uint64(0xD2511F53))
        second = uint64(uint64(c) * uint64(0xCD9E8D57))
        a = uint32(uint32(uint32(second >> uint64(32)) ^ b) ^ key0)
        b = uint32(second & uint64(0xFFFFFFFF))
        c = uint32(uint32(uint32(first >> uint64(32)) ^ d) ^ key1)
        d = uint32(first & uint64(0xFFFFFFFF))
        key0 = uint32(key0 + uint32(0x9E3779B9))
        key1 = uint32(key1 + uint32(0xBB67AE85))
    return a, b, c, d
