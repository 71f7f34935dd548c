"""Slices at run-time positions, scatters, and unstacking."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.ir.dims import product


def _start_scalars(start_indices, rank: int) -> list:
    """One int32 scalar per axis, from a vector or a sequence of scalars, traced or not."""
    if hasattr(start_indices, "shape"):
        start_indices = convert_to_tensor(start_indices)
        if len(start_indices.shape) == 0:
            start_indices = ops.reshape(start_indices, shape=(1,))
        starts = [ops.reshape(start_indices[i : i + 1], shape=()) for i in range(rank)]
    else:
        starts = [ops.reshape(convert_to_tensor(s), shape=()) for s in start_indices]
    return [ops.convert(s, dtype="int32") for s in starts]


def _is_static(starts) -> bool:
    return all(isinstance(s, np.ndarray) for s in starts)


def slice(inputs, start_indices, shape):
    """The block of the given shape at a position; -1 in `shape` takes the rest of the axis (static starts only)."""
    inputs = convert_to_tensor(inputs)
    if not hasattr(start_indices, "shape") and len(start_indices) != len(shape):
        raise ValueError(
            "Length of `start_indices` must match length of `shape`. "
            f"Received: start_indices={start_indices}, shape={shape}"
        )
    starts = _start_scalars(start_indices, len(shape))
    sizes = tuple(
        inputs.shape[i] - int(starts[i])
        if not hasattr(s, "terms") and s == -1
        else (s if hasattr(s, "terms") else int(s))
        for i, s in enumerate(shape)
    )
    if _is_static(starts):
        first = tuple(_clamped(int(s), n, size) for s, n, size in zip(starts, sizes, inputs.shape))
        limit = tuple(s + n for s, n in zip(first, sizes))
        if limit == tuple(inputs.shape) and not any(first):
            return inputs
        return ops.slice(inputs, start=first, limit=limit, stride=(1,) * len(first))
    return ops.dynamic_slice(inputs, *starts, shape=sizes)


def _clamped(start: int, length, size):
    """The start moved so that the block lies inside, as lax.dynamic_slice does."""
    if isinstance(size, int) and isinstance(length, int):
        return max(0, min(start, size - length))
    return start


def slice_update(inputs, start_indices, updates):
    """`inputs` with a block replaced by `updates` (converted to the dtype of `inputs`)."""
    inputs = convert_to_tensor(inputs)
    updates = convert_to_tensor(updates, dtype=inputs.dtype)
    return ops.dynamic_update_slice(inputs, updates, *_start_scalars(start_indices, len(inputs.shape)))


def _flat_indices(indices):
    indices = convert_to_tensor(indices)
    return indices if indices.dtype.name == "int32" else ops.convert(indices, dtype="int32")


def scatter(indices, values, shape):
    """Zeros of the given shape with `values` added at `indices` (last axis: the coordinates)."""
    values = convert_to_tensor(values)
    shape = tuple(int(s) if not hasattr(s, "terms") else s for s in shape)
    base = ops.full(shape=shape, value=0, dtype=values.dtype.name)
    return ops.scatter_nd(base, _flat_indices(indices), values, reduction="add")


def scatter_update(inputs, indices, updates, reduction=None):
    """`inputs` with `updates` written at (or combined with what is at) `indices` (last axis: the coordinates)."""
    inputs = convert_to_tensor(inputs)
    if reduction not in (None, "add", "max", "min", "mul"):
        raise ValueError(f"Unsupported reduction: {reduction}")
    indices = _flat_indices(indices)
    updates = convert_to_tensor(updates, dtype=inputs.dtype)
    expected = (*indices.shape[:-1], *inputs.shape[indices.shape[-1] :])
    if tuple(updates.shape) != expected:
        fits = product(updates.shape) == product(expected)
        updates = ops.reshape(updates, shape=expected) if fits else ops.broadcast_to(updates, shape=expected)
    return ops.scatter_nd(inputs, indices, updates, reduction=reduction or "update")


def unstack(x, num=None, axis=0):
    """The slices of `x` along an axis of static size, without that axis."""
    x = convert_to_tensor(x)
    axis = axis % len(x.shape)
    prefix = (np.s_[:],) * axis
    return [x[(*prefix, i)] for i in range(num if num is not None else x.shape[axis])]
