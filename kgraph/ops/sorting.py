"""Order along an axis: sort, argsort, top_k, searchsorted. All are stable: equal elements keep their order."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kgraph import ops
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ops.common import (
    ORDERED,
    Array,
    Size,
    booleans,
    distinct,
    integers,
    normalize_axis,
    require,
    require_dtype,
    require_same_dtype,
    special,
    uniform,
    widened,
    zeros_like,
)


def _order(x: np.ndarray, axis: int, descending: bool) -> np.ndarray:
    """Positions of the stable order. Ascending order puts NaN last, descending order first."""
    if not descending:
        return np.argsort(x, axis, kind="stable")
    # Reversed twice, so that equal elements keep their order.
    return x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)


def _require_axis(name: str, x: TensorType, axis: int) -> None:
    require_dtype(name, ORDERED, x)
    require(0 <= axis < x.rank, lambda: f"{name}({x}): axis {axis} is out of range")


def _samples(**attrs) -> list[Sample]:
    row = attrs | {"axis": 1}
    return [
        Sample((distinct((3, 5)),), row),
        Sample((distinct((2, 7, 3)),), row),
        Sample((distinct((3, 17)),), attrs | {"axis": 0}),
        Sample((integers((3, 19), 0, 5),), row, "ties"),
        Sample((integers((33,), 0, 256, "uint8"),), attrs | {"axis": 0}, "uint8"),
        Sample((booleans((3, 7)),), row, "bool"),
        Sample((distinct((3, 7), dtype="bfloat16"),), row, "bfloat16"),
        Sample((uniform((3, 0)),), row, "empty"),
        Sample((special()[None],), row, "special"),
    ]


# -- sort -------------------------------------------------------------------------------------------------------------


def _sort_infer(x: TensorType, axis: int, descending: bool) -> TensorType:
    _require_axis("sort", x, axis)
    return x


def _sort_gradient(cotangents, inputs, outputs, axis, descending):
    (x,) = inputs
    order = ops.argsort(x, axis=axis, descending=descending)
    return (ops.scatter_along_axis(zeros_like(x), order, cotangents[0], axis=axis, reduction="add"),)


SORT = register(
    Primitive(
        "sort",
        infer=_sort_infer,
        reference=widened(lambda x, axis, descending: np.take_along_axis(x, _order(x, axis, descending), axis)),
        gradient=_sort_gradient,
        traits=frozenset(),
        samples=lambda: [*_samples(descending=False), *_samples(descending=True)],
        tolerance=0.0,
    )
)


def sort(x: Array, *, axis: int = -1, descending: bool = False) -> Array:
    """x in order along an axis; NaN come last, first in descending order.

    x: real or bool, rank at least 1. Gives x's type. Raises ShapeError for an axis out of range.
    """
    return bind(SORT, x, axis=normalize_axis("sort", axis, len(x.shape)), descending=bool(descending))


# -- argsort ----------------------------------------------------------------------------------------------------------


def _argsort_infer(x: TensorType, axis: int, stable: bool, descending: bool, dtype: str) -> TensorType:
    _require_axis("argsort", x, axis)
    return x.with_dtype(dtype)


def _argsort(x: np.ndarray, axis: int, stable: bool, descending: bool, dtype: str) -> np.ndarray:
    return _order(x, axis, descending).astype(np_dtype(dtype))


ARGSORT = register(
    Primitive(
        "argsort",
        infer=_argsort_infer,
        reference=widened(_argsort),
        gradient=NotDifferentiable("its result is an index"),
        traits=frozenset(),
        samples=lambda: [
            *_samples(stable=True, descending=False, dtype="int32"),
            *_samples(stable=True, descending=True, dtype="int64"),
        ],
        tolerance=0.0,
    )
)


def argsort(x: Array, *, axis: int = -1, stable: bool = True, descending: bool = False, dtype: str = "int32") -> Array:
    """The positions that put x in order along an axis; NaN come last, first in descending order.

    x: real or bool, rank at least 1. stable: whether equal elements must keep their order (a kernel may ignore it for
    False). Gives x's shape in the int `dtype`. Raises ShapeError for an axis out of range.
    """
    axis = normalize_axis("argsort", axis, len(x.shape))
    return bind(ARGSORT, x, axis=axis, stable=bool(stable), descending=bool(descending), dtype=dtype_name(dtype))


# -- top_k ------------------------------------------------------------------------------------------------------------


def _top_k_infer(x: TensorType, k: int, sorted: bool) -> tuple[TensorType, TensorType]:
    require_dtype("top_k", ORDERED, x)
    require(x.rank > 0, lambda: f"top_k({x}): expected a rank of at least 1")
    require(k >= 0 and (k == x.shape[-1] or k <= x.shape[-1]), lambda: f"top_k({x}): the last axis has less than {k}")
    shape = (*x.shape[:-1], k)
    return x.with_shape(shape), TensorType(shape, "int32")


def _top_k(x: np.ndarray, k: int, sorted: bool) -> tuple[np.ndarray, np.ndarray]:
    order = _order(x, x.ndim - 1, True)[..., :k]
    return np.take_along_axis(x, order, -1), order.astype(np.int32)


def _top_k_gradient(cotangents, inputs, outputs, k, sorted):
    (x,) = inputs
    return (ops.scatter_along_axis(zeros_like(x), outputs[1], cotangents[0], axis=-1, reduction="add"),)


TOP_K = register(
    Primitive(
        "top_k",
        infer=_top_k_infer,
        reference=widened(_top_k),
        gradient=_top_k_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((distinct((3, 5)),), {"k": 2, "sorted": True}),
            Sample((distinct((2, 3, 17)),), {"k": 17, "sorted": True}),
            Sample((distinct((33,)),), {"k": 1, "sorted": False}),
            Sample((integers((3, 19), 0, 5),), {"k": 7, "sorted": True}, "ties"),
            Sample((distinct((3, 7), dtype="bfloat16"),), {"k": 3, "sorted": True}, "bfloat16"),
            Sample((uniform((0, 3)),), {"k": 2, "sorted": True}, "empty"),
            Sample((special()[None],), {"k": 3, "sorted": True}, "special"),
        ],
        tolerance=0.0,
        results=2,
    )
)


def top_k(x: Array, *, k: Size, sorted: bool = True) -> tuple[Array, Array]:
    """The k greatest elements along the last axis and their positions (int32), the earlier one first at ties.

    x: real or bool, rank at least 1; NaN count as greatest. sorted: whether the result must descend (a kernel may
    leave it in any order for False). Raises ShapeError where the last axis is shorter than k.
    """
    return bind(TOP_K, x, k=int(k), sorted=bool(sorted))


# -- searchsorted -----------------------------------------------------------------------------------------------------


def _searchsorted_infer(sequence: TensorType, values: TensorType, side: str, dtype: str) -> TensorType:
    what = lambda: f"searchsorted({sequence}, {values})"
    require_dtype("searchsorted", ORDERED, sequence, values)
    require_same_dtype("searchsorted", sequence, values)
    require(sequence.rank == 1, lambda: f"{what()}: expected a sorted sequence of rank 1")
    require(side in ("left", "right"), lambda: f"{what()}: expected side 'left' or 'right', got {side!r}")
    return values.with_dtype(dtype)


def _searchsorted(sequence: np.ndarray, values: np.ndarray, side: Literal["left", "right"], dtype: str) -> np.ndarray:
    return np.asarray(np.searchsorted(sequence, values, side)).astype(np_dtype(dtype))


SEARCHSORTED = register(
    Primitive(
        "searchsorted",
        infer=_searchsorted_infer,
        reference=widened(_searchsorted),
        gradient=NotDifferentiable("its result is an index"),
        traits=frozenset(),
        samples=lambda: [
            Sample((np.sort(distinct((17,))), uniform((3, 5))), {"side": "left", "dtype": "int32"}),
            Sample((np.sort(integers((9,))), integers((7,), seed=1)), {"side": "right", "dtype": "int64"}, "ties"),
            Sample((np.sort(integers((9,))), integers((), seed=1)), {"side": "left", "dtype": "int32"}, "ties"),
            Sample((uniform((0,)), uniform((3,))), {"side": "left", "dtype": "int32"}, "empty"),
            Sample((np.sort(special()), special()), {"side": "right", "dtype": "int32"}, "special"),
        ],
        tolerance=0.0,
    )
)


def searchsorted(sequence: Array, values: Array, *, side: str = "left", dtype: str = "int32") -> Array:
    """Where to insert values into an ascending sequence: before ("left") or behind ("right") equal elements.

    sequence: [n]. values: any shape, the same real or bool dtype. Gives the values' shape in the int `dtype`.
    Raises ShapeError for a sequence of another rank.
    """
    return bind(SEARCHSORTED, sequence, values, side=side, dtype=dtype_name(dtype))
