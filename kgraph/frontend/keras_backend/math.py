"""kgraph's `keras.src.backend.<backend>.math`: segments, order, Fourier transforms, special functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axes_of,
    broadcast,
    concrete,
    convert,
    dtype_of,
    filled,
    flatten,
    insert_axes,
    is_float,
    move_axis,
    promote,
    promote_inexact,
    reshape_to,
    scalar,
    size_of,
    slice_axis,
    to_inexact,
)
from kgraph.ir import Dim
from kgraph.ir.dims import product


# -- segments -------------------------------------------------------------------------------------------------------
def _segment(data: Tensor, segment_ids: Tensor, num_segments: int | Dim | None, reduction: str, start: Any) -> Tensor:
    """data[i] combined into place segment_ids[i] of num_segments rows that begin with `start`."""
    data, ids = convert_to_tensor(data), convert_to_tensor(segment_ids)
    if num_segments is None:
        (known,) = concrete(f"segment_{reduction}", ids)
        num_segments = int(known.max()) + 1 if known.size else 0
    num_segments = size_of(num_segments)
    # Negative ids are dropped, as ids beyond the end are; the primitive would count them from the end.
    beyond = convert_to_tensor(num_segments, dtype_of(ids))
    ids = ops.select(ops.lt(ids, scalar(0, ids)), beyond, ids)
    base = filled((num_segments, *data.shape[1:]), start, dtype_of(data))
    return ops.scatter_nd(base, insert_axes(ids, (ids.ndim,)), data, reduction=reduction)


def _extreme_value(x: Tensor, largest: bool) -> Any:
    if is_float(x):
        return float("inf") if largest else float("-inf")
    if dtype_of(x) == "bool":
        return largest
    info = np.iinfo(x.dtype)
    return int(info.max if largest else info.min)


def segment_sum(data: Tensor, segment_ids: Tensor, num_segments: int | None = None, sorted: bool = False) -> Tensor:
    """The sum of the rows of each segment, [num_segments, ...]; negative ids are left out."""
    return _segment(data, segment_ids, num_segments, "add", 0)


def segment_max(data: Tensor, segment_ids: Tensor, num_segments: int | None = None, sorted: bool = False) -> Tensor:
    """The largest elements of each segment, [num_segments, ...]; the dtype's lowest value for an empty one."""
    data = convert_to_tensor(data)
    return _segment(data, segment_ids, num_segments, "max", _extreme_value(data, largest=False))


def segment_min(data: Tensor, segment_ids: Tensor, num_segments: int | None = None, sorted: bool = False) -> Tensor:
    """The smallest elements of each segment, [num_segments, ...]; the dtype's highest value for an empty one."""
    data = convert_to_tensor(data)
    return _segment(data, segment_ids, num_segments, "min", _extreme_value(data, largest=True))


def segment_prod(data: Tensor, segment_ids: Tensor, num_segments: int | None = None, sorted: bool = False) -> Tensor:
    """The product of the rows of each segment, [num_segments, ...]; 1 for an empty one."""
    return _segment(data, segment_ids, num_segments, "mul", 1)


# -- order, distance ------------------------------------------------------------------------------------------------
def top_k(x: Tensor, k: Any, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest elements along the last axis, in descending order, and their int32 indices."""
    values, indices = ops.top_k(convert_to_tensor(x), k=size_of(k), sorted=True)
    return values, indices


def in_top_k(targets: Tensor, predictions: Tensor, k: int) -> Tensor:
    """Whether predictions[i, targets[i]] is among the k largest of its row; NaN never is, equal ones all are."""
    targets, predictions = convert_to_tensor(targets), convert_to_tensor(predictions)
    last = predictions.ndim - 1
    own = ops.take_along_axis(predictions, insert_axes(targets, (targets.ndim,)), axis=last)
    if is_float(own):
        own = ops.select(ops.is_nan(own), scalar(float("-inf"), own), own)
    larger = convert(ops.gt(predictions, own), "int32")
    rank = ops.reduce_sum(larger, axes=(last,), keepdims=False)
    return ops.lt(rank, scalar(k, rank))


def logsumexp(x: Tensor, axis: int | tuple | None = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) over axes, without overflow."""
    x = to_inexact(x)
    axes = axes_of(axis, x.ndim)
    return ops.logsumexp(x, axes=axes, keepdims=bool(keepdims)) if axes else x


def cdist(x: Tensor, y: Tensor) -> Tensor:
    """[..., P, R] of the Euclidean distances between the rows of x [..., P, M] and y [..., R, M]."""
    x, y = promote_inexact(x, y)
    if x.ndim < 2 or y.ndim < 2:
        raise ValueError("`cdist` inputs must have rank >= 2")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError("Last dimension of inputs to `cdist` must match")
    difference = ops.sub(insert_axes(x, (x.ndim - 1,)), insert_axes(y, (y.ndim - 2,)))
    total = ops.reduce_sum(ops.mul(difference, difference), axes=(difference.ndim - 1,), keepdims=False)
    return ops.sqrt(total)


def extract_sequences(x: Tensor, sequence_length: int, sequence_stride: int) -> Tensor:
    """[..., frames, sequence_length] of the windows of the last axis, a stride apart."""
    x = convert_to_tensor(x)
    frames = (x.shape[-1] - sequence_length) // sequence_stride + 1
    start = ops.mul(ops.iota(shape=(frames, 1), dtype="int32", axis=0), np.asarray(sequence_stride, "int32"))
    places = ops.add(start, ops.iota(shape=(1, sequence_length), dtype="int32", axis=1))
    return ops.take(x, places, axis=x.ndim - 1, mode="clip")


# -- Fourier transforms ---------------------------------------------------------------------------------------------
def _complex_of(x: Any) -> Tensor:
    """A complex tensor of a pair (real, imaginary). Raises ValueError for anything else."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError(f"Input `x` should be a tuple of two tensors - real and imaginary.Received: x={x}")
    real, imag = (convert_to_tensor(part) for part in x)
    if tuple(real.shape) != tuple(imag.shape):
        raise ValueError(
            "Input `x` should be a tuple of two tensors - real and imaginary."
            "Both the real and imaginary parts should have the same shape. "
            f"Received: x[0].shape = {tuple(real.shape)}, x[1].shape = {tuple(imag.shape)}"
        )
    if not is_float(real) or not is_float(imag):
        raise ValueError(f"At least one tensor in input `x` is not of type float.Received: x={x}.")
    real, imag = promote(real, imag)
    if dtype_of(real) != "float64":
        real, imag = convert(real, "float32"), convert(imag, "float32")
    return ops.complex(real, imag)


# The name by which `keras.ops.polar` calls it.
_get_complex_tensor_from_tuple = _complex_of


def _parts_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.real(x), ops.imag(x)


def fft(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The discrete Fourier transform along the last axis, of and as a pair (real, imaginary)."""
    return _parts_of(ops.fft(_complex_of(x)))


def fft2(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The discrete Fourier transform along the last two axes, of and as a pair (real, imaginary)."""
    return _parts_of(ops.fft2(_complex_of(x)))


def ifft2(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of `fft2`."""
    return _parts_of(ops.ifft2(_complex_of(x)))


def rfft(x: Tensor, fft_length: int | None = None) -> tuple[Tensor, Tensor]:
    """The non-negative frequencies of the Fourier transform along the last axis, cut or filled to fft_length."""
    x = to_inexact(x)
    x = x if dtype_of(x) == "float64" else convert(x, "float32")
    length = x.shape[-1] if fft_length is None else size_of(fft_length)
    return _parts_of(ops.rfft(x, length=length))


def irfft(x: tuple[Tensor, Tensor], fft_length: int | None = None) -> Tensor:
    """The inverse of `rfft`, real, of length fft_length or 2 * (frequencies - 1)."""
    spectrum = _complex_of(x)
    length = 2 * (spectrum.shape[-1] - 1) if fft_length is None else size_of(fft_length)
    return ops.irfft(spectrum, length=length)


def _window(window: Any, sequence_length: int, fft_length: int, dtype: str) -> Tensor:
    """A window by name or by its values, centred in fft_length zeros; ones for None."""
    if window is None:
        return filled((fft_length,), 1, dtype)
    if isinstance(window, str):
        if window not in ("hann", "hamming"):
            raise ValueError(
                f'If a string is passed to `window`, it must be one of `"hann"`, `"hamming"`. Received: window={window}'
            )
        # The periodic windows of signal processing: one more point than asked for, the last one dropped.
        points = np.hanning(sequence_length + 1) if window == "hann" else np.hamming(sequence_length + 1)
        window = points[:-1] if sequence_length > 1 else np.ones(sequence_length)
    window = convert_to_tensor(window, dtype)
    if window.ndim != 1 or window.shape[-1] != sequence_length:
        raise ValueError(
            f"The shape of `window` must be equal to [sequence_length].Received: window shape={tuple(window.shape)}"
        )
    before = (fft_length - sequence_length) // 2
    after = fft_length - sequence_length - before
    return ops.pad(window, scalar(0, window), low=(before,), high=(after,), interior=(0,))


def stft(
    x: Tensor,
    sequence_length: int,
    sequence_stride: int,
    fft_length: int,
    window: str | Tensor | None = "hann",
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """The short-time Fourier transform of the last axis, [..., frames, fft_length // 2 + 1], real and imaginary.

    window: "hann", "hamming", sequence_length values, or None. center: mirror fft_length // 2 elements at both ends.
    """
    x = convert_to_tensor(x)
    if dtype_of(x) not in ("float32", "float64"):
        raise TypeError(f"Invalid input type. Expected `float32` or `float64`. Received: input type={x.dtype}")
    if fft_length < sequence_length:
        raise ValueError(
            "`fft_length` must equal or larger than `sequence_length`. "
            f"Received: sequence_length={sequence_length}, fft_length={fft_length}"
        )
    values = _window(window, sequence_length, fft_length, dtype_of(x))
    if center:
        widths = (0,) * (x.ndim - 1) + (fft_length // 2,)
        x = ops.pad_mirror(x, low=widths, high=widths, mode="reflect")
    frames = extract_sequences(x, fft_length, sequence_stride)
    return _parts_of(ops.rfft(ops.mul(frames, values), length=fft_length))


def istft(
    x: tuple[Tensor, Tensor],
    sequence_length: int,
    sequence_stride: int,
    fft_length: int,
    length: int | None = None,
    window: str | Tensor | None = "hann",
    center: bool = True,
) -> Tensor:
    """The inverse of `stft`, [..., length], for a pair (real, imaginary) [..., frames, fft_length // 2 + 1].

    The frames are windowed again, added up where they overlap, and divided by the sum of the squared windows.
    """
    spectrum = _complex_of(x)
    if spectrum.ndim < 2:
        raise ValueError(f"Input `x` must have at least 2 dimensions. Received shape: {tuple(spectrum.shape)}")
    frames = ops.irfft(spectrum, length=fft_length)
    values = _window(window, sequence_length, fft_length, dtype_of(frames))
    count = frames.shape[-2]
    total = fft_length + sequence_stride * (count - 1)
    signal = _overlap_add(ops.mul(frames, values), sequence_stride, total)
    square = broadcast(ops.mul(values, values), (count, fft_length))
    norm = _overlap_add(square, sequence_stride, total)
    # Where no window reaches there is nothing to restore.
    reached = ops.gt(norm, scalar(1e-10, norm))
    signal = ops.div(signal, ops.select(reached, norm, scalar(1, norm)))
    if window is None:
        # Without a window Keras divides by the stride where it otherwise divides by the sum of the window.
        signal = ops.mul(signal, scalar(fft_length / sequence_stride, signal))
    start = fft_length // 2 if center else 0
    if length is not None:
        end = start + size_of(length)
        end = end if end <= total else total
    else:
        end = total - fft_length // 2 if center else total
    return slice_axis(signal, signal.ndim - 1, start, end)


def _overlap_add(frames: Tensor, stride: int, total: Any) -> Tensor:
    """Windows [..., count, width] added into [..., total], each a stride after the one before."""
    *lead, count, width = frames.shape
    start = ops.mul(ops.iota(shape=(count, 1), dtype="int32", axis=0), np.asarray(stride, "int32"))
    places = flatten(ops.add(start, ops.iota(shape=(1, width), dtype="int32", axis=1)))
    rows = product(lead)
    updates = move_axis(reshape_to(frames, (rows, count * width)), 1, 0)
    base = filled((total, rows), 0, dtype_of(frames))
    out = ops.scatter_nd(base, insert_axes(places, (1,)), updates, reduction="add")
    return reshape_to(move_axis(out, 1, 0), (*lead, total))


# -- special functions ----------------------------------------------------------------------------------------------
def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x)."""
    return ops.rsqrt(to_inexact(x))


def erf(x: Tensor) -> Tensor:
    """The error function."""
    return ops.erf(to_inexact(x))


def erfc(x: Tensor) -> Tensor:
    """1 - erf(x), accurate for large x."""
    return ops.erfc(to_inexact(x))


def erfinv(x: Tensor) -> Tensor:
    """The inverse of erf on (-1, 1)."""
    return ops.erf_inv(to_inexact(x))


def logdet(x: Tensor) -> Tensor:
    """The logarithm of |det| of square matrices."""
    from kgraph.frontend.keras_backend.numpy import slogdet

    return slogdet(x)[1]
