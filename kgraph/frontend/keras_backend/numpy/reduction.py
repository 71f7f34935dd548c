"""Reductions and running sums; those that skip NaN are in `nan_reduction`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from keras.src.backend.common import dtypes
from keras.src.backend.common.variables import standardize_dtype

from kgraph import ops
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    HALF_TYPES,
    SMALL_INTS,
    Tensor,
    axes_of,
    axis_of,
    convert,
    dtype_of,
    flatten,
    is_complex,
    is_float,
    promote,
    reshape_to,
    scalar,
    to_bool,
    widened,
)
from kgraph.frontend.keras_backend.sparse import SparseTensor
from kgraph.ir import Dim
from kgraph.ir.dims import product

Axis = int | tuple | list | None


def reduce_over(primitive: Callable, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    """A reducing primitive over axes; over none of them it changes nothing."""
    axes = axes_of(axis, x.ndim)
    return primitive(x, axes=axes, keepdims=bool(keepdims)) if axes else x


def count_over(x: Tensor, axis: Axis) -> int | Dim:
    """The number of elements that a reduction over axes takes together."""
    return product(x.shape[a] for a in axes_of(axis, x.ndim))


def divided_by_count(x: Tensor, count: int | Dim) -> Tensor:
    """A tensor divided by a number of elements, NaN for none."""
    if isinstance(count, Dim):
        return ops.div(x, convert_to_tensor(count, dtype_of(x)))
    if count == 0:
        return ops.mul(x, scalar(math.nan, x))
    return ops.div(x, scalar(count, x))


def _accumulation_dtype(x: Tensor) -> str:
    """The dtype that means and variances are formed in: at least float32."""
    dtype = dtype_of(x)
    return dtype if dtype in ("float64", "complex128") else dtypes.result_type(dtype, "float32")


# -- sums and products ----------------------------------------------------------------------------------------------
def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over axes; small integers and booleans are summed in 32 bits, half floats in float32."""
    if type(x) is SparseTensor:
        return sparse_rules.sum(x, axis, keepdims)
    x = convert_to_tensor(x)
    dtype = SMALL_INTS.get(dtype_of(x), dtype_of(x))
    total = reduce_over(ops.reduce_sum, widened(convert(x, dtype)), axis, keepdims)
    return convert(total, dtype)


def prod(x: Tensor, axis: Axis = None, keepdims: bool = False, dtype: str | None = None) -> Tensor:
    """The product over axes, in 32 bits for small integers unless `dtype` is given."""
    x = convert_to_tensor(x)
    dtype = SMALL_INTS.get(dtype_of(x), dtype_of(x)) if dtype is None else standardize_dtype(dtype)
    total = reduce_over(ops.reduce_prod, widened(convert(x, dtype)), axis, keepdims)
    return convert(total, dtype)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over axes: of integers in float32, of half floats computed in float32."""
    x = x if type(x) is SparseTensor else convert_to_tensor(x)
    compute = _accumulation_dtype(x)
    result = dtype_of(x) if is_float(x) or is_complex(x) else compute
    if type(x) is SparseTensor:
        divide = lambda total: divided_by_count(total, count_over(x, axis))
        return sparse_rules.mean(x, axis, keepdims, compute, result, divide)
    total = reduce_over(ops.reduce_sum, convert(x, compute), axis, keepdims)
    return convert(divided_by_count(total, count_over(x, axis)), result)


def average(x: Tensor, axis: Axis = None, weights: Tensor | None = None) -> Tensor:
    """The mean over axes, weighted if weights are given: of the shape of x, or a vector along the one axis."""
    x = convert_to_tensor(x)
    if weights is None:
        (x,) = promote(x, extra=(float,))
        return mean(x, axis)
    x, weights = promote(x, weights, extra=(float,))
    if weights.ndim != x.ndim:
        if axis is None or weights.ndim != 1 or isinstance(axis, (tuple, list)):
            raise ValueError(
                "average: weights of another shape than x must be a vector along one axis. "
                f"Received: x.shape={tuple(x.shape)}, weights.shape={tuple(weights.shape)}, axis={axis}"
            )
        along = axis_of(axis, x.ndim)
        weights = reshape_to(weights, tuple(weights.shape[0] if i == along else 1 for i in range(x.ndim)))
    dtype, weights = dtype_of(x), ops.broadcast_to(widened(weights), shape=tuple(x.shape))
    total = reduce_over(ops.reduce_sum, ops.mul(widened(x), weights), axis, False)
    return convert(ops.div(total, reduce_over(ops.reduce_sum, weights, axis, False)), dtype)


def var(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The variance over axes, in two passes; half floats are computed in float32."""
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    x = convert(x, _accumulation_dtype(x))
    count = count_over(x, axis)
    center = divided_by_count(reduce_over(ops.reduce_sum, x, axis, True), count)
    deviation = ops.sub(x, center)
    if is_complex(x):
        deviation = ops.abs(deviation)
        result = dtype_of(deviation)
    total = reduce_over(ops.reduce_sum, ops.mul(deviation, deviation), axis, keepdims)
    return convert(divided_by_count(total, count), result)


def std(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The standard deviation over axes, the root of `var`."""
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    # The root is taken before rounding to half precision.
    variance = var(widened(x), axis, keepdims)
    out = ops.sqrt(variance)
    return out if is_complex(x) else convert(out, result)


# -- extremes -------------------------------------------------------------------------------------------------------
def _extreme(name: str, x: Tensor, axis: Axis, keepdims: bool, initial: Tensor | None) -> Tensor:
    x = convert_to_tensor(x)
    largest = name == "max"
    if initial is None:
        count = count_over(x, axis)
        if isinstance(count, int) and count == 0:
            raise ValueError(f"{name}: a tensor of shape {tuple(x.shape)} has no elements along axis {axis}")
    if dtype_of(x) == "bool":
        out = reduce_over(ops.reduce_or if largest else ops.reduce_and, x, axis, keepdims)
    else:
        out = reduce_over(ops.reduce_max if largest else ops.reduce_min, x, axis, keepdims)
    if initial is None:
        return out
    initial = convert_to_tensor(initial, dtype_of(x))
    if dtype_of(x) == "bool":
        return (ops.logical_or if largest else ops.logical_and)(out, initial)
    return (ops.maximum if largest else ops.minimum)(out, initial)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False, initial: Tensor | None = None) -> Tensor:
    """The largest element over axes, at least `initial`; NaN if there is one."""
    return _extreme("max", x, axis, keepdims, initial)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False, initial: Tensor | None = None) -> Tensor:
    """The smallest element over axes, at most `initial`; NaN if there is one."""
    return _extreme("min", x, axis, keepdims, initial)


def amax(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest element over axes; NaN if there is one."""
    return max(x, axis, keepdims)


def amin(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest element over axes; NaN if there is one."""
    return min(x, axis, keepdims)


def ptp(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest element minus the smallest one, over axes."""
    x = convert_to_tensor(x)
    return ops.sub(max(x, axis, keepdims), min(x, axis, keepdims))


def arg_extreme(primitive: Callable, x: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    """The int32 index of an extreme along an axis, or among all elements for axis None."""
    shape = tuple(x.shape)
    if axis is None:
        out = primitive(flatten(x), axis=0, dtype="int32")
        return reshape_to(out, (1,) * len(shape)) if keepdims else out
    axis = axis_of(axis, len(shape)) if shape else 0
    out = primitive(x if shape else flatten(x), axis=axis, dtype="int32")
    return reshape_to(out, (*shape[:axis], 1, *shape[axis + 1 :])) if keepdims and shape else out


def _zeros_told_apart(x: Tensor) -> Tensor:
    """x with -0.0 replaced by the negative number next to it: Keras ranks it below 0.0 in argmax and argmin."""
    if not is_float(x) or x.ndim == 0:
        return x
    x = convert(x, _accumulation_dtype(x))
    info = np.finfo(x.dtype)
    bits = ops.bitcast_convert(x, dtype=f"int{info.bits}")
    negative_zero = ops.eq(bits, scalar(np.iinfo(bits.dtype).min, bits))
    return ops.select(negative_zero, scalar(-info.tiny, x), x)


def argmax(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The int32 index of the first largest element along an axis, or among all elements."""
    return arg_extreme(ops.argmax, _zeros_told_apart(convert_to_tensor(x)), axis, keepdims)


def argmin(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The int32 index of the first smallest element along an axis, or among all elements."""
    return arg_extreme(ops.argmin, _zeros_told_apart(convert_to_tensor(x)), axis, keepdims)


# -- logic ----------------------------------------------------------------------------------------------------------
def all(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether all elements over axes are true."""
    return reduce_over(ops.reduce_and, to_bool(x), axis, keepdims)


def any(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether any element over axes is true."""
    return reduce_over(ops.reduce_or, to_bool(x), axis, keepdims)


# -- running sums and products --------------------------------------------------------------------------------------
def running(primitive: Callable, x: Tensor, axis: int | None, dtype: str | None) -> Tensor:
    """A running reduction along an axis, or over all elements in a row; booleans count as int32."""
    if axis is None:
        x, axis = flatten(x), 0
    dtype = dtypes.result_type(dtype or x.dtype)
    dtype = "int32" if dtype == "bool" else dtype
    x = convert(x, "float32" if dtype in HALF_TYPES else dtype)
    return convert(primitive(x, axis=axis_of(axis, x.ndim), reverse=False), dtype)


def cumsum(x: Tensor, axis: int | None = None, dtype: str | None = None) -> Tensor:
    """The running sum along an axis, or over all elements in a row."""
    return running(ops.cumsum, convert_to_tensor(x), axis, dtype)


def cumprod(x: Tensor, axis: int | None = None, dtype: str | None = None) -> Tensor:
    """The running product along an axis, or over all elements in a row."""
    return running(ops.cumprod, convert_to_tensor(x), axis, dtype)


# -- without NaN ----------------------------------------------------------------------------------------------------
def _without_nan(x: Tensor, value: float) -> Tensor:
    """A tensor with NaN replaced."""
    if not is_float(x) and not is_complex(x):
        return x
    return ops.select(ops.ne(x, x), scalar(value, x), x)


def nansum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over axes of what is not NaN."""
    return sum(_without_nan(convert_to_tensor(x), 0), axis, keepdims)


def nanprod(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The product over axes of what is not NaN."""
    return prod(_without_nan(convert_to_tensor(x), 1), axis, keepdims)


def nancumsum(x: Tensor, axis: int | None = None, dtype: str | None = None) -> Tensor:
    """The running sum of what is not NaN."""
    return running(ops.cumsum, _without_nan(convert_to_tensor(x), 0), axis, dtype)


def nancumprod(x: Tensor, axis: int | None = None, dtype: str | None = None) -> Tensor:
    """The running product of what is not NaN."""
    return running(ops.cumprod, _without_nan(convert_to_tensor(x), 1), axis, dtype)


def _valid_count(x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    """How many elements over axes are not NaN, in the dtype of x."""
    return reduce_over(ops.reduce_sum, convert(ops.eq(x, x), dtype_of(x)), axis, keepdims)


def nanmean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over axes of what is not NaN; NaN where nothing is left."""
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    x = convert(x, _accumulation_dtype(x))
    total = reduce_over(ops.reduce_sum, _without_nan(x, 0), axis, keepdims)
    return convert(ops.div(total, _valid_count(x, axis, keepdims)), result)


def nanvar(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The variance over axes of what is not NaN; NaN where nothing is left."""
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    x = convert(x, _accumulation_dtype(x))
    center = ops.div(reduce_over(ops.reduce_sum, _without_nan(x, 0), axis, True), _valid_count(x, axis, True))
    deviation = _without_nan(ops.sub(x, center), 0)
    total = reduce_over(ops.reduce_sum, ops.mul(deviation, deviation), axis, keepdims)
    return convert(ops.div(total, _valid_count(x, axis, keepdims)), result)


def nanstd(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The standard deviation over axes of what is not NaN; NaN where nothing is left."""
    x = convert_to_tensor(x)
    result = dtypes.result_type(x.dtype, float)
    return convert(ops.sqrt(nanvar(widened(x), axis, keepdims)), result)


def _nan_extreme(name: str, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    x = convert_to_tensor(x)
    if not is_float(x):
        return _extreme(name, x, axis, keepdims, None)
    worst = -math.inf if name == "max" else math.inf
    out = _extreme(name, _without_nan(x, worst), axis, keepdims, None)
    nothing = reduce_over(ops.reduce_and, ops.is_nan(x), axis, keepdims)
    return ops.select(nothing, scalar(math.nan, x), out)


def nanmax(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest element over axes that is not NaN; NaN where nothing is left."""
    return _nan_extreme("max", x, axis, keepdims)


def nanmin(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest element over axes that is not NaN; NaN where nothing is left."""
    return _nan_extreme("min", x, axis, keepdims)


def _nan_arg_extreme(primitive: Callable, worst: float, x: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    x = convert_to_tensor(x)
    if not is_float(x):
        return arg_extreme(primitive, x, axis, keepdims)
    out = arg_extreme(primitive, _without_nan(x, worst), axis, keepdims)
    nothing = reduce_over(ops.reduce_and, ops.is_nan(x), axis, keepdims)
    return ops.select(nothing, scalar(-1, out), out)


def nanargmax(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The int32 index of the first largest element that is not NaN; -1 where nothing is left."""
    return _nan_arg_extreme(ops.argmax, -math.inf, x, axis, keepdims)


def nanargmin(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The int32 index of the first smallest element that is not NaN; -1 where nothing is left."""
    return _nan_arg_extreme(ops.argmin, math.inf, x, axis, keepdims)
