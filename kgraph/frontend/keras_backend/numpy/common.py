"""What the functions of Keras' array interface share: promotion, axes, constants, and the border of tracing."""

from __future__ import annotations

import builtins
import functools
import operator
from typing import Any, TypeAlias

import numpy as np
from keras.src.backend import config
from keras.src.backend.common import dtypes
from keras.src.backend.common.backend_utils import canonicalize_axis
from keras.src.backend.common.variables import standardize_dtype

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.core import is_tensor
from kgraph.ir import Dim, Traced
from kgraph.ir.dims import product
from kgraph.ops.common import sizes_differ

# A tensor: a NumPy array, a traced array, a Keras variable, or anything that `convert_to_tensor` takes.
Tensor = Any
# One axis or several, each counted from the front or from the back.
Axes: TypeAlias = int | tuple[int, ...] | list[int]
HALF_TYPES = ("float16", "bfloat16")
SMALL_INTS = {"bool": "int32", "int8": "int32", "int16": "int32", "uint8": "uint32", "uint16": "uint32"}


# `numpy.dtype.name` is computed anew at each call, and takes longer than a small operation.
_name_of = functools.cache(standardize_dtype)


def dtype_of(x: Tensor) -> str:
    """The dtype name of a tensor."""
    return _name_of(x.dtype)


def is_float(x: Tensor) -> bool:
    """Whether a tensor is of a real floating dtype."""
    return "float" in dtype_of(x)


def is_complex(x: Tensor) -> bool:
    """Whether a tensor is of a complex dtype."""
    return "complex" in dtype_of(x)


def is_traced(*tensors: Tensor) -> bool:
    """Whether any of the tensors is a value under trace."""
    return builtins.any(isinstance(t, Traced) for t in tensors)


def concrete(function: str, *tensors: Tensor) -> list[np.ndarray]:
    """The tensors as NumPy arrays, for a function whose result's shape depends on their values.

    Raises UnsupportedError, naming `function`, where one is under trace.
    """
    operands = [convert_to_tensor(t) for t in tensors]
    if is_traced(*operands):
        raise UnsupportedError(
            f"keras.ops.{function}: the shape of the result depends on the values of a tensor, which are not known "
            "while the function is traced. Call it outside of the compiled function, or give the size where the "
            "function has an argument for it."
        )
    return [np.asarray(t) for t in tensors]


def convert(x: Tensor, dtype: str) -> Tensor:
    """A tensor in another dtype; the same tensor where it has it."""
    return x if dtype_of(x) == dtype else ops.convert(x, dtype=dtype)


def scalar(value: Any, like: Tensor) -> np.ndarray:
    """A Python number as a constant of rank 0 in the dtype of `like`."""
    return np.array(value, dtype=like.dtype)


def number_or_tensor(x: Tensor) -> Tensor:
    """Python ints and floats (and symbolic sizes) as they are, for promotion treats them weakly; a tensor otherwise."""
    return x if type(x) in (int, float) or isinstance(x, Dim) else convert_to_tensor(x)


def _promotion_type(x: Tensor) -> Any:
    if isinstance(x, Dim):
        return int
    return dtype_of(x) if is_tensor(x) or isinstance(x, Traced) else type(x)


def promote(*tensors: Tensor, extra: tuple = ()) -> list[Tensor]:
    """Operands in their common dtype by Keras' promotion rules; Python numbers are weakly typed.

    extra: further types that take part, such as `float` where the result must be inexact.
    """
    operands = [number_or_tensor(t) for t in tensors]
    types = [_promotion_type(t) for t in operands]
    dtype = _common_type((*types, *extra), config.floatx())
    return [t if own == dtype else convert_to_tensor(t, dtype) for t, own in zip(operands, types, strict=True)]


@functools.lru_cache(4096)
def _common_type(types: tuple, floatx: str) -> str:
    """Keras' `result_type`, which depends on floatx for Python numbers alone."""
    return dtypes.result_type(*types)


def promote_inexact(*tensors: Tensor) -> list[Tensor]:
    """Operands in their common floating (or complex) dtype."""
    return promote(*tensors, extra=(float,))


def to_inexact(x: Tensor) -> Tensor:
    """A tensor in the floating (or complex) dtype that Keras computes it in: integers become floatx."""
    x = convert_to_tensor(x)
    return convert(x, dtypes.result_type(x.dtype, float))


def to_bool(x: Tensor) -> Tensor:
    """A tensor's truth values."""
    x = convert_to_tensor(x)
    return x if dtype_of(x) == "bool" else ops.ne(x, scalar(0, x))


def widened(x: Tensor) -> Tensor:
    """Half floats in float32, everything else as it is; long sums and products are formed so."""
    return convert(x, "float32") if dtype_of(x) in HALF_TYPES else x


def axis_of(axis: int, ndim: int) -> int:
    """An axis counted from the front. Raises ValueError out of bounds."""
    return canonicalize_axis(axis, ndim)


def axes_of(axis: Axes | None, ndim: int) -> tuple[int, ...]:
    """Sorted distinct axes counted from the front; None means all of them. Raises ValueError for a repeated one."""
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, (tuple, list)):
        return (axis_of(axis, ndim),)
    axes = tuple(sorted(axis_of(a, ndim) for a in axis))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {tuple(axis)} names an axis twice, for a tensor of rank {ndim}")
    return axes


def size_of(size: Any) -> int | Dim:
    """A size given as an int, a symbolic size, or a concrete tensor of rank 0. Raises UnsupportedError if traced."""
    if isinstance(size, Dim):
        return size
    if isinstance(size, Traced):
        raise UnsupportedError("a size that depends on the values of a tensor cannot be used as a shape under trace")
    return operator.index(size.item() if isinstance(size, np.ndarray) else size)


def shape_of(shape: Any) -> tuple[int | Dim, ...]:
    """A shape argument (a size or a sequence of sizes) as a tuple."""
    if isinstance(shape, (int, np.integer, Dim)) or (isinstance(shape, (np.ndarray, Traced)) and shape.ndim == 0):
        return (size_of(shape),)
    return tuple(size_of(s) for s in shape)


def reshape_to(x: Tensor, shape: tuple) -> Tensor:
    """A tensor of the same elements in a complete shape; the same tensor where it has it."""
    return x if tuple(x.shape) == tuple(shape) else ops.reshape(x, shape=tuple(shape))


def flatten(x: Tensor) -> Tensor:
    """A tensor of rank 1 with the same elements."""
    return reshape_to(x, (product(x.shape),))


def permute(x: Tensor, permutation: tuple) -> Tensor:
    """A tensor with its axes in another order; the same tensor where that is the order they have."""
    permutation = tuple(permutation)
    return x if permutation == tuple(range(x.ndim)) else ops.transpose(x, permutation=permutation)


def broadcast(x: Tensor, shape: tuple) -> Tensor:
    """A tensor repeated to a shape by NumPy's rules; the same tensor where it has it."""
    return x if tuple(x.shape) == tuple(shape) else ops.broadcast_to(x, shape=tuple(shape))


def broadcast_sizes(*shapes: tuple) -> tuple:
    """The shape that all shapes broadcast to.

    Raises ValueError where there is none, DimDecisionError where that depends on the run-time size.
    """
    rank = builtins.max((len(s) for s in shapes), default=0)
    out: list = []
    for column in zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True):
        sizes = [s for s in column if s != 1]
        if builtins.any(sizes_differ(s, sizes[0]) for s in sizes[1:]):
            raise ValueError(f"shapes {', '.join(map(str, shapes))} do not broadcast with each other")
        out.append(sizes[0] if sizes else 1)
    return tuple(out)


def filled(shape: tuple, value: Any, dtype: str) -> Tensor:
    """A tensor of one value."""
    return ops.full(shape=tuple(shape), value=value, dtype=dtype)


def slice_axis(x: Tensor, axis: int, start: Any, limit: Any, stride: int = 1) -> Tensor:
    """`x[..., start:limit:stride, ...]` along one axis; the bounds are sizes from the front."""
    if isinstance(start, int) and start == 0 and limit == x.shape[axis] and stride == 1:
        return x
    rank = x.ndim
    starts, limits, strides = [0] * rank, list(x.shape), [1] * rank
    starts[axis], limits[axis], strides[axis] = start, limit, stride
    return ops.slice(x, start=tuple(starts), limit=tuple(limits), stride=tuple(strides))


def insert_axes(x: Tensor, axes: tuple) -> Tensor:
    """A tensor with axes of size 1 put in, at places of the result counted from the front."""
    sizes = list(x.shape)
    for a in sorted(axes):
        sizes.insert(a, 1)
    return reshape_to(x, tuple(sizes))


def drop_axes(x: Tensor, axes: tuple) -> Tensor:
    """A tensor without the given axes of size 1."""
    return reshape_to(x, tuple(s for i, s in enumerate(x.shape) if i not in axes))


def move_axis(x: Tensor, source: int, destination: int) -> Tensor:
    """A tensor with one axis moved; both counted from the front."""
    order = [i for i in range(x.ndim) if i != source]
    order.insert(destination, source)
    return permute(x, tuple(order))


def not_a_number(x: Tensor) -> Tensor:
    """Where a tensor is NaN; nowhere for integers."""
    return ops.is_nan(x) if is_float(x) or is_complex(x) else filled(x.shape, False, "bool")


def floatx() -> str:
    """Keras' default float dtype."""
    return config.floatx()


def default_dtype(dtype: Any) -> str:
    """A dtype argument by name, with floatx for None."""
    return standardize_dtype(dtype or config.floatx())


def tensors_of(xs: Any) -> list[Tensor]:
    """A sequence of tensors, given as a list or as one tensor to be taken apart along its first axis."""
    if is_tensor(xs) or isinstance(xs, Traced):
        return [drop_axes(slice_axis(xs, 0, i, i + 1), (0,)) for i in range(size_of(xs.shape[0]))]
    return list(xs)
