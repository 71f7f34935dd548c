"""Discrete Fourier transforms; on the host, by NumPy's pocketfft."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import COMPLEX_OF, REAL_OF, dtype_of, size_attr, uniform
from kgraph.ops.rules import dtype_error, scalar, shape_error

__all__ = ["fft", "fft2", "ifft", "ifft2", "irfft", "rfft"]


# -- complex to complex -----------------------------------------------------------------------------------------------
def _complex_infer(name: str, axes: int):
    def infer(x):
        if x.dtype not in REAL_OF:
            raise dtype_error(name, (x,), "a complex operand")
        if x.rank < axes:
            raise shape_error(name, (x,), f"an operand of rank {axes} or more")
        return x

    return infer


def _nonempty(transform):
    """NumPy refuses transforms of length 0; a batch without elements it takes."""
    return lambda x, **attrs: transform(x, **attrs) if x.size else np.zeros_like(x)


def _complex_transform(name: str, axes: int, transform) -> Primitive:
    """A transform over the last `axes` axes. Its matrix is symmetric, so its cotangent is the same transform's."""
    shapes = [(3, 8), (2, 3, 7), (5, 1)] if axes == 1 else [(4, 6), (2, 3, 5)]
    record = Primitive(
        name=name,
        infer=_complex_infer(name, axes),
        reference=_nonempty(transform),
        gradient=lambda cotangents, inputs, outputs: (getattr(ops, name)(cotangents[0]),),
        traits=frozenset({"host"}),
        samples=lambda: [Sample((uniform(s, dtype="complex64"),)) for s in [*shapes, (0, 4, 5)]],
        tolerance=1e-5,
    )
    return register(record)


FFT = _complex_transform("fft", 1, np.fft.fft)
IFFT = _complex_transform("ifft", 1, np.fft.ifft)
FFT2 = _complex_transform("fft2", 2, np.fft.fft2)
IFFT2 = _complex_transform("ifft2", 2, np.fft.ifft2)


def fft(x):
    """sum_n x[n] exp(-2 pi i k n / N) along the last axis. x: complex, rank 1 or more; gives its type."""
    return bind(FFT, x)


def ifft(x):
    """sum_k x[k] exp(2 pi i k n / N) / N along the last axis. x: complex, rank 1 or more; gives its type."""
    return bind(IFFT, x)


def fft2(x):
    """`fft` over the last two axes. x: complex, rank 2 or more; gives its type."""
    return bind(FFT2, x)


def ifft2(x):
    """`ifft` over the last two axes. x: complex, rank 2 or more; gives its type."""
    return bind(IFFT2, x)


# -- real -------------------------------------------------------------------------------------------------------------
def _rfft_infer(x, *, length):
    if x.dtype not in COMPLEX_OF:
        raise dtype_error("rfft", (x,), "a float32 or float64 operand")
    if not x.rank:
        raise shape_error("rfft", (x,), "an operand of rank 1 or more")
    return TensorType((*x.shape[:-1], length // 2 + 1), COMPLEX_OF[x.dtype])


def _rfft_reference(x, *, length):
    if 0 in x.shape[:-1]:
        return np.zeros((*x.shape[:-1], length // 2 + 1), np.result_type(x, np.complex64))
    return np.fft.rfft(x, n=length)


def _resized_last(x, size):
    """`x` cut, or filled with zeros, to `size` along its last axis."""
    rank = len(x.shape)
    if x.shape[-1] == size:
        return x
    zeros = (0,) * rank
    return ops.pad(x, scalar(0, dtype_of(x)), low=zeros, high=(*zeros[1:], size - x.shape[-1]), interior=zeros)


def _rfft_gradient(cotangents, inputs, outputs, *, length):
    # x[n] contributes exp(-2 pi i k n / N) to the entries that are kept: an fft of the cotangent, zero elsewhere.
    full = ops.real(ops.fft(_resized_last(cotangents[0], length)))
    return (_resized_last(full, inputs[0].shape[-1]),)


RFFT = register(
    Primitive(
        name="rfft",
        infer=_rfft_infer,
        reference=_rfft_reference,
        gradient=_rfft_gradient,
        traits=frozenset({"host"}),
        samples=lambda: [
            Sample((uniform((3, 8)),), {"length": 8}, "even"),
            Sample((uniform((2, 7)),), {"length": 7}, "odd"),
            Sample((uniform((5,)),), {"length": 8}, "filled"),
            Sample((uniform((3, 8)),), {"length": 5}, "cut"),
            Sample((uniform((0, 8)),), {"length": 8}, "empty"),
        ],
        tolerance=1e-5,
    )
)


def rfft(x, *, length=None):
    """Entries 0..length // 2 of the transform of a real x along its last axis, cut or zero-filled to `length`.

    x: float32 or float64, rank 1 or more. length: x.shape[-1] by default. Gives [..., length // 2 + 1], complex.
    """
    return bind(RFFT, x, length=size_attr(x.shape[-1] if length is None else length))


def _irfft_infer(x, *, length):
    if x.dtype not in REAL_OF:
        raise dtype_error("irfft", (x,), "a complex operand")
    if not x.rank:
        raise shape_error("irfft", (x,), "an operand of rank 1 or more")
    return TensorType((*x.shape[:-1], length), REAL_OF[x.dtype])


def _irfft_reference(x, *, length):
    if 0 in x.shape[:-1]:
        return np.zeros((*x.shape[:-1], length), x.real.dtype)
    return np.fft.irfft(x, n=length)


def _irfft_gradient(cotangents, inputs, outputs, *, length):
    # Entry k stands for itself and its mirror image, but for k = 0 and, for even lengths, k = length / 2.
    (cotangent,), (x,) = cotangents, inputs
    transformed = ops.conj(ops.rfft(cotangent, length=length))
    count = length // 2 + 1
    index = ops.iota(shape=(count,), dtype="int32", axis=0)
    own = ops.logical_or(ops.eq(index, scalar(0, "int32")), ops.eq(ops.add(index, index), _int_scalar(length)))
    dtype = dtype_of(cotangent)
    weights = ops.div(
        ops.select(own, scalar(1, dtype), scalar(2, dtype)), ops.convert(_int_scalar(length), dtype=dtype)
    )
    weights = ops.complex(weights, scalar(0, dtype))
    return (_resized_last(ops.mul(transformed, weights), x.shape[-1]),)


def _int_scalar(size):
    return scalar(size, "int32") if isinstance(size, int) else ops.dim_value(dim=size, dtype="int32")


IRFFT = register(
    Primitive(
        name="irfft",
        infer=_irfft_infer,
        reference=_irfft_reference,
        gradient=_irfft_gradient,
        traits=frozenset({"host"}),
        samples=lambda: [
            Sample((uniform((3, 5), dtype="complex64"),), {"length": 8}, "even"),
            Sample((uniform((2, 4), dtype="complex64"),), {"length": 7}, "odd"),
            Sample((uniform((3,), dtype="complex64"),), {"length": 8}, "filled"),
            Sample((uniform((2, 6), dtype="complex64"),), {"length": 5}, "cut"),
            Sample((uniform((0, 5), dtype="complex64"),), {"length": 8}, "empty"),
        ],
        tolerance=1e-5,
    )
)


def irfft(x, *, length=None):
    """The real signal of `length` whose transform begins with x along the last axis; the inverse of `rfft`.

    x: complex, rank 1 or more, cut or filled with zeros to length // 2 + 1; the imaginary parts of entry 0 and, for
    even lengths, of the last one are ignored. length: 2 * (x.shape[-1] - 1) by default. Gives [..., length], real.
    """
    return bind(IRFFT, x, length=size_attr(2 * (x.shape[-1] - 1) if length is None else length))
