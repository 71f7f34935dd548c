"""Filters with fixed kernels: Gaussian blur and Sobel edges, as depthwise convolutions."""

from __future__ import annotations

import numpy as np
from keras.src import backend

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.image_layout import as_batch, from_batch
from kgraph.frontend.keras_backend.layout import from_channels_last, to_channels_last
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """[N, H, W, C] with every channel convolved with one [kh, kw] kernel; zeros outside, the odd one after."""
    kh, kw = kernel.shape
    channels = x.shape[-1]
    weights = ops.broadcast_to(ops.reshape(kernel, shape=(kh, kw, 1, 1)), shape=(kh, kw, 1, channels))
    padding = tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in (kh, kw))
    return ops.conv(x, weights, padding=padding, feature_groups=channels)


def _gaussian(size: int, sigma: Tensor) -> Tensor:
    x = np.arange(size, dtype=sigma.dtype) - np.array((size - 1) / 2, sigma.dtype)
    scaled = ops.div(x, sigma)
    weights = ops.exp(ops.mul(scalar(-0.5, sigma), ops.mul(scaled, scaled)))
    return ops.div(weights, ops.reduce_sum(weights, axes=(0,), keepdims=True))


def gaussian_blur(images: Tensor, kernel_size=(3, 3), sigma=(1.0, 1.0), data_format=None) -> Tensor:
    """Images convolved with a sampled, normalised Gaussian; kernel_size and sigma are (horizontal, vertical)."""
    data_format = backend.standardize_data_format(data_format)
    images = convert_to_tensor(images)
    original = images.dtype.name
    compute = backend.result_type(original, "float32")
    sigma = convert_to_tensor(sigma, compute)
    width, height = (int(k) for k in kernel_size)
    kernel = ops.mul(knp.expand_dims(_gaussian(height, sigma[1]), 1), knp.expand_dims(_gaussian(width, sigma[0]), 0))
    x, unbatched = as_batch(images, data_format)
    return cast(from_batch(_filtered(cast(x, compute), kernel), data_format, unbatched), original)


def sobel_edges(images: Tensor, data_format=None) -> Tensor:
    """Vertical and horizontal derivatives of [N, H, W, C] (or [N, C, H, W]) images along a new last axis."""
    images = convert_to_tensor(images)
    layout = "channels_first" if data_format == "channels_first" else "channels_last"
    x = to_channels_last(images, layout)
    vertical = np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]], images.dtype)
    edges = [from_channels_last(_filtered(x, kernel), layout) for kernel in (vertical, vertical.T)]
    return knp.stack(edges, axis=-1)
