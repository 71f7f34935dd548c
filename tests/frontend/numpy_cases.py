"""One or more calls of every function of `keras_backend.numpy`, each with what NumPy gives for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

# The size that stands for the batch: no other axis of a case has it, and it becomes symbolic where axis 0 has it.
BATCH = 5


@dataclass(frozen=True)
class Case:
    """A call. Arrays among `args` (also inside of lists) are tensors, everything else is static.

    expected: the function that gives the expected value for the same arguments; of NumPy's module by default.
    traceable: False where the shape of the result depends on values.
    symbolic: False where the function cannot work on a symbolic first axis, by its nature.
    """

    name: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    expected: Callable | None = None
    traceable: bool = True
    symbolic: bool = True
    tolerance: float = 2e-6
    label: str = ""

    def __str__(self):
        return f"{self.name}{'-' if self.label else ''}{self.label}"


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def f(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(dtype)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).uniform(-0.9, 0.9, shape).astype("float32")


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).uniform(0.2, 4.0, shape).astype("float32")


def ints(*shape: int, low: int = -9, high: int = 10, seed: int = 0, dtype: str = "int32") -> np.ndarray:
    return rng(seed).integers(low, high, shape).astype(dtype)


def bools(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).random(shape) < 0.5


def with_nan(*shape: int, seed: int = 0) -> np.ndarray:
    x = f(*shape, seed=seed)
    x[rng(seed + 1).random(shape) < 0.25] = np.nan
    return x


X, Y, Z = f(BATCH, 3), f(BATCH, 3, seed=1), f(3, seed=2)
K, J = ints(BATCH, 3), ints(BATCH, 3, low=1, seed=1)
P, Q = bools(BATCH, 3), bools(BATCH, 3, seed=1)
C = f(BATCH, 3, 4, seed=3)
M = f(4, 6, seed=4)
SPECIAL = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan], "float32")
COMPLEX = (f(BATCH, 3) + 1j * f(BATCH, 3, seed=9)).astype("complex64")

CASES: list[Case] = []


def case(name: str, *args: Any, expected: Callable | None = None, kw: dict | None = None, **options: Any) -> None:
    CASES.append(Case(name, args, kw or {}, expected, **options))


def unary(names: str, *arrays: np.ndarray, **options: Any) -> None:
    for name in names.split():
        for array in arrays:
            case(name, array, label=f"{array.dtype}{array.ndim}", **options)


# -- elementwise, one operand ---------------------------------------------------------------------------------------
unary("sin cos tan sinh cosh tanh arctan arcsinh exp exp2 expm1 deg2rad rad2deg sinc cbrt", X, K)
unary("arcsin arccos arctanh", unit(BATCH, 3), unit())
unary("arccosh", positive(BATCH, 3) + 1)
unary("log log2 log10 log1p sqrt", positive(BATCH, 3), J)
unary("reciprocal", positive(BATCH, 3), J, expected=lambda x: 1 / x)
unary("ceil floor", X, K, SPECIAL)
unary("trunc round", X, K, SPECIAL)
unary("abs absolute", X, K, SPECIAL, J.astype("uint8"), COMPLEX)
unary("fabs", X, K)
unary("negative square", X, K)
unary("sign", X, K, SPECIAL)
unary("signbit", X, SPECIAL)
unary("isfinite isinf isnan", X, SPECIAL, K, COMPLEX)
unary("isneginf isposinf", X, SPECIAL)
unary("isreal real imag conj conjugate angle", X, COMPLEX)
unary("copy", X, K)
unary("logical_not", X, P)
unary("bitwise_not bitwise_invert", K, P, expected=np.invert)
unary("i0", X, 3 * f(BATCH, 3), tolerance=5e-6, expected=lambda x: special.i0(x))
unary("nan_to_num", SPECIAL, X, K)
case("nan_to_num", SPECIAL, kw={"nan": 1.0, "posinf": 2.0, "neginf": -3.0}, label="values")
case("round", 100 * X, 2, label="places")
case("round", (100 * X).astype("int32"), -1, label="tens")
case("view", X, "int32", expected=lambda x, d: x.view(d))
case("view", f(BATCH, 4), "int16", expected=lambda x, d: x.view(d), label="narrower")
case("view", f(BATCH, 4), "float64", expected=lambda x, d: x.view(d), label="wider")

# -- elementwise, two operands --------------------------------------------------------------------------------------
for _name in "add subtract multiply maximum minimum fmax fmin".split():
    case(_name, X, Y)
    case(_name, X, Z, label="broadcast")
    case(_name, K, J, label="integers")
    case(_name, X, 2, label="number")
for _name in "add multiply maximum minimum".split():
    case(_name, P, Q, label="booleans")
for _name in "equal not_equal less less_equal greater greater_equal".split():
    case(_name, K, J)
    case(_name, X, Z, label="broadcast")
    case(_name, X, 0.5, label="number")
for _name in "logical_and logical_or logical_xor".split():
    case(_name, P, Q)
    case(_name, X, K, label="numbers")
for _name in "bitwise_and bitwise_or bitwise_xor".split():
    case(_name, K, J)
    case(_name, P, Q, label="booleans")
for _name, _function in (("left_shift", np.left_shift), ("right_shift", np.right_shift)):
    case(_name, K, ints(BATCH, 3, low=0, high=5), expected=_function)
    case(f"bitwise_{_name}", K, 2, expected=_function, label="number")
case("divide", X, Y)
case("divide", K, J, label="integers")
case("true_divide", X, Y)
case(
    "divide_no_nan",
    X,
    np.where(P, Y, 0).astype("float32"),
    expected=lambda a, b: np.where(b == 0, 0, a / (b + (b == 0))),
)
case("floor_divide", X, Y)
case("floor_divide", K, J, label="integers")
case("mod", X, Y, tolerance=1e-5)
case("mod", K, -J, label="integers")
case("fmod", X, Y, tolerance=1e-5)
case("fmod", K, J, label="integers")
case("power", positive(BATCH, 3), Y)
case("power", X, 2, label="square")
case("power", J, ints(BATCH, 3, low=0, high=4), label="integers")
case("clip", X, -0.5, 0.5)
case("clip", K, -2, 3, label="integers")
case("clip", J.astype("uint8"), -300, 300, label="beyond", expected=lambda x, low, high: x)
case("clip", X, None, Z, label="above")
case("hypot", X, Y)
case("arctan2", X, Y)
case("heaviside", np.sign(K).astype("float32"), Y)
case("nextafter", X, Y)
case("logaddexp", X, Y)
case("logaddexp", SPECIAL[:6], SPECIAL[:6], label="infinities")
case("logaddexp2", X, Y)
case("logaddexp2", SPECIAL[:6], SPECIAL[:6], label="infinities")
case("ldexp", X, ints(BATCH, 3, low=-60, high=60))
case("ldexp", np.array([1e-30, 1e30], "float32"), np.array([190, -190], "int32"), label="far")
case("gcd", 6 * K, 4 * J)
case("lcm", K, J)
case("isclose", X, X + 1e-7)
case("isclose", SPECIAL, SPECIAL, kw={"equal_nan": True}, label="special")
case("allclose", X, X + 1e-7)
case("isin", K, J[:2])
case("isin", K, J[:2], kw={"invert": True}, label="invert")
case("where", P, X, Z)
case("where", P, expected=lambda p: np.nonzero(p), traceable=False, label="indices")
case("select", [X > 0.5, X > 0], [X, Y], -1.0)
case("nonzero", K, traceable=False)
case("count_nonzero", K)
case("count_nonzero", K, kw={"axis": 1}, label="axis")
case("heaviside", SPECIAL, np.float32(0.5), label="special")

# -- shape ----------------------------------------------------------------------------------------------------------
case("reshape", C, (-1, 12))
case("reshape", C, (BATCH, -1), label="rest", symbolic=False)
case("ravel", C)
case("ndim", C, expected=lambda x: 3)
case("size", C, expected=lambda x: x.size, symbolic=False)
case("transpose", C)
case("transpose", C, (0, 2, 1), label="axes")
case("swapaxes", C, 0, -1)
case("moveaxis", C, 0, -1)
case("moveaxis", C, (0, 1), (2, 0), label="several")
case("expand_dims", X, -1)
case("expand_dims", X, (0, 2), label="several")
case("squeeze", C[:, :1, :])
case("squeeze", C[:, :1, :], 1, label="axis")
case("broadcast_to", Z, (4, 3))
case("flip", C)
case("flip", C, (0, 2), label="axes")
case("fliplr", X)
case("flipud", X)
for _k in range(4):
    case("rot90", C, _k, (0, 1), label=f"{_k}")
    case("rot90", C, _k, (2, 1), label=f"{_k} other plane")
case("roll", C, 2, 1)
case("roll", C, 2, 0, label="batch")
case("roll", C, 7, label="row")
case("roll", C, (1, -1), (1, 2), label="several")
case("concatenate", [X, Y])
case("concatenate", [X, Y], 1, label="axis")
case("append", X, Y)
case("append", X, Y, 0, label="axis")
case("stack", [X, Y], 1)
case("hstack", [X, Y])
case("hstack", [Z, Z], label="vectors")
case("vstack", [X, Y])
case("vstack", [Z, Z], label="vectors")
case("dstack", [X, Y])
case("split", M, 2)
case("split", M, (1, 3), 1, label="places")
case("split", f(BATCH, 6), 3, 1, label="batch")
case("array_split", M, 4, 1)
case("hsplit", M, 3)
case("vsplit", M, 2)
case("dsplit", C, 2)
case("tile", C, (2, 1, 3))
case("tile", Z, (4, 2), label="more axes")
case("repeat", X, 3, 0)
case("repeat", X, 2, label="row")
case("repeat", X, [1, 0, 2], 1, label="each")
case("meshgrid", Z, f(4))
case("meshgrid", Z, f(4), kw={"indexing": "ij"}, label="ij")
for _mode in "constant edge reflect symmetric wrap linear_ramp maximum mean median minimum".split():
    case("pad", C, ((0, 0), (1, 2), (2, 0)), kw={"mode": _mode}, label=_mode, tolerance=1e-5)
case("pad", X, 1, kw={"constant_values": 3.0}, label="value")
case("pad", K, (2, 1), kw={"mode": "edge"}, label="integers")

# -- creation -------------------------------------------------------------------------------------------------------
case("array", [[1.0, 2.0], [3.0, 4.0]], expected=lambda x: np.array(x, "float32"))
case("zeros", (2, 3), expected=lambda s: np.zeros(s, "float32"))
case("ones", (2, 3), "int32")
case("empty", (2, 3), expected=lambda s: np.zeros(s, "float32"))
case("full", (2, 3), 4.0, expected=lambda s, v: np.full(s, v, "float32"))
case("full", (2, 3), Z, expected=lambda s, v: np.full(s, v, "float32"), label="tensor")
case("zeros_like", X)
case("ones_like", X)
case("empty_like", X, expected=np.zeros_like)
case("full_like", X, 3.0)
case("eye", 4, 5, 1, expected=lambda *a: np.eye(*a, dtype="float32"))
case("identity", 4, expected=lambda n: np.eye(n, dtype="float32"))
case("tri", 4, 5, -1, expected=lambda *a: np.tri(*a, dtype="float32"))
case("tril", C, 1)
case("triu", C, -1)
case("vander", Z)
case("vander", Z, 4, True, label="increasing")
case("arange", 2, 11, 3, expected=lambda *a: np.arange(*a, dtype="int32"))
case("arange", 0.0, 1.0, 0.1, expected=lambda *a: np.arange(*a).astype("float32"), label="floats")
case("linspace", 0.0, 1.0, 7, expected=lambda *a: np.linspace(*a).astype("float32"))
case("linspace", Z, Z + 1, 7, kw={"endpoint": False, "axis": -1}, label="tensors")
case("logspace", 0.0, 2.0, 7, expected=lambda *a: np.logspace(*a).astype("float32"))
case("logspace", Z, Z + 1, 4, label="tensors", tolerance=1e-5)
case("geomspace", 1.0, 100.0, 7, expected=lambda *a: np.geomspace(*a).astype("float32"))
case("geomspace", positive(3), positive(3) + 1, 4, label="tensors", tolerance=1e-5)
for _name in "bartlett blackman hamming hanning".split():
    case(_name, np.array(7), traceable=False)
case("kaiser", np.array(7), 8.0, expected=lambda n, b: np.kaiser(int(n), b), traceable=False)

# -- reductions -----------------------------------------------------------------------------------------------------
for _name in "sum prod mean max min amax amin all any var std ptp".split():
    case(_name, C, tolerance=1e-5)
    case(_name, C, kw={"axis": 1}, label="axis", tolerance=1e-5)
    case(_name, C, kw={"axis": (0, -1), "keepdims": True}, label="axes", tolerance=1e-5)
    case(_name, C, kw={"axis": ()}, label="none", tolerance=1e-5)
for _name in "sum prod mean max min all any".split():
    case(_name, ints(BATCH, 3, dtype="int8"), kw={"axis": 1}, label="int8", tolerance=1e-5)
for _name in "max min all any".split():
    case(_name, P, kw={"axis": 0}, label="booleans")
case("max", X, kw={"axis": 1, "initial": 0.5}, label="initial")
case("average", X, 1)
case("average", X, 1, Z, label="weights")
case("average", X, kw={"weights": positive(BATCH, 3)}, label="all", tolerance=1e-5)
for _name in "argmax argmin".split():
    case(_name, C)
    case(_name, C, 1, label="axis")
    case(_name, C, kw={"axis": -1, "keepdims": True}, label="keepdims")
for _name in "cumsum cumprod".split():
    case(_name, C, tolerance=1e-5)
    case(_name, C, 1, label="axis", tolerance=1e-5)
    case(_name, P, 1, label="booleans")
N = with_nan(BATCH, 3, 4)
for _name in "nansum nanprod nanmean nanmax nanmin nanvar nanstd nanmedian".split():
    case(_name, N, tolerance=1e-5)
    case(_name, N, kw={"axis": (0, 2)}, label="axes", tolerance=1e-5)
for _name in "nancumsum nancumprod".split():
    case(_name, N, 1, tolerance=1e-5)
case("nanargmax", N[:, :, 0], 0)
case("nanargmin", N[:, :, 0], 0)

# -- statistics -----------------------------------------------------------------------------------------------------
for _method in "linear lower higher midpoint nearest".split():
    case("quantile", C, 0.3, kw={"axis": 1, "method": _method}, label=_method)
case("quantile", C, np.array([0.1, 0.5], "float64"), kw={"axis": (0, 2), "keepdims": True}, label="several")
case("percentile", C, 30.0, kw={"axis": -1})
case("nanquantile", N, 0.3, kw={"axis": 1})
case("nanpercentile", N, 30.0, kw={"axis": 1})
case("median", C)
case("median", C, 1, label="axis")
case("median", N, 1, label="nan")
case("corrcoef", M)
case("trapezoid", C)
case("trapezoid", X, Z, label="points")
case("correlate", f(9), f(4, seed=1), tolerance=1e-5)
for _mode in "valid same full".split():
    case("correlate", f(4), f(9, seed=1), _mode, label=_mode, tolerance=1e-5)
case("histogram", f(40), 6)
case("histogram", f(40), 6, (-1.0, 1.0), label="range")
case("bincount", ints(9, low=0, high=6), traceable=False)
case("bincount", ints(9, low=0, high=6), positive(9), 8, label="weights", traceable=False, tolerance=1e-5)

# -- indexing, order ------------------------------------------------------------------------------------------------
case("take", C, np.array([[0, 2], [-1, 1]]), 1)
case("take", C, np.array([0, 7, -1]), label="row", symbolic=False)
case("take_along_axis", C, ints(BATCH, 2, 4, low=0, high=3), 1)
case("unravel_index", np.array([0, 7, 11]), (3, 4))
case("diag", Z, 1)
case("diag", Z, -2, label="below")
case("diag", M, 1, label="matrix")
case("diagflat", M[:2, :2], 1)
case("diagonal", C, 1, 1, 2)
case("diagonal", M, -1, label="below")
case("trace", C, 0, 1, 2)
case("diff", C)
case("diff", C, 2, 1, label="twice")
case("diff", P, 1, 1, label="booleans")
case("sort", C, 1)
case("sort", N, label="nan")
case("argsort", C, 1)
case("argpartition", f(9), 3, expected=lambda x, k: np.argsort(x))
case("searchsorted", np.sort(f(9)), X)
case("searchsorted", np.sort(f(9)), X, "right", label="right")
case("digitize", X, np.array([-1.0, 0.0, 1.0], "float32"))
case("digitize", X, np.array([1.0, 0.0, -1.0], "float32"), label="descending")
case("unique", K, traceable=False)
case(
    "unique",
    ints(9, low=0, high=4),
    kw={"size": 6, "fill_value": -1, "return_index": True, "return_inverse": True, "return_counts": True},
    expected=lambda x, **kw: (
        np.array([0, 1, 2, 3, -1, -1]),
        *(np.append(v, [fill] * 2) for v, fill in zip(_unique(x)[1:2], _unique(x)[1][:1], strict=True)),
        _unique(x)[2],
        np.append(_unique(x)[3], [0, 0]),
    ),
    label="size",
)


def _unique(x: np.ndarray) -> tuple:
    return np.unique(x, return_index=True, return_inverse=True, return_counts=True)


# -- products -------------------------------------------------------------------------------------------------------
def product(name: str, *args: Any, **options: Any) -> None:
    case(name, *args, tolerance=1e-5, **options)


product("matmul", X, f(3, 4))
product("matmul", C, f(4, 2), label="rank 3")
product("matmul", C, f(BATCH, 4, 2), label="batch")
product("matmul", f(2, 1, 3, 4), f(BATCH, 4, 2), label="broadcast", symbolic=False)
product("matmul", Z, f(3, 4), label="row")
product("matmul", C, f(4), label="column")
product(
    "matmul",
    ints(2, 3, dtype="int8"),
    ints(3, 4, dtype="int8"),
    label="int8",
    expected=lambda a, b: a.astype("int32") @ b,
)
product("dot", X, f(3, 4))
product("dot", C, f(2, 4, 6), label="rank 3")
product("dot", X, 2.0, label="number")
product("inner", X, f(4, 3))
product("vdot", X, Y)
product("outer", X, f(4))
product("tensordot", C, f(3, 4, 2))
product("tensordot", C, f(4, 6, 3), ([1, 2], [2, 0]), label="axes")
product("tensordot", X, f(4), 0, label="outer")
product("kron", X, f(2, 4))
product("cross", f(BATCH, 3), f(BATCH, 3, seed=1))
# NumPy itself takes no vectors of two components any more.
product(
    "cross",
    f(BATCH, 2),
    f(BATCH, 3, seed=1),
    label="plane",
    expected=lambda x, y: np.cross(np.pad(x, ((0, 0), (0, 1))), y),
)
product("einsum", "bij,bjk->bik", C, f(BATCH, 4, 2))
product("einsum", "...ij->...ji", C, label="transpose")
product("einsum", "bij->b", C, label="sum")
product("slogdet", f(BATCH, 3, 3), expected=lambda x: tuple(np.linalg.slogdet(x)))
product("vectorize", lambda x: x, expected=lambda f: f, traceable=False, label="callable")
