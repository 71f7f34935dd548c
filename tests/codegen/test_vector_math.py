"""Errors of the inlined functions, in units in the last place, against NumPy's long double or math's libm functions."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from scipy import special

from kgraph.codegen.cpu import vector_math, vector_special, vector_trig
from kgraph.codegen.cpu.builder import KernelBuilder
from tests.codegen.driver import compile_ir, host_target

COUNT = 40_000
EXACT = np.longdouble
LIBM = {name: np.vectorize(getattr(math, name), otypes=[float]) for name in ("erf", "erfc")}


def evaluate(function, *arrays: np.ndarray, lanes: int | None = None, target=None) -> np.ndarray:
    """`function(b, *values)` over arrays of one dtype."""
    target = target or host_target()
    dtype = arrays[0].dtype.name
    lanes = lanes or target.lanes(dtype)
    b = KernelBuilder("function", target)
    pointers = [b.operand(i, dtype) for i in range(len(arrays) + 1)]

    def body(i, mask, slot):
        b.store(pointers[-1], i, function(b, *(b.load(p, i, lanes, mask) for p in pointers[:-1])), mask)

    b.vector_loop(b.begin, b.end, lanes, body)
    kernel = compile_ir(b.ir_text(), target)
    out = np.empty_like(arrays[0])
    addresses = np.array([a.ctypes.data for a in (*arrays, out)], np.uint64)
    kernel.function(addresses.ctypes.data, 0, 0, out.size, 0)
    return out


def ulps(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distances in units in the last place; infinite where only one side is NaN or an infinity is wrong."""
    dtype = result.dtype
    with np.errstate(all="ignore"):
        rounded = exact.astype(dtype)
        spacing = np.spacing(np.maximum(np.abs(rounded), np.finfo(dtype).tiny)).astype(EXACT)
        distance = (np.abs(result.astype(EXACT) - exact) / spacing).astype(float)
    special = ~np.isfinite(rounded) | ~np.isfinite(result)
    same = (result == rounded) | (np.isnan(result) & np.isnan(rounded))
    distance[special] = np.where(same[special], 0.0, np.inf)
    # A result that overflows within the last place is as good as the largest number.
    edge = np.isfinite(rounded) & np.isinf(result) & (np.abs(rounded) == np.finfo(dtype).max)
    distance[edge] = 1.0
    return distance


def values(dtype: str, low: float, high: float) -> np.ndarray:
    """Values spread evenly over [low, high], magnitudes spread over the exponents, and the special ones."""
    rng = np.random.default_rng(7)
    info = np.finfo(dtype)
    even = rng.uniform(0, 1, COUNT).astype(EXACT) * (EXACT(high) - EXACT(low)) + EXACT(low)
    exponents = rng.uniform(np.log2(float(info.smallest_subnormal)), np.log2(max(abs(low), abs(high))), COUNT // 2)
    spread = np.exp2(exponents.astype(EXACT)) * rng.choice([-1, 1], COUNT // 2)
    special = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, info.max, info.min, info.tiny, info.smallest_subnormal]
    near_one = 1 + rng.normal(size=COUNT // 4) * 1e-2
    with np.errstate(over="ignore"):
        return np.concatenate([even, spread, near_one, np.array(special, EXACT)]).astype(dtype)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


# name: (exact function, domain for float32, for float64, ulp for float32, for float64)
UNARY = {
    "exp": (np.exp, (-110, 95), (-760, 720), 2, 2),
    "exp2": (np.exp2, (-155, 130), (-1080, 1030), 2, 2),
    "expm1": (np.expm1, (-30, 95), (-50, 720), 2, 4),
    "log": (np.log, (-1, 3e38), (-1, 1e308), 2, 2),
    "log1p": (np.log1p, (-1, 40), (-1, 40), 2, 2),
    "log2": (np.log2, (-1, 3e38), (-1, 1e308), 2, 2),
    "tanh": (np.tanh, (-11, 11), (-22, 22), 2, 4),
    "logistic": (logistic, (-110, 30), (-760, 50), 2, 2),
    "softplus": (softplus, (-110, 110), (-750, 750), 4, 2),
    "sinh": (np.sinh, (-92, 92), (-715, 715), 4, 4),
    "cosh": (np.cosh, (-92, 92), (-715, 715), 2, 2),
    "erf": (LIBM["erf"], (-5, 5), (-7, 7), 2, 4),
    "erfc": (LIBM["erfc"], (-5, 11), (-7, 26), 1, 6),  # libm itself is off by some of these
    "sin": (np.sin, (-1e5, 1e5), (-3e6, 3e6), 4, 4),
    "cos": (np.cos, (-1e5, 1e5), (-3e6, 3e6), 4, 4),
    "tan": (np.tan, (-1e5, 1e5), (-3e6, 3e6), 4, 4),
    "asin": (np.arcsin, (-1, 1), (-1, 1), 1, 4),
    "acos": (np.arccos, (-1, 1), (-1, 1), 1, 4),
    "atan": (np.arctan, (-10, 10), (-10, 10), 2, 2),
    "asinh": (np.arcsinh, (-10, 10), (-10, 10), 1, 2),
    "acosh": (np.arccosh, (0, 10), (0, 10), 1, 4),
    "atanh": (np.arctanh, (-1, 1), (-1, 1), 1, 2),
    "cbrt": (np.cbrt, (-3e38, 3e38), (-1e308, 1e308), 1, 2),
    "erf_inv": (special.erfinv, (-1, 1), (-1, 1), 1, 6),
}


def function_named(name: str):
    for module in (vector_math, vector_trig, vector_special):
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", UNARY)
def test_error(name, dtype):
    exact, *rest = UNARY[name]
    wide = dtype == "float64"
    x = values(dtype, *rest[wide])
    with np.errstate(all="ignore"):
        reference = exact(x.astype(EXACT if name not in ("erf", "erfc", "erf_inv") else float)).astype(EXACT)
    distance = ulps(evaluate(function_named(name), x), reference)
    worst = int(np.argmax(distance))
    assert distance[worst] <= rest[2 + wide], f"{name}({x[worst]!r}): {distance[worst]:.2f} ulp"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_huge_arguments(name, dtype):
    rng = np.random.default_rng(0)
    top = 127 if dtype == "float32" else 1023
    spread = np.exp2(rng.uniform(15, top, COUNT // 2).astype(EXACT)) * rng.choice([-1, 1], COUNT // 2)
    near_zeros = np.arange(1, 20_001) * (np.pi / 2)  # as near multiples of pi/2 as the dtype allows
    x = np.concatenate([spread, near_zeros]).astype(dtype)
    distance = ulps(evaluate(function_named(name), x), getattr(np, name)(x.astype(EXACT)))
    assert distance.max() <= 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "exact"), [("lgamma", special.gammaln), ("digamma", special.digamma)])
def test_gamma_functions(name, exact, dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-20, 100, 5000), np.exp(rng.uniform(-40, 80, 2000)), [0.0, -1, -5, 1, 2, np.inf]])
    x = x.astype(dtype)
    result, wanted = evaluate(function_named(name), x), exact(x.astype(float))
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(result[~finite], wanted[~finite].astype(dtype))
    tolerance = 2e-7 if dtype == "float32" else 1e-12  # SciPy itself loses digits near poles
    np.testing.assert_allclose(result[finite], wanted[finite], rtol=tolerance, atol=1e-13)


BINARY = {"pow": (np.power, 2), "atan2": (np.arctan2, 2), "hypot": (np.hypot, 2), "logaddexp": (np.logaddexp, 4)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BINARY)
def test_binary_error(name, dtype):
    exact, limit = BINARY[name]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, COUNT)) * 4
    if name == "pow":
        x = np.exp(x)
    elif name == "logaddexp":
        x = np.abs(x)  # away from the zeros of the result
    x, y = x.astype(dtype), y.astype(dtype)
    result = evaluate(function_named(name), x, y)
    assert ulps(result, exact(x.astype(EXACT), y.astype(EXACT))).max() <= limit


def specials(dtype) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of special values."""
    one = np.array([0, -0.0, 1, -1, 2, -2, 3, -3, 0.5, -0.5, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 2.5], dtype)
    x, y = np.meshgrid(one, one)
    return np.ascontiguousarray(x.ravel()), np.ascontiguousarray(y.ravel())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "exact"), [("pow", np.power), ("atan2", np.arctan2), ("hypot", np.hypot)])
def test_binary_specials(name, exact, dtype):
    x, y = specials(dtype)
    result = evaluate(function_named(name), x, y)
    with np.errstate(all="ignore"):
        wanted = exact(x, y)
    np.testing.assert_allclose(result, wanted, rtol=1e-6)
    zero = wanted == 0
    np.testing.assert_array_equal(np.signbit(result[zero]), np.signbit(wanted[zero]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_remainders_are_exact(dtype):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, COUNT)) * np.exp(rng.uniform(-80, 80, (2, COUNT)))).astype(dtype)
    x, y = (np.concatenate(pair) for pair in zip((x, y), specials(dtype)))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate(vector_special.fmod, x, y), np.fmod(x, y))
        quotient = evaluate(lambda b, x, y: vector_special.floor_divmod(b, x, y)[0], x, y)
        remainder = evaluate(lambda b, x, y: vector_special.floor_divmod(b, x, y)[1], x, y)
        np.testing.assert_array_equal(quotient, np.floor_divide(x, y))
        np.testing.assert_array_equal(remainder, np.mod(x, y))


@pytest.mark.parametrize("name", ["exp", "tanh", "sin", "pow"])
def test_lane_counts(name):
    """Scalars and vectors of any length agree, if not to the bit: some code is for whole AVX-512 registers only."""
    x = values("float32", -10, 10)[:999]
    arrays = (x, x[::-1].copy()) if name == "pow" else (x,)
    run = functools.partial(evaluate, function_named(name), *arrays)
    full = run().astype(EXACT)
    for lanes in (1, 4, 32):
        assert ulps(run(lanes=lanes), full).max() <= 2


@pytest.mark.parametrize(("vector_bytes", "ulp", "tail"), [(None, 3, None), (32, 3, 32), (16, 3, 64)])
def test_gelu(vector_bytes, ulp, tail):
    """tail: ulp that results for -3 < x < 0 are off by at most, where erfc and not 1 - erf gives them."""
    x = np.concatenate([values("float32", -8, 8), values("float32", -3, 0)])
    target = host_target(vector_bytes) if vector_bytes else host_target()
    with np.errstate(invalid="ignore"):
        exact = np.where(x == -np.inf, 0, x.astype(float) * special.ndtr(x.astype(float)))
    result = evaluate(vector_math.gelu, x, target=target)
    distance = ulps(result, exact.astype(EXACT))
    assert distance[~(x < 0)].max() <= ulp
    negative = np.isfinite(x) & (x < 0)
    assert np.abs(result[negative] - exact[negative]).max() <= 4e-7
    assert (result[x == -np.inf] == 0).all()
    if tail is not None:
        assert distance[(x < 0) & (x > -3)].max() <= tail


@pytest.mark.parametrize("vector_bytes", [16, 32])
@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "sin", "pow", "fmod"])
def test_other_instruction_sets(name, vector_bytes):
    """SSE4.2, which has no fused multiply-add, and AVX2, are as good as the native set."""
    target = host_target(vector_bytes)
    for dtype in ("float32", "float64"):
        x = values(dtype, -20, 20)
        arrays = (x, x[::-1].copy()) if name in ("pow", "fmod") else (x,)
        native = evaluate(function_named(name), *arrays)
        other = evaluate(function_named(name), *arrays, target=target)
        if name == "fmod":
            np.testing.assert_array_equal(other, native)
        else:
            assert ulps(other, native.astype(EXACT)).max() <= 2
