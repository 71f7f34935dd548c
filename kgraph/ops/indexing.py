"""Gathers. A negative index counts from the end, once; what is still out of range is clamped, or as the mode says."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.errors import DTypeError
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ir.types import INTS
from kgraph.ops.common import (
    Array,
    Size,
    booleans,
    dtype_of,
    integers,
    like,
    listing,
    normalize_axis,
    require,
    require_size,
    unbroadcast,
    uniform,
    zeros_like,
)

MODES = ("clip", "fill", "wrap")


def require_indices(name: str, indices: TensorType, types: tuple) -> None:
    """Raises DTypeError unless the operand `indices` of `name(types)` has an int dtype."""
    if indices.dtype not in INTS:
        raise DTypeError(f"{name}({listing(types)}): expected int indices, got {indices.dtype}")


# -- indices into an axis: NumPy for the references, ops for the gradient rules ---------------------------------------


def from_end(indices: np.ndarray, n: int) -> np.ndarray:
    """Indices as int64 with negative ones counted from the end, once."""
    indices = indices.astype(np.int64)
    return np.where(indices < 0, indices + n, indices)


def traced_from_end(indices: Array, n: Size) -> tuple[Array, Array]:
    """The same written with ops; gives the indices and the axis' size, both int32 (or int64 for wide indices)."""
    dtype = "int64" if dtype_of(indices) in ("int64", "uint64", "uint32") else "int32"
    indices, size = ops.convert(indices, dtype=dtype), ops.dim_value(dim=n, dtype=dtype)
    return ops.select(ops.lt(indices, like(indices, 0)), ops.add(indices, size), indices), size


def _traced_clamped(indices: Array, n: Size) -> Array:
    indices, size = traced_from_end(indices, n)
    return ops.minimum(ops.maximum(indices, like(indices, 0)), ops.sub(size, like(size, 1)))


def in_range(indices: Array, n: Size) -> Array:
    """Whether each index, with negative ones counted from the end once, lies inside of an axis of size `n`."""
    indices, size = traced_from_end(indices, n)
    return ops.logical_and(ops.ge(indices, like(indices, 0)), ops.lt(indices, size))


# -- take -------------------------------------------------------------------------------------------------------------


def _take_infer(x: TensorType, indices: TensorType, axis: int, mode: str) -> TensorType:
    require_indices("take", indices, (x, indices))
    require(0 <= axis < x.rank, lambda: f"take({x}, {indices}): axis {axis} is out of range")
    require(mode in MODES, lambda: f"take({x}, {indices}): expected a mode out of {MODES}, got {mode!r}")
    if isinstance(x.shape[axis], int) and x.shape[axis] == 0 and mode != "fill":
        empty = any(isinstance(n, int) and n == 0 for n in indices.shape)
        require(empty, lambda: f"take({x}, {indices}): axis {axis} is empty, there is nothing to take")
    return x.with_shape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _fill_value(dtype: np.dtype):
    """What mode "fill" puts: NaN, the least signed int, the greatest unsigned int, True."""
    if dtype.kind == "b":
        return True
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
    return dtype.type(np.nan)


def _take(x: np.ndarray, indices: np.ndarray, axis: int, mode: str) -> np.ndarray:
    n = x.shape[axis]
    if mode == "wrap" and n:
        return np.take(x, indices.astype(np.int64) % n, axis)
    where = from_end(indices, n)
    if mode == "fill":
        missing = ((where < 0) | (where >= n)).reshape(indices.shape + (1,) * (x.ndim - axis - 1))
        if n == 0:
            return np.full((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), _fill_value(x.dtype), x.dtype)
        found = np.take(x, np.clip(where, 0, n - 1), axis)
        return np.where(missing, np.asarray(_fill_value(x.dtype), x.dtype), found)
    return np.take(x, np.clip(where, 0, max(n - 1, 0)), axis)


def _take_gradient(cotangents, inputs, outputs, axis, mode):
    (c,), (x, indices) = cotangents, inputs
    n, rank, count = x.shape[axis], len(x.shape), len(indices.shape)
    if mode == "clip":
        where = _traced_clamped(indices, n)
    else:
        where, size = traced_from_end(indices, n)
        where = ops.mod(where, size) if mode == "wrap" else where
    # The indexed axes to the front, where scatter_nd wants them.
    picked = tuple(range(axis, axis + count))
    rest = tuple(i for i in range(len(c.shape)) if i not in picked)
    updates = ops.transpose(c, permutation=picked + rest)
    base = ops.full(shape=(n, *x.shape[:axis], *x.shape[axis + 1 :]), value=0, dtype=dtype_of(x))
    dx = ops.scatter_nd(base, ops.reshape(where, shape=(*where.shape, 1)), updates, reduction="add")
    back = (*range(1, axis + 1), 0, *range(axis + 1, rank))
    return ops.transpose(dx, permutation=back), None


def _take_samples() -> list[Sample]:
    attrs = lambda axis, mode="clip": {"axis": axis, "mode": mode}
    far = np.array([[0, 4, -1], [9, -5, -7]], "int32")
    return [
        Sample((uniform((5, 3)), integers((7,), 0, 5)), attrs(0)),
        Sample((uniform((2, 5, 3)), integers((2, 4), 0, 5)), attrs(1)),
        Sample((uniform((3, 5)), integers((), 0, 5)), attrs(1)),
        Sample((uniform((3, 5)), integers((2,), 0, 5, "int64")), attrs(1, "fill")),
        Sample((uniform((5, 3)), far), attrs(0), "far clip"),
        Sample((uniform((5, 3)), far), attrs(0, "wrap"), "far wrap"),
        Sample((uniform((5, 3)), far), attrs(0, "fill"), "special"),
        Sample((integers((5, 3)), far), attrs(0, "fill"), "int32"),
        Sample((booleans((5, 3)), integers((2, 3), 0, 5)), attrs(0), "bool"),
        Sample((uniform((5, 3), dtype="bfloat16"), far), attrs(0), "bfloat16"),
        Sample((uniform((5, 3)), integers((0, 2), 0, 5)), attrs(0), "empty"),
        Sample((uniform((5, 0)), integers((2,), 0, 5)), attrs(0), "empty"),
    ]


TAKE = register(Primitive("take", _take_infer, _take, _take_gradient, frozenset(), _take_samples, tolerance=0.0))


def take(x: Array, indices: Array, *, axis: int, mode: str = "clip") -> Array:
    """Elements of x at positions along one axis, as numpy.take: the axis is replaced by the shape of `indices`.

    indices: any shape, int. mode, for indices out of range after negative ones count from the end: "clip" takes the
    nearest element, "wrap" counts periodically, "fill" gives NaN (the least int, the greatest unsigned int, True).
    Gives x's dtype. Raises ShapeError for an axis that is empty or out of range, DTypeError for float indices.
    """
    return bind(TAKE, x, indices, axis=normalize_axis("take", axis, len(x.shape)), mode=mode)


# -- take_along_axis --------------------------------------------------------------------------------------------------


def _along_shape(name: str, types: tuple, axis: int) -> tuple:
    """The result's shape: the operands broadcast except along the axis, where it is the indices' size."""
    x, indices = types
    out: list[Size] = []
    for i, (a, b) in enumerate(zip(x.shape, indices.shape)):
        if i == axis or a == 1:
            out.append(b)
        elif b == 1:
            out.append(a)
        else:
            require_size(name, types, f"size {i} of the indices", b, a)
            out.append(a)
    return tuple(out)


def _take_along_axis_infer(x: TensorType, indices: TensorType, axis: int) -> TensorType:
    types = (x, indices)
    require_indices("take_along_axis", indices, types)
    require(x.rank == indices.rank, lambda: f"take_along_axis({listing(types)}): expected operands of one rank")
    require(0 <= axis < x.rank, lambda: f"take_along_axis({listing(types)}): axis {axis} is out of range")
    return x.with_shape(_along_shape("take_along_axis", types, axis))


def _take_along_axis(x: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    n = x.shape[axis]
    where = np.clip(from_end(indices, n), 0, max(n - 1, 0))
    others = np.broadcast_shapes(
        (*x.shape[:axis], 1, *x.shape[axis + 1 :]), (*where.shape[:axis], 1, *where.shape[axis + 1 :])
    )
    full = lambda a: np.broadcast_to(a, (*others[:axis], a.shape[axis], *others[axis + 1 :]))
    return np.take_along_axis(full(x), full(where), axis)


def _take_along_axis_gradient(cotangents, inputs, outputs, axis):
    (c,), (x, indices) = cotangents, inputs
    where = ops.broadcast_to(_traced_clamped(indices, x.shape[axis]), shape=c.shape)
    base_shape = (*c.shape[:axis], x.shape[axis], *c.shape[axis + 1 :])
    if c.shape[axis] == 1:
        # One element of a row, such as the logarithm of a label's probability: no scatter, which nothing fuses with.
        along = tuple(n if i == axis else 1 for i, n in enumerate(base_shape))
        positions = ops.iota(shape=along, dtype=dtype_of(where), axis=axis)
        return unbroadcast(ops.select(ops.eq(positions, where), c, zeros_like(c)), x), None
    base = ops.full(shape=base_shape, value=0, dtype=dtype_of(x))
    return unbroadcast(ops.scatter_along_axis(base, where, c, axis=axis, reduction="add"), x), None


TAKE_ALONG_AXIS = register(
    Primitive(
        "take_along_axis",
        infer=_take_along_axis_infer,
        reference=_take_along_axis,
        gradient=_take_along_axis_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)), integers((3, 2), 0, 5)), {"axis": 1}),
            Sample((uniform((2, 5, 3)), integers((2, 7, 3), -5, 5)), {"axis": 1}),
            Sample((uniform((3, 5)), integers((1, 4), 0, 5)), {"axis": 1}, "broadcast"),
            Sample((uniform((1, 5)), integers((3, 4), 0, 5)), {"axis": 1}, "broadcast"),
            Sample((uniform((3, 5)), integers((3, 1), -7, 7)), {"axis": 1}, "one of a row"),
            Sample((uniform((1, 4, 5)), integers((3, 1, 5), 0, 4, "int64")), {"axis": 1}, "one of a row, broadcast"),
            Sample((integers((3, 5)), integers((3, 2), -20, 20)), {"axis": 1}, "int32"),
            Sample((uniform((3, 5)), integers((3, 0), 0, 5)), {"axis": 1}, "empty"),
        ],
        tolerance=0.0,
    )
)


def take_along_axis(x: Array, indices: Array, *, axis: int) -> Array:
    """Elements of x at positions along one axis that differ from row to row, as numpy.take_along_axis.

    indices: int, x's rank; its other sizes broadcast with x's. Indices out of range are clamped.
    Gives x's dtype with the size of `indices` along the axis. Raises ShapeError for shapes that do not fit.
    """
    return bind(TAKE_ALONG_AXIS, x, indices, axis=normalize_axis("take_along_axis", axis, len(x.shape)))


# -- gather_nd --------------------------------------------------------------------------------------------------------


def tuple_length(name: str, x: TensorType, indices: TensorType, types: tuple) -> int:
    """How many leading axes of x an index tuple addresses: the static last size of `indices`."""
    require_indices(name, indices, types)
    what = lambda: f"{name}({listing(types)}): expected index tuples along the last axis, at most {x.rank} long"
    require(indices.rank > 0 and isinstance(indices.shape[-1], int) and indices.shape[-1] <= x.rank, what)
    return indices.shape[-1]


def _gather_nd_infer(x: TensorType, indices: TensorType) -> TensorType:
    k = tuple_length("gather_nd", x, indices, (x, indices))
    return x.with_shape((*indices.shape[:-1], *x.shape[k:]))


def _gather_nd(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    tuples = (
        np.clip(from_end(indices[..., i], n), 0, max(n - 1, 0)) for i, n in enumerate(x.shape[: indices.shape[-1]])
    )
    return np.array(x[tuple(tuples)]) if indices.shape[-1] else np.broadcast_to(x, indices.shape[:-1] + x.shape).copy()


def columns(indices: Array) -> list[Array]:
    """The components of index tuples, each with its axis of size 1 kept last."""
    rank, k = len(indices.shape), indices.shape[-1]
    front = tuple(indices.shape[:-1])
    return [
        ops.slice(indices, start=(0,) * (rank - 1) + (i,), limit=(*front, i + 1), stride=(1,) * rank) for i in range(k)
    ]


def _gather_nd_gradient(cotangents, inputs, outputs):
    x, indices = inputs
    if not indices.shape[-1]:
        return unbroadcast(cotangents[0], x), None
    where = [_traced_clamped(column, n) for column, n in zip(columns(indices), x.shape)]
    dx = ops.scatter_nd(zeros_like(x), ops.concatenate(*where, axis=-1), cotangents[0], reduction="add")
    return dx, None


GATHER_ND = register(
    Primitive(
        "gather_nd",
        infer=_gather_nd_infer,
        reference=_gather_nd,
        gradient=_gather_nd_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((5, 3)), integers((7, 1), 0, 5))),
            Sample((uniform((5, 3, 2)), integers((2, 4, 2), 0, 3))),
            Sample((uniform((5, 3)), integers((2,), 0, 3))),
            Sample((uniform((5, 3)), integers((6, 2), -9, 9)), name="far"),
            Sample((integers((5, 3)), integers((6, 2), 0, 3, "int64")), name="int32"),
            Sample((uniform((5, 3)), integers((0, 1), 0, 5)), name="empty"),
        ],
        tolerance=0.0,
    )
)


def gather_nd(x: Array, indices: Array) -> Array:
    """Slices of x at index tuples: result[i...] = x[indices[i..., 0], indices[i..., 1], ...].

    indices: int [..., k] with a static k of at most x's rank; out of range ones are clamped.
    Gives x's dtype, shape indices.shape[:-1] + x.shape[k:]. Raises ShapeError for k above x's rank.
    """
    return bind(GATHER_ND, x, indices)
