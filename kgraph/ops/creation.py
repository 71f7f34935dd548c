"""Primitives without operands: constants, ranges, fills, and run-time sizes as values."""

from __future__ import annotations

import numpy as np

from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register, type_of
from kgraph.ops.common import Array, Size, normalize_axis, require, shape_attr, size_attr, uniform

NO_OPERANDS = NotDifferentiable("it has no operands")

CONSTANT = register(
    Primitive(
        "constant",
        infer=lambda value: type_of(value),
        reference=lambda value: value,
        gradient=NO_OPERANDS,
        traits=frozenset(),
        samples=lambda: [
            Sample((), {"value": uniform((3, 5))}),
            Sample((), {"value": np.array(2.5, "float32")}),
            Sample((), {"value": np.zeros((0, 3), "int32")}, "empty"),
        ],
        tolerance=0.0,
    )
)


def constant(value, dtype: str | None = None) -> np.ndarray:
    """A concrete array; it becomes a `constant` node where a traced primitive meets it.

    value: an array, a number or nested sequences of numbers. dtype: its dtype; None keeps an array's own and takes
    NumPy's default for Python numbers. Raises TypeError for a dtype that kgraph does not have.
    """
    array = np.asarray(value, None if dtype is None else np_dtype(dtype_name(dtype)))
    dtype_name(array.dtype)
    return array


# -- iota -------------------------------------------------------------------------------------------------------------


def _iota_infer(shape: tuple, dtype: str, axis: int) -> TensorType:
    require(0 <= axis < len(shape), lambda: f"iota: axis {axis} is out of range for the shape {shape}")
    return TensorType(shape, dtype)


def _iota(shape: tuple, dtype: str, axis: int) -> np.ndarray:
    # Counted in int64 and converted, since narrow floats do not count exactly.
    column = np.arange(shape[axis]).astype(np_dtype(dtype)).reshape((-1,) + (1,) * (len(shape) - axis - 1))
    return np.broadcast_to(column, shape).copy()


IOTA = register(
    Primitive(
        "iota",
        infer=_iota_infer,
        reference=_iota,
        gradient=NO_OPERANDS,
        traits=frozenset(),
        samples=lambda: [
            Sample((), {"shape": (7,), "dtype": "int32", "axis": 0}),
            Sample((), {"shape": (3, 5, 2), "dtype": "float32", "axis": 1}),
            Sample((), {"shape": (3, 17), "dtype": "int64", "axis": 1}),
            Sample((), {"shape": (0, 3), "dtype": "int32", "axis": 1}, "empty"),
        ],
        tolerance=0.0,
    )
)


def iota(*, shape, dtype: str, axis: int = 0) -> Array:
    """0, 1, 2 ... along one axis, the same along the others.

    shape: sizes, ints or Dims. Gives that shape and dtype. Raises ShapeError for an axis out of range.
    """
    shape = shape_attr(shape)
    return bind(IOTA, shape=shape, dtype=dtype_name(dtype), axis=normalize_axis("iota", axis, len(shape)))


# -- full -------------------------------------------------------------------------------------------------------------

FULL = register(
    Primitive(
        "full",
        infer=lambda shape, value, dtype: TensorType(shape, dtype),
        reference=lambda shape, value, dtype: np.full(shape, np.asarray(value).astype(np_dtype(dtype))),
        gradient=NO_OPERANDS,
        traits=frozenset(),
        samples=lambda: [
            Sample((), {"shape": (3, 17), "value": 1.5, "dtype": "float32"}),
            Sample((), {"shape": (), "value": -3, "dtype": "int32"}),
            Sample((), {"shape": (5,), "value": True, "dtype": "bool"}),
            Sample((), {"shape": (5,), "value": float("-inf"), "dtype": "bfloat16"}),
            Sample((), {"shape": (0, 3), "value": 0.0, "dtype": "float32"}, "empty"),
        ],
        tolerance=0.0,
    )
)


def full(*, shape, value: float | int | bool | complex, dtype: str) -> Array:
    """A tensor with one value everywhere.

    shape: sizes, ints or Dims. value: a Python scalar. Gives that shape and dtype.
    """
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return bind(FULL, shape=shape_attr(shape), value=value, dtype=dtype_name(dtype))


# -- dim_value --------------------------------------------------------------------------------------------------------

DIM_VALUE = register(
    Primitive(
        "dim_value",
        infer=lambda dim, dtype: TensorType((), dtype),
        reference=lambda dim, dtype: np.asarray(int(dim)).astype(np_dtype(dtype)),
        gradient=NO_OPERANDS,
        traits=frozenset(),
        samples=lambda: [
            Sample((), {"dim": 7, "dtype": "int32"}),
            Sample((), {"dim": 12, "dtype": "float32"}),
        ],
        tolerance=0.0,
    )
)


def dim_value(*, dim: Size, dtype: str) -> Array:
    """A size as a scalar of the given dtype: an array for an int, recorded for a Dim.

    Raises DimDecisionError for a Dim outside of a trace.
    """
    return bind(DIM_VALUE, dim=size_attr(dim), dtype=dtype_name(dtype))
