"""Functions that make tensors from numbers: ranges, constants, identity matrices, window functions."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
from keras.src.backend.common import dtypes
from keras.src.backend.common.variables import standardize_dtype

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.core import is_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    broadcast,
    broadcast_sizes,
    concrete,
    convert,
    default_dtype,
    dtype_of,
    filled,
    floatx,
    insert_axes,
    is_traced,
    move_axis,
    number_or_tensor,
    promote,
    reshape_to,
    scalar,
    shape_of,
    size_of,
)
from kgraph.ir import Dim, Traced


def array(x: Any, dtype: str | None = None) -> Tensor:
    """A tensor made of numbers, sequences or a tensor."""
    return convert_to_tensor(x, dtype=dtype)


# -- constants ------------------------------------------------------------------------------------------------------
def zeros(shape: Any, dtype: str | None = None) -> Tensor:
    """A tensor of zeros, of floatx by default."""
    return filled(shape_of(shape), 0, default_dtype(dtype))


def ones(shape: Any, dtype: str | None = None) -> Tensor:
    """A tensor of ones, of floatx by default."""
    return filled(shape_of(shape), 1, default_dtype(dtype))


def empty(shape: Any, dtype: str | None = None) -> Tensor:
    """A tensor to be overwritten; it holds zeros, so that results never depend on old memory."""
    return zeros(shape, dtype)


def full(shape: Any, fill_value: Tensor, dtype: str | None = None) -> Tensor:
    """A tensor of one value, or of a value broadcast to the shape; of floatx by default."""
    shape, dtype = shape_of(shape), default_dtype(dtype)
    if type(fill_value) in (bool, int, float):
        return filled(shape, fill_value, dtype)
    return broadcast(convert_to_tensor(fill_value, dtype), shape)


def zeros_like(x: Tensor, dtype: str | None = None) -> Tensor:
    """Zeros in the shape and dtype of a tensor."""
    return full_like(x, 0, dtype)


def ones_like(x: Tensor, dtype: str | None = None) -> Tensor:
    """Ones in the shape and dtype of a tensor."""
    return full_like(x, 1, dtype)


def empty_like(x: Tensor, dtype: str | None = None) -> Tensor:
    """Zeros in the shape and dtype of a tensor."""
    return full_like(x, 0, dtype)


def full_like(x: Tensor, fill_value: Tensor, dtype: str | None = None) -> Tensor:
    """One value in the shape and dtype of a tensor."""
    x = convert_to_tensor(x)
    return full(tuple(x.shape), fill_value, dtype or dtype_of(x))


# -- matrices -------------------------------------------------------------------------------------------------------
def _relative_column(rows: Any, columns: Any) -> Tensor:
    """int32 [rows, columns] of column minus row."""
    row = ops.iota(shape=(rows, 1), dtype="int32", axis=0)
    column = ops.iota(shape=(1, columns), dtype="int32", axis=1)
    return ops.sub(column, row)


def eye(N: int, M: int | None = None, k: int = 0, dtype: str | None = None) -> Tensor:
    """[N, M] with ones on the k-th diagonal."""
    offset = _relative_column(size_of(N), size_of(N if M is None else M))
    return ops.convert(ops.eq(offset, scalar(size_of(k), offset)), dtype=default_dtype(dtype))


def identity(n: int, dtype: str | None = None) -> Tensor:
    """The identity matrix [n, n]."""
    return eye(n, dtype=dtype)


def tri(N: int, M: int | None = None, k: int = 0, dtype: str | None = None) -> Tensor:
    """[N, M] with ones at and below the k-th diagonal."""
    offset = _relative_column(size_of(N), size_of(N if M is None else M))
    return ops.convert(ops.le(offset, scalar(size_of(k), offset)), dtype=default_dtype(dtype))


def _triangle(function: str, x: Tensor, compare: Any, k: Any) -> Tensor:
    x = convert_to_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"{function}: expected a tensor of rank 2 or more. Received: shape={tuple(x.shape)}")
    offset = _relative_column(*x.shape[-2:])
    return ops.select(compare(offset, convert_to_tensor(k, "int32")), x, scalar(0, x))


def tril(x: Tensor, k: int = 0) -> Tensor:
    """Matrices with zeros above the k-th diagonal."""
    return _triangle("tril", x, ops.le, k)


def triu(x: Tensor, k: int = 0) -> Tensor:
    """Matrices with zeros below the k-th diagonal."""
    return _triangle("triu", x, ops.ge, k)


def vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    """[len(x), N] of the powers of the elements of a vector, the highest first unless `increasing`."""
    x = convert_to_tensor(x)
    if x.ndim != 1:
        raise ValueError(f"vander: expected a vector. Received: shape={tuple(x.shape)}")
    columns = x.shape[0] if N is None else size_of(N)
    if isinstance(columns, int) and columns < 0:
        raise ValueError(f"vander: N cannot be negative. Received: N={N}")
    if dtype_of(x) == "bool":
        x = convert(x, "int32")
    exponents = ops.iota(shape=(columns,), dtype="int32", axis=0)
    exponents = exponents if increasing else ops.rev(exponents, axes=(0,))
    return ops.pow(insert_axes(x, (1,)), convert(exponents, dtype_of(x)))


# -- ranges ---------------------------------------------------------------------------------------------------------
def arange(start: Any, stop: Any = None, step: Any = None, dtype: str | None = None) -> Tensor:
    """Numbers from start up to stop (excluded). Bounds are numbers, symbolic sizes or concrete tensors."""
    if dtype is None:
        dtype = dtypes.result_type(*(_range_type(v) for v in (start, stop, step) if v is not None))
    dtype = standardize_dtype(dtype)
    if stop is None:
        start, stop = 0, start
    step = 1 if step is None else step
    if builtins.any(isinstance(v, Traced) for v in (start, stop, step)):
        raise UnsupportedError(
            "keras.ops.arange: its bounds are tensors under trace, so that the length of the result is not known. "
            "Take them from shapes, which may be symbolic, or from Python numbers"
        )
    if builtins.any(isinstance(v, Dim) for v in (start, stop, step)):
        return _symbolic_arange(start, stop, step, dtype)
    start, stop, step = (v.item() if is_tensor(v) else v for v in (start, stop, step))
    # Evaluated in double precision (or as integers), so that the last digits do not depend on the dtype.
    return np.arange(start, stop, step).astype(convert_to_tensor(0, dtype).dtype)


def _range_type(value: Any) -> Any:
    if isinstance(value, Dim):
        return int
    return value.dtype if hasattr(value, "dtype") else type(value)


def _symbolic_arange(start: Any, stop: Any, step: Any, dtype: str) -> Tensor:
    if isinstance(step, Dim) or step != int(step) or step == 0:
        raise UnsupportedError(f"keras.ops.arange: a step of {step} between symbolic bounds {start} and {stop}")
    step = int(step)
    length = -((start - stop) // step) if step > 0 else -((stop - start) // -step)
    out = ops.iota(shape=(length,), dtype="int32", axis=0)
    if step != 1:
        out = ops.mul(out, scalar(step, out))
    if not (isinstance(start, int) and start == 0):
        out = ops.add(out, convert_to_tensor(start, "int32"))
    return convert(out, dtype)


def linspace(
    start: Tensor,
    stop: Tensor,
    num: Any = 50,
    endpoint: bool = True,
    retstep: bool = False,
    dtype: str | None = None,
    axis: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`num` evenly spaced numbers from start to stop, along a new axis; with their distance if `retstep`."""
    num = size_of(num)
    if num < 0:
        raise ValueError(f"linspace: num cannot be negative. Received: num={num}")
    start, stop = number_or_tensor(start), number_or_tensor(stop)
    compute = dtypes.result_type(*(_range_type(v) for v in (start, stop)), float)
    dtype = compute if dtype is None else standardize_dtype(dtype)
    intervals = num - 1 if endpoint else num
    if not is_traced(start, stop) and np.ndim(start) == np.ndim(stop) == 0:
        # Between Python numbers everything is known: one rounding, from double precision.
        values, spacing = np.linspace(float(start), float(stop), num, endpoint, retstep=True)
        out = _floored(convert_to_tensor(values, "float64"), dtype)
        return (out, np.array(spacing, dtype=_np_dtype(compute))) if retstep else out
    start, stop = (convert_to_tensor(v, compute) for v in (start, stop))
    shape = broadcast_sizes(start.shape, stop.shape)
    start, stop = broadcast(start, shape), broadcast(stop, shape)
    span = ops.sub(stop, start)
    step = ops.div(span, scalar(intervals if intervals > 0 else math.nan, span))
    fractions = np.arange(num) / builtins.max(intervals, 1)
    weights = reshape_to(np.asarray(fractions, dtype=start.dtype), (num,) + (1,) * len(shape))
    # Each end is weighted by itself, so that the last number is `stop` exactly.
    out = ops.add(ops.mul(start, ops.sub(scalar(1, weights), weights)), ops.mul(stop, weights))
    out = move_axis(out, 0, axis % (len(shape) + 1))
    out = _floored(out, dtype)
    return (out, step) if retstep else out


def _floored(x: Tensor, dtype: str) -> Tensor:
    """Conversion that rounds down where the target is an integer."""
    return ops.convert(ops.floor(x) if "int" in dtype else x, dtype=dtype)


def _np_dtype(dtype: str) -> np.dtype:
    return convert_to_tensor(0, dtype).dtype


def logspace(
    start: Tensor,
    stop: Tensor,
    num: Any = 50,
    endpoint: bool = True,
    base: float = 10,
    dtype: str | None = None,
    axis: int = 0,
) -> Tensor:
    """`num` numbers from base**start to base**stop, evenly spaced on a logarithmic scale."""
    start, stop, base = (number_or_tensor(v) for v in (start, stop, base))
    if dtype is None:
        dtype = dtypes.result_type(*(_range_type(v) for v in (start, stop)), float)
    dtype = standardize_dtype(dtype)
    if not is_traced(start, stop, base) and np.ndim(start) == np.ndim(stop) == np.ndim(base) == 0:
        return np.logspace(float(start), float(stop), size_of(num), endpoint, float(base)).astype(_np_dtype(dtype))
    exponents: Tensor = linspace(start, stop, num, endpoint, axis=axis)
    powers = promote(base, exponents)
    return convert(ops.pow(powers[0], powers[1]), dtype)


def geomspace(
    start: Tensor,
    stop: Tensor,
    num: Any = 50,
    endpoint: bool = True,
    dtype: str | None = None,
    axis: int = 0,
) -> Tensor:
    """`num` numbers from start to stop with a constant ratio; both ends of one sign, neither of them 0."""
    start, stop = number_or_tensor(start), number_or_tensor(stop)
    compute = dtypes.result_type(*(_range_type(v) for v in (start, stop)), float)
    dtype = compute if dtype is None else standardize_dtype(dtype)
    if not is_traced(start, stop) and np.ndim(start) == np.ndim(stop) == 0:
        return np.geomspace(float(start), float(stop), size_of(num), endpoint).astype(_np_dtype(dtype))
    start, stop = (convert_to_tensor(v, compute) for v in (start, stop))
    shape = broadcast_sizes(start.shape, stop.shape)
    start, stop = broadcast(start, shape), broadcast(stop, shape)
    logs: Tensor = linspace(ops.log(ops.abs(start)), ops.log(ops.abs(stop)), num, endpoint, axis=axis)
    direction = insert_axes(ops.sign(start), (axis % (len(shape) + 1),))
    return convert(ops.mul(ops.exp(logs), direction), dtype)


# -- windows --------------------------------------------------------------------------------------------------------
def _window(function: str, make: Any, length: Tensor) -> Tensor:
    (points,) = concrete(function, length)
    return np.asarray(make(int(points))).astype(_np_dtype(floatx()))


def bartlett(x: int) -> Tensor:
    """The triangular window of x points."""
    return _window("bartlett", np.bartlett, x)


def blackman(x: int) -> Tensor:
    """The Blackman window of x points."""
    return _window("blackman", np.blackman, x)


def hamming(x: int) -> Tensor:
    """The Hamming window of x points."""
    return _window("hamming", np.hamming, x)


def hanning(x: int) -> Tensor:
    """The Hann window of x points."""
    return _window("hanning", np.hanning, x)


def kaiser(x: int, beta: float) -> Tensor:
    """The Kaiser window of x points and shape `beta`."""
    (known,) = concrete("kaiser", beta)
    return _window("kaiser", lambda points: np.kaiser(points, float(known)), x)
