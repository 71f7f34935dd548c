"""Elementwise changes of representation: dtype conversion, bit casts, complex parts, the gradient barrier."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kgraph import ops
from kgraph.errors import DTypeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ir.types import COMPLEX, FLOATS
from kgraph.ops.common import (
    ANY,
    COMPLEX_OF,
    INEXACT,
    REAL_OF,
    Array,
    booleans,
    dtype_of,
    integers,
    is_differentiable,
    like,
    require,
    special,
    uniform,
)
from kgraph.ops.elementwise import Binary, Unary, binary, unary

# -- convert ----------------------------------------------------------------------------------------------------------


def convert_array(x: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of x in another dtype: floats to ints truncate and saturate, NaN gives 0; to bool is `!= 0`."""
    source, target = dtype_name(x.dtype), np_dtype(dtype)
    with np.errstate(all="ignore"):
        if source in COMPLEX and dtype not in COMPLEX:
            return convert_array(x.real if dtype != "bool" else x != 0, dtype)
        if dtype == "bool":
            return x != 0
        if source not in FLOATS or dtype in INEXACT:
            return x.astype(target)
        limits = ml_dtypes.iinfo(target)
        whole = np.trunc(x.astype(np.float64))
        # float(max) may round up to a value that no longer fits: at and above it the maximum is taken.
        over, under = whole >= float(limits.max), whole <= float(limits.min)
        inside = np.where(over | under | np.isnan(whole), 0.0, whole)
        # Through int64 (uint64): NumPy has no direct casts to 4 bits, and those of floats to narrow ints do not wrap.
        wide = inside.astype(np.uint64 if dtype == "uint64" else np.int64).astype(target)
        return np.where(over, target.type(limits.max), np.where(under, target.type(limits.min), wide)).astype(target)


def _convert_gradient(cotangents, inputs, outputs, dtype):
    (x,) = inputs
    if not is_differentiable(x) or dtype not in INEXACT:
        return (None,)
    return (ops.convert(cotangents[0], dtype=dtype_of(x)),)


def _convert_samples() -> list[Sample]:
    wild = np.array([np.nan, np.inf, -np.inf, 0.5, -0.5, 1.9, -1.9, 2.5e9, -2.5e9, 1e19, -1e19, 300, -300], "float32")
    out = [Sample((uniform((3, 17), -9, 9),), {"dtype": d}, d) for d in ("float64", "float16", "bfloat16", "int32")]
    out += [Sample((uniform((2, 3), -9, 9, d),), {"dtype": "float32"}, d) for d in ("float16", "bfloat16", "float64")]
    out += [Sample((integers((3, 5), -300, 300),), {"dtype": d}, d) for d in ("float32", "int8", "uint8", "int64")]
    out += [Sample((booleans((3, 5)),), {"dtype": d}, d) for d in ("float32", "int32")]
    out += [Sample((uniform((), -9, 9),), {"dtype": "int64"}), Sample((uniform((0, 3)),), {"dtype": "int32"}, "empty")]
    targets = ("bool", "int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "bfloat16")
    out += [Sample((wild,), {"dtype": d}, "special") for d in targets]
    out.append(Sample((uniform((5,)),), {"dtype": "complex64"}, "complex64"))
    return out


CONVERT = register(
    Primitive(
        "convert",
        infer=lambda x, dtype: x.with_dtype(dtype),
        reference=convert_array,
        gradient=_convert_gradient,
        traits=frozenset({"elementwise"}),
        samples=_convert_samples,
        tolerance=0.0,
    )
)


def convert(x: Array, *, dtype: str) -> Array:
    """x in another dtype; x itself where it has that dtype already.

    Floats to ints truncate towards 0 and saturate, NaN gives 0; ints to narrower ints wrap; anything to bool is
    `x != 0`; complex to real takes the real part. x: any shape and dtype. Raises TypeError for an unknown dtype.
    """
    dtype = dtype_name(dtype)
    return x if dtype_name(x.dtype) == dtype else bind(CONVERT, x, dtype=dtype)


# -- bitcast_convert --------------------------------------------------------------------------------------------------


def _require_bits(name: str, x: TensorType, dtype: str) -> None:
    if "bool" in (x.dtype, dtype):
        raise DTypeError(f"{name}({x}) to {dtype}: the bits of bool are not defined")


def _bitcast_infer(x: TensorType, dtype: str) -> TensorType:
    _require_bits("bitcast_convert", x, dtype)
    if x.itemsize != np_dtype(dtype).itemsize:
        raise DTypeError(f"bitcast_convert({x}) to {dtype}: expected a dtype of {x.itemsize} bytes")
    return x.with_dtype(dtype)


BITCAST_CONVERT = register(
    Primitive(
        "bitcast_convert",
        infer=_bitcast_infer,
        reference=lambda x, dtype: np.ascontiguousarray(x).view(np_dtype(dtype)).reshape(x.shape).copy(),
        gradient=NotDifferentiable("it reinterprets bits"),
        traits=frozenset({"elementwise"}),
        samples=lambda: [
            Sample((uniform((3, 5)),), {"dtype": "int32"}),
            Sample((integers((7,), -(2**31), 2**31),), {"dtype": "uint32"}),
            Sample((integers((), 0, 2**30),), {"dtype": "float32"}),
            Sample((uniform((7,), dtype="bfloat16"),), {"dtype": "int16"}, "bfloat16"),
            Sample((uniform((0, 3)),), {"dtype": "int32"}, "empty"),
            Sample((special(),), {"dtype": "uint32"}, "special"),
        ],
        tolerance=0.0,
    )
)


def _regroup_infer(x: TensorType, dtype: str) -> TensorType:
    _require_bits("bitcast_regroup", x, dtype)
    size, new = x.itemsize, np_dtype(dtype).itemsize
    if size >= new:
        return TensorType((*x.shape, size // new), dtype)
    require(
        x.rank > 0 and x.shape[-1] == new // size,
        lambda: f"bitcast_regroup({x}) to {dtype}: expected a last axis of size {new // size}",
    )
    return TensorType(x.shape[:-1], dtype)


def _regroup(x: np.ndarray, dtype: str) -> np.ndarray:
    shape = _regroup_infer(TensorType(x.shape, dtype_name(x.dtype)), dtype).shape
    return np.ascontiguousarray(x).reshape(-1).view(np_dtype(dtype)).reshape(shape).copy()


BITCAST_REGROUP = register(
    Primitive(
        "bitcast_regroup",
        infer=_regroup_infer,
        reference=_regroup,
        gradient=NotDifferentiable("it reinterprets bits"),
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)),), {"dtype": "uint8"}),
            Sample((integers((5, 2), 0, 2**16, "uint16"),), {"dtype": "uint32"}),
            Sample((integers((4,), 0, 256, "uint8"),), {"dtype": "float32"}, "scalar"),
            Sample((uniform((0, 3)),), {"dtype": "int16"}, "empty"),
        ],
        tolerance=0.0,
    )
)


def bitcast_convert(x: Array, *, dtype: str) -> Array:
    """The bits of x as another dtype, as in StableHLO; x itself where it has that dtype already.

    x: any shape and dtype except bool. To a dtype of the same size the shape stays; other sizes: `bitcast_regroup`.
    Raises ShapeError where the last axis does not fit and DTypeError for bool.
    """
    dtype = dtype_name(dtype)
    if dtype_name(x.dtype) == dtype:
        return x
    same_size = np_dtype(dtype_of(x)).itemsize == np_dtype(dtype).itemsize
    return bind(BITCAST_CONVERT, x, dtype=dtype) if same_size else bitcast_regroup(x, dtype=dtype)


def bitcast_regroup(x: Array, *, dtype: str) -> Array:
    """The bits of x as elements of another size, little endian.

    x: any shape and dtype except bool. To a dtype k times smaller an axis of size k is appended; to one k times larger
    the last axis, of size k, is removed. Raises ShapeError where it does not fit and DTypeError for bool.
    """
    return bind(BITCAST_REGROUP, x, dtype=dtype_name(dtype))


# -- stop_gradient ----------------------------------------------------------------------------------------------------

stop_gradient: Unary = unary(
    "stop_gradient", np.array, lambda c, x, y: None, "x, through which no gradient flows.", dtypes=ANY, widen=False
)

# -- optimization_barrier ---------------------------------------------------------------------------------------------

OPTIMIZATION_BARRIER = register(
    Primitive(
        "optimization_barrier",
        infer=lambda x: x,
        reference=np.array,
        gradient=lambda cotangents, inputs, outputs: cotangents,
        traits=frozenset({"view"}),
        samples=lambda: [
            Sample((uniform((3, 5)),), {}),
            Sample((integers((7,)),), {}),
            Sample((booleans(()),), {}),
            Sample((uniform((0, 3)),), {}, "empty"),
        ],
        tolerance=0.0,
    )
)


def optimization_barrier(x: Array) -> Array:
    """x, as a value that no rewrite takes for x, as in StableHLO: what is computed from it does not merge with what is
    computed from x. It costs nothing at run time. x: any shape and dtype.
    """
    return bind(OPTIMIZATION_BARRIER, x)


# -- complex numbers --------------------------------------------------------------------------------------------------

real: Unary = unary(
    "real",
    lambda x: x.real.copy(),
    lambda c, x, y: ops.complex(c, like(c, 0)),
    "The real part.",
    dtypes=COMPLEX,
    result=REAL_OF.__getitem__,
    traits={"host"},
)
imag: Unary = unary(
    "imag",
    lambda x: x.imag.copy(),
    lambda c, x, y: ops.complex(like(c, 0), ops.neg(c)),
    "The imaginary part.",
    dtypes=COMPLEX,
    result=REAL_OF.__getitem__,
    traits={"host"},
)
conj: Unary = unary(
    "conj", np.conj, lambda c, x, y: ops.conj(c), "The complex conjugate.", dtypes=COMPLEX, traits={"host"}
)


def _complex(re: np.ndarray, im: np.ndarray) -> np.ndarray:
    out = np.empty(np.broadcast_shapes(re.shape, im.shape), COMPLEX_OF[re.dtype.name])
    out.real, out.imag = re, im
    return out


complex: Binary = binary(
    "complex",
    _complex,
    lambda c, re, im, z: (ops.real(c), ops.neg(ops.imag(c))),
    "re + i * im; float32 gives complex64, float64 complex128.",
    dtypes=frozenset(COMPLEX_OF),
    result=COMPLEX_OF.__getitem__,
    traits={"host"},
    widen=False,
    samples=lambda: [
        Sample((uniform((3, 5)), uniform((3, 5), seed=1))),
        Sample((uniform((3, 1)), uniform((7,), seed=1))),
        Sample((uniform((0, 3)), uniform((3,))), name="empty"),
    ],
)
