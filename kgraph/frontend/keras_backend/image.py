"""Image functions: colour spaces, resizing, blurring, edges. Those that move pixels are in `image_geometry`."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from keras.src import backend

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.image_geometry import (
    affine_transform,
    compute_homography_matrix,
    elastic_transform,
    map_coordinates,
    perspective_transform,
    scale_and_translate,
)
from kgraph.frontend.keras_backend.image_layout import as_batch, from_batch, require_image_rank
from kgraph.frontend.keras_backend.image_smoothing import gaussian_blur, sobel_edges
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar

RESIZE_INTERPOLATIONS = ("bilinear", "nearest", "lanczos3", "lanczos5", "bicubic")

__all__ = [
    "affine_transform",
    "compute_homography_matrix",
    "elastic_transform",
    "gaussian_blur",
    "hsv_to_rgb",
    "map_coordinates",
    "perspective_transform",
    "resize",
    "rgb_to_grayscale",
    "rgb_to_hsv",
    "scale_and_translate",
    "sobel_edges",
]


# -- colour ------------------------------------------------------------------------------------------------------------
def _channel_axis(data_format: str) -> int:
    return -1 if backend.standardize_data_format(data_format) == "channels_last" else -3


def rgb_to_grayscale(images: Tensor, data_format=None) -> Tensor:
    """Luma of RGB images (weights 0.2989, 0.5870, 0.1140) with one channel; grey images stay as they are."""
    images = convert_to_tensor(images)
    axis = _channel_axis(data_format)
    require_image_rank(images)
    if images.shape[axis] not in (1, 3):
        raise ValueError(
            "Invalid channel size: expected 3 (RGB) or 1 (Grayscale). "
            f"Received input with shape: images.shape={tuple(images.shape)}"
        )
    if images.shape[axis] == 1:
        return images
    original = images.dtype.name
    images = cast(images, backend.result_type(images.dtype, float))
    weights = np.array([0.2989, 0.5870, 0.1140], images.dtype)
    shape = [1] * len(images.shape)
    shape[axis] = 3
    grey = knp.sum(ops.mul(images, weights.reshape(shape)), axis=axis, keepdims=True)
    return cast(grey, original)


def _float_planes(images: Tensor, data_format) -> tuple[list[Tensor], int]:
    require_image_rank(images)
    if not backend.is_float_dtype(images.dtype):
        raise ValueError(
            "Invalid images dtype: expected float dtype. "
            f"Received: images.dtype={backend.standardize_dtype(images.dtype)}"
        )
    axis = _channel_axis(data_format)
    return [knp.squeeze(plane, axis) for plane in knp.split(images, 3, axis)], axis


def rgb_to_hsv(images: Tensor, data_format=None) -> Tensor:
    """Hue, saturation and value, all in [0, 1], of RGB images in [0, 1]."""
    images = convert_to_tensor(images)
    epsilon = scalar(float(ml_dtypes.finfo(images.dtype).eps), images) if images.dtype.kind in "fV" else None
    if epsilon is not None:
        images = ops.select(ops.lt(ops.abs(images), epsilon), scalar(0, images), images)
    (red, green, blue), axis = _float_planes(images, data_format)
    zero, one = scalar(0, red), scalar(1, red)
    value = ops.maximum(ops.maximum(red, green), blue)
    spread = ops.sub(value, ops.minimum(ops.minimum(red, green), blue))
    positive, coloured = ops.gt(value, zero), ops.gt(spread, zero)
    saturation = ops.select(positive, ops.div(spread, ops.select(positive, value, one)), zero)
    norm = ops.div(one, ops.mul(scalar(6, red), ops.select(coloured, spread, one)))
    from_green = ops.add(ops.mul(norm, ops.sub(blue, red)), scalar(2 / 6, red))
    from_blue = ops.add(ops.mul(norm, ops.sub(red, green)), scalar(4 / 6, red))
    hue = ops.select(ops.eq(value, green), from_green, from_blue)
    hue = ops.select(ops.eq(value, red), ops.mul(norm, ops.sub(green, blue)), hue)
    hue = ops.add(ops.select(coloured, hue, zero), ops.select(ops.lt(hue, zero), one, zero))
    return knp.stack([hue, saturation, value], axis=axis)


def hsv_to_rgb(images: Tensor, data_format=None) -> Tensor:
    """RGB images of hue, saturation and value."""
    (hue, saturation, value), axis = _float_planes(convert_to_tensor(images), data_format)
    zero, one = scalar(0, hue), scalar(1, hue)
    turn = ops.mul(ops.mod(hue, one), scalar(6, hue))

    def ramp(x):
        return ops.minimum(ops.maximum(x, zero), one)

    def distance(place):
        return ops.abs(ops.sub(turn, scalar(place, hue)))

    red = ramp(ops.sub(distance(3), one))
    green = ramp(ops.sub(scalar(2, hue), distance(2)))
    blue = ramp(ops.sub(scalar(2, hue), distance(4)))
    grey = ops.sub(one, saturation)
    planes = [ops.mul(value, ops.add(grey, ops.mul(saturation, plane))) for plane in (red, green, blue)]
    return knp.stack(planes, axis=axis)


# -- resizing ----------------------------------------------------------------------------------------------------------
def resize(
    images: Tensor,
    size,
    interpolation="bilinear",
    antialias=False,
    crop_to_aspect_ratio=False,
    pad_to_aspect_ratio=False,
    fill_mode="constant",
    fill_value=0.0,
    data_format=None,
) -> Tensor:
    """Images of another (height, width); pixel i covers [i, i + 1), as in `jax.image.resize`."""
    data_format = backend.standardize_data_format(data_format)
    if interpolation not in RESIZE_INTERPOLATIONS:
        raise ValueError(
            "Invalid value for argument `interpolation`. Expected of one "
            f"{RESIZE_INTERPOLATIONS}. Received: interpolation={interpolation}"
        )
    if fill_mode != "constant":
        raise ValueError(
            f"Invalid value for argument `fill_mode`. Only `'constant'` is supported. Received: fill_mode={fill_mode}"
        )
    if pad_to_aspect_ratio and crop_to_aspect_ratio:
        raise ValueError("Only one of `pad_to_aspect_ratio` & `crop_to_aspect_ratio` can be `True`.")
    if len(size) != 2:
        raise ValueError(f"Argument `size` must be a tuple of two elements (height, width). Received: size={size}")
    images = convert_to_tensor(images)
    target = tuple(int(s) for s in size)
    x, unbatched = as_batch(images, data_format)
    if crop_to_aspect_ratio:
        x = _crop_to_ratio(x, target)
    elif pad_to_aspect_ratio:
        x = _pad_to_ratio(x, target, fill_value)
    return from_batch(_resampled(x, target, interpolation, antialias), data_format, unbatched)


def _resampled(x: Tensor, target: tuple, method: str, antialias: bool) -> Tensor:
    if tuple(x.shape[1:3]) == target:
        return x
    integer = x.dtype.kind in "iub" and method != "nearest"
    original = x.dtype.name
    if integer:
        x = cast(x, "float32")
    y = ops.resize(x, size=target, method=method, antialias=bool(antialias))
    if not integer:
        return y
    # Kernels with negative lobes overshoot: keep to the range of the dtype, as JAX does.
    limits = np.iinfo(original) if original != "bool" else None
    low, high = (limits.min, limits.max) if limits else (0, 1)
    y = ops.minimum(ops.maximum(ops.round_nearest_even(y), scalar(low, y)), scalar(high, y))
    return cast(y, original)


def _crop_to_ratio(x: Tensor, target: tuple) -> Tensor:
    """The largest centred part with the aspect ratio of the target."""
    height, width = x.shape[1:3]
    crop_height = max(min(height, int(float(width * target[0]) / target[1])), 1)
    crop_width = max(min(width, int(float(height * target[1]) / target[0])), 1)
    top, left = int(float(height - crop_height) / 2), int(float(width - crop_width) / 2)
    return x[:, top : top + crop_height, left : left + crop_width, :]


def _pad_to_ratio(x: Tensor, target: tuple, fill_value: float) -> Tensor:
    """The images in the middle of a frame with the aspect ratio of the target."""
    height, width = x.shape[1:3]
    top = int(float(max(height, int(float(width * target[0]) / target[1])) - height) / 2)
    left = int(float(max(width, int(float(height * target[1]) / target[0])) - width) / 2)
    if top > 0:
        border = (0, top, 0, 0)
    elif left > 0:
        border = (0, 0, left, 0)
    else:
        return x
    fill = math.trunc(fill_value) if x.dtype.kind in "iu" else fill_value
    return ops.pad(x, scalar(fill, x), low=border, high=border, interior=(0, 0, 0, 0))
