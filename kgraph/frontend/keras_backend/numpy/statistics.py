"""Quantiles and correlation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axes_of,
    broadcast,
    convert,
    dtype_of,
    floatx,
    insert_axes,
    is_traced,
    move_axis,
    permute,
    promote,
    reshape_to,
    scalar,
    slice_axis,
    widened,
)
from kgraph.frontend.keras_backend.numpy.reduction import Axis, divided_by_count
from kgraph.ir.dims import product

_METHODS = ("linear", "lower", "higher", "midpoint", "nearest")


def quantile(x: Tensor, q: Tensor, axis: Axis = None, method: str = "linear", keepdims: bool = False) -> Tensor:
    """The q-quantiles over axes, q in [0, 1]; the axis of a vector of them comes first. NaN if there is one.

    method: what is taken between two elements: "linear", "lower", "higher", "midpoint", "nearest".
    """
    return _quantile(x, q, axis, method, keepdims, skip_nan=False)


def percentile(x: Tensor, q: Tensor, axis: Axis = None, method: str = "linear", keepdims: bool = False) -> Tensor:
    """The q-th percentiles over axes, q in [0, 100]; as `quantile`."""
    return _quantile(x, _hundredth(q), axis, method, keepdims, skip_nan=False)


def nanquantile(x: Tensor, q: Tensor, axis: Axis = None, method: str = "linear", keepdims: bool = False) -> Tensor:
    """The q-quantiles over axes of what is not NaN; NaN where nothing is left."""
    return _quantile(x, q, axis, method, keepdims, skip_nan=True)


def nanpercentile(x: Tensor, q: Tensor, axis: Axis = None, method: str = "linear", keepdims: bool = False) -> Tensor:
    """The q-th percentiles over axes of what is not NaN; NaN where nothing is left."""
    return _quantile(x, _hundredth(q), axis, method, keepdims, skip_nan=True)


def median(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The middle element over axes, the mean of the two middle ones for an even number. NaN if there is one."""
    return _quantile(x, 0.5, axis, "midpoint", keepdims, skip_nan=False)


def nanmedian(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The median over axes of what is not NaN; NaN where nothing is left."""
    return _quantile(x, 0.5, axis, "midpoint", keepdims, skip_nan=True)


def _hundredth(q: Tensor) -> Tensor:
    if is_traced(q):
        (q,) = promote(q, extra=(float,))
        return ops.div(q, scalar(100, q))
    return np.asarray(q, dtype="float64") / 100


def _quantile(x: Any, q: Any, axis: Axis, method: str, keepdims: bool, skip_nan: bool) -> Tensor:
    if method not in _METHODS:
        raise ValueError(f"quantile: method is one of {_METHODS}. Received: method={method!r}")
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    x = convert(x, result)
    axes = axes_of(axis, x.ndim)
    kept_shape = tuple(1 if i in axes else s for i, s in enumerate(x.shape))
    # The reduced axes become one, the last.
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    x = permute(x, (*kept, *axes))
    lead = tuple(x.shape[: len(kept)])
    x = reshape_to(x, (*lead, product(x.shape[len(kept) :])))
    x = ops.sort(x, axis=len(lead), descending=False)
    if not is_traced(q) and isinstance(x.shape[-1], int) and not skip_nan:
        q = np.asarray(q, dtype="float64")
        out = _between_known_places(x, q, method)
    else:
        q = convert_to_tensor(q, "float32" if not is_traced(q) else dtypes.result_type(q.dtype, "float32"))
        out = _between_places(x, q, method, skip_nan)
    # So far: the kept axes, then one of quantiles; the result has the quantiles first.
    out = convert(out, result)
    shape = kept_shape if keepdims else lead
    if q.ndim == 0:
        return reshape_to(out, shape)
    return reshape_to(move_axis(out, len(lead), 0), (*q.shape, *shape))


def _between_known_places(x: Tensor, q: np.ndarray, method: str) -> Tensor:
    """Quantiles of sorted rows at places known beforehand: a few slices and one interpolation."""
    count, last = x.shape[-1], x.ndim - 1
    if count == 0:
        raise ValueError("quantile: there is nothing to reduce over")
    place = q.reshape(-1) * (count - 1)
    low = np.clip(np.floor(place), 0, count - 1).astype("int32")
    high = np.clip(np.ceil(place), 0, count - 1).astype("int32")
    weight = widened(scalar(0, x))
    weight = np.asarray(place - np.floor(place)).astype(weight.dtype)

    def at(places: np.ndarray) -> Tensor:
        if len(places) == 1:
            return slice_axis(x, last, int(places[0]), int(places[0]) + 1)
        return ops.take(x, places, axis=last, mode="clip")

    if method in ("lower", "nearest") or (low == high).all():
        chosen = np.where(weight > 0.5, high, low) if method == "nearest" else low
        out = at(chosen)
    elif method == "higher":
        out = at(high)
    else:
        out = _interpolated(at(low), at(high), weight, method)
    # NaN sorts last, so that the last element tells whether there is one.
    top = slice_axis(x, last, count - 1, count)
    return ops.select(ops.is_nan(top), scalar(math.nan, out), out)


def _interpolated(low: Tensor, high: Tensor, weight: Tensor, method: str) -> Tensor:
    low, high = widened(low), widened(high)
    if method == "midpoint":
        weight = ops.select(ops.gt(weight, scalar(0, weight)), scalar(0.5, weight), scalar(0, weight))
    weight = convert(weight, dtype_of(low))
    mixed = ops.add(ops.mul(low, ops.sub(scalar(1, weight), weight)), ops.mul(high, weight))
    # Equal ends, infinities among them, which the products above would turn into NaN.
    return ops.select(ops.eq(low, high), low, mixed)


def _between_places(x: Tensor, q: Tensor, method: str, skip_nan: bool) -> Tensor:
    """Quantiles of sorted rows where the places depend on tensors or on symbolic sizes."""
    rank, last = x.ndim, x.ndim - 1
    length = convert_to_tensor(x.shape[-1], dtype_of(q))
    if skip_nan:
        valid = ops.logical_not(ops.is_nan(x))
        length = ops.reduce_sum(convert(valid, dtype_of(q)), axes=(last,), keepdims=True)
    flat = reshape_to(q, (1,) * last + (product(q.shape),))
    top = ops.maximum(ops.sub(length, scalar(1, length)), scalar(0, length))
    place = ops.mul(flat, top)
    low, high = ops.floor(place), ops.ceil(place)
    weight = ops.sub(place, low)
    rows = (*x.shape[:-1], place.shape[-1])

    def at(places: Tensor) -> Tensor:
        places = convert(ops.minimum(ops.maximum(places, scalar(0, places)), top), "int32")
        return ops.take_along_axis(x, broadcast(places, rows), axis=last)

    if method == "lower":
        out = at(low)
    elif method == "higher":
        out = at(high)
    elif method == "nearest":
        out = at(ops.select(ops.gt(weight, scalar(0.5, weight)), high, low))
    else:
        out = _interpolated(at(low), at(high), weight, method)
    if skip_nan:
        # Without a valid element the first one is NaN, and is what has been fetched.
        return out
    end = x.shape[-1]
    return ops.select(ops.is_nan(slice_axis(x, rank - 1, end - 1, end)), scalar(math.nan, out), out)


def corrcoef(x: Tensor) -> Tensor:
    """Pearson's correlation coefficients [variables, variables] of the rows of a matrix; 1 for a vector."""
    x = convert_to_tensor(x)
    result = floatx() if dtype_of(x) == "int64" else dtypes.result_type(x.dtype, float)
    x = widened(convert(x, result))
    if x.ndim > 2:
        raise ValueError(f"corrcoef: expected a vector or a matrix. Received: shape={tuple(x.shape)}")
    is_vector = x.ndim < 2
    x = insert_axes(x, (0,)) if x.ndim == 1 else reshape_to(x, (1, 1)) if x.ndim == 0 else x
    center = divided_by_count(ops.reduce_sum(x, axes=(1,), keepdims=True), x.shape[1])
    deviation = ops.sub(x, center)
    # Rows of length 1 give the coefficients as inner products; nothing is divided by the number of observations.
    covariance = ops.dot_general(deviation, deviation, lhs_contract=(1,), rhs_contract=(1,), lhs_batch=(), rhs_batch=())
    length = ops.sqrt(ops.reduce_sum(ops.mul(deviation, deviation), axes=(1,), keepdims=True))
    out = ops.div(ops.div(covariance, length), reshape_to(length, (1, x.shape[0])))
    out = ops.minimum(ops.maximum(out, scalar(-1, out)), scalar(1, out))
    return convert(reshape_to(out, ()) if is_vector else out, result)


def trapezoid(y: Tensor, x: Tensor | None = None, dx: float = 1.0, axis: int = -1) -> Tensor:
    """The integral of samples along an axis by the trapezoidal rule, at points x or at a distance dx."""
    (y,) = promote(y, extra=(float,))
    (axis,) = axes_of(axis, y.ndim)
    count = y.shape[axis]
    pairs = ops.add(slice_axis(y, axis, 1, count), slice_axis(y, axis, 0, count - 1))
    if x is None:
        step = convert_to_tensor(dx, dtype_of(y))
        if step.ndim == 1:
            step = reshape_to(step, tuple(step.shape[0] if i == axis else 1 for i in range(y.ndim)))
    else:
        x = convert_to_tensor(x, dtype_of(y))
        along = 0 if x.ndim == 1 else axis
        step = ops.sub(slice_axis(x, along, 1, x.shape[along]), slice_axis(x, along, 0, x.shape[along] - 1))
        if x.ndim == 1:
            step = reshape_to(step, tuple(step.shape[0] if i == axis else 1 for i in range(y.ndim)))
    area = widened(ops.mul(pairs, step))
    total = ops.reduce_sum(area, axes=(axis,), keepdims=False)
    return convert(ops.mul(total, scalar(0.5, total)), dtype_of(y))
