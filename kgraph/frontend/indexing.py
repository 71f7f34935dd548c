"""`x[key]` with NumPy's meaning for traced arrays: slices, integers, None, Ellipsis, integer arrays, traced indices."""

from __future__ import annotations

import builtins

import numpy as np

from kgraph import ops
from kgraph.errors import CaptureError, ShapeError
from kgraph.frontend.traced_array import TracedArray
from kgraph.ir import Dim, TensorType
from kgraph.ops.common import broadcast_shapes


def get_item(x, key):
    """`x[key]`.

    Indices out of bounds are clamped to the last element, as in JAX, where they are traced or the size is symbolic;
    they raise IndexError where both are known.
    """
    entries = _entries(key, x.shape)
    if not any(kind == "array" for kind, _ in entries):
        return _basic(x, entries)
    # Integers beside index arrays take part in their broadcasting.
    entries = [("array", _index_array(value)) if kind == "int" else (kind, value) for kind, value in entries]
    return _advanced(_slice_axes(x, entries), entries)


def _entries(key, shape) -> list[tuple[str, object]]:
    """The key as one (kind, value) per axis of the operand, in order, plus a ("new", None) per None."""
    key = key if isinstance(key, tuple) else (key,)
    entries: list[tuple[str, object]] = []
    for item in key:
        if item is None:
            entries.append(("new", None))
        elif item is Ellipsis:
            entries.append(("ellipsis", None))
        elif isinstance(item, builtins.slice):
            entries.append(("slice", item))
        elif isinstance(item, Dim) or (isinstance(item, (int, np.integer)) and not isinstance(item, (bool, np.bool_))):
            entries.append(("int", item if isinstance(item, Dim) else int(item)))
        else:
            entries.extend(("array", a) for a in _index_arrays(item))
    used = sum(kind in ("slice", "int", "array") for kind, _ in entries)
    rank = len(shape)
    if used > rank:
        raise IndexError(f"{used} indices for a tensor of rank {rank} and shape {shape}")
    positions = [i for i, (kind, _) in enumerate(entries) if kind == "ellipsis"]
    if len(positions) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    at = positions[0] if positions else len(entries)
    fill = [("slice", builtins.slice(None))] * (rank - used)
    return entries[:at] + fill + entries[at + (1 if positions else 0) :]


def _index_arrays(item) -> list:
    """One integer index array, or for a concrete boolean mask one per axis of the mask."""
    item = getattr(item, "value", item) if hasattr(item, "assign") else item
    if isinstance(item, TracedArray):
        if item.value.dtype == "bool":
            raise CaptureError(
                "indexing with a boolean tensor gives a shape that depends on its values. Use keras.ops.where "
                "with three arguments, or multiply by the mask."
            )
        return [item]
    if isinstance(item, (list, tuple)) and any(isinstance(leaf, (TracedArray, Dim)) for leaf in item):
        from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor

        return [convert_to_tensor(item, "int32")]
    array = np.asarray(item)
    if array.dtype == bool:
        return [a.astype("int32") for a in np.nonzero(array)]
    if array.size == 0:
        array = array.astype("int32")
    if array.dtype.kind not in "iu":
        raise IndexError(f"indices must be integers, slices or integer tensors; received {item!r}")
    return [array]


def _index_array(value):
    return ops.dim_value(dim=value, dtype="int32") if isinstance(value, Dim) else np.asarray(value, "int32")


def _int_position(index, size):
    if not isinstance(size, Dim) and not isinstance(index, Dim) and not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for an axis of size {size}")
    return index + size if not isinstance(index, Dim) and index < 0 else index


def _clamp(position, size):
    """A slice bound brought into [0, size]; raises DimDecisionError where that depends on a symbolic size."""
    if position < 0:
        position = position + size
        if position < 0:
            return 0
    return position if position <= size else size


def _slice_bounds(item: builtins.slice, size) -> tuple:
    """(start, limit, positive stride, whether reversed) of a slice of an axis."""
    for bound in (item.start, item.stop, item.step):
        if isinstance(bound, TracedArray):
            raise CaptureError(
                "a slice bound is a tensor, so the shape of the result depends on its value. "
                "Use keras.ops.slice(x, start_indices, shape), whose shape is fixed."
            )
    step = 1 if item.step is None else int(item.step)
    if step == 0:
        raise ValueError("slice step cannot be zero")
    if not isinstance(size, Dim) and not isinstance(item.start, Dim) and not isinstance(item.stop, Dim):
        start, stop, step = item.indices(size)
        count = max(0, -((start - stop) // step) if step > 0 else -((stop - start) // -step))
        if step > 0:
            return start, (start + (count - 1) * step + 1 if count else start), step, False
        first = start + (count - 1) * step if count else 0
        return first, (start + 1 if count else 0), -step, True
    if step > 0:
        start = 0 if item.start is None else _clamp(item.start, size)
        limit = size if item.stop is None else _clamp(item.stop, size)
        if not start <= limit:
            limit = start
        return start, limit, step, False
    if item.start is None and item.stop is None and step == -1:
        return 0, size, 1, True
    # The same elements from the other end: reverse the axis, then slice forward.
    raise ShapeError(
        f"slice {item} with a negative step of an axis of symbolic size {size}; reverse it with [::-1] first"
    )


def _slice_axes(x, entries):
    """Apply the slices of a key; axes of other kinds stay whole."""
    start, limit, stride, reversed_axes = [], [], [], []
    axis = 0
    for kind, value in entries:
        if kind == "new":
            continue
        size = x.shape[axis]
        bounds = _slice_bounds(value, size) if kind == "slice" else (0, size, 1, False)
        start.append(bounds[0])
        limit.append(bounds[1])
        stride.append(bounds[2])
        if bounds[3]:
            reversed_axes.append(axis)
        axis += 1
    return _apply(x, start, limit, stride, reversed_axes)


def _apply(x, start, limit, stride, reversed_axes):
    if any(s != 0 for s in start) or tuple(limit) != tuple(x.shape) or any(s != 1 for s in stride):
        x = ops.slice(x, start=tuple(start), limit=tuple(limit), stride=tuple(stride))
    return ops.rev(x, axes=tuple(reversed_axes)) if reversed_axes else x


def _basic(x, entries):
    start, limit, stride, reversed_axes, shape_of = [], [], [], [], []
    axis = 0
    for kind, value in entries:
        if kind == "new":
            shape_of.append(None)
            continue
        size = x.shape[axis]
        if kind == "int":
            position = _int_position(value, size)
            start.append(position)
            limit.append(position + 1)
            stride.append(1)
        else:
            bounds = _slice_bounds(value, size)
            start.append(bounds[0])
            limit.append(bounds[1])
            stride.append(bounds[2])
            if bounds[3]:
                reversed_axes.append(axis)
            shape_of.append(axis)
        axis += 1
    x = _apply(x, start, limit, stride, reversed_axes)
    shape = tuple(1 if a is None else x.shape[a] for a in shape_of)
    return x if shape == tuple(x.shape) else ops.reshape(x, shape=shape)


def _broadcast(arrays: list) -> tuple[list, tuple]:
    shape = broadcast_shapes("indexing", *[TensorType(tuple(a.shape), a.dtype.name) for a in arrays])
    return [a if tuple(a.shape) == shape else ops.broadcast_to(a, shape=shape) for a in arrays], shape


def _normalise(index, size):
    """Index array as int32 in [0, size), negative ones counted from the end."""
    if isinstance(index, np.ndarray) and not isinstance(size, Dim):
        if index.size and (index.min() < -size or index.max() >= size):
            raise IndexError(f"an index is out of bounds for an axis of size {size}")
        return np.where(index < 0, index + size, index).astype("int32")
    index = ops.convert(index, dtype="int32")
    end = ops.dim_value(dim=size, dtype="int32") if isinstance(size, Dim) else np.asarray(size, "int32")
    zero, one = np.asarray(0, "int32"), np.asarray(1, "int32")
    index = ops.select(ops.lt(index, zero), ops.add(index, end), index)
    return ops.minimum(ops.maximum(index, zero), ops.sub(end, one))


def _advanced(x, entries):
    axes, arrays = [], []
    axis = 0
    for kind, value in entries:
        if kind == "array":
            axes.append(axis)
            arrays.append(_normalise(value, x.shape[axis]))
        axis += kind != "new"
    kept = [a for a in range(len(x.shape)) if a not in axes]
    positions = [i for i, (kind, _) in enumerate(entries) if kind == "array"]
    adjacent = positions[-1] - positions[0] + 1 == len(positions)
    if len(axes) == 1:
        index_shape = tuple(arrays[0].shape)
        y = ops.take(x, arrays[0], axis=axes[0], mode="clip")
        before = axes[0]
    else:
        arrays, index_shape = _broadcast(arrays)
        rank = len(index_shape)
        index = ops.concatenate(*[ops.reshape(a, shape=(*a.shape, 1)) for a in arrays], axis=rank)
        kept_first = ops.transpose(x, permutation=(*axes, *kept)) if axes != list(range(len(axes))) else x
        y = ops.gather_nd(kept_first, index)
        # y: index_shape, then the kept axes. Adjacent index arrays leave their result in their place.
        before = sum(a < axes[0] for a in kept) if adjacent else 0
        if before:
            order = (*range(rank, rank + before), *range(rank), *range(rank + before, rank + len(kept)))
            y = ops.transpose(y, permutation=order)
    if not any(kind == "new" for kind, _ in entries):
        return y
    return ops.reshape(y, shape=_with_new_axes(entries, x, index_shape, positions[0], adjacent))


def _with_new_axes(entries, x, index_shape, first, adjacent) -> tuple:
    shape = [] if adjacent else list(index_shape)
    axis = 0
    for i, (kind, _) in enumerate(entries):
        if kind == "new":
            shape.append(1)
            continue
        if kind == "slice":
            shape.append(x.shape[axis])
        elif adjacent and i == first:
            shape.extend(index_shape)
        axis += 1
    return tuple(shape)
