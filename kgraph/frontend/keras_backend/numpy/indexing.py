"""Functions that fetch elements by index, and diagonals."""

from __future__ import annotations

import builtins

from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axis_of,
    broadcast,
    broadcast_sizes,
    convert,
    dtype_of,
    flatten,
    insert_axes,
    permute,
    reshape_to,
    scalar,
    shape_of,
    slice_axis,
)
from kgraph.frontend.keras_backend.numpy.reduction import sum as _sum
from kgraph.ir.dims import product


def _as_index(indices: Tensor) -> Tensor:
    indices = convert_to_tensor(indices)
    return indices if "int" in dtype_of(indices) else convert(indices, "int32")


def take(x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
    """Slices of x along an axis, in the shape of the indices; of all elements in a row for axis None.

    Negative indices count from the end; out of bounds gives NaN (the extreme value of integers), as in JAX.
    """
    x, indices = convert_to_tensor(x), _as_index(indices)
    if axis is None:
        x, axis = flatten(x), 0
    return ops.take(x, indices, axis=axis_of(axis, x.ndim), mode="fill")


def take_along_axis(x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
    """Elements of x along an axis, each at its own index; the other axes broadcast with those of the indices."""
    x, indices = convert_to_tensor(x), _as_index(indices)
    if axis is None:
        x, indices, axis = flatten(x), flatten(indices), 0
    if x.ndim != indices.ndim:
        raise ValueError(
            "take_along_axis: x and indices need the same rank. "
            f"Received: x.shape={tuple(x.shape)}, indices.shape={tuple(indices.shape)}"
        )
    axis = axis_of(axis, x.ndim)
    rest = broadcast_sizes(_with_size(x.shape, axis, 1), _with_size(indices.shape, axis, 1))
    x = broadcast(x, _with_size(rest, axis, x.shape[axis]))
    indices = broadcast(indices, _with_size(rest, axis, indices.shape[axis]))
    return ops.take_along_axis(x, indices, axis=axis)


def _with_size(shape: tuple, axis: int, size: object) -> tuple:
    return tuple(size if i == axis else s for i, s in enumerate(shape))


def unravel_index(indices: Tensor, shape: tuple) -> tuple[Tensor, ...]:
    """The coordinates, an array per axis, of places counted in the row of all elements of a shape.

    Negative places count from the end; those out of bounds are brought to the nearest end, as in JAX.
    """
    indices = convert_to_tensor(indices)
    indices = convert(indices, dtypes.result_type(indices.dtype))
    sizes = shape_of(shape)
    total = convert_to_tensor(product(sizes), dtype_of(indices))
    place = ops.select(ops.lt(indices, scalar(0, indices)), ops.add(indices, total), indices)
    place = ops.minimum(ops.maximum(place, scalar(0, place)), ops.sub(total, scalar(1, total)))
    out = []
    for i, size in enumerate(sizes):
        size = convert_to_tensor(size, dtype_of(place))
        rest = convert_to_tensor(product(sizes[i + 1 :]), dtype_of(place))
        out.append(ops.rem(ops.floor_divide(place, rest), size))
    return tuple(out)


# -- diagonals ------------------------------------------------------------------------------------------------------
def diagonal(x: Tensor, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The diagonals of the matrices in two axes, along a new last axis."""
    x = convert_to_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"diagonal: expected a tensor of rank 2 or more. Received: shape={tuple(x.shape)}")
    first, second = axis_of(axis1, x.ndim), axis_of(axis2, x.ndim)
    if first == second:
        raise ValueError(f"diagonal: axis1 and axis2 cannot be the same. Received: {axis1} and {axis2}")
    lead = [i for i in range(x.ndim) if i not in (first, second)]
    x = permute(x, (*lead, first, second))
    *lead, rows, columns = x.shape
    room = (rows, columns - offset) if offset >= 0 else (rows + offset, columns)
    length = builtins.max(0, room[0] if room[0] == room[1] or room[0] <= room[1] else room[1])
    # In a row of all elements of a matrix its diagonal has a constant stride.
    x = reshape_to(x, (*lead, rows * columns))
    start = offset if offset >= 0 else -offset * columns
    if isinstance(length, int) and length == 0:
        return slice_axis(x, len(lead), 0, 0)
    return slice_axis(x, len(lead), start, start + (length - 1) * (columns + 1) + 1, columns + 1)


def trace(x: Tensor, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The sum of each diagonal of the matrices in two axes."""
    return _sum(diagonal(x, offset, axis1, axis2), axis=-1)


def diag(x: Tensor, k: int = 0) -> Tensor:
    """The k-th diagonal of a matrix, or for a vector the matrix that has it there."""
    x = convert_to_tensor(x)
    if x.ndim == 2:
        return diagonal(x, k)
    if x.ndim != 1:
        raise ValueError(f"diag: expected a vector or a matrix. Received: shape={tuple(x.shape)}")
    size = x.shape[0] + builtins.abs(k)
    row = ops.iota(shape=(size, 1), dtype="int32", axis=0)
    column = ops.iota(shape=(1, size), dtype="int32", axis=1)
    padded = ops.pad(x, scalar(0, x), low=(0,), high=(builtins.abs(k),), interior=(0,))
    # Above the main diagonal elements are counted by rows, below it by columns.
    values = insert_axes(padded, (1,) if k >= 0 else (0,))
    return ops.select(ops.eq(ops.sub(column, row), scalar(k, column)), values, scalar(0, x))


def diagflat(x: Tensor, k: int = 0) -> Tensor:
    """The matrix with all elements of a tensor, in a row, on its k-th diagonal."""
    return diag(flatten(convert_to_tensor(x)), k)


def diff(a: Tensor, n: int = 1, axis: int = -1) -> Tensor:
    """The differences of neighbours along an axis, taken n times; of booleans whether they differ."""
    a = convert_to_tensor(a)
    if n < 0:
        raise ValueError(f"diff: n cannot be negative. Received: n={n}")
    axis = axis_of(axis, a.ndim)
    subtract = ops.ne if dtype_of(a) == "bool" else ops.sub
    for _ in range(n):
        length = a.shape[axis]
        if isinstance(length, int) and length == 0:
            return a
        a = subtract(slice_axis(a, axis, 1, length), slice_axis(a, axis, 0, length - 1))
    return a
