"""`SparseTensor`: a tensor as the list of its elements that are not zero (the COO form).

Its members are NumPy arrays, or traced arrays while a trace runs; everything here and in `sparse_rules` is written on
primitives, so that eager and traced code is one. A function of the backend without a rule for sparse tensors gets them
dense (`core.dense_tensor`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from kgraph import ops
from kgraph.errors import InputError, ShapeError
from kgraph.frontend.traced_array import TracedArray
from kgraph.ir import Dim
from kgraph.ir.dims import product
from kgraph.ops.common import sizes_differ
from kgraph.ops.indexing import in_range

LARGEST_KEY = 2**63 - 1
# An index beyond every shape.
FAR_OUTSIDE = 2**62


class SparseTensor:
    """A tensor of which most elements are zero.

    indices: int64 [entries, k], where each entry lies along the first k axes, k at most the rank.
    values: [entries, *shape[k:]], an element for each entry, or a block of them where k is less than the rank (rows of
        a matrix, say). Entries of the same place add up (of booleans: one that is true suffices).
    shape: the sizes of the tensor, ints or symbolic ones.
    unique: whether no two entries have the same place, where the maker knows.

    Entries under a trace whose indices lie outside of the shape are no elements: their number cannot shrink there, as
    it does on arrays. Raises ShapeError for members that do not fit each other, InputError for arrays of indices that
    are no integers or lie outside of the shape.
    """

    # Keras' shape inference asks both of KerasTensors, and where values and symbols meet, of tensors.
    sparse = True
    ragged = False
    # NumPy's operators leave the operation to this class.
    __array_ufunc__ = None

    def __init__(self, indices, values, shape, *, unique: bool = False):
        self.values = _array(values)
        self.shape = tuple(d if isinstance(d, Dim) else int(d) for d in shape)
        indices = indices if isinstance(indices, TracedArray) else np.asarray(indices)
        if not isinstance(indices, TracedArray) and not indices.size and indices.ndim < 2:
            indices = np.zeros((0, len(self.shape) - self.values.ndim + 1), "int64")  # an empty list
        self._require_fit(indices)
        indices = indices if indices.dtype == np.int64 else ops.convert(indices, dtype="int64")
        if isinstance(indices, TracedArray):
            # Negative ones are out of range, rather than counted from the end as the primitives do.
            indices = ops.select(ops.lt(indices, np.array(0)), np.array(FAR_OUTSIDE), indices)
        self.indices = indices
        self.unique = unique

    @classmethod
    def _of(cls, indices, values, shape: tuple, unique: bool = False) -> SparseTensor:
        """A tensor of members that fit each other."""
        self = cls.__new__(cls)
        self.indices, self.values, self.shape, self.unique = indices, values, shape, unique
        return self

    def _require_fit(self, indices) -> None:
        if indices.dtype.kind not in "iu":
            raise InputError(f"SparseTensor: expected integers as indices, got {indices.dtype}")
        k = indices.shape[-1] if indices.ndim == 2 else None
        expected = None if k is None or k > self.ndim else (indices.shape[0], *self.shape[k:])
        found = tuple(self.values.shape)
        if expected is None or len(found) != len(expected) or any(map(sizes_differ, found, expected)):
            raise ShapeError(
                "SparseTensor: expected indices [entries, k] and values [entries, *shape[k:]], got indices "
                f"{tuple(indices.shape)} and values {found} for the shape {self.shape}"
            )
        if not isinstance(indices, TracedArray) and not any(isinstance(d, Dim) for d in self.shape[:k]):
            if indices.size and ((indices < 0) | (indices >= np.asarray(self.shape[:k]))).any():
                raise InputError(f"SparseTensor: an index lies outside of the shape {self.shape}")

    @staticmethod
    def from_scipy(matrix) -> SparseTensor:
        """The tensor of a SciPy sparse matrix or array, of any format; entries of the same place add up."""
        coo = matrix.tocoo()
        coords = getattr(coo, "coords", None) or (coo.row, coo.col)
        return SparseTensor(np.stack(coords, axis=1), coo.data, coo.shape)

    @staticmethod
    def from_dense(x) -> SparseTensor:
        """The tensor of a dense one: its elements that are not zero; all of them under a trace."""
        shape = tuple(x.shape)
        if isinstance(x, TracedArray):
            values = ops.reshape(x, shape=(product(shape),))
            return SparseTensor._of(_all_places(shape), values, shape, unique=True)
        x = np.asarray(x)
        places = np.nonzero(x)
        indices = np.stack(places, axis=1) if places else np.zeros((int(bool(x)), 0), "int64")
        return SparseTensor._of(indices, x[places] if places else x.reshape(-1)[: len(indices)], shape, unique=True)

    # -- description ----------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nse(self) -> int | Dim:
        """The number of entries."""
        return self.values.shape[0]

    @property
    def is_traced(self) -> bool:
        """Whether it belongs to a running trace."""
        return isinstance(self.values, TracedArray) or isinstance(self.indices, TracedArray)

    def __repr__(self) -> str:
        block = tuple(self.shape[self.indices.shape[1] :])
        sizes = ",".join(map(str, self.shape))
        entries = f"{self.nse} {'entry' if self.nse == 1 else 'entries'}" + (f" of {list(block)}" if block else "")
        return f"<SparseTensor {self.dtype.name}[{sizes}], {entries}>"

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor of rank 0")
        return int(self.shape[0])

    # -- conversion -----------------------------------------------------------------------------------------------
    def to_dense(self):
        """The dense tensor: a NumPy array, or a traced array under a trace."""
        values, dtype = self.values, self.dtype.name
        if dtype == "bool":
            values = ops.convert(values, dtype="int32")
        base = ops.full(shape=self.shape, value=0, dtype=values.dtype.name)
        reduction = "update" if self.unique and not self.is_traced else "add"
        out = ops.scatter_nd(base, self.indices, values, reduction=reduction)
        return ops.convert(out, dtype="bool") if dtype == "bool" else out

    def numpy(self) -> np.ndarray:
        """The dense tensor as a NumPy array."""
        return self.__array__()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.to_dense(), dtype=dtype)

    def __getitem__(self, key):
        """A part of the dense tensor."""
        return self.to_dense()[key]

    def __iter__(self):
        return iter(self.to_dense())

    def __float__(self) -> float:
        return float(self.to_dense())

    def __int__(self) -> int:
        return int(self.to_dense())

    def __bool__(self) -> bool:
        return bool(self.to_dense())

    def astype(self, dtype) -> SparseTensor:
        """The tensor in another dtype."""
        from kgraph.frontend.keras_backend.core import cast

        return cast(self, dtype)

    # -- entries --------------------------------------------------------------------------------------------------
    def coalesced(self) -> SparseTensor:
        """The same tensor with one entry for each place, in the order of the places."""
        if self.unique:
            return self
        indices, (values,) = merge(self.indices, [self.values], self.shape)
        return SparseTensor._of(indices, values, self.shape, unique=True)

    def spelled_out(self, axes: int | None = None) -> SparseTensor:
        """The same tensor with indices along `axes` first axes, by default all: blocks become entries of their own."""
        k, axes = self.indices.shape[1], self.ndim if axes is None else axes
        if k >= axes:
            return self
        block = self.shape[k:axes]
        inner, count = _all_places(block), product(block)
        outer = ops.broadcast_to(ops.reshape(self.indices, shape=(self.nse, 1, k)), shape=(self.nse, count, k))
        inner = ops.broadcast_to(ops.reshape(inner, shape=(1, count, axes - k)), shape=(self.nse, count, axes - k))
        total = self.nse * count
        indices = ops.reshape(ops.concatenate(outer, inner, axis=2), shape=(total, axes))
        values = ops.reshape(self.values, shape=(total, *self.shape[axes:]))
        return SparseTensor._of(indices, values, self.shape, self.unique)

    def without_zeros(self) -> SparseTensor:
        """The same tensor; of arrays, without the entries that are zero throughout."""
        if self.is_traced:
            return self
        kept = np.asarray(self.values).astype(bool).any(axis=tuple(range(1, self.values.ndim)))
        return SparseTensor._of(self.indices[kept], self.values[kept], self.shape, self.unique)

    def masked(self) -> SparseTensor:
        """The same tensor with zeros for the entries that are no elements, ahead of losing some of their indices."""
        if not isinstance(self.indices, TracedArray):
            return self
        valid = ops.reshape(_inside(self.indices, self.shape), shape=(self.nse, *(1,) * (self.values.ndim - 1)))
        values = ops.select(valid, self.values, np.zeros((), self.dtype))
        return SparseTensor._of(self.indices, values, self.shape, self.unique)

    @property
    def T(self) -> SparseTensor:
        return _function("transpose")(self)


def _array(x):
    """Values as a tensor, in Keras' dtypes for Python numbers."""
    from kgraph.frontend.keras_backend.core import dense_tensor

    return dense_tensor(x)


# -- places ------------------------------------------------------------------------------------------------------------
def _all_places(shape: tuple):
    """Indices [number of elements, rank] of all elements of a shape, in their order."""
    total = product(shape)
    grid = [ops.reshape(ops.iota(shape=shape, dtype="int64", axis=a), shape=(total, 1)) for a in range(len(shape))]
    return ops.concatenate(*grid, axis=1) if grid else np.zeros((1, 0), "int64")


def column(indices, axis: int):
    """The indices [entries] along one axis."""
    entries = indices.shape[0]
    picked = ops.slice(indices, start=(0, axis), limit=(entries, axis + 1), stride=(1, 1))
    return ops.reshape(picked, shape=(entries,))


def stacked(columns: list, entries):
    """Indices [entries, number of columns] of columns [entries]."""
    if not columns:
        return ops.full(shape=(entries, 0), value=0, dtype="int64")
    return ops.concatenate(*[ops.reshape(c, shape=(entries, 1)) for c in columns], axis=1)


def _size(n):
    return ops.dim_value(dim=n, dtype="int64")


def _inside(indices, shape: tuple):
    """Which entries [entries] are elements of a tensor of the shape."""
    inside = [in_range(column(indices, a), n) for a, n in enumerate(shape[: indices.shape[1]])]
    return functools.reduce(ops.logical_and, inside) if inside else np.ones((1,), bool)


def keys(indices, shape: tuple):
    """Each entry's number [entries] in the row of all places; the number of places for what is no element.

    Raises InputError for a tensor of more places than 64 bits count.
    """
    sizes, entries = shape[: indices.shape[1]], indices.shape[0]
    count: Any = product(sizes)
    if isinstance(count, int) and count > LARGEST_KEY:
        raise InputError(f"a sparse tensor of shape {shape} has more places than 64 bits count")
    out: Any = ops.full(shape=(entries,), value=0, dtype="int64")
    for axis, n in enumerate(sizes):
        out = ops.add(ops.mul(out, _size(n)), column(indices, axis))
    if not isinstance(indices, TracedArray) or not sizes:
        return out
    return ops.select(_inside(indices, shape), out, _size(count))


def places(numbers, sizes: tuple) -> list:
    """The columns of indices for numbers in the row of all places: the inverse of `keys`."""
    columns: list = []
    for n in reversed(sizes[1:]):
        # A size of 0 leaves no entries; 1 in its place keeps the division defined.
        n = ops.maximum(_size(n), np.array(1, "int64"))
        columns.insert(0, ops.rem(numbers, n))
        numbers = ops.floor_divide(numbers, n)
    return [numbers, *columns] if sizes else []


def merge(indices, values: list, shape: tuple) -> tuple:
    """`(indices, values)` with one entry for each place, in their order; values are lists of members of that indices.

    Arrays have as many entries then as there are places. Traced ones keep their number, and those that are over become
    no elements, with zeros for values.
    """
    entries, k = indices.shape
    if isinstance(entries, int) and entries == 0:
        return indices, values
    numbers = keys(indices, shape)
    order = ops.argsort(numbers)
    numbers = ops.take(numbers, order, axis=0)
    before = ops.concatenate(np.array([-1], "int64"), numbers, axis=0)
    before = ops.slice(before, start=(0,), limit=(entries,), stride=(1,))
    first = ops.convert(ops.ne(numbers, before), dtype="int32")
    target = ops.reshape(ops.sub(ops.cumsum(first, axis=0), np.array(1, "int32")), shape=(entries, 1))
    outside = ops.broadcast_to(stacked([ops.reshape(_size(n), shape=(1,)) for n in shape[:k]], 1), shape=(entries, k))
    indices = ops.scatter_nd(outside, target, ops.take(indices, order, axis=0), reduction="update")
    merged = [_summed(target, ops.take(v, order, axis=0)) for v in values]
    if isinstance(first, TracedArray):
        return indices, merged
    count = int(np.asarray(first).sum())
    return indices[:count], [_first(v, count) for v in merged]


def _first(x, count: int):
    """The first so many along the first axis."""
    rank = x.ndim
    return ops.slice(x, start=(0,) * rank, limit=(count, *x.shape[1:]), stride=(1,) * rank)


def _summed(target, values):
    """The sums [entries, ...] of the values with the same target; of booleans, whether any is true."""
    dtype = values.dtype.name
    values = ops.convert(values, dtype="int32") if dtype == "bool" else values
    zeros = ops.full(shape=tuple(values.shape), value=0, dtype=values.dtype.name)
    out = ops.scatter_nd(zeros, target, values, reduction="add")
    return ops.convert(out, dtype="bool") if dtype == "bool" else out


# -- operators ---------------------------------------------------------------------------------------------------------
def _function(name: str):
    from kgraph.frontend.keras_backend import numpy

    return getattr(numpy, name)


def _operator(function: str, swapped: bool = False):
    def operator(self, other):
        if getattr(other, "_keras_history", None) is not None:
            return NotImplemented  # a KerasTensor answers for itself
        return _function(function)(*((other, self) if swapped else (self, other)))

    operator.__name__ = function
    return operator


def _method(function: str):
    def method(self, *args, **kwargs):
        return _function(function)(self, *args, **kwargs)

    method.__name__ = function
    return method


_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "mod",
    "pow": "power",
    "matmul": "matmul",
}
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
for _name, _of_keras in _OPERATORS.items():
    setattr(SparseTensor, f"__{_name}__", _operator(_of_keras))
    setattr(SparseTensor, f"__r{_name}__", _operator(_of_keras, swapped=True))
for _name, _of_keras in _COMPARISONS.items():
    setattr(SparseTensor, f"__{_name}__", _operator(_of_keras))
for _name, _of_keras in {"neg": "negative", "abs": "absolute"}.items():
    setattr(SparseTensor, f"__{_name}__", _method(_of_keras))
for _name in ("sum", "mean", "reshape", "transpose", "squeeze", "conj"):
    setattr(SparseTensor, _name, _method(_name))


__all__ = ["SparseTensor"]
