"""Functions that rearrange, join, split and repeat the elements of tensors."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Axes,
    Tensor,
    axes_of,
    axis_of,
    broadcast,
    concrete,
    drop_axes,
    flatten,
    insert_axes,
    is_traced,
    permute,
    promote,
    reshape_to,
    shape_of,
    size_of,
    slice_axis,
    tensors_of,
)
from kgraph.frontend.keras_backend.sparse import SparseTensor
from kgraph.ir import Dim
from kgraph.ir.dims import product
from kgraph.ops.common import sizes_differ


# -- order and rank -------------------------------------------------------------------------------------------------
def reshape(x: Tensor, newshape: Any) -> Tensor:
    """The same elements in another shape; one size may be -1. Raises ValueError where the sizes do not fit."""
    if type(x) is SparseTensor:
        return sparse_rules.reshape(x, _complete_shape(x, newshape))
    x = convert_to_tensor(x)
    return reshape_to(x, _complete_shape(x, newshape))


def _complete_shape(x: Tensor, newshape: Any) -> tuple:
    """`newshape` with the size that stands for -1. Raises ValueError where there is none."""
    shape = list(shape_of(newshape))
    unknown = [i for i, s in enumerate(shape) if isinstance(s, int) and s == -1]
    if len(unknown) > 1:
        raise ValueError(f"reshape: only one size can be -1. Received: newshape={newshape}")
    if unknown:
        total, known = product(x.shape), product(s for i, s in enumerate(shape) if i != unknown[0])
        if isinstance(known, int) and known == 0:
            raise ValueError(f"reshape: the size -1 is ambiguous in {newshape} for a tensor of shape {x.shape}")
        if isinstance(total, int) and isinstance(known, int) and total % known:
            raise ValueError(f"reshape: {total} elements of shape {tuple(x.shape)} do not fit into {newshape}")
        shape[unknown[0]] = total // known
    return tuple(shape)


def ravel(x: Tensor) -> Tensor:
    """All elements in a row."""
    return flatten(convert_to_tensor(x))


def ndim(x: Tensor) -> int:
    """The rank."""
    return convert_to_tensor(x).ndim


def size(x: Tensor) -> int | Dim:
    """The number of elements."""
    return product(convert_to_tensor(x).shape)


def transpose(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """A tensor with its axes in the given order, reversed by default."""
    x = x if type(x) is SparseTensor else convert_to_tensor(x)
    order = tuple(reversed(range(x.ndim))) if axes is None else tuple(axis_of(a, x.ndim) for a in axes)
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"transpose: axes {axes} are not an order of the {x.ndim} axes of the tensor")
    return (sparse_rules.permute if type(x) is SparseTensor else permute)(x, order)


def swapaxes(x: Tensor, axis1: int, axis2: int) -> Tensor:
    """A tensor with two axes exchanged."""
    x = convert_to_tensor(x)
    order = list(range(x.ndim))
    a, b = axis_of(axis1, x.ndim), axis_of(axis2, x.ndim)
    order[a], order[b] = b, a
    return permute(x, tuple(order))


def moveaxis(x: Tensor, source: Axes, destination: Axes) -> Tensor:
    """A tensor with axes moved from `source` to `destination`, the others in their order."""
    x = convert_to_tensor(x)
    sources = [axis_of(a, x.ndim) for a in (source if isinstance(source, (tuple, list)) else [source])]
    targets = [axis_of(a, x.ndim) for a in (destination if isinstance(destination, (tuple, list)) else [destination])]
    if len(sources) != len(targets):
        raise ValueError(f"moveaxis: source {source} and destination {destination} differ in length")
    order = [a for a in range(x.ndim) if a not in sources]
    for target, origin in sorted(zip(targets, sources, strict=True)):
        order.insert(target, origin)
    return permute(x, tuple(order))


def expand_dims(x: Tensor, axis: Axes) -> Tensor:
    """A tensor with axes of size 1 put in, at places of the result."""
    x = x if type(x) is SparseTensor else convert_to_tensor(x)
    places = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    axes = axes_of(places, x.ndim + len(places))
    return (sparse_rules.insert_axes if type(x) is SparseTensor else insert_axes)(x, axes)


def squeeze(x: Tensor, axis: Axes | None = None) -> Tensor:
    """A tensor without axes of size 1. Raises ValueError for an axis of another size."""
    x = x if type(x) is SparseTensor else convert_to_tensor(x)
    axes = tuple(i for i, s in enumerate(x.shape) if s == 1) if axis is None else axes_of(axis, x.ndim)
    for a in axes:
        if sizes_differ(x.shape[a], 1):
            raise ValueError(f"squeeze: axis {a} of shape {tuple(x.shape)} is not of size 1")
    return (sparse_rules.drop_axes if type(x) is SparseTensor else drop_axes)(x, axes)


def broadcast_to(x: Tensor, shape: Any) -> Tensor:
    """A tensor repeated to a shape by NumPy's rules."""
    return broadcast(convert_to_tensor(x), shape_of(shape))


def flip(x: Tensor, axis: Axes | None = None) -> Tensor:
    """A tensor with the order of its elements reversed along axes, all by default."""
    x = convert_to_tensor(x)
    axes = axes_of(axis, x.ndim)
    return ops.rev(x, axes=axes) if axes else x


def fliplr(x: Tensor) -> Tensor:
    """A tensor reversed along its second axis."""
    x = convert_to_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"fliplr: expected a tensor of rank 2 or more. Received: shape={tuple(x.shape)}")
    return ops.rev(x, axes=(1,))


def flipud(x: Tensor) -> Tensor:
    """A tensor reversed along its first axis."""
    x = convert_to_tensor(x)
    if x.ndim < 1:
        raise ValueError("flipud: expected a tensor of rank 1 or more. Received a scalar")
    return ops.rev(x, axes=(0,))


def rot90(array: Tensor, k: int = 1, axes: tuple[int, int] = (0, 1)) -> Tensor:
    """A tensor turned k times by 90 degrees in the plane of two axes, from the first towards the second."""
    array = convert_to_tensor(array)
    if array.ndim < 2:
        raise ValueError(f"Input array must have at least 2 dimensions. Received: array.ndim={array.ndim}")
    if len(axes) != 2 or axes[0] == axes[1]:
        raise ValueError(f"Invalid axes: {axes}. Axes must be a tuple of two different dimensions.")
    first, second = (axis_of(a, array.ndim) for a in axes)
    if first == second:
        raise ValueError(f"Invalid axes: {axes}. Axes must be a tuple of two different dimensions.")
    turns = k % 4
    if turns == 0:
        return array
    if turns == 2:
        return ops.rev(array, axes=tuple(sorted((first, second))))
    if turns == 1:
        return swapaxes(ops.rev(array, axes=(second,)), first, second)
    return ops.rev(swapaxes(array, first, second), axes=(second,))


def roll(x: Tensor, shift: Axes, axis: Axes | None = None) -> Tensor:
    """A tensor whose elements are moved by `shift` places along axes, those beyond the end coming back in front."""
    x = convert_to_tensor(x)
    if axis is None:
        return reshape_to(roll(flatten(x), shift, 0), x.shape)
    axes = [axis_of(a, x.ndim) for a in (axis if isinstance(axis, (tuple, list)) else [axis])]
    shifts = shift if isinstance(shift, (tuple, list)) else [shift]
    shifts = list(shifts) * len(axes) if len(shifts) == 1 else list(shifts)
    if len(axes) == 1 and len(shifts) > 1:
        axes = axes * len(shifts)
    for a, s in zip(axes, shifts, strict=True):
        x = _roll_axis(x, s, a)
    return x


def _roll_axis(x: Tensor, shift: Any, axis: int) -> Tensor:
    length = x.shape[axis]
    if isinstance(length, int) and not is_traced(shift) and not isinstance(shift, Dim):
        if length == 0 or (places := size_of(shift) % length) == 0:
            return x
        tail, head = slice_axis(x, axis, length - places, length), slice_axis(x, axis, 0, length - places)
        return ops.concatenate(tail, head, axis=axis)
    # The shift or the length is known only at run time: every element is fetched from its place modulo the length.
    places = ops.iota(shape=(length,), dtype="int32", axis=0)
    length, shift = convert_to_tensor(length, "int32"), convert_to_tensor(shift, "int32")
    return ops.take(x, ops.mod(ops.sub(places, shift), length), axis=axis, mode="clip")


# -- joining --------------------------------------------------------------------------------------------------------
def concatenate(xs: Sequence[Tensor], axis: int | None = 0) -> Tensor:
    """Tensors joined along an axis; flattened first where it is None; sparse where all of them are."""
    xs = tensors_of(xs)
    if xs and axis is not None and builtins.all(type(x) is SparseTensor for x in xs):
        return sparse_rules.concatenate(xs, axis)
    xs = promote(*(convert_to_tensor(x) for x in xs))
    if axis is None:
        xs, axis = [flatten(x) for x in xs], 0
    axis = axis_of(axis, xs[0].ndim)
    return xs[0] if len(xs) == 1 else ops.concatenate(*xs, axis=axis)


def append(x1: Tensor, x2: Tensor, axis: int | None = None) -> Tensor:
    """x2 joined to the end of x1."""
    return concatenate([convert_to_tensor(x1), convert_to_tensor(x2)], axis)


def stack(x: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    xs = promote(*(convert_to_tensor(t) for t in tensors_of(x)))
    axis = axis_of(axis, xs[0].ndim + 1)
    for t in xs:
        if t.ndim != xs[0].ndim or builtins.any(map(sizes_differ, t.shape, xs[0].shape)):
            raise ValueError(f"stack: all tensors need the same shape. Received: {[tuple(t.shape) for t in xs]}")
    xs = [insert_axes(t, (axis,)) for t in xs]
    return xs[0] if len(xs) == 1 else ops.concatenate(*xs, axis=axis)


def hstack(xs: Sequence[Tensor]) -> Tensor:
    """Tensors joined along the second axis, along the first where they have only one."""
    xs = [_at_least_1d(x) for x in tensors_of(xs)]
    return concatenate(xs, 0 if xs[0].ndim == 1 else 1)


def vstack(xs: Sequence[Tensor]) -> Tensor:
    """Tensors joined along the first axis; those of rank 1 as rows."""
    return concatenate([_at_least_2d(x) for x in tensors_of(xs)], 0)


def dstack(xs: Sequence[Tensor]) -> Tensor:
    """Tensors joined along the third axis, with axes put in where they have fewer."""
    xs = [_at_least_2d(x) for x in tensors_of(xs)]
    return concatenate([insert_axes(x, (2,)) if x.ndim == 2 else x for x in xs], 2)


def _at_least_1d(x: Tensor) -> Tensor:
    x = convert_to_tensor(x)
    return x if x.ndim else reshape_to(x, (1,))


def _at_least_2d(x: Tensor) -> Tensor:
    x = _at_least_1d(x)
    return x if x.ndim > 1 else reshape_to(x, (1, *x.shape))


# -- splitting ------------------------------------------------------------------------------------------------------
def split(x: Tensor, indices_or_sections: Any, axis: int = 0) -> list[Tensor]:
    """Parts of a tensor along an axis: so many equal ones, or cut before the given indices."""
    x = convert_to_tensor(x)
    axis = axis_of(axis, x.ndim)
    sections = _sections(indices_or_sections)
    if sections is not None:
        remainder = x.shape[axis] % sections
        if remainder if isinstance(remainder, int) else remainder > 0:
            raise ValueError(
                f"split: axis {axis} of size {x.shape[axis]} cannot be divided into {sections} equal parts. "
                "Use `array_split` for parts of different sizes"
            )
        step = x.shape[axis] // sections
        cuts = [i * step for i in range(sections + 1)]
        return [slice_axis(x, axis, a, b) for a, b in itertools.pairwise(cuts)]
    return _split_at(x, indices_or_sections, axis)


def array_split(x: Tensor, indices_or_sections: Any, axis: int = 0) -> list[Tensor]:
    """Parts of a tensor along an axis, as `split`, the first ones larger by one where the size does not divide."""
    x = convert_to_tensor(x)
    axis = axis_of(axis, x.ndim)
    sections = _sections(indices_or_sections)
    if sections is None:
        return _split_at(x, indices_or_sections, axis)
    if sections <= 0:
        raise ValueError(f"array_split: the number of parts must be positive. Received: {sections}")
    small, larger = x.shape[axis] // sections, x.shape[axis] % sections
    sizes = [small + (1 if i < larger else 0) for i in range(sections)]
    return _cut(x, sizes, axis)


def _sections(indices_or_sections: Any) -> int | Dim | None:
    if isinstance(indices_or_sections, (tuple, list)):
        return None
    if getattr(indices_or_sections, "ndim", 0):
        return None
    return size_of(indices_or_sections)


def _cut(x: Tensor, sizes: Sequence, axis: int) -> list[Tensor]:
    parts, start = [], 0
    for s in sizes:
        parts.append(slice_axis(x, axis, start, start + s))
        start = start + s
    return parts


def _split_at(x: Tensor, indices: Any, axis: int) -> list[Tensor]:
    if not isinstance(indices, (tuple, list)):
        indices = list(concrete("split", indices)[0])
    length = x.shape[axis]
    cuts = []
    for index in (size_of(i) for i in indices):
        index = index + length if index < 0 else index
        cuts.append(builtins.max(0, index) if index <= length else length)
    starts, limits = [0, *cuts], [*cuts, length]
    return [slice_axis(x, axis, a, b if b >= a else a) for a, b in zip(starts, limits, strict=True)]


def hsplit(x: Tensor, indices_or_sections: Any) -> list[Tensor]:
    """Parts of a tensor along its second axis, along its only one for rank 1."""
    x = convert_to_tensor(x)
    return split(x, indices_or_sections, 1 if x.ndim > 1 else 0)


def vsplit(x: Tensor, indices_or_sections: Any) -> list[Tensor]:
    """Parts of a tensor along its first axis. Raises ValueError below rank 2."""
    x = convert_to_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"vsplit: expected a tensor of rank 2 or more. Received: shape={tuple(x.shape)}")
    return split(x, indices_or_sections, 0)


def dsplit(x: Tensor, indices_or_sections: Any) -> list[Tensor]:
    """Parts of a tensor along its third axis. Raises ValueError below rank 3."""
    x = convert_to_tensor(x)
    if x.ndim < 3:
        raise ValueError(f"dsplit: expected a tensor of rank 3 or more. Received: shape={tuple(x.shape)}")
    return split(x, indices_or_sections, 2)


# -- repeating ------------------------------------------------------------------------------------------------------
def tile(x: Tensor, repeats: Axes) -> Tensor:
    """A tensor laid side by side, `repeats` times along each axis."""
    x = convert_to_tensor(x)
    times = shape_of(repeats)
    rank = builtins.max(x.ndim, len(times))
    times = (1,) * (rank - len(times)) + times
    sizes = (1,) * (rank - x.ndim) + tuple(x.shape)
    if builtins.all(t == 1 for t in times):
        return reshape_to(x, sizes)
    narrow = [n for s, t in zip(sizes, times, strict=True) for n in ((s,) if t == 1 else (1, s))]
    wide = [n for s, t in zip(sizes, times, strict=True) for n in ((s,) if t == 1 else (t, s))]
    total = tuple(s * t for s, t in zip(sizes, times, strict=True))
    return reshape_to(broadcast(reshape_to(x, tuple(narrow)), tuple(wide)), total)


def repeat(x: Tensor, repeats: Any, axis: int | None = None) -> Tensor:
    """Every element repeated in place: all as often, or each its own number of times (known outside of a trace)."""
    x = convert_to_tensor(x)
    if axis is None:
        x, axis = flatten(x), 0
    axis = axis_of(axis, x.ndim)
    if isinstance(repeats, Dim) or (not is_traced(repeats) and np.size(repeats) == 1):
        times = repeats if isinstance(repeats, Dim) else int(np.asarray(repeats).item())
        shape = tuple(x.shape)
        wide = (*shape[: axis + 1], times, *shape[axis + 1 :])
        total = (*shape[:axis], shape[axis] * times, *shape[axis + 1 :])
        return reshape_to(broadcast(insert_axes(x, (axis + 1,)), wide), total)
    (each,) = concrete("repeat", repeats)
    if not isinstance(x.shape[axis], int):
        raise UnsupportedError(f"keras.ops.repeat: axis {axis} of size {x.shape[axis]} needs one number of repeats")
    return ops.take(x, np.arange(x.shape[axis], dtype="int32").repeat(each), axis=axis, mode="clip")


def meshgrid(*x: Tensor, indexing: str = "xy") -> list[Tensor]:
    """Coordinate tensors of the grid spanned by vectors; the first two axes are exchanged for indexing "xy"."""
    if indexing not in ("xy", "ij"):
        raise ValueError(f'meshgrid: indexing is "xy" or "ij". Received: indexing={indexing!r}')
    vectors = [flatten(convert_to_tensor(v)) for v in x]
    rank = len(vectors)
    order = list(range(rank))
    if indexing == "xy" and rank > 1:
        order[0], order[1] = 1, 0
    sizes: list = [1] * rank
    for place, v in zip(order, vectors, strict=True):
        sizes[place] = v.shape[0]
    out = []
    for place, v in zip(order, vectors, strict=True):
        out.append(broadcast(reshape_to(v, tuple(v.shape[0] if i == place else 1 for i in range(rank))), tuple(sizes)))
    return out
