"""What becomes of sparse tensors in the functions of the backend: as in Keras' shape inference, and its JAX backend.

- Elementwise functions of one tensor that give 0 for 0 keep the entries (`zero_preserving`).
- Sums, differences and extrema of two sparse tensors have the entries of both (`union`); with a dense one they are
  dense. A product has the entries of its sparse operands (`intersection`), a quotient those of a sparse dividend, and
  further ones where the divisor makes something of a zero (`division`).
- What moves, joins or sums elements works on the entries' indices.
- Products of matrices are sparse where both operands are.

A product of a sparse tensor and a dense one that is infinite or NaN where there is no entry takes the zero for a zero,
as JAX does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend.core import dense_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    SMALL_INTS,
    Axes,
    Tensor,
    axes_of,
    axis_of,
    broadcast_sizes,
    convert,
    dtype_of,
    filled,
    is_float,
    is_traced,
    promote,
    reshape_to,
    scalar,
    widened,
)
from kgraph.frontend.keras_backend.sparse import FAR_OUTSIDE, SparseTensor, column, keys, merge, places, stacked
from kgraph.ir import Dim
from kgraph.ir.dims import product
from kgraph.ops.common import sizes_differ


# -- element by element ------------------------------------------------------------------------------------------------
def on_entries(function: Callable, x: SparseTensor, linear: bool = False) -> SparseTensor:
    """A function of elements that gives 0 for 0, on the entries. linear: it may be applied before entries add up."""
    if not linear:
        x = x.coalesced()
    return SparseTensor._of(x.indices, function(x.values), x.shape, x.unique)


def zero_preserving(function: Callable) -> Callable:
    """A function of one tensor that gives 0 for 0, element by element, which keeps a sparse tensor sparse."""

    @functools.wraps(function)
    def _dispatch(x):
        return function(x) if type(x) is not SparseTensor else on_entries(function, x)

    return _dispatch


def linear(function: Callable) -> Callable:
    """As `zero_preserving`, for a function of which the value of a sum is the sum of the values."""

    @functools.wraps(function)
    def _dispatch(x):
        return function(x) if type(x) is not SparseTensor else on_entries(function, x, linear=True)

    return _dispatch


def _binary(rule: Callable) -> Callable:
    """A decorator of functions of two tensors: `rule(function, x1, x2)` where one of them is sparse."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def _dispatch(x1, x2):
            if type(x1) is SparseTensor or type(x2) is SparseTensor:
                return rule(function, x1, x2)
            return function(x1, x2)

        return _dispatch

    return decorate


def _merged(function: Callable, x1: SparseTensor, x2: SparseTensor) -> SparseTensor:
    """A function that gives 0 for two zeros, on the entries of both."""
    shape = broadcast_sizes(x1.shape, x2.shape)
    x1, x2 = _broadcast(x1, shape), _broadcast(x2, shape)
    if x1.indices is x2.indices and x1.unique and x2.unique:
        return SparseTensor._of(x1.indices, function(x1.values, x2.values), shape, unique=True)
    k = max(x1.indices.shape[1], x2.indices.shape[1])
    x1, x2 = x1.spelled_out(k), x2.spelled_out(k)
    indices = ops.concatenate(x1.indices, x2.indices, axis=0)
    first = ops.concatenate(x1.values, _no_values(x2, x1.dtype.name), axis=0)
    second = ops.concatenate(_no_values(x1, x2.dtype.name), x2.values, axis=0)
    indices, (first, second) = merge(indices, [first, second], shape)
    return SparseTensor._of(indices, function(first, second), shape, unique=True)


def _no_values(x: SparseTensor, dtype: str) -> Tensor:
    return filled(tuple(x.values.shape), 0, dtype)


def _broadcast(x: SparseTensor, shape: tuple) -> SparseTensor:
    """A sparse tensor repeated to a shape by NumPy's rules."""
    if tuple(x.shape) == tuple(shape):
        return x
    x = insert_axes(x.spelled_out(), tuple(range(len(shape) - x.ndim)))
    repeated = [a for a in range(len(shape)) if sizes_differ(x.shape[a], shape[a])]
    if not repeated:
        return SparseTensor._of(x.indices, x.values, shape, x.unique)
    # The entries once for every place along the repeated axes.
    block, entries = tuple(shape[a] for a in repeated), x.nse
    count = product(block)
    columns = []
    for a in range(len(shape)):
        if a in repeated:
            numbers = ops.iota(shape=(1, *block), dtype="int64", axis=1 + repeated.index(a))
            grid = ops.broadcast_to(reshape_to(numbers, (1, count)), shape=(entries, count))
        else:
            grid = ops.broadcast_to(reshape_to(column(x.indices, a), (entries, 1)), shape=(entries, count))
        columns.append(reshape_to(grid, (entries * count,)))
    values = ops.broadcast_to(reshape_to(x.values, (entries, 1)), shape=(entries, count))
    return SparseTensor._of(
        stacked(columns, entries * count), reshape_to(values, (entries * count,)), tuple(shape), x.unique
    )


def _union(function: Callable, x1: Tensor, x2: Tensor) -> Tensor:
    if type(x1) is SparseTensor and type(x2) is SparseTensor:
        return _merged(function, x1, x2)
    return function(dense_operand(x1), dense_operand(x2))


def dense_operand(x: Tensor) -> Tensor:
    """A sparse tensor as a dense one, anything else as it is (Python numbers are promoted weakly)."""
    return x.to_dense() if type(x) is SparseTensor else x


def _number(x: Tensor) -> Tensor | None:
    """What counts as one number: Python's, or a tensor of rank 0; None for anything else."""
    if type(x) in (int, float, bool, complex) or isinstance(x, Dim):
        return x
    x = dense_tensor(x)
    return x if x.ndim == 0 else None


def at_entries(dense: Tensor, x: SparseTensor) -> Tensor:
    """The elements of a dense tensor that meet the entries, broadcasting with the values of `x`."""
    k = x.indices.shape[1]
    dense = reshape_to(dense, (*(1,) * (x.ndim - dense.ndim), *dense.shape))
    columns = [
        ops.full(shape=(x.nse,), value=0, dtype="int64") if _is_one(n) else column(x.indices, a)
        for a, n in enumerate(dense.shape[:k])
    ]
    if any(_is_zero(n) for n in dense.shape):
        return filled((x.nse, *dense.shape[k:]), 0, dtype_of(dense))  # there are no entries
    return ops.gather_nd(dense, stacked(columns, x.nse))


def _is_one(n: int | Dim) -> bool:
    return not isinstance(n, Dim) and n == 1


def _is_zero(n: int | Dim) -> bool:
    return not isinstance(n, Dim) and n == 0


def _intersection(function: Callable, x1: Tensor, x2: Tensor) -> SparseTensor:
    if type(x1) is SparseTensor and type(x2) is SparseTensor:
        return _merged(function, x1, x2).without_zeros()
    sparse, other = (x1, x2) if type(x1) is SparseTensor else (x2, x1)
    if dtype_of(sparse) == "bool":
        sparse = sparse.coalesced()  # `or` comes before a number's sum
    apply = function if sparse is x1 else lambda values, factor: function(factor, values)
    number = _number(other)
    if number is not None:
        return on_entries(lambda values: apply(values, number), sparse, linear=True)
    other = dense_tensor(other)
    shape = broadcast_sizes(sparse.shape, other.shape)
    sparse = _broadcast(sparse, shape)
    return on_entries(lambda values: apply(values, at_entries(other, sparse)), sparse, linear=True)


def _division(function: Callable, x1: Tensor, x2: Tensor) -> Tensor:
    if type(x2) is SparseTensor:
        return function(dense_operand(x1), x2.to_dense())
    number = _number(x2)
    divisor = dense_tensor(x2)
    of_zero = None if is_traced(divisor) else np.asarray(function(np.zeros((), x1.dtype), divisor))
    shape = broadcast_sizes(x1.shape, divisor.shape)
    if of_zero is None or (of_zero.any() and any(isinstance(n, Dim) for n in shape)):
        # How many places the divisor is 0 or NaN at is not known: every place gets an entry.
        return SparseTensor.from_dense(function(x1.to_dense(), x2))
    x1 = _broadcast(x1, shape)
    if of_zero.any():
        x1 = _merged(lambda values, _: values, x1, SparseTensor.from_dense(np.broadcast_to(of_zero, shape)))
    if dtype_of(x1) == "bool":
        x1 = x1.coalesced()
    if number is not None:
        return on_entries(lambda values: function(values, number), x1, linear=True)
    return on_entries(lambda values: function(values, at_entries(divisor, x1)), x1, linear=True)


union, intersection, division = _binary(_union), _binary(_intersection), _binary(_division)


def digitize(x: SparseTensor, bins: Tensor, number: Callable) -> SparseTensor:
    """The bin of each element, by the function `number` of elements and bins."""
    of_zero = number(np.zeros((1,), x.dtype), bins)
    if is_traced(of_zero) or of_zero.any():
        return SparseTensor.from_dense(number(x.to_dense(), bins))
    return on_entries(lambda values: number(values, bins), x)


# -- order and rank ----------------------------------------------------------------------------------------------------
def reshape(x: SparseTensor, shape: tuple) -> SparseTensor:
    """The same elements in another, complete shape."""
    x = x.spelled_out()
    indices = stacked(places(keys(x.indices, x.shape), shape), x.nse)
    return SparseTensor._of(indices, x.values, tuple(shape), x.unique)


def permute(x: SparseTensor, order: tuple) -> SparseTensor:
    """The axes in another order."""
    k = x.indices.shape[1]
    if sorted(order[:k]) != list(range(k)):
        x, k = x.spelled_out(), x.ndim
    indices = stacked([column(x.indices, a) for a in order[:k]], x.nse)
    values = ops.transpose(x.values, permutation=(0, *(a - k + 1 for a in order[k:])))
    return SparseTensor._of(indices, values, tuple(x.shape[a] for a in order), x.unique)


def insert_axes(x: SparseTensor, axes: tuple) -> SparseTensor:
    """Axes of size 1 put in, at places of the result counted from the front."""
    shape, columns = list(x.shape), [column(x.indices, a) for a in range(x.indices.shape[1])]
    for a in sorted(axes):
        shape.insert(a, 1)
        if a <= len(columns):
            columns.insert(a, ops.full(shape=(x.nse,), value=0, dtype="int64"))
    values = reshape_to(x.values, (x.nse, *shape[len(columns) :]))
    return SparseTensor._of(stacked(columns, x.nse), values, tuple(shape), x.unique)


def drop_axes(x: SparseTensor, axes: tuple) -> SparseTensor:
    """Without the given axes of size 1."""
    k = x.indices.shape[1]
    x = x.masked() if any(a < k for a in axes) else x
    left = [a for a in range(x.ndim) if a not in axes]
    columns = [column(x.indices, a) for a in left if a < k]
    shape = tuple(x.shape[a] for a in left)
    values = reshape_to(x.values, (x.nse, *shape[len(columns) :]))
    return SparseTensor._of(stacked(columns, x.nse), values, shape, x.unique)


def concatenate(xs: list[SparseTensor], axis: int) -> SparseTensor:
    """The tensors one after the other along an axis. Raises ValueError where another size differs."""
    rank, axis = xs[0].ndim, axis_of(axis, xs[0].ndim)
    for x in xs[1:]:
        if x.ndim != rank or any(sizes_differ(x.shape[a], xs[0].shape[a]) for a in range(rank) if a != axis):
            raise ValueError(f"concatenate: shapes {[x.shape for x in xs]} differ in more than axis {axis}")
    k = max(axis + 1, *(x.indices.shape[1] for x in xs))
    xs = [x.spelled_out(k) for x in xs]
    moved: list = []
    start: Any = 0
    for x in xs:
        columns = [column(x.indices, a) for a in range(k)]
        columns[axis] = _moved(x, columns[axis], axis, start)
        moved.append(stacked(columns, x.nse))
        start = start + x.shape[axis]
    shape = tuple(start if a == axis else n for a, n in enumerate(xs[0].shape))
    values = ops.concatenate(*promote(*(x.values for x in xs)), axis=0)
    return SparseTensor._of(ops.concatenate(*moved, axis=0), values, shape, all(x.unique for x in xs))


def _moved(x: SparseTensor, numbers: Tensor, axis: int, start: int | Dim) -> Tensor:
    """Indices along an axis counted from `start`; those that are no elements stay outside of the longer axis."""
    out = ops.add(numbers, ops.dim_value(dim=start, dtype="int64"))
    if not is_traced(numbers):
        return out
    inside = ops.lt(numbers, ops.dim_value(dim=x.shape[axis], dtype="int64"))
    return ops.select(inside, out, np.array(FAR_OUTSIDE))


# -- sums --------------------------------------------------------------------------------------------------------------
def _summed(x: SparseTensor, axis: Axes | None, keepdims: bool) -> SparseTensor:
    """The sum over axes in the dtype of `x`."""
    axes = axes_of(axis, x.ndim)
    k = x.indices.shape[1]
    gone = tuple(a for a in axes if a < k)
    inner = tuple(a - k + 1 for a in axes if a >= k)
    if gone:
        x = x.masked()
    values = ops.reduce_sum(x.values, axes=inner, keepdims=keepdims) if inner else x.values
    zeros = ops.full(shape=(x.nse,), value=0, dtype="int64")
    columns = [zeros if a in gone else column(x.indices, a) for a in range(k) if keepdims or a not in gone]
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape) if keepdims or a not in axes)
    return SparseTensor._of(stacked(columns, x.nse), values, shape, x.unique and not gone).coalesced()


def sum(x: SparseTensor, axis: Axes | None = None, keepdims: bool = False) -> SparseTensor:
    """The sum over axes, in the dtypes of the dense one."""
    x = x.coalesced() if dtype_of(x) == "bool" else x
    dtype = SMALL_INTS.get(dtype_of(x), dtype_of(x))
    total = _summed(on_entries(lambda v: widened(convert(v, dtype)), x, linear=True), axis, keepdims)
    return on_entries(lambda v: convert(v, dtype), total)


def mean(x: SparseTensor, axis: Axes | None, keepdims: bool, compute: str, result: str, divide: Callable):
    """The mean over axes: a sum in the dtype `compute`, of which `divide` makes the mean, in the dtype `result`."""
    x = x.coalesced() if dtype_of(x) == "bool" else x
    total = _summed(on_entries(lambda v: convert(v, compute), x, linear=True), axis, keepdims)
    return on_entries(lambda v: convert(divide(v), result), total)


# -- products of matrices ----------------------------------------------------------------------------------------------
def matmul(x1: Tensor, x2: Tensor, dense_matmul: Callable) -> Tensor:
    """The product of matrices, of which one is sparse or both; sparse for two sparse ones.

    A sparse [..., M, K] times a dense [K, N] goes entry by entry, unless the dense form takes less memory than that.
    """
    if type(x1) is SparseTensor and type(x2) is SparseTensor:
        return SparseTensor.from_dense(matmul(x1, x2.to_dense(), dense_matmul))
    if type(x1) is SparseTensor:
        x2 = dense_tensor(x2)
        return _times_dense(x1, x2) if _is_worth(x1, x2, 0) else dense_matmul(x1.to_dense(), x2)
    x1 = dense_tensor(x1)
    if x2.ndim == 2 and x1.ndim == 2 and _is_worth(x2, x1, 1):
        transposed = _times_dense(permute(x2, (1, 0)), ops.transpose(x1, permutation=(1, 0)))
        return ops.transpose(transposed, permutation=(1, 0))
    return dense_matmul(x1, x2.to_dense())


def _is_worth(x: SparseTensor, dense: Tensor, contracted: int) -> bool:
    """Whether the product is one of floats with a matrix, and an element per entry and column is less than all."""
    if not (is_float(x) and is_float(dense)) or dense.ndim != 2 or x.ndim < 2:
        return False
    sizes = (*x.shape, x.nse, *dense.shape, *x.values.shape)
    if any(isinstance(n, Dim) for n in sizes):
        return False
    return product(x.values.shape) * dense.shape[1 - contracted] < product(x.shape)


def _times_dense(x: SparseTensor, dense: Tensor) -> Tensor:
    """[..., M, K] sparse times [K, N] dense. Raises ValueError where the sizes do not fit."""
    if sizes_differ(x.shape[-1], dense.shape[0]):
        raise ValueError(f"matmul: shapes {x.shape} and {tuple(dense.shape)} do not fit")
    x = x.spelled_out()
    values, dense = promote(x.values, dense)
    dtype = dtype_of(values)
    rows = ops.take(widened(dense), column(x.indices, x.ndim - 1), axis=0)
    products = ops.mul(rows, reshape_to(widened(values), (x.nse, 1)))
    target = stacked([column(x.indices, a) for a in range(x.ndim - 1)], x.nse)
    base = filled((*x.shape[:-1], dense.shape[1]), 0, dtype_of(products))
    return convert(ops.scatter_nd(base, target, products, reduction="add"), dtype)


# -- encodings ---------------------------------------------------------------------------------------------------------
def one_hot(x: Tensor, num_classes: int, axis: int, dtype: str) -> SparseTensor:
    """1 at the class of each element along a new axis, counted from the front; no entry for a class out of range."""
    shape, total = tuple(x.shape), product(x.shape)
    numbers = [reshape_to(ops.iota(shape=shape, dtype="int64", axis=a), (total,)) for a in range(len(shape))]
    classes = reshape_to(convert(x, "int64"), (total,))
    full = (*shape[:axis], num_classes, *shape[axis:])
    valid = ops.logical_and(ops.ge(classes, scalar(0, classes)), ops.lt(classes, scalar(num_classes, classes)))
    if is_traced(classes):
        numbers.insert(axis, ops.select(valid, classes, scalar(num_classes, classes)))
    else:
        total = int(np.asarray(valid).sum())
        numbers = [n[valid] for n in numbers]
        numbers.insert(axis, classes[valid])
    return SparseTensor._of(stacked(numbers, total), filled((total,), 1, dtype), full, unique=True)


def multi_hot(x: Tensor, num_classes: int, axis: int, reduced: int, dtype: str) -> SparseTensor:
    """1 at every class along the axis `reduced` of the encoding."""
    counts = sum(one_hot(x, num_classes, axis % (x.ndim + 1), "int32"), axis=reduced)
    return on_entries(lambda v: convert(ops.convert(v, dtype="bool"), dtype), counts)


def bincount(x: Tensor, weights: Tensor | None, minlength: int, count: Callable) -> SparseTensor:
    """`numpy.bincount` of the entries of a sparse vector, or of each row of a sparse matrix; or of dense ones."""
    if type(x) is not SparseTensor:
        return SparseTensor.from_dense(count(x, weights, minlength))
    if x.is_traced:
        raise UnsupportedError("keras.ops.bincount: the size of the result depends on the values of a traced tensor")
    x = x.spelled_out()
    if weights is not None:
        if type(weights) is not SparseTensor:
            raise ValueError("bincount: `x` is sparse and `weights` are not; they need the same entries")
        weights = weights.spelled_out()
        if not np.array_equal(np.asarray(weights.indices), np.asarray(x.indices)):
            raise ValueError("bincount: `x` and `weights` are sparse, and their entries differ")
        weights = weights.values
    if x.ndim == 1:
        return SparseTensor.from_dense(count(x.values, weights, minlength))
    if x.ndim != 2:
        raise ValueError(f"bincount: expected a vector or a matrix. Received: shape={x.shape}")
    # Rows have as many entries as they happen to have: each counts by the pair of its row and its value.
    length = max(int(x.values.max()) + 1 if len(x.values) else 0, int(minlength))
    flat = count(x.indices[:, 0] * length + x.values, weights, x.shape[0] * length)
    return SparseTensor.from_dense(np.reshape(flat, (x.shape[0], length)))
