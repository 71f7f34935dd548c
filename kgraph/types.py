"""Types of values: a shape of `int | Dim` and a dtype named as Keras names it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from kgraph.dims import Dim, product
from kgraph.errors import DTypeError

SHORT_NAMES = {
    "bool": "pred",
    "int4": "s4",
    "uint4": "u4",
    "int8": "s8",
    "int16": "s16",
    "int32": "s32",
    "int64": "s64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "complex64": "c64",
    "complex128": "c128",
}
LONG_NAMES = {short: long for long, short in SHORT_NAMES.items()}

_OF_ML_DTYPES = frozenset({"int4", "uint4", "float8_e4m3fn", "float8_e5m2", "bfloat16"})
FLOATS = frozenset({"float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"})
COMPLEX = frozenset({"complex64", "complex128"})
INTS = frozenset(n for n in SHORT_NAMES if n.startswith(("int", "uint")))


class _NumpyDtypes(dict):
    """NumPy dtypes by dtype name, looked up at first use: only models with the narrow ones need ml_dtypes."""

    def __missing__(self, name: str) -> np.dtype:
        if name not in SHORT_NAMES:
            raise KeyError(name)
        if name in _OF_ML_DTYPES:
            try:
                import ml_dtypes
            except ModuleNotFoundError:
                raise DTypeError(f"arrays of {name} need the package ml_dtypes, which is not installed") from None
            self[name] = np.dtype(getattr(ml_dtypes, name))
        else:
            self[name] = np.dtype(name)
        return self[name]


_NP_DTYPES = _NumpyDtypes()


def np_dtype(name: str) -> np.dtype:
    """The NumPy dtype (of ml_dtypes where NumPy has none) for a dtype name.

    Raises DTypeError where ml_dtypes is needed and not installed, KeyError for what is no dtype name.
    """
    return _NP_DTYPES[name]


@lru_cache(1024)
def numpy_name(dtype: np.dtype) -> str:
    """`dtype.name`, which NumPy computes anew each time."""
    return dtype.name


def dtype_name(dtype) -> str:
    """The canonical name of a NumPy dtype, scalar type or name."""
    name = dtype if isinstance(dtype, str) else numpy_name(np.dtype(dtype))
    if name not in SHORT_NAMES:
        raise TypeError(f"kgraph has no dtype {name!r}; it knows {sorted(SHORT_NAMES)}")
    return name


@dataclass(frozen=True)
class TensorType:
    """Shape (tuple of `int | Dim`) and dtype name of a value; prints as `f32[N,128]`."""

    shape: tuple
    dtype: str

    @cached_property
    def np_dtype(self) -> np.dtype:
        return _NP_DTYPES[self.dtype]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def size(self):
        """Number of elements, `int | Dim`."""
        return product(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.np_dtype.itemsize

    @cached_property
    def nbytes(self):
        """Bytes of the dense tensor, `int | Dim`."""
        return self.size * self.itemsize

    @property
    def is_static(self) -> bool:
        """Whether no size is symbolic."""
        return not any(isinstance(s, Dim) for s in self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def with_shape(self, shape) -> TensorType:
        """The same dtype in another shape."""
        return TensorType(tuple(shape), self.dtype)

    def with_dtype(self, dtype: str) -> TensorType:
        """The same shape in another dtype."""
        return TensorType(self.shape, dtype)

    def __str__(self):
        return f"{SHORT_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"


def type_of(array) -> TensorType:
    """The type of a concrete NumPy array or scalar."""
    array = np.asarray(array)
    return TensorType(tuple(array.shape), dtype_name(array.dtype))
