"""Pooling over fixed windows, and adaptive pooling to a fixed output size."""

from __future__ import annotations

import numpy as np
from keras.src import backend

from kgraph import ops
from kgraph.errors import DimDecisionError
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.layout import from_channels_last, to_channels_last
from kgraph.frontend.keras_backend.numpy.common import Tensor, is_float, scalar, to_inexact
from kgraph.ir import Dim


def _check_padding(padding: str) -> str:
    if padding not in ("same", "valid"):
        raise ValueError(f"Invalid padding '{padding}', must be 'same' or 'valid'.")
    return padding


def _per_axis(value):
    return value if value is None or isinstance(value, int) else tuple(int(v) for v in value)


def max_pool(inputs: Tensor, pool_size, strides=None, padding="valid", data_format=None) -> Tensor:
    data_format = backend.standardize_data_format(data_format)
    x = to_channels_last(convert_to_tensor(inputs), data_format)
    y = ops.max_pool(x, window=_per_axis(pool_size), strides=_per_axis(strides), padding=_check_padding(padding))
    return from_channels_last(y, data_format)


def average_pool(inputs: Tensor, pool_size, strides=None, padding="valid", data_format=None) -> Tensor:
    """Mean over windows; what is padded does not count."""
    data_format = backend.standardize_data_format(data_format)
    x = to_channels_last(to_inexact(inputs), data_format)
    y = ops.average_pool(x, window=_per_axis(pool_size), strides=_per_axis(strides), padding=_check_padding(padding))
    return from_channels_last(y, data_format)


# -- adaptive ----------------------------------------------------------------------------------------------------------
def _pool_axis(x: Tensor, axis: int, window: int, stride: int, kind: str) -> Tensor:
    windows, strides = [1] * len(x.shape), [1] * len(x.shape)
    windows[axis], strides[axis] = window, stride
    y = ops.reduce_window(x, kind=kind, window=tuple(windows), strides=tuple(strides), padding="valid")
    return ops.div(y, scalar(window, y)) if kind == "sum" else y


def _adaptive_axis(x: Tensor, axis: int, size: int, kind: str) -> Tensor:
    """Pool one axis to `size` windows: window i covers [floor(i n / size), ceil((i + 1) n / size))."""
    n = x.shape[axis]
    if isinstance(n, Dim):
        if size == 1:
            return ops.reduce_max(x, axes=(axis,), keepdims=True) if kind == "max" else _mean_axis(x, axis)
        raise DimDecisionError(f"adaptive pooling of an axis of symbolic size {n} to {size} windows")
    if n % size == 0:
        return _pool_axis(x, axis, n // size, n // size, kind)
    starts = np.arange(size) * n // size
    stops = -(-(np.arange(1, size + 1) * n) // size)
    lengths = stops - starts
    short, long = int(lengths.min()), int(lengths.max())
    pooled = [_pool_axis(x, axis, w, 1, kind) for w in dict.fromkeys((short, long))]
    # All windows of both lengths that there are, then those that are wanted.
    offset = n - short + 1
    index = np.where(lengths == short, starts, starts + offset).astype("int32")
    both = pooled[0] if len(pooled) == 1 else ops.concatenate(*pooled, axis=axis)
    return ops.take(both, index, axis=axis, mode="clip")


def _mean_axis(x: Tensor, axis: int) -> Tensor:
    total = ops.reduce_sum(x, axes=(axis,), keepdims=True)
    return ops.div(total, ops.dim_value(dim=x.shape[axis], dtype=x.dtype.name))


def _adaptive(inputs: Tensor, output_size, data_format, kind: str) -> Tensor:
    data_format = backend.standardize_data_format(data_format)
    x = convert_to_tensor(inputs)
    x = x if is_float(x) or kind == "max" else to_inexact(x)
    rank = len(x.shape) - 2
    if rank not in (1, 2, 3):
        raise ValueError(f"adaptive pooling supports only 1D/2D/3D inputs. Received: inputs.shape={tuple(x.shape)}")
    sizes = (output_size,) * rank if isinstance(output_size, int) else tuple(output_size)
    first = 2 if data_format == "channels_first" else 1
    for axis, size in enumerate(sizes):
        if size is not None:
            x = _adaptive_axis(x, first + axis, size, kind)
    return x


def adaptive_average_pool(inputs: Tensor, output_size, data_format=None) -> Tensor:
    return _adaptive(inputs, output_size, data_format, "sum")


def adaptive_max_pool(inputs: Tensor, output_size, data_format=None) -> Tensor:
    return _adaptive(inputs, output_size, data_format, "max")
