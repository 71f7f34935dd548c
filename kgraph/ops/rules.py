"""What the coarse primitives share beyond `common`: messages, checks, means and axis moves in gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import Dim, TensorType, dtype_name, np_dtype
from kgraph.ir.types import FLOATS
from kgraph.ops.common import WIDER, dtype_of, listing, sizes_differ


# -- checks -----------------------------------------------------------------------------------------------------------
def shape_error(name: str, types: Sequence[TensorType], expected: str) -> ShapeError:
    """The ShapeError of `name(types)`, where something else was expected."""
    return ShapeError(f"{name}({listing(types)}): expected {expected}")


def dtype_error(name: str, types: Sequence[TensorType], expected: str) -> DTypeError:
    """The DTypeError of `name(types)`, where something else was expected."""
    return DTypeError(f"{name}({listing(types)}): expected {expected}")


def require_float(name: str, *types: TensorType) -> None:
    """Raises DTypeError unless all operands are floats."""
    if any(t.dtype not in FLOATS for t in types):
        raise dtype_error(name, types, "float operands; convert them first")


def require_broadcast_to(name: str, types: Sequence[TensorType], index: int, shape: Sequence) -> None:
    """Operand `index` must broadcast against `shape` without enlarging it."""
    own = types[index].shape
    tail = tuple(shape)[len(shape) - len(own) :] if len(own) <= len(shape) else None
    if tail is None or any(s != 1 and sizes_differ(s, t) for s, t in zip(own, tail)):
        raise shape_error(name, types, f"operand {index} to broadcast to [{','.join(map(str, shape))}]")


# -- references -------------------------------------------------------------------------------------------------------
def wide(array: np.ndarray) -> np.ndarray:
    """The array in the dtype that references compute in: narrow floats become float32."""
    name = dtype_name(array.dtype)
    return array.astype(WIDER[name]) if name in WIDER else array


# -- gradients --------------------------------------------------------------------------------------------------------
def scalar(value, dtype: str) -> np.ndarray:
    """A concrete scalar operand."""
    return np.array(value, np_dtype(dtype))


def convert(x, dtype: str):
    """`x` in `dtype`, untouched if it has it already."""
    return x if dtype_of(x) == dtype else ops.convert(x, dtype=dtype)


def float32_at_least(*arrays) -> tuple:
    """Operands in the precision that gradients compute in: narrow floats become float32."""
    return tuple(convert(a, "float32") if dtype_of(a) in WIDER else a for a in arrays)


def element_count(x, axes: Sequence[int]):
    """The number of elements along `axes` as a scalar operand of the dtype of `x`; a `dim_value` where symbolic."""
    count = 1
    for axis in axes:
        count = x.shape[axis] * count
    dtype = dtype_of(x)
    return ops.dim_value(dim=count, dtype=dtype) if isinstance(count, Dim) else scalar(count, dtype)


def total(x, axes: Sequence[int]):
    """Sum over `axes`, which stay with size 1."""
    return ops.reduce_sum(x, axes=tuple(axes), keepdims=True)


def mean(x, axes: Sequence[int]):
    """Mean over `axes`, which stay with size 1."""
    return ops.div(total(x, axes), element_count(x, axes))


def place_axis(x, axis: int, rank: int):
    """The vector `x` as a tensor of `rank` whose only axis of other size than 1 is `axis`."""
    return ops.reshape(x, shape=(*(1,) * axis, x.shape[0], *(1,) * (rank - axis - 1)))


def reorder(x, labels: Sequence, wanted: Sequence | None = None):
    """`x`, whose axes are called `labels`, transposed to `wanted` (ascending labels by default)."""
    wanted = sorted(labels) if wanted is None else wanted
    permutation = tuple(labels.index(label) for label in wanted)
    return x if permutation == tuple(range(len(permutation))) else ops.transpose(x, permutation=permutation)


def matrix_transpose(x):
    """The transpose of the matrices in the last two axes."""
    rank = len(x.shape)
    return ops.transpose(x, permutation=(*range(rank - 2), rank - 1, rank - 2))
