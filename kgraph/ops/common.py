"""What the records share: dtype sets, broadcasting with symbolic sizes, checks with readable errors, sample arrays.

Conventions of every record:
- A gradient rule gets one cotangent per result, each of its result's type, and gives one per operand: None stands for
  zero and for operands without derivative (ints, bools). Complex numbers follow `dL = Re(sum(cotangent * dx))`.
- A sample named "special" holds values on which derivatives do not exist (NaN, infinities, kinks, poles).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kgraph import ops
from kgraph.errors import DimDecisionError, DTypeError, ShapeError
from kgraph.ir import Dim, TensorType, Traced, dtype_name, np_dtype
from kgraph.ir.types import COMPLEX, FLOATS, INTS

Array: TypeAlias = np.ndarray | Traced
Size: TypeAlias = int | Dim

BOOL = frozenset({"bool"})
REAL = FLOATS | INTS
INEXACT = FLOATS | COMPLEX
NUMBERS = REAL | COMPLEX
ORDERED = REAL | BOOL
ANY = NUMBERS | BOOL
SIGNED_INTS = frozenset(n for n in INTS if n.startswith("int"))
REAL_OF = {"complex64": "float32", "complex128": "float64"}
COMPLEX_OF = {"float32": "complex64", "float64": "complex128"}

# -- checks -----------------------------------------------------------------------------------------------------------


def describe(dtypes: frozenset) -> str:
    """A dtype set in words, for messages and docstrings."""
    parts = [(FLOATS, "float"), (COMPLEX, "complex"), (INTS, "int"), (BOOL, "bool")]
    if dtypes == SIGNED_INTS:
        return "signed int"
    words = [word for members, word in parts if members <= dtypes]
    rest = sorted(dtypes - frozenset().union(*(members for members, word in parts if word in words)))
    return " or ".join(words + rest)


def listing(types: Sequence[TensorType]) -> str:
    """The operands' types in a row, for messages."""
    return ", ".join(map(str, types)) or "none"


def require_dtype(name: str, dtypes: frozenset, *types: TensorType) -> None:
    """Raises DTypeError unless every operand's dtype is in `dtypes`."""
    for t in types:
        if t.dtype not in dtypes:
            raise DTypeError(f"{name}({listing(types)}): expected {describe(dtypes)} operands, got {t.dtype}")


def require_same_dtype(name: str, *types: TensorType) -> str:
    """The operands' common dtype; DTypeError if they differ (operands are never promoted)."""
    for t in types[1:]:
        if t.dtype != types[0].dtype:
            raise DTypeError(f"{name}({listing(types)}): expected one dtype for all operands; convert them first")
    return types[0].dtype


def require(condition: bool, error: Callable[[], str]) -> None:
    """Raises ShapeError(error()) unless the condition holds."""
    if not condition:
        raise ShapeError(error())


def sizes_differ(a: Size, b: Size) -> bool:
    """Whether two sizes differ for all run-time sizes. Raises DimDecisionError where that depends on them."""
    if a == b:
        return False
    if isinstance(a, Dim) or isinstance(b, Dim):
        try:
            return bool(a < b or a > b)
        except DimDecisionError:
            raise DimDecisionError(f"whether the sizes {a} and {b} are equal depends on the run-time size") from None
    return True


def require_size(name: str, types: Sequence[TensorType], what: str, got: Size, expected: Size) -> None:
    """Raises ShapeError unless two sizes are equal; DimDecisionError where that depends on the run-time size."""
    if sizes_differ(got, expected):
        raise ShapeError(f"{name}({listing(types)}): {what} is {got}, expected {expected}")


def normalize_axis(name: str, axis: int, rank: int) -> int:
    """`axis` counted from the front. Raises ShapeError outside of [-rank, rank)."""
    axis = int(axis)
    if not -rank <= axis < rank:
        raise ShapeError(f"{name}: axis {axis} is out of range for rank {rank}")
    return axis % rank


def normalize_axes(name: str, axes, rank: int) -> tuple[int, ...]:
    """Axes as a sorted tuple counted from the front; None means all. Raises ShapeError for a repeated one."""
    if axes is None:
        return tuple(range(rank))
    axes = (axes,) if isinstance(axes, (int, np.integer)) else axes
    out = tuple(sorted(normalize_axis(name, a, rank) for a in axes))
    if len(set(out)) != len(out):
        raise ShapeError(f"{name}: axes {tuple(axes)} repeat an axis of rank {rank}")
    return out


def size_attr(size) -> Size:
    """A size as an attribute: a Dim stays, everything else becomes an int."""
    return size if isinstance(size, Dim) else int(size)


def shape_attr(shape) -> tuple[Size, ...]:
    """A shape as an attribute: ints and Dims to a tuple."""
    return tuple(size_attr(s) for s in ((shape,) if isinstance(shape, (int, np.integer, Dim)) else shape))


def per_axis(name: str, value, rank: int) -> tuple[Size, ...]:
    """One size per axis; a scalar counts for every axis. Raises ShapeError for another length."""
    if isinstance(value, (int, np.integer, Dim)):
        return (size_attr(value),) * rank
    out = shape_attr(value)
    require(len(out) == rank, lambda: f"{name}: expected {rank} values, one per axis, got {out}")
    return out


# -- broadcasting -----------------------------------------------------------------------------------------------------


def broadcast_shapes(name: str, *types: TensorType) -> tuple[Size, ...]:
    """The NumPy broadcast of the operands' shapes. Raises ShapeError where they do not fit."""
    shape = types[0].shape
    if all(t.shape == shape for t in types[1:]):
        return shape
    rank = max(t.rank for t in types)
    out: list[Size] = [1] * rank
    for t in types:
        for i, size in enumerate(t.shape, start=rank - t.rank):
            if out[i] == 1:
                out[i] = size
            elif size != 1 and sizes_differ(out[i], size):
                raise ShapeError(f"{name}({listing(types)}): sizes {out[i]} and {size} of axis {i - rank} do not fit")
    return tuple(out)


def unbroadcast(cotangent: Array | None, target) -> Array | None:
    """Sum a cotangent over the axes along which an operand of `target`'s shape was broadcast.

    target: a TensorType, or anything with a `shape` (an operand).
    """
    if cotangent is None or cotangent.shape == tuple(target.shape):
        return cotangent
    shape = tuple(target.shape)
    extra = len(cotangent.shape) - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, size in enumerate(shape) if size == 1 and cotangent.shape[i + extra] != 1
    )
    out = ops.reduce_sum(cotangent, axes=axes, keepdims=False)
    return out if out.shape == shape else ops.reshape(out, shape=shape)


# -- operands in rules ------------------------------------------------------------------------------------------------


def dtype_of(x: Array) -> str:
    """The dtype name of an operand, traced or concrete."""
    return dtype_name(x.dtype)


def like(x: Array, value) -> np.ndarray:
    """A scalar of x's dtype."""
    return np.asarray(value, np_dtype(dtype_of(x)))


def zeros_like(x: Array) -> Array:
    """Zeros of x's type."""
    return ops.full(shape=tuple(x.shape), value=0, dtype=dtype_of(x))


def is_differentiable(x: Array) -> bool:
    """Whether x's dtype carries derivatives."""
    return dtype_of(x) in INEXACT


# -- references -------------------------------------------------------------------------------------------------------

# NumPy has no loops, or only inexact ones, for these: they are computed in the wider dtype and rounded back.
WIDER: dict[str, np.dtype] = {n: np.dtype("float32") for n in FLOATS if np_dtype(n).itemsize < 4}
WIDER |= {"int4": np.dtype("int8"), "uint4": np.dtype("uint8")}


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference that computes narrow dtypes in wider ones and rounds back; silent about overflow and NaN."""

    @functools.wraps(function)
    def wrapped(*arrays, **attrs):
        narrow = [a.dtype for a in arrays if a.dtype.itemsize < 4 and a.dtype.name in WIDER]
        with np.errstate(all="ignore"):
            if not narrow:
                return function(*arrays, **attrs)
            out = function(*(a.astype(WIDER[a.dtype.name]) if a.dtype.name in WIDER else a for a in arrays), **attrs)
            wide = WIDER[narrow[0].name]
            back = lambda a: a.astype(narrow[0]) if a.dtype == wide else a
            return tuple(map(back, out)) if isinstance(out, tuple) else back(out)

    return wrapped


def lowest(dtype: np.dtype):
    """The least value of a dtype, -inf for floats: the neutral element of max."""
    if dtype.kind == "b":
        return False
    return np.iinfo(dtype).min if dtype.kind in "iu" else dtype.type(-np.inf)


def highest(dtype: np.dtype):
    """The greatest value of a dtype, inf for floats: the neutral element of min."""
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max if dtype.kind in "iu" else dtype.type(np.inf)


# -- samples ----------------------------------------------------------------------------------------------------------


def uniform(shape=(), low=-2.0, high=2.0, dtype="float32", seed=0) -> np.ndarray:
    """Values spread over [low, high], the same ones for equal arguments; complex ones in both parts."""
    rng = np.random.default_rng([seed, *shape])
    values = rng.uniform(low, high, shape)
    if dtype in COMPLEX:
        values = values + 1j * rng.uniform(low, high, shape)
    return np.asarray(values).astype(np_dtype(dtype))


def integers(shape=(), low=-9, high=10, dtype="int32", seed=0) -> np.ndarray:
    """Integers of [low, high); [max(low, 0), high) for unsigned dtypes."""
    low = max(low, 0) if dtype.startswith("u") else low
    return np.asarray(np.random.default_rng([seed, *shape]).integers(low, high, shape)).astype(np_dtype(dtype))


def booleans(shape=(), seed=0) -> np.ndarray:
    """Booleans, the same ones for equal arguments."""
    return np.asarray(np.random.default_rng([seed, *shape]).integers(0, 2, shape)).astype(bool)


def distinct(shape=(), dtype="float32", seed=0) -> np.ndarray:
    """Shuffled values that are at least 0.25 apart, none of them 0: no ties for max, sort and finite differences."""
    count = int(np.prod(shape))
    values = (np.random.default_rng([seed, *shape]).permutation(count) - count // 2) * 0.25 + 0.125
    return values.reshape(shape).astype(np_dtype(dtype))


SPECIAL_FLOATS = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, -1e-40, 3e38, -3e38, 88.7, -103.9)


def special(dtype="float32") -> np.ndarray:
    """NaN, infinities, signed zeros, denormals, the ends of the range."""
    with np.errstate(all="ignore"):
        return np.array(SPECIAL_FLOATS).astype(np_dtype(dtype))
