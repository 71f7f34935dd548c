"""Scatters: updates brought in at indices. A negative index counts from the end, once; what is still out of range is
dropped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ir.dims import product
from kgraph.ops.common import (
    Array,
    booleans,
    distinct,
    dtype_of,
    integers,
    like,
    listing,
    normalize_axis,
    require,
    require_same_dtype,
    require_size,
    sizes_differ,
    uniform,
    widened,
)
from kgraph.ops.indexing import columns, from_end, in_range, require_indices, tuple_length

REDUCTIONS = ("update", "add", "mul", "max", "min")

# -- what both scatters share -----------------------------------------------------------------------------------------


def _combine(base: np.ndarray, where: tuple, updates: np.ndarray, reduction: str) -> np.ndarray:
    """`base` with `updates` brought in at NumPy index arrays, in their row-major order."""
    out = base.copy()
    if reduction == "update":
        out[where] = updates
    else:
        kernels = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
        kernels[reduction].at(out, where, updates)
    return out


def _require_reduction(name: str, types: tuple, reduction: str) -> None:
    require(
        reduction in REDUCTIONS, lambda: f"{name}({listing(types)}): expected one of {REDUCTIONS}, got {reduction!r}"
    )


def _scatter_gradient(c, base, updates, out, reduction, scatter: Callable, gather: Callable, hit: Array):
    """Cotangents of base and updates for both scatters.

    scatter: `scatter(base, updates, reduction)` at the node's indices. gather: reads at the same places.
    hit: whether an index is in range, broadcastable to the updates.
    """
    if reduction == "add":
        return c, _where(hit, gather(c))
    if reduction == "mul":
        # Other updates of the same place enter by division; a zero among them leaves the place's first-order term.
        others = ops.select(
            ops.eq(updates, like(updates, 0)),
            gather(ops.mul(c, base)),
            ops.div(gather(ops.mul(c, out)), ops.select(ops.eq(updates, like(updates, 0)), like(updates, 1), updates)),
        )
        factor = scatter(ops.full(shape=base.shape, value=1, dtype=dtype_of(base)), updates, "mul")
        return ops.mul(c, factor), _where(hit, others)
    if reduction == "update":
        # The last of several updates of a place wins: each update asks whether its own number stands there.
        numbers = ops.reshape(
            ops.iota(shape=(product(updates.shape),), dtype="int32", axis=0), shape=tuple(updates.shape)
        )
        written = scatter(ops.full(shape=base.shape, value=-1, dtype="int32"), numbers, "update")
        wins = ops.eq(gather(written), numbers)
        return _where(ops.lt(written, np.array(0, "int32")), c), _where(wins, gather(c))
    # max, min: shared between all that attain the extremum.
    dtype = dtype_of(base)
    base_hit = ops.convert(ops.eq(base, out), dtype=dtype)
    update_hit = ops.convert(ops.logical_and(ops.eq(updates, gather(out)), hit), dtype=dtype)
    count = scatter(base_hit, update_hit, "add")
    share = ops.div(c, ops.maximum(count, like(count, 1)))
    return ops.mul(share, base_hit), ops.mul(gather(share), update_hit)


def _where(pred: Array, value: Array) -> Array:
    return ops.select(pred, value, like(value, 0))


def _scatter_nd_infer(base: TensorType, indices: TensorType, updates: TensorType, reduction: str) -> TensorType:
    types = (base, indices, updates)
    _require_reduction("scatter_nd", types, reduction)
    require_same_dtype("scatter_nd", base, updates)
    k = tuple_length("scatter_nd", base, indices, types)
    expected = (*indices.shape[:-1], *base.shape[k:])
    fits = len(expected) == updates.rank and not any(map(sizes_differ, updates.shape, expected))
    require(fits, lambda: f"scatter_nd({listing(types)}): expected updates of shape {expected}")
    return base


def _scatter_nd(base: np.ndarray, indices: np.ndarray, updates: np.ndarray, reduction: str) -> np.ndarray:
    k = indices.shape[-1]
    flat = indices.reshape(-1, k) if k else np.zeros((int(np.prod(indices.shape[:-1])), 0), np.int64)
    where = [from_end(flat[:, i], n) for i, n in enumerate(base.shape[:k])]
    inside = np.ones(len(flat), bool)
    for w, n in zip(where, base.shape):
        inside &= (w >= 0) & (w < n)
    rows = updates.reshape(len(flat), *base.shape[k:])[inside]
    if not k:
        # Every update addresses the whole base.
        return _combine(base[None], (np.zeros(len(rows), np.int64),), rows, reduction)[0]
    return _combine(base, tuple(w[inside] for w in where), rows, reduction)


def _scatter_nd_gradient(cotangents, inputs, outputs, reduction):
    base, indices, updates = inputs
    hit = np.array(True)
    for column, n in zip(columns(indices), base.shape):
        hit = ops.logical_and(hit, in_range(column, n))
    trailing = len(updates.shape) - len(indices.shape) + 1
    if indices.shape[-1]:
        hit = ops.reshape(hit, shape=(*indices.shape[:-1], *(1,) * trailing))
    d_base, d_updates = _scatter_gradient(
        cotangents[0],
        base,
        updates,
        outputs[0],
        reduction,
        scatter=lambda b, u, r: ops.scatter_nd(b, indices, u, reduction=r),
        gather=lambda x: ops.gather_nd(x, indices),
        hit=hit,
    )
    return d_base, None, d_updates


def _scatter_nd_samples() -> list[Sample]:
    unique = np.array([[4], [0], [2]], "int32")
    twice = np.array([[4], [0], [4], [-1], [9], [-6]], "int32")
    pairs = np.array([[[0, 1], [4, 2]], [[4, 2], [7, 0]]], "int32")
    out = []
    for r in REDUCTIONS:
        attrs = {"reduction": r}
        out.append(Sample((distinct((5, 3)), unique, distinct((3, 3), seed=1) * 0.9), attrs, r))
        out.append(Sample((distinct((5, 3)), twice, distinct((6, 3), seed=1) * 0.9), attrs, f"{r} twice"))
        out.append(Sample((distinct((5, 3, 2)), pairs, distinct((2, 2, 2), seed=1) * 0.9), attrs, f"{r} pairs"))
        out.append(Sample((integers((5, 3)), twice, integers((6, 3), seed=1)), attrs, "int32"))
        out.append(Sample((uniform((5, 3)), unique[:0], uniform((0, 3))), attrs, "empty"))
    bf16 = (uniform((5, 3), dtype="bfloat16"), twice, uniform((6, 3), dtype="bfloat16"))
    out.append(Sample(bf16, {"reduction": "add"}, "bfloat16"))
    out.append(Sample((booleans((5, 3)), unique, booleans((3, 3), seed=1)), {"reduction": "update"}, "bool"))
    return out


SCATTER_ND = register(
    Primitive(
        "scatter_nd",
        infer=_scatter_nd_infer,
        reference=widened(_scatter_nd),
        gradient=_scatter_nd_gradient,
        traits=frozenset(),
        samples=_scatter_nd_samples,
    )
)


def scatter_nd(base: Array, indices: Array, updates: Array, *, reduction: str = "update") -> Array:
    """`base` with updates brought in at index tuples: out[indices[i..., 0], ...] = reduce(that, updates[i...]).

    indices: int [..., k] with a static k of at most base's rank; tuples out of range are dropped.
    updates: base's dtype, shape indices.shape[:-1] + base.shape[k:]. reduction: "update" (the last one of a place
    wins), "add", "mul", "max" or "min". Gives base's type. Raises ShapeError or DTypeError where they do not fit.
    """
    return bind(SCATTER_ND, base, indices, updates, reduction=reduction)


def _scatter_along_axis_infer(base, indices, updates, axis: int, reduction: str) -> TensorType:
    types = (base, indices, updates)
    name = "scatter_along_axis"
    _require_reduction(name, types, reduction)
    require_same_dtype(name, base, updates)
    require_indices(name, indices, types)
    one_rank = base.rank == indices.rank == updates.rank
    require(one_rank and 0 <= axis < base.rank, lambda: f"{name}({listing(types)}): expected one rank above {axis}")
    for i in range(base.rank):
        require_size(name, types, f"size {i} of the updates", updates.shape[i], indices.shape[i])
        if i != axis:
            require_size(name, types, f"size {i} of the indices", indices.shape[i], base.shape[i])
    return base


def _scatter_along_axis(base, indices, updates, axis: int, reduction: str) -> np.ndarray:
    where = list(np.indices(indices.shape, sparse=False))
    where[axis] = from_end(indices, base.shape[axis])
    inside = (where[axis] >= 0) & (where[axis] < base.shape[axis])
    return _combine(base, tuple(w[inside] for w in where), updates[inside], reduction)


def _scatter_along_axis_gradient(cotangents, inputs, outputs, axis, reduction):
    base, indices, updates = inputs
    d_base, d_updates = _scatter_gradient(
        cotangents[0],
        base,
        updates,
        outputs[0],
        reduction,
        scatter=lambda b, u, r: ops.scatter_along_axis(b, indices, u, axis=axis, reduction=r),
        gather=lambda x: ops.take_along_axis(x, indices, axis=axis),
        hit=in_range(indices, base.shape[axis]),
    )
    return d_base, None, d_updates


def _scatter_along_axis_samples() -> list[Sample]:
    rows = np.array([[4, 0, 4], [1, 2, 0], [-1, 9, -6]], "int32")
    out = []
    for r in REDUCTIONS:
        attrs = {"axis": 1, "reduction": r}
        out.append(Sample((distinct((3, 5)), rows, distinct((3, 3), seed=1) * 0.9), attrs, r))
        first = {"axis": 0, "reduction": r}
        out.append(Sample((distinct((5, 3)), rows, distinct((3, 3), seed=1) * 0.9), first, f"{r} first axis"))
        out.append(Sample((integers((3, 5)), rows, integers((3, 3), seed=1)), attrs, "int32"))
        out.append(Sample((uniform((3, 5)), rows[:, :0], uniform((3, 0))), attrs, "empty"))
    return out


SCATTER_ALONG_AXIS = register(
    Primitive(
        "scatter_along_axis",
        infer=_scatter_along_axis_infer,
        reference=widened(_scatter_along_axis),
        gradient=_scatter_along_axis_gradient,
        traits=frozenset(),
        samples=_scatter_along_axis_samples,
    )
)


def scatter_along_axis(base: Array, indices: Array, updates: Array, *, axis: int, reduction: str = "update") -> Array:
    """`base` with updates brought in along one axis: out[..., indices[..., i, ...], ...] = reduce(that, updates).

    indices: int, base's rank and its sizes except along the axis; ones out of range are dropped. updates: the shape of
    indices, base's dtype. reduction: as for `scatter_nd`. Gives base's type.
    Raises ShapeError or DTypeError where they do not fit.
    """
    axis = normalize_axis("scatter_along_axis", axis, len(base.shape))
    return bind(SCATTER_ALONG_AXIS, base, indices, updates, axis=axis, reduction=reduction)
