"""Cotangents of convolution weights that have kernels of their own. Other weights' cotangents are convolutions."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import require_same_dtype, sizes_differ, widened
from kgraph.ops.convolution import CONV, dilate_and_pad, dilated_size, window_count
from kgraph.ops.rules import require_float, shape_error

__all__ = ["depthwise_filter_gradient"]


def _conv_attrs(x, *, strides, padding, rhs_dilation) -> dict:
    """The attributes of the depthwise convolution whose weight is meant."""
    return {
        "strides": strides,
        "padding": padding,
        "lhs_dilation": (1,) * len(strides),
        "rhs_dilation": rhs_dilation,
        "feature_groups": x.shape[-1],
    }


def _infer(x, cotangent, *, window, strides, padding, rhs_dilation):
    types = (x, cotangent)
    require_float("depthwise_filter_gradient", *types)
    require_same_dtype("depthwise_filter_gradient", *types)
    rank = x.rank - 2
    if rank < 1 or any(len(v) != rank for v in (window, strides, padding, rhs_dilation)):
        raise shape_error("depthwise_filter_gradient", types, "x[N, *spatial, C], and one attribute per spatial axis")
    spatial = tuple(
        window_count(size, dilated_size(k, rd), stride, low, high)
        for size, k, stride, (low, high), rd in zip(x.shape[1:-1], window, strides, padding, rhs_dilation)
    )
    wanted = (x.shape[0], *spatial, x.shape[-1])
    if cotangent.rank != x.rank or any(map(sizes_differ, cotangent.shape, wanted)):
        raise shape_error("depthwise_filter_gradient", types, f"a cotangent of shape {wanted}")
    return x.with_shape((*window, 1, x.shape[-1]))


@widened
def _reference(x, cotangent, *, window, strides, padding, rhs_dilation):
    padded = dilate_and_pad(x, ((0, 0), *padding, (0, 0)), (1,) * x.ndim, 0)
    out = np.zeros((*window, 1, x.shape[-1]), x.dtype)
    if not cotangent.size:
        return out
    positions = tuple(range(x.ndim - 1))
    for tap in np.ndindex(*window):
        met = tuple(
            slice(t * rd, t * rd + (n - 1) * s + 1, s)
            for t, rd, n, s in zip(tap, rhs_dilation, cotangent.shape[1:-1], strides)
        )
        out[(*tap, 0)] = (padded[(slice(None), *met)] * cotangent).sum(positions)
    return out


def _gradient(cotangents, inputs, outputs, *, window, strides, padding, rhs_dilation):
    """It is bilinear: its cotangent acts as a weight on x, and transposed on the convolution's cotangent."""
    (weight,), (x, cotangent) = cotangents, inputs
    attrs = _conv_attrs(x, strides=strides, padding=padding, rhs_dilation=rhs_dilation)
    to_x, _ = CONV.gradient((cotangent,), (x, weight), (cotangent,), **attrs)
    return to_x, ops.conv(x, weight, **attrs)


def _samples():
    rng = np.random.default_rng(0)

    def sample(name, shape, window, strides=1, padding=0, rhs_dilation=1):
        rank = len(shape) - 2
        each = lambda v: (v,) * rank if isinstance(v, int) else v
        attrs = {
            "window": window,
            "strides": each(strides),
            "padding": ((padding, padding),) * rank if isinstance(padding, int) else padding,
            "rhs_dilation": each(rhs_dilation),
        }
        x = rng.standard_normal(shape).astype(np.float32)
        weight = TensorType((*window, 1, shape[-1]), "float32")
        conv_attrs = _conv_attrs(x, **{k: attrs[k] for k in ("strides", "padding", "rhs_dilation")})
        out = CONV.infer(TensorType(shape, "float32"), weight, **conv_attrs)
        return Sample((x, rng.standard_normal(out.shape).astype(np.float32)), attrs, name)

    return [
        sample("3x3 same", (2, 5, 6, 3), (3, 3), padding=1),
        sample("3x3 stride 2, uneven padding", (3, 8, 7, 17), (3, 3), 2, ((0, 1), (1, 0))),
        sample("5x5 over many positions", (2, 23, 19, 4), (5, 5), padding=2),
        sample("dilated", (1, 9, 8, 5), (2, 3), 1, ((1, 0), (2, 2)), (2, 3)),
        sample("cropped", (2, 6, 5, 2), (2, 2), 1, ((-1, 0), (0, -2))),
        sample("1D causal", (2, 9, 3), (3,), padding=((4, 0),), rhs_dilation=2),
        sample("3D", (1, 3, 4, 5, 2), (2, 2, 3), (1, 2, 2), ((1, 0), (0, 1), (1, 1))),
        sample("window larger than the image", (1, 2, 2, 3), (3, 3), padding=1),
        sample("empty batch", (0, 5, 5, 2), (3, 3)),
    ]


DEPTHWISE_FILTER_GRADIENT = register(
    Primitive(
        name="depthwise_filter_gradient",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def depthwise_filter_gradient(x, cotangent, *, window, strides, padding, rhs_dilation):
    """The cotangent [*window, 1, C] of the weight of a depthwise convolution of x[N, *spatial, C], one filter each.

    cotangent: [N, *out, C], of the convolution's result. window, strides, rhs_dilation: one entry per spatial axis;
    padding: a (low, high) pair per axis. Raises ShapeError, DTypeError for operands that do not fit.
    """
    attrs = {"window": tuple(window), "strides": tuple(strides), "rhs_dilation": tuple(rhs_dilation)}
    return bind(DEPTHWISE_FILTER_GRADIENT, x, cotangent, padding=tuple(map(tuple, padding)), **attrs)
