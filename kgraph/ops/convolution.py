"""Convolution over channels-last tensors, and the padding rules of Keras."""

from __future__ import annotations

from itertools import product as cartesian

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import Dim, Primitive, Sample, TensorType, bind, register
from kgraph.ir.dims import ceil_div
from kgraph.ir.types import FLOATS
from kgraph.ops.common import dtype_of, per_axis, require_same_dtype, sizes_differ, widened, zeros_like
from kgraph.ops.rules import dtype_error, shape_error

__all__ = ["conv", "conv_transpose", "conv_transpose_padding", "same_padding", "window_padding"]

# The patches that the reference gathers at once hold at most so many elements; larger batches go in pieces.
_PATCH_LIMIT = 1 << 25


# -- sizes ------------------------------------------------------------------------------------------------------------
def dilated_size(size, dilation: int):
    """The extent of `size` elements that lie `dilation` apart; 0 for none."""
    return 0 if size == 0 else (size - 1) * dilation + 1


def window_count(size, window, stride: int, low=0, high=0):
    """How many windows of extent `window` fit a size padded by `low` and `high`; 0 if none does."""
    count = (size + low + high - window) // stride + 1
    return count if isinstance(count, Dim) else max(count, 0)


def same_padding(size, window: int, stride: int, dilation: int = 1) -> tuple:
    """The (low, high) padding that gives ceil(size / stride) windows, the odd element at the end, as in Keras.

    size: may be symbolic; the padding then is a symbolic size too, exact for every size of at least 1.
    """
    extent = dilated_size(window, dilation)
    count = ceil_div(size, stride)
    if not isinstance(size, Dim):
        total = max((count - 1) * stride + extent - size, 0)
    elif extent >= stride:
        total = (count - 1) * stride + extent - size
    else:
        # Only last windows that reach over the end by t < extent need padding; size mod stride decides, which floor
        # divisions express: ceil(size / stride) exceeds ceil((size - t) / stride) by one in exactly those cases.
        total = 0
        for t in range(1, extent):
            total = total + count - ceil_div(size - t, stride)
    low = total // 2
    return low, total - low


def window_padding(padding, sizes, window, strides, dilation) -> tuple:
    """((low, high), ...) per spatial axis from "same", "valid" or explicit pairs.

    sizes, window, strides, dilation: one entry per spatial axis. Raises ShapeError for another word.
    """
    if not isinstance(padding, str):
        return tuple((low, high) for low, high in padding)
    word = padding.lower()
    if word == "valid":
        return ((0, 0),) * len(window)
    if word != "same":
        raise ShapeError(f'padding {padding!r}: expected "same", "valid" or one (low, high) pair per spatial axis')
    return tuple(same_padding(*axis) for axis in zip(sizes, window, strides, dilation, strict=True))


def conv_transpose_padding(window: int, stride: int, dilation: int, padding: str, output_padding=None) -> tuple:
    """The (low, high) padding of the stride-dilated input of a transposed convolution, as Keras defines it.

    The output size is (size - 1) * stride + extent + output_padding for "valid", and for "same" size * stride where
    `output_padding` is None, else (size - 1) * stride + extent % 2 + output_padding.
    """
    extent = dilated_size(window, dilation)
    if padding.lower() == "valid":
        extra = max(extent, stride) - extent if output_padding is None else output_padding
        return extent - 1, extent - 1 + extra
    if padding.lower() != "same":
        raise ShapeError(f'conv_transpose: padding {padding!r}: expected "same" or "valid"')
    total = stride + extent - 2 if output_padding is None else extent + extent % 2 - 2 + output_padding
    low = min(total // 2 + total % 2, extent - 1)
    return low, total - low


# -- record -----------------------------------------------------------------------------------------------------------
def _infer(x, w, *, strides, padding, lhs_dilation, rhs_dilation, feature_groups):
    types = (x, w)
    require_same_dtype("conv", *types)
    if x.dtype == "bool":
        raise dtype_error("conv", types, "numbers")
    rank = x.rank - 2
    if rank < 1 or w.rank != x.rank:
        raise shape_error("conv", types, "x[N, *spatial, channels] and w[*window, channels / groups, filters]")
    for what, value in (
        ("strides", strides),
        ("padding", padding),
        ("lhs_dilation", lhs_dilation),
        ("rhs_dilation", rhs_dilation),
    ):
        if len(value) != rank:
            raise shape_error("conv", types, f"{what} with one entry per spatial axis, got {value}")
    channels, filters = w.shape[-2], w.shape[-1]
    if sizes_differ(x.shape[-1], channels * feature_groups):
        raise shape_error(
            "conv", types, f"{channels} x {feature_groups} input channels (w's channels times the groups)"
        )
    if isinstance(filters, int) and filters % feature_groups:
        raise shape_error("conv", types, f"filters that divide into {feature_groups} groups")
    spatial = tuple(
        window_count(dilated_size(size, ld), dilated_size(window, rd), stride, low, high)
        for size, window, stride, (low, high), ld, rd in zip(
            x.shape[1:-1], w.shape[:-2], strides, padding, lhs_dilation, rhs_dilation
        )
    )
    return x.with_shape((x.shape[0], *spatial, filters))


def dilate_and_pad(x: np.ndarray, padding, dilation, fill) -> np.ndarray:
    """`x` with `dilation - 1` fills between neighbours, then (low, high) fills around, per axis; negative ones crop."""
    if all(d == 1 for d in dilation) and all(p == (0, 0) for p in padding):
        return x
    extents = [dilated_size(n, d) for n, d in zip(x.shape, dilation)]
    out = np.full([max(n + lo + hi, 0) for n, (lo, hi) in zip(extents, padding)], fill, x.dtype)
    target, source = [], []
    for n, d, (lo, _), size in zip(x.shape, dilation, padding, out.shape):
        first = max(-(lo // d), 0)  # the first element that is not cropped away
        last = min(n, (size - 1 - lo) // d + 1) if size else first
        first = min(first, max(last, 0))
        source.append(slice(first, max(last, first)))
        begin = first * d + lo
        target.append(slice(begin, begin + dilated_size(max(last - first, 0), d), d))
    if all(s.stop > s.start for s in source):
        out[tuple(target)] = x[tuple(source)]
    return out


def _windows(x: np.ndarray, window, strides, dilation) -> np.ndarray:
    """A view [N, *out, *window, channels] of the padded input."""
    rank = len(window)
    extents = [dilated_size(k, d) for k, d in zip(window, dilation)]
    view = np.lib.stride_tricks.sliding_window_view(x, extents, tuple(range(1, rank + 1)))
    steps = (slice(None), *(slice(None, None, s) for s in strides), slice(None))
    view = view[(*steps, *(slice(None, None, d) for d in dilation))]
    return np.moveaxis(view, rank + 1, -1)


@widened
def _reference(x, w, *, strides, padding, lhs_dilation, rhs_dilation, feature_groups):
    inferred = _infer(
        TensorType(x.shape, "float32"),
        TensorType(w.shape, "float32"),
        strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_groups=feature_groups,
    )
    if 0 in inferred.shape or 0 in w.shape:
        return np.zeros(inferred.shape, x.dtype)
    x = dilate_and_pad(x, ((0, 0), *padding, (0, 0)), (1, *lhs_dilation, 1), 0)
    out = np.empty(inferred.shape, x.dtype)
    if feature_groups > 1 and w.shape[-2] == 1:
        _depthwise(x, w, strides, rhs_dilation, feature_groups, out)
        return out
    windows = _windows(x, w.shape[:-2], strides, rhs_dilation)
    patch = int(np.prod(windows.shape[1:]))
    piece = max(_PATCH_LIMIT // max(patch, 1), 1)
    for start in range(0, len(x), piece):
        _dense(windows[start : start + piece], w, feature_groups, out[start : start + piece])
    return out


def _dense(windows, w, groups, out) -> None:
    """One matrix product per group: rows are output positions, the contracted axis is (window, channels of a group)."""
    channels, filters = w.shape[-2], w.shape[-1]
    taps = int(np.prod(w.shape[:-2]))
    rows = int(np.prod(out.shape[:-1]))
    if groups == 1:
        out[...] = (windows.reshape(rows, taps * channels) @ w.reshape(taps * channels, filters)).reshape(out.shape)
        return
    left = windows.reshape(rows, taps, groups, channels).transpose(2, 0, 1, 3).reshape(groups, rows, taps * channels)
    right = w.reshape(taps * channels, groups, filters // groups).transpose(1, 0, 2)
    out[...] = np.matmul(left, right).transpose(1, 0, 2).reshape(out.shape)


def _depthwise(x, w, strides, dilation, groups, out) -> None:
    """Every channel by itself: a sum over the taps of shifted inputs times that tap's weights."""
    multiplier = w.shape[-1] // groups
    total = np.zeros((*out.shape[:-1], groups, multiplier), x.dtype)
    for tap in cartesian(*(range(k) for k in w.shape[:-2])):
        steps = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, out.shape[1:-1], strides)
        )
        total += x[(slice(None), *steps)][..., None] * w[tap].reshape(groups, multiplier)
    out[...] = total.reshape(out.shape)


def _gradient(cotangents, inputs, outputs, *, strides, padding, lhs_dilation, rhs_dilation, feature_groups):
    """Both cotangents are convolutions; strides and dilations change places (Dumoulin and Visin, 2016)."""
    (cotangent,), (x, w) = cotangents, inputs
    spatial = tuple(range(1, len(x.shape) - 1))
    if any(cotangent.shape[a] == 0 for a in spatial):  # no window fits: the result, empty, depends on nothing
        return zeros_like(x), zeros_like(w)
    to_x, to_w = [], []
    for i, (stride, (low, _), ld, rd) in enumerate(zip(strides, padding, lhs_dilation, rhs_dilation)):
        extent_x = dilated_size(x.shape[i + 1], ld)
        extent_w = dilated_size(w.shape[i], rd)
        extent_out = dilated_size(cotangent.shape[i + 1], stride)
        before = extent_w - 1 - low
        to_x.append((before, extent_x + extent_w - 1 - extent_out - before))
        to_w.append((low, extent_out - extent_x + before))
    return (
        ops.conv(
            cotangent,
            _transposed_filters(w, feature_groups),
            strides=lhs_dilation,
            padding=tuple(to_x),
            lhs_dilation=strides,
            rhs_dilation=rhs_dilation,
            feature_groups=feature_groups,
        ),
        _filter_gradient(x, w, cotangent, padding, tuple(to_w), strides, lhs_dilation, rhs_dilation, feature_groups),
    )


def _transposed_filters(w, groups: int):
    """w[*window, C/g, F] as the filters [*window, F/g, C] of the reverse convolution, windows flipped."""
    rank = len(w.shape) - 2
    window, channels, filters = tuple(w.shape[:-2]), w.shape[-2], w.shape[-1]
    flipped = ops.rev(w, axes=tuple(range(rank)))
    if groups == 1:
        return ops.transpose(flipped, permutation=(*range(rank), rank + 1, rank))
    split = ops.reshape(flipped, shape=(*window, channels, groups, filters // groups))
    split = ops.transpose(split, permutation=(*range(rank), rank + 2, rank + 1, rank))
    return ops.reshape(split, shape=(*window, filters // groups, channels * groups))


def _filter_gradient(x, w, cotangent, padding, to_w, strides, lhs_dilation, rhs_dilation, groups: int):
    """A primitive of its own, where sizes other than the batch and the image are known; else a convolution.

    A transposed convolution with stride 1 is the reverse of a strided one: x and the cotangent change places there, and
    taps count from the other end.
    """
    static = not any(isinstance(n, Dim) for n in (*w.shape, cotangent.shape[-1]))
    if not static or dtype_of(x) not in FLOATS or 0 in w.shape:
        return _filter_gradient_by_convolution(x, cotangent, to_w, strides, lhs_dilation, rhs_dilation, groups)
    window, rank = tuple(w.shape[:-2]), len(strides)
    if all(d == 1 for d in lhs_dilation):
        return ops.conv_filter_gradient(
            x,
            cotangent,
            window=window,
            strides=strides,
            padding=padding,
            rhs_dilation=rhs_dilation,
            feature_groups=groups,
        )
    if groups > 1 or any(s != 1 for s in strides):
        return _filter_gradient_by_convolution(x, cotangent, to_w, strides, lhs_dilation, rhs_dilation, groups)
    reverse = []
    for size, extent, k, (low, _), ld, rd in zip(
        x.shape[1:-1], cotangent.shape[1:-1], window, padding, lhs_dilation, rhs_dilation
    ):
        before = dilated_size(k, rd) - 1 - low
        reverse.append((before, dilated_size(size, ld) - 1 + dilated_size(k, rd) - extent - before))
    out = ops.conv_filter_gradient(
        cotangent, x, window=window, strides=lhs_dilation, padding=tuple(reverse), rhs_dilation=rhs_dilation
    )
    out = ops.rev(out, axes=tuple(range(rank)))
    return ops.transpose(out, permutation=(*range(rank), rank + 1, rank))


def _filter_gradient_by_convolution(x, cotangent, to_w, strides, lhs_dilation, rhs_dilation, groups: int):
    """The batch is what is contracted: x as [C/g, *spatial, g*N] is convolved with the cotangent [*out, N, F]."""
    rank = len(x.shape) - 2
    batch, size, channels = x.shape[0], tuple(x.shape[1:-1]), x.shape[-1]
    axes = tuple(range(1, rank + 1))
    if groups == 1:
        images = ops.transpose(x, permutation=(rank + 1, *axes, 0))
    else:
        images = ops.reshape(x, shape=(batch, *size, groups, channels // groups))
        images = ops.transpose(images, permutation=(rank + 2, *axes, rank + 1, 0))
        images = ops.reshape(images, shape=(channels // groups, *size, batch * groups))
    filters = ops.transpose(cotangent, permutation=(*axes, 0, rank + 1))
    out = ops.conv(
        images,
        filters,
        strides=rhs_dilation,
        padding=to_w,
        lhs_dilation=lhs_dilation,
        rhs_dilation=strides,
        feature_groups=groups,
    )
    return ops.transpose(out, permutation=(*axes, 0, rank + 1))


def _samples():
    rng = np.random.default_rng(0)

    def sample(name, x, w, strides=1, padding=0, lhs_dilation=1, rhs_dilation=1, feature_groups=1):
        rank = len(x) - 2
        pairs = ((padding, padding),) * rank if isinstance(padding, int) else padding
        each = lambda v: (v,) * rank if isinstance(v, int) else v
        attrs = {
            "strides": each(strides),
            "padding": pairs,
            "lhs_dilation": each(lhs_dilation),
            "rhs_dilation": each(rhs_dilation),
            "feature_groups": feature_groups,
        }
        arrays = (rng.standard_normal(x).astype(np.float32), rng.standard_normal(w).astype(np.float32))
        return Sample(arrays, attrs, name)

    return [
        sample("3x3 same", (2, 5, 6, 3), (3, 3, 3, 4), padding=1),
        sample("1x1", (1, 4, 3, 5), (1, 1, 5, 7)),
        sample("1x1 strided", (1, 5, 6, 3), (1, 1, 3, 2), strides=2),
        sample("3x3 stride 2, uneven padding", (1, 7, 6, 2), (3, 3, 2, 3), strides=2, padding=((0, 1), (1, 0))),
        sample("window 2x3, strides 1 and 3", (2, 6, 8, 2), (2, 3, 2, 3), strides=(1, 3), padding=((1, 0), (0, 2))),
        sample("dilated window", (1, 9, 7, 2), (3, 2, 2, 3), rhs_dilation=(2, 3), padding=1),
        sample("transposed", (1, 4, 5, 3), (3, 3, 3, 2), lhs_dilation=2, padding=((2, 1), (1, 2))),
        sample("transposed, dilated, strided", (1, 4, 3, 2), (2, 3, 2, 2), 2, ((3, 1), (4, 2)), (3, 2), (1, 2)),
        sample("cropped", (1, 6, 5, 2), (2, 2, 2, 3), padding=((-1, 0), (0, -2))),
        sample("two groups", (2, 5, 4, 4), (3, 3, 2, 6), padding=1, feature_groups=2),
        sample("depthwise", (1, 6, 5, 3), (3, 3, 1, 3), padding=1, feature_groups=3),
        sample("depthwise, multiplier 2, stride 2", (1, 7, 5, 3), (3, 3, 1, 6), 2, 1, feature_groups=3),
        sample("causal 1D", (2, 9, 3), (3, 3, 4), padding=((4, 0),), rhs_dilation=2),
        sample("3D", (1, 3, 4, 5, 2), (2, 2, 3, 2, 3), strides=(1, 2, 2), padding=((1, 0), (0, 1), (1, 1))),
        sample("empty batch", (0, 5, 5, 2), (3, 3, 2, 3)),
    ]


CONV = register(
    Primitive(
        name="conv",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def conv(x, w, *, strides=1, padding="valid", lhs_dilation=1, rhs_dilation=1, feature_groups: int = 1):
    """Cross-correlation of x[N, *spatial, C] with w[*window, C / groups, F]; the result is [N, *out, F].

    strides, lhs_dilation, rhs_dilation: an int or one per spatial axis. `lhs_dilation` puts zeros between neighbours
        of x (a transposed convolution), `rhs_dilation` between those of w.
    padding: "valid", "same", or (low, high) per spatial axis around the dilated x; negative values crop.
    feature_groups: groups of channels that are convolved apart; C of them make a depthwise convolution.
    Dtypes: both operands the same number type. Raises ShapeError, DTypeError.
    """
    rank = len(x.shape) - 2
    strides = per_axis("conv", strides, rank)
    lhs_dilation = per_axis("conv", lhs_dilation, rank)
    rhs_dilation = per_axis("conv", rhs_dilation, rank)
    sizes = [dilated_size(n, d) for n, d in zip(x.shape[1:-1], lhs_dilation)]
    return bind(
        CONV,
        x,
        w,
        strides=strides,
        padding=window_padding(padding, sizes, tuple(w.shape[:-2]), strides, rhs_dilation),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_groups=int(feature_groups),
    )


def conv_transpose(x, w, *, strides=1, padding: str = "valid", output_padding=None, dilation=1):
    """Keras' transposed convolution of x[N, *spatial, C] with w[*window, F, C]; the result is [N, *out, F].

    strides, dilation: an int or one per spatial axis. padding: "valid" or "same". output_padding: None, an int, or one
    per spatial axis; see `conv_transpose_padding` for the output size.
    """
    rank = len(x.shape) - 2
    strides = per_axis("conv_transpose", strides, rank)
    dilation = per_axis("conv_transpose", dilation, rank)
    extra = (None,) * rank if output_padding is None else per_axis("conv_transpose", output_padding, rank)
    pairs = tuple(
        conv_transpose_padding(k, s, d, padding, o) for k, s, d, o in zip(w.shape[:-2], strides, dilation, extra)
    )
    return conv(x, _transposed_filters(w, 1), padding=pairs, lhs_dilation=strides, rhs_dilation=dilation)
