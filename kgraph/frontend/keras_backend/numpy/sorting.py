"""Functions that order elements, look them up in order, and count them."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axis_of,
    concrete,
    convert,
    dtype_of,
    filled,
    flatten,
    insert_axes,
    is_traced,
    promote,
    promote_inexact,
    reshape_to,
    scalar,
    size_of,
    slice_axis,
)
from kgraph.frontend.keras_backend.numpy.creation import linspace
from kgraph.frontend.keras_backend.sparse import SparseTensor
from kgraph.ir import Dim


def sort(x: Tensor, axis: int | None = -1) -> Tensor:
    """The elements in ascending order along an axis, NaN last."""
    x = convert_to_tensor(x)
    if axis is None:
        x, axis = flatten(x), 0
    return ops.sort(x, axis=axis_of(axis, x.ndim), descending=False)


def argsort(x: Tensor, axis: int | None = -1) -> Tensor:
    """The int32 indices that put the elements along an axis in ascending order; equal ones keep theirs."""
    x = convert_to_tensor(x)
    if axis is None or x.ndim == 0:
        x, axis = flatten(x), 0
    return ops.argsort(x, axis=axis_of(axis, x.ndim), stable=True, descending=False, dtype="int32")


def argpartition(x: Tensor, kth: int, axis: int | None = -1) -> Tensor:
    """int32 indices by which the element at `kth` is where sorting puts it, smaller ones before and larger after."""
    # A complete order is a partition for every kth.
    x = convert_to_tensor(x)
    out = argsort(x, axis)
    length = out.shape[0 if axis is None else axis]
    if isinstance(kth, int) and not -length <= kth < length:
        raise ValueError(f"argpartition: kth={kth} is out of bounds for {length} elements")
    return out


def searchsorted(sorted_sequence: Tensor, values: Tensor, side: str = "left") -> Tensor:
    """The int32 places in an ascending vector at which values keep it so: before equal elements, or after them."""
    sequence = convert_to_tensor(sorted_sequence)
    if sequence.ndim != 1:
        raise ValueError(
            "`searchsorted` only supports 1-D sorted sequences. You can use `keras.ops.vectorized_map` to extend it "
            f"to N-D sequences. Received: sorted_sequence.shape={tuple(sequence.shape)}"
        )
    sequence, values = promote(sequence, values)
    return ops.searchsorted(sequence, values, side=side, dtype="int32")


def digitize(x: Tensor, bins: Tensor) -> Tensor:
    """The int32 number of the bin of each element; bins are vectors of ascending or descending edges."""
    if type(x) is SparseTensor:
        return sparse_rules.digitize(x, bins, digitize)
    x, bins = promote(x, bins)
    if bins.ndim != 1:
        raise ValueError(f"digitize: bins must be a vector. Received: bins.shape={tuple(bins.shape)}")
    count = bins.shape[0]
    if isinstance(count, int) and count == 0:
        return filled(x.shape, 0, "int32")
    ascending = ops.searchsorted(bins, x, side="right", dtype="int32")
    if not is_traced(bins) and bool(np.asarray(ops.ge(bins[-1:], bins[:1]))[0]):
        return ascending
    descending = ops.searchsorted(ops.rev(bins, axes=(0,)), x, side="left", dtype="int32")
    descending = ops.sub(convert_to_tensor(count, "int32"), descending)
    if not is_traced(bins):
        return descending
    is_ascending = ops.ge(slice_axis(bins, 0, count - 1, count), slice_axis(bins, 0, 0, 1))
    return ops.select(reshape_to(is_ascending, ()), ascending, descending)


# -- counts ---------------------------------------------------------------------------------------------------------
def bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0, sparse: bool = False) -> Tensor:
    """How often each number from 0 on occurs in a vector, or in each row of a matrix; or the sum of its weights.

    The result has as many places as the largest number needs, at least `minlength`; so x has to be concrete. It is
    sparse for a sparse x, whose entries alone count, and with `sparse=True`.
    """
    if sparse or type(x) is SparseTensor:
        return sparse_rules.bincount(x, weights, minlength, bincount)
    (x,) = concrete("bincount", x)
    if weights is None:
        weights, dtype = filled(x.shape, 1, "int32"), "int32"
    else:
        weights = convert_to_tensor(weights)
        dtype = dtypes.result_type(x.dtype, weights.dtype)
        weights = convert(weights, dtype)
    length = max(int(x.max()) + 1 if x.size else 0, int(minlength))
    if x.ndim == 1:
        base, index = filled((length,), 0, dtype), insert_axes(convert(x, "int32"), (1,))
    elif x.ndim == 2:
        base = filled((x.shape[0], length), 0, dtype)
        rows = np.broadcast_to(np.arange(x.shape[0], dtype="int32")[:, None], x.shape)
        index = np.stack([rows, convert(x, "int32")], axis=-1)
    else:
        raise ValueError(f"bincount: expected a vector or a matrix. Received: shape={x.shape}")
    return ops.scatter_nd(base, index, weights, reduction="add")


def histogram(x: Tensor, bins: int | Tensor = 10, range: tuple | None = None) -> tuple[Tensor, Tensor]:
    """How many elements fall into each bin, and the edges of the bins.

    bins: their number, between the smallest and the largest element or within `range`; or a vector of edges.
    """
    (x,) = promote_inexact(flatten(convert_to_tensor(x)))
    if isinstance(bins, (int, np.integer)):
        if bins < 1:
            raise ValueError(f"histogram: the number of bins must be positive. Received: bins={bins}")
        low, high = _bounds(x, range)
        edges = linspace(low, high, int(bins) + 1)
        edges = convert(edges, dtype_of(x))
    else:
        x, edges = promote(x, bins)
    count = size_of(edges.shape[0]) - 1
    place = ops.searchsorted(edges, x, side="right", dtype="int32")
    # The last bin has both of its edges. What is below the first or above the last one goes to a place that is cut off.
    last = ops.eq(x, slice_axis(edges, 0, count, count + 1))
    place = ops.select(last, scalar(count, place), place)
    inside = ops.logical_and(ops.ge(place, scalar(1, place)), ops.le(place, scalar(count, place)))
    place = ops.select(inside, ops.sub(place, scalar(1, place)), scalar(count, place))
    total = filled((count + 1,), 0, "int32")
    ones = filled(x.shape, 1, "int32")
    counts = ops.scatter_nd(total, insert_axes(place, (1,)), ones, reduction="add")
    # Counted as integers, and given in the dtype of the edges, as in JAX.
    return convert(slice_axis(counts, 0, 0, count), dtype_of(x)), edges


def _bounds(x: Tensor, range: tuple | None) -> tuple[Tensor, Tensor]:
    """The ends of the histogram, moved apart by one where they coincide, as NumPy does."""
    if range is not None:
        low, high = (convert_to_tensor(v, dtype_of(x)) for v in range)
    elif isinstance(x.shape[0], int) and x.shape[0] == 0:
        return scalar(0, x), scalar(1, x)
    else:
        low = ops.reduce_min(x, axes=(0,), keepdims=False)
        high = ops.reduce_max(x, axes=(0,), keepdims=False)
    same = ops.eq(low, high)
    half = scalar(0.5, x)
    return ops.select(same, ops.sub(low, half), low), ops.select(same, ops.add(high, half), high)


# -- distinct elements ----------------------------------------------------------------------------------------------
def unique(
    x: Tensor,
    sorted: bool = True,
    return_index: bool = False,
    return_inverse: bool = False,
    return_counts: bool = False,
    axis: int | None = None,
    size: int | None = None,
    fill_value: Any = None,
) -> Tensor | tuple[Tensor, ...]:
    """The distinct elements in ascending order (slices along an axis, where one is given).

    return_index, return_inverse, return_counts: also their first places, the place of each element among them, and
        how often each occurs.
    size: cut or fill the result to so many elements, with `fill_value` (0 by default; counts with 0, first places
        with that of the smallest element); makes the function traceable for axis None.
    """
    x = convert_to_tensor(x)
    if is_traced(x) and size is not None and axis is None:
        outputs = _unique_of_size(x, size_of(size), fill_value)
    else:
        outputs = _unique_of_concrete(x, axis, size, fill_value)
    wanted = (True, return_index, return_inverse, return_counts)
    chosen = tuple(out for out, want in zip(outputs, wanted, strict=True) if want)
    return chosen[0] if len(chosen) == 1 else chosen


def _unique_of_concrete(x: Tensor, axis: int | None, size: Any, fill_value: Any) -> list[Tensor]:
    (array,) = concrete("unique", x)
    values: Tensor
    values, index, inverse, counts = np.unique(
        array, return_index=True, return_inverse=True, return_counts=True, axis=axis, equal_nan=False
    )
    along = 0 if axis is None else axis_of(axis, array.ndim)
    if size is not None:
        size = size_of(size)
        missing = max(size - values.shape[along], 0)
        values = slice_axis(values, along, 0, min(size, values.shape[along]))
        widths = [missing if i == along else 0 for i in range(values.ndim)]
        fill = np.asarray(0 if fill_value is None else fill_value).astype(values.dtype)
        values = ops.pad(values, fill, low=(0,) * values.ndim, high=tuple(widths), interior=(0,) * values.ndim)
        index = _resized(index, size, index[:1].sum())
        counts = _resized(counts, size, 0)
    return [values, *(convert(v, "int32") for v in (index, inverse, counts))]


def _resized(x: Tensor, size: int, fill: int) -> Tensor:
    x = slice_axis(x, 0, 0, min(size, x.shape[0]))
    return ops.pad(x, scalar(fill, x), low=(0,), high=(size - x.shape[0],), interior=(0,))


def _unique_of_size(x: Tensor, size: int | Dim, fill_value: Any) -> list[Tensor]:
    shape, row = tuple(x.shape), flatten(x)
    length = row.shape[0]
    if isinstance(size, Dim) or (isinstance(length, int) and length == 0):
        raise UnsupportedError("keras.ops.unique under trace needs a concrete size and a tensor that is not empty")
    order = ops.argsort(row, axis=0, stable=True, descending=False, dtype="int32")
    ordered = ops.take(row, order, axis=0, mode="clip")
    differs = ops.ne(slice_axis(ordered, 0, 1, length), slice_axis(ordered, 0, 0, length - 1))
    is_new = ops.concatenate(filled((1,), True, "bool"), differs, axis=0)
    rank = ops.sub(ops.cumsum(convert(is_new, "int32"), axis=0, reverse=False), np.asarray(1, "int32"))
    # Distinct elements beyond `size` are gathered in one place more, which is cut off.
    place = insert_axes(ops.minimum(rank, np.asarray(size, "int32")), (1,))
    fill = 0 if fill_value is None else fill_value

    def scattered(value: Any, updates: Tensor, reduction: str) -> Tensor:
        base = filled((size + 1,), value, dtype_of(updates))
        return slice_axis(ops.scatter_nd(base, place, updates, reduction=reduction), 0, 0, size)

    values = scattered(fill, ordered, "update")
    counts = scattered(0, filled((length,), 1, "int32"), "add")
    # The first place is the smallest one; a large start value stands for none.
    first = scattered(np.iinfo("int32").max, order, "min")
    smallest = reshape_to(slice_axis(order, 0, 0, 1), ())
    first = ops.select(ops.gt(counts, scalar(0, counts)), first, smallest)
    inverse = ops.scatter_nd(filled((length,), 0, "int32"), insert_axes(order, (1,)), rank, reduction="update")
    return [values, first, reshape_to(inverse, shape), counts]
