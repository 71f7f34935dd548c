"""Types of values under the IR's name; `kgraph.types`, which the runtime shares, defines them."""

from kgraph.types import (
    COMPLEX,
    FLOATS,
    INTS,
    LONG_NAMES,
    SHORT_NAMES,
    TensorType,
    dtype_name,
    np_dtype,
    numpy_name,
    type_of,
)

__all__ = [
    "COMPLEX",
    "FLOATS",
    "INTS",
    "LONG_NAMES",
    "SHORT_NAMES",
    "TensorType",
    "dtype_name",
    "np_dtype",
    "numpy_name",
    "type_of",
]
