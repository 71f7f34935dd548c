"""Image functions that move pixels: interpolation at coordinates and the transforms built on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from keras.src import backend
from keras.src.random.seed_generator import draw_seed

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.image_layout import as_batch, from_batch, require_image_rank
from kgraph.frontend.keras_backend.image_smoothing import gaussian_blur
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar

# Interpolation name -> spline order.
INTERPOLATIONS = {"nearest": 0, "bilinear": 1}
FILL_MODES = {"constant", "nearest", "wrap", "mirror", "reflect"}
METHODS = {"linear", "bilinear", "trilinear", "cubic", "bicubic", "tricubic", "lanczos3", "lanczos5"}


def _check_interpolation(interpolation: str) -> int:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            "Invalid value for argument `interpolation`. Expected of one "
            f"{set(INTERPOLATIONS)}. Received: interpolation={interpolation}"
        )
    return INTERPOLATIONS[interpolation]


def _check_fill_mode(fill_mode: str) -> None:
    if fill_mode not in FILL_MODES:
        raise ValueError(
            f"Invalid value for argument `fill_mode`. Expected one of {FILL_MODES}. Received: fill_mode={fill_mode}"
        )


# -- interpolation -----------------------------------------------------------------------------------------------------
def _inside(index: Tensor, size: Tensor, fill_mode: str) -> Tensor:
    """An int32 index of any value as one in [0, size), by the fill mode ("constant" is clipped; the caller masks)."""
    zero, one, two = (np.asarray(v, "int32") for v in (0, 1, 2))
    last = ops.sub(size, one)
    if fill_mode == "wrap":
        return ops.mod(index, size)
    if fill_mode == "reflect":
        # d c b a | a b c d | d c b a
        place = ops.mod(index, ops.mul(two, size))
        return ops.minimum(place, ops.sub(ops.mul(two, size), ops.add(place, one)))
    if fill_mode == "mirror":
        # d c b | a b c d | c b a
        period = ops.maximum(ops.mul(two, last), one)
        place = ops.mod(index, period)
        return ops.minimum(ops.minimum(place, ops.sub(period, place)), last)
    return ops.minimum(ops.maximum(index, zero), last)


def _interpolate(
    gather: Callable,
    coordinates: Sequence[Tensor],
    sizes: Sequence,
    order: int,
    fill_mode: str,
    fill: Tensor,
    dtype: str,
) -> Tensor:
    """Values at real coordinates by a spline of order 0 or 1.

    gather: from one int32 index tensor per axis to values. coordinates: one tensor per axis, in pixels. fill: what
    lies outside, for fill_mode "constant". dtype: of the values; integers are rounded.
    """
    nodes = []  # per axis: (index inside, valid or None, weight or None) for each neighbour
    for coordinate, size in zip(coordinates, sizes):
        extent = convert_to_tensor(size, "int32")
        if order == 0:
            nearest = ops.convert(_round_half_away(coordinate), dtype="int32")
            neighbours: list[tuple[Tensor, Tensor | None]] = [(nearest, None)]
        else:
            lower = ops.floor(coordinate)
            upper_weight = ops.sub(coordinate, lower)
            lower_weight = ops.sub(scalar(1, coordinate), upper_weight)
            index = ops.convert(lower, dtype="int32")
            neighbours = [(index, lower_weight), (ops.add(index, np.asarray(1, "int32")), upper_weight)]
        nodes.append([(_inside(i, extent, fill_mode), _valid(i, extent, fill_mode), w) for i, w in neighbours])
    total: Tensor = None
    compute = coordinates[0].dtype.name
    for corner in itertools.product(*nodes):
        value = gather([index for index, _, _ in corner])
        value = cast(value, compute) if order == 1 else value
        if fill_mode == "constant":
            valid = None
            for _, here, _ in corner:
                valid = here if valid is None else ops.logical_and(valid, here)
            value = ops.select(_like(valid, value), value, cast(fill, value.dtype))
        for _, _, weight in corner:
            if weight is not None:
                value = ops.mul(value, _like(weight, value))
        total = value if total is None else ops.add(total, value)
    if total.dtype.name == dtype:
        return total
    return cast(total if backend.is_float_dtype(dtype) else _round_half_away(total), dtype)


def _round_half_away(x: Tensor) -> Tensor:
    half = scalar(0.5, x)
    return ops.select(ops.ge(x, scalar(0, x)), ops.floor(ops.add(x, half)), ops.ceil(ops.sub(x, half)))


def _valid(index: Tensor, size: Tensor, fill_mode: str):
    if fill_mode != "constant":
        return None
    return ops.logical_and(ops.ge(index, np.asarray(0, "int32")), ops.lt(index, size))


def _like(x: Tensor, value: Tensor) -> Tensor:
    """A tensor over positions with axes of size 1 behind, as many as the values have (their channels)."""
    missing = len(value.shape) - len(x.shape)
    return ops.reshape(x, shape=(*x.shape, *(1,) * missing)) if missing else x


def map_coordinates(inputs: Tensor, coordinates, order: int, fill_mode="constant", fill_value=0.0) -> Tensor:
    """`inputs` at real coordinates: coordinates[i] holds the position along axis i for every place of the result."""
    inputs, coordinates = convert_to_tensor(inputs), convert_to_tensor(coordinates)
    if coordinates.shape[0] != len(inputs.shape):
        raise ValueError(
            "First dim of `coordinates` must be the same as the rank of `inputs`. Received inputs with shape: "
            f"{tuple(inputs.shape)} and coordinate leading dim of {coordinates.shape[0]}"
        )
    if len(coordinates.shape) < 2:
        raise ValueError(
            f"Invalid coordinates rank: expected at least rank 2. Received input with shape: {tuple(coordinates.shape)}"
        )
    _check_fill_mode(fill_mode)
    if order not in (0, 1):
        raise ValueError(f"Invalid value for argument `order`. Expected one of {[0, 1]}. Received: order={order}")
    compute = backend.result_type(inputs.dtype, "float32")
    coordinates = cast(coordinates, compute)
    fill = convert_to_tensor(fill_value, inputs.dtype)

    def gather(indices):
        return ops.gather_nd(inputs, knp.stack(indices, axis=-1))

    return _interpolate(
        gather, [coordinates[i] for i in range(len(inputs.shape))], inputs.shape, order, fill_mode, fill,
        inputs.dtype.name,
    )  # fmt: skip


def _sample(images: Tensor, rows: Tensor, columns: Tensor, order: int, fill_mode: str, fill_value) -> Tensor:
    """[N, H, W, C] at the positions rows, columns [N or 1, h, w], per image; [N, h, w, C]."""
    n, height, width, _ = images.shape
    shape = (n, *rows.shape[1:])
    batch = ops.iota(shape=shape, dtype="int32", axis=0)
    rows, columns = (c if c.shape[0] == n else ops.broadcast_to(c, shape=shape) for c in (rows, columns))

    def gather(indices):
        return ops.gather_nd(images, knp.stack([batch, *indices], axis=-1))

    fill = convert_to_tensor(fill_value, images.dtype)
    return _interpolate(gather, (rows, columns), (height, width), order, fill_mode, fill, images.dtype.name)


def _grid(height, width, dtype: str) -> tuple[Tensor, Tensor]:
    """Row and column numbers, [1, height, width] each."""
    shape = (1, height, width)
    return ops.iota(shape=shape, dtype=dtype, axis=1), ops.iota(shape=shape, dtype=dtype, axis=2)


# -- transforms --------------------------------------------------------------------------------------------------------
def affine_transform(
    images: Tensor, transform: Tensor, interpolation="bilinear", fill_mode="constant", fill_value=0, data_format=None
) -> Tensor:
    """Images whose pixel (x, y) comes from (a0 x + a1 y + a2, b0 x + b1 y + b2); transform: [..., 8]."""
    data_format = backend.standardize_data_format(data_format)
    order = _check_interpolation(interpolation)
    _check_fill_mode(fill_mode)
    images, transform = convert_to_tensor(images), convert_to_tensor(transform)
    require_image_rank(images)
    if len(transform.shape) not in (1, 2):
        raise ValueError(
            "Invalid transform rank: expected rank 1 (single transform) or rank 2 (batch of transforms). "
            f"Received input with shape: transform.shape={tuple(transform.shape)}"
        )
    original = images.dtype.name
    compute = backend.result_type(original, "float32")
    x, unbatched = as_batch(cast(images, compute), data_format)
    transform = cast(transform if len(transform.shape) == 2 else knp.expand_dims(transform, 0), compute)
    a0, a1, a2, b0, b1, b2 = (ops.reshape(transform[:, i], shape=(transform.shape[0], 1, 1)) for i in range(6))
    row, column = _grid(x.shape[1], x.shape[2], compute)
    columns = ops.add(ops.add(ops.mul(a0, column), ops.mul(a1, row)), a2)
    rows = ops.add(ops.add(ops.mul(b0, column), ops.mul(b1, row)), b2)
    y = _sample(x, rows, columns, order, fill_mode, fill_value)
    y = y if backend.is_float_dtype(original) else _round_half_away(y)
    return cast(from_batch(y, data_format, unbatched), original)


def perspective_transform(
    images: Tensor, start_points, end_points, interpolation="bilinear", fill_value=0, data_format=None
) -> Tensor:
    """Images warped by the perspective that takes four start points to four end points, [..., 4, 2] as (x, y)."""
    data_format = backend.standardize_data_format(data_format)
    start, end = convert_to_tensor(start_points), convert_to_tensor(end_points)
    order = _check_interpolation(interpolation)
    images = convert_to_tensor(images)
    require_image_rank(images)
    for name, points in (("start_points", start), ("end_points", end)):
        if len(points.shape) not in (2, 3) or tuple(points.shape[-2:]) != (4, 2):
            raise ValueError(
                f"Invalid {name} shape: expected (4,2) for a single image or (N,4,2) for a batch. "
                f"Received shape: {tuple(points.shape)}"
            )
    if tuple(start.shape) != tuple(end.shape):
        raise ValueError(
            "start_points and end_points must have the same shape. "
            f"Received start_points.shape={tuple(start.shape)}, end_points.shape={tuple(end.shape)}"
        )
    original = images.dtype.name
    compute = backend.result_type(original, "float32")
    x, unbatched = as_batch(cast(images, compute), data_format)
    start, end = (p if len(p.shape) == 3 else knp.expand_dims(p, 0) for p in (start, end))
    h = cast(compute_homography_matrix(start, end), compute)
    h = [ops.reshape(h[:, i], shape=(h.shape[0], 1, 1)) for i in range(8)]
    row, column = _grid(x.shape[1], x.shape[2], compute)

    def plane(a, b, c):
        return ops.add(ops.add(ops.mul(a, column), ops.mul(b, row)), c)

    depth = plane(h[6], h[7], scalar(1, row))
    y = _sample(x, ops.div(plane(*h[3:6]), depth), ops.div(plane(*h[:3]), depth), order, "constant", fill_value)
    return cast(from_batch(y, data_format, unbatched), original)


def compute_homography_matrix(start_points, end_points) -> Tensor:
    """[N, 8]: the homographies (last entry 1 left out) that take end points to start points."""
    from kgraph.frontend.keras_backend.linalg import solve

    start, end = convert_to_tensor(start_points), convert_to_tensor(end_points)
    dtype = backend.result_type(start.dtype, end.dtype, float)
    compute = backend.result_type(dtype, "float32")
    start, end = cast(start, compute), cast(end, compute)
    rows = []
    for i in range(4):
        x, y = end[:, i, 0], end[:, i, 1]
        u, v = start[:, i, 0], start[:, i, 1]
        one, zero = knp.ones_like(x), knp.zeros_like(x)
        # u (h6 x + h7 y + 1) = h0 x + h1 y + h2, and the same for v with h3, h4, h5.
        rows.append(knp.stack([x, y, one, zero, zero, zero, ops.neg(ops.mul(u, x)), ops.neg(ops.mul(u, y))], axis=-1))
        rows.append(knp.stack([zero, zero, zero, x, y, one, ops.neg(ops.mul(v, x)), ops.neg(ops.mul(v, y))], axis=-1))
    matrix = knp.stack(rows, axis=1)
    target = ops.reshape(start, shape=(start.shape[0], 8, 1))
    return cast(ops.reshape(solve(matrix, target), shape=(start.shape[0], 8)), dtype)


def elastic_transform(
    images: Tensor,
    alpha=20.0,
    sigma=5.0,
    interpolation="bilinear",
    fill_mode="reflect",
    fill_value=0.0,
    seed=None,
    data_format=None,
) -> Tensor:
    """Images distorted by a random displacement field, smoothed by sigma and scaled by alpha."""
    from kgraph.frontend.keras_backend import random

    data_format = backend.standardize_data_format(data_format)
    order = _check_interpolation(interpolation)
    _check_fill_mode(fill_mode)
    images = convert_to_tensor(images)
    x, unbatched = as_batch(images, data_format)
    compute = backend.result_type(images.dtype, "float32")
    size = int(6 * float(sigma)) | 1
    n, height, width, _ = x.shape
    noise = random.normal((n, height, width, 2), dtype=compute, seed=draw_seed(seed))
    noise = ops.mul(noise, np.array(sigma, compute))
    field = gaussian_blur(noise, (size, size), (float(sigma), float(sigma)), data_format="channels_last")
    shift: Tensor = ops.mul(field, convert_to_tensor(alpha, compute))
    row, column = _grid(height, width, compute)
    y = _sample(x, ops.add(row, shift[..., 1]), ops.add(column, shift[..., 0]), order, fill_mode, fill_value)
    return from_batch(y, data_format, unbatched)


# -- resampling with a shift -------------------------------------------------------------------------------------------
def _triangle(x: Tensor) -> Tensor:
    return knp.maximum(0.0, 1.0 - x)


def _cubic(x: Tensor) -> Tensor:
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return knp.where(x >= 2.0, 0.0, knp.where(x >= 1.0, far, near))


def _lanczos(radius: float) -> Callable:
    def kernel(x: Tensor) -> Tensor:
        safe: Tensor = knp.where(x > 1e-3, x, 1.0)
        value = radius * knp.sin(np.pi * safe) * knp.sin(np.pi * safe / radius) / (np.pi**2 * safe * safe)
        return knp.where(x > radius, 0.0, knp.where(x > 1e-3, value, 1.0))

    return kernel


_KERNELS = {
    "linear": _triangle,
    "bilinear": _triangle,
    "trilinear": _triangle,
    "cubic": _cubic,
    "bicubic": _cubic,
    "tricubic": _cubic,
    "lanczos3": _lanczos(3.0),
    "lanczos5": _lanczos(5.0),
}


def scale_and_translate(
    images: Tensor, output_shape, scale, translation, spatial_dims, method, antialias=True
) -> Tensor:
    """Images resampled under `output position = scale * input position + translation` along some axes."""
    if method not in METHODS:
        raise ValueError(f"Invalid value for argument `method`. Expected of one {METHODS}. Received: method={method}")
    images = convert_to_tensor(images)
    scale, translation = convert_to_tensor(scale), convert_to_tensor(translation)
    dtype = backend.result_type(scale.dtype, translation.dtype, "float32")
    scale, translation = cast(scale, dtype), cast(translation, dtype)
    integer = not backend.is_float_dtype(images.dtype)
    x = cast(images, "float32") if integer else images
    for i, axis in enumerate(spatial_dims):
        axis = axis % len(x.shape)
        weights = _weights(x.shape[axis], output_shape[axis], scale[i], translation[i], _KERNELS[method], antialias)
        x = knp.moveaxis(knp.tensordot(x, cast(weights, x.dtype), axes=((axis,), (0,))), -1, axis)
    if not integer:
        return x
    limits = np.iinfo(images.dtype)
    x = ops.minimum(ops.maximum(ops.round_nearest_even(x), scalar(limits.min, x)), scalar(limits.max, x))
    return cast(x, images.dtype)


def _weights(in_size, out_size, scale: Tensor, translation: Tensor, kernel: Callable, antialias: bool) -> Tensor:
    """[in_size, out_size]: the weight of each input pixel in each output pixel."""
    inverse = ops.div(scalar(1, scale), scale)
    stretch = knp.maximum(inverse, 1.0) if antialias else scalar(1, scale)
    place: Tensor = ops.iota(shape=(1, out_size), dtype=scale.dtype.name, axis=1)
    position = (place + 0.5) * inverse - translation * inverse - 0.5
    index = ops.iota(shape=(in_size, 1), dtype=scale.dtype.name, axis=0)
    weights = kernel(knp.absolute(position - index) / stretch)
    total = knp.sum(weights, axis=0, keepdims=True)
    usable = knp.absolute(total) > 1000.0 * float(np.finfo(np.float32).eps)
    weights = knp.where(usable, weights / knp.where(total != 0, total, 1.0), 0.0)
    end = convert_to_tensor(in_size, scale.dtype) - 0.5
    return knp.where(knp.logical_and(position >= -0.5, position <= end), weights, 0.0)
