"""Cotangents of convolution weights: what the filters of a convolution receive from the cotangent of its result."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import require_same_dtype, sizes_differ, widened
from kgraph.ops.convolution import CONV, dilate_and_pad, dilated_size, window_count
from kgraph.ops.rules import require_float, shape_error

__all__ = ["conv_filter_gradient"]


def _conv_attrs(*, strides, padding, rhs_dilation, feature_groups) -> dict:
    """The attributes of the convolution whose weight is meant."""
    return {
        "strides": strides,
        "padding": padding,
        "lhs_dilation": (1,) * len(strides),
        "rhs_dilation": rhs_dilation,
        "feature_groups": feature_groups,
    }


def _infer(x, cotangent, *, window, strides, padding, rhs_dilation, feature_groups):
    types = (x, cotangent)
    require_float("conv_filter_gradient", *types)
    require_same_dtype("conv_filter_gradient", *types)
    rank = x.rank - 2
    if rank < 1 or any(len(v) != rank for v in (window, strides, padding, rhs_dilation)):
        raise shape_error("conv_filter_gradient", types, "x[N, *spatial, C], and one attribute per spatial axis")
    spatial = tuple(
        window_count(size, dilated_size(k, rd), stride, low, high)
        for size, k, stride, (low, high), rd in zip(x.shape[1:-1], window, strides, padding, rhs_dilation)
    )
    if cotangent.rank != x.rank or any(map(sizes_differ, cotangent.shape[:-1], (x.shape[0], *spatial))):
        raise shape_error("conv_filter_gradient", types, f"a cotangent of shape {(x.shape[0], *spatial, 'filters')}")
    if any(isinstance(n, int) and n % feature_groups for n in (x.shape[-1], cotangent.shape[-1])):
        raise shape_error(
            "conv_filter_gradient", types, f"channels and filters that divide into {feature_groups} groups"
        )
    return x.with_shape((*window, x.shape[-1] // feature_groups, cotangent.shape[-1]))


@widened
def _reference(x, cotangent, *, window, strides, padding, rhs_dilation, feature_groups):
    padded = dilate_and_pad(x, ((0, 0), *padding, (0, 0)), (1,) * x.ndim, 0)
    channels, filters = x.shape[-1] // feature_groups, cotangent.shape[-1]
    out = np.zeros((*window, channels, filters), x.dtype)
    if not cotangent.size:
        return out
    pixels = cotangent.size // filters
    right = cotangent.reshape(pixels, feature_groups, -1).transpose(1, 0, 2)
    for tap in np.ndindex(*window):
        met = tuple(
            slice(t * rd, t * rd + (n - 1) * s + 1, s)
            for t, rd, n, s in zip(tap, rhs_dilation, cotangent.shape[1:-1], strides)
        )
        left = padded[(slice(None), *met)].reshape(pixels, feature_groups, channels).transpose(1, 2, 0)
        out[tap] = np.matmul(left, right).transpose(1, 0, 2).reshape(channels, filters)
    return out


def _gradient(cotangents, inputs, outputs, *, window, **attrs):
    """It is bilinear: its cotangent acts as a weight on x, and transposed on the convolution's cotangent."""
    (weight,), (x, cotangent) = cotangents, inputs
    attrs = _conv_attrs(**attrs)
    to_x, _ = CONV.gradient((cotangent,), (x, weight), (cotangent,), **attrs)
    return to_x, ops.conv(x, weight, **attrs)


def _samples():
    rng = np.random.default_rng(0)

    def sample(name, shape, weight, strides=1, padding=0, rhs_dilation=1, groups=1):
        rank = len(shape) - 2
        each = lambda v: (v,) * rank if isinstance(v, int) else v
        attrs = {
            "strides": each(strides),
            "padding": ((padding, padding),) * rank if isinstance(padding, int) else padding,
            "rhs_dilation": each(rhs_dilation),
            "feature_groups": groups,
        }
        x = rng.standard_normal(shape).astype(np.float32)
        out = CONV.infer(TensorType(shape, "float32"), TensorType(weight, "float32"), **_conv_attrs(**attrs))
        cotangent = rng.standard_normal(out.shape).astype(np.float32)
        return Sample((x, cotangent), {"window": weight[:-2], **attrs}, name)

    def depthwise(name, shape, window, *geometry):
        return sample(f"depthwise {name}", shape, (*window, 1, shape[-1]), *geometry, groups=shape[-1])

    return [
        sample("3x3 same", (2, 5, 6, 3), (3, 3, 3, 4), padding=1),
        sample("one channel", (2, 9, 8, 1), (3, 3, 1, 20), padding=1),
        sample("many channels", (2, 6, 5, 40), (3, 3, 40, 36), padding=1),
        sample("1x1 strided", (1, 5, 6, 3), (1, 1, 3, 2), 2),
        sample("3x3 stride 2, uneven padding", (3, 7, 6, 16), (3, 3, 16, 17), 2, ((0, 1), (1, 0))),
        sample("window 2x3, strides 1 and 3", (2, 6, 8, 2), (2, 3, 2, 3), (1, 3), ((1, 0), (0, 2))),
        sample("dilated window", (1, 9, 7, 6), (3, 2, 6, 3), 1, 1, (2, 3)),
        sample("cropped", (1, 6, 5, 2), (2, 2, 2, 3), 1, ((-1, 0), (0, -2))),
        sample("two groups", (2, 5, 4, 4), (3, 3, 2, 6), 1, 1, groups=2),
        sample("two filters per channel", (1, 7, 5, 3), (3, 3, 1, 6), 2, 1, groups=3),
        sample("1D causal", (2, 9, 3), (3, 3, 4), 1, ((4, 0),), 2),
        sample("3D", (1, 3, 4, 5, 2), (2, 2, 3, 2, 3), (1, 2, 2), ((1, 0), (0, 1), (1, 1))),
        sample("empty batch", (0, 5, 5, 2), (3, 3, 2, 3)),
        depthwise("3x3 same", (2, 5, 6, 3), (3, 3), 1, 1),
        depthwise("3x3 stride 2, uneven padding", (3, 8, 7, 17), (3, 3), 2, ((0, 1), (1, 0))),
        depthwise("5x5 over many positions", (2, 23, 19, 4), (5, 5), 1, 2),
        depthwise("dilated", (1, 9, 8, 5), (2, 3), 1, ((1, 0), (2, 2)), (2, 3)),
        depthwise("cropped", (2, 6, 5, 2), (2, 2), 1, ((-1, 0), (0, -2))),
        depthwise("1D causal", (2, 9, 3), (3,), 1, ((4, 0),), 2),
        depthwise("3D", (1, 3, 4, 5, 2), (2, 2, 3), (1, 2, 2), ((1, 0), (0, 1), (1, 1))),
        depthwise("window larger than the image", (1, 2, 2, 3), (3, 3), 1, 1),
        depthwise("empty batch", (0, 5, 5, 2), (3, 3)),
    ]


CONV_FILTER_GRADIENT = register(
    Primitive(
        name="conv_filter_gradient",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def conv_filter_gradient(x, cotangent, *, window, strides, padding, rhs_dilation, feature_groups: int = 1):
    """The cotangent [*window, C / groups, F] of the weight of a convolution of x[N, *spatial, C], not dilated.

    cotangent: [N, *out, F], of the convolution's result. window, strides, rhs_dilation: one entry per spatial axis;
    padding: a (low, high) pair per axis. feature_groups: C of them, with F == C, make a depthwise convolution.
    Raises ShapeError, DTypeError for operands that do not fit.
    """
    return bind(
        CONV_FILTER_GRADIENT,
        x,
        cotangent,
        window=tuple(window),
        strides=tuple(strides),
        padding=tuple(map(tuple, padding)),
        rhs_dilation=tuple(rhs_dilation),
        feature_groups=int(feature_groups),
    )
