"""Moments, and normalisation with scale and offset: batch (inference form), layer, RMS and group normalisation."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import (
    dtype_of,
    normalize_axes,
    normalize_axis,
    require_same_dtype,
    require_size,
    sizes_differ,
    unbroadcast,
    uniform,
    widened,
)
from kgraph.ops.rules import (
    convert,
    element_count,
    float32_at_least,
    mean,
    place_axis,
    require_broadcast_to,
    require_float,
    scalar,
    shape_error,
)

__all__ = ["batch_norm", "group_norm", "layer_norm", "moments", "rms_norm"]


def _narrowed(cotangents, inputs) -> tuple:
    """Cotangents in the dtypes of their operands."""
    return tuple(convert(c, dtype_of(x)) for c, x in zip(cotangents, inputs, strict=True))


def _inverse_deviation(variance, epsilon: float):
    return ops.rsqrt(ops.add(variance, scalar(epsilon, dtype_of(variance))))


def _require_vector(name: str, types, index: int, size) -> None:
    if types[index].rank != 1:
        raise shape_error(name, types, f"operand {index} of rank 1, one entry per channel")
    require_size(name, types, f"the length of operand {index}", types[index].shape[0], size)


# -- moments ----------------------------------------------------------------------------------------------------------
def _infer_moments(x, *, axes):
    require_float("moments", x)
    if not axes or list(axes) != sorted(set(axes)) or not 0 <= axes[0] <= axes[-1] < x.rank:
        raise shape_error("moments", (x,), f"ascending axes below rank {x.rank}, got {axes}")
    kept = TensorType(tuple(s for a, s in enumerate(x.shape) if a not in axes), x.dtype)
    return kept, kept


@widened
def _reference_moments(x, *, axes):
    count = x.dtype.type(np.prod([x.shape[a] for a in axes]))
    with np.errstate(divide="ignore", invalid="ignore"):  # no elements have no mean
        centre = x.sum(axes, keepdims=True) / count
        variance = np.square(x - centre).sum(axes) / count
    return centre.reshape(variance.shape), variance


def _gradient_moments(cotangents, inputs, outputs, *, axes):
    to_mean, to_variance, x, centre = float32_at_least(*cotangents, *inputs, outputs[0])
    shape = tuple(1 if a in axes else s for a, s in enumerate(x.shape))
    count = element_count(x, axes)
    spread = lambda value: ops.reshape(value, shape=shape)
    # How the mean moves does not change the variance: differences from it sum to zero.
    slope = ops.div(ops.mul(scalar(2, dtype_of(x)), to_variance), count)
    to_x = ops.add(ops.mul(ops.sub(x, spread(centre)), spread(slope)), spread(ops.div(to_mean, count)))
    return _narrowed((to_x,), inputs)


def _samples_moments():
    def sample(name, shape, axes, dtype="float32", shift=0.0):
        array = (uniform(shape) + shift).astype(TensorType((), dtype).np_dtype)
        return Sample((array,), {"axes": axes}, name)

    return [
        sample("channels last", (2, 3, 5, 7), (0, 1, 2)),
        sample("channels first", (2, 3, 5, 7), (0, 2, 3)),
        sample("matrix", (5, 19), (1,)),
        sample("everything", (3, 5), (0, 1)),
        sample("far from zero", (40, 3), (0,), shift=1000.0),
        sample("no channels", (5, 0), (0,)),
        sample("bfloat16", (3, 5), (0,), "bfloat16"),
    ]


MOMENTS = register(
    Primitive(
        name="moments",
        infer=_infer_moments,
        reference=_reference_moments,
        gradient=_gradient_moments,
        traits=frozenset({"coarse"}),
        samples=_samples_moments,
        tolerance=1e-5,
        results=2,
    )
)


def moments(x, *, axes) -> tuple:
    """(mean, variance) of x over `axes`, which are removed; the variance is the mean squared difference from the mean.

    x: any rank, float; half precisions are computed in float32. Both results have the dtype of x; NaN where there are
    no elements. Raises ShapeError, DTypeError.
    """
    return bind(MOMENTS, x, axes=normalize_axes("moments", axes, len(x.shape)))


# -- batch ------------------------------------------------------------------------------------------------------------
def _infer_batch(x, mean, variance, gamma, beta, *, axis, epsilon):
    types = (x, mean, variance, gamma, beta)
    require_same_dtype("batch_norm", *types)
    require_float("batch_norm", *types)
    if not 0 <= axis < x.rank:
        raise shape_error("batch_norm", types, f"a channel axis below rank {x.rank}, got {axis}")
    for index in range(1, 5):
        _require_vector("batch_norm", types, index, x.shape[axis])
    return x


@widened
def _reference_batch(x, mean, variance, gamma, beta, *, axis, epsilon):
    inverse = gamma / np.sqrt(variance + x.dtype.type(epsilon))
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    return x * inverse.reshape(shape) + (beta - mean * inverse).reshape(shape)


def _gradient_batch(cotangents, inputs, outputs, *, axis, epsilon):
    cotangent, x, mean, variance, gamma, _ = float32_at_least(*cotangents, *inputs)
    rank = len(x.shape)
    others = tuple(a for a in range(rank) if a != axis)
    inverse = _inverse_deviation(variance, epsilon)
    scale = ops.mul(gamma, inverse)
    centred = ops.sub(x, place_axis(mean, axis, rank))
    to_beta = ops.reduce_sum(cotangent, axes=others, keepdims=False)
    products = ops.reduce_sum(ops.mul(cotangent, centred), axes=others, keepdims=False)
    to_gamma = ops.mul(products, inverse)
    half = scalar(-0.5, dtype_of(x))
    to_variance = ops.mul(ops.mul(to_gamma, gamma), ops.mul(half, ops.mul(inverse, inverse)))
    to_x = ops.mul(cotangent, place_axis(scale, axis, rank))
    return _narrowed((to_x, ops.neg(ops.mul(to_beta, scale)), to_variance, to_gamma, to_beta), inputs)


def _samples_batch():
    def sample(name, shape, axis, epsilon=1e-3, dtype="float32"):
        size = shape[axis]
        vectors = (uniform((size,), seed=1), uniform((size,), 0.1, 2, seed=2), uniform((size,), seed=3))
        arrays = (uniform(shape), *vectors, uniform((size,), seed=4))
        return Sample(tuple(a.astype(TensorType((), dtype).np_dtype) for a in arrays), _batch(axis, epsilon), name)

    def _batch(axis, epsilon):
        return {"axis": axis, "epsilon": epsilon}

    return [
        sample("channels last", (2, 3, 5, 7), 3),
        sample("channels first", (2, 3, 5, 7), 1, 1e-5),
        sample("matrix", (5, 19), 1),
        sample("empty batch", (0, 5), 1),
        sample("bfloat16", (3, 5), 1, 1e-3, "bfloat16"),
    ]


BATCH_NORM = register(
    Primitive(
        name="batch_norm",
        infer=_infer_batch,
        reference=_reference_batch,
        gradient=_gradient_batch,
        traits=frozenset({"coarse"}),
        samples=_samples_batch,
        tolerance=1e-5,
    )
)


def batch_norm(x, mean, variance, gamma, beta, *, axis: int = -1, epsilon: float = 1e-3):
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta with given statistics.

    x: any rank, float. mean, variance, gamma, beta: [x.shape[axis]] of the dtype of x. Gives the type of x.
    Training computes mean and variance ahead of this. Raises ShapeError, DTypeError.
    """
    axis = normalize_axis("batch_norm", axis, len(x.shape))
    return bind(BATCH_NORM, x, mean, variance, gamma, beta, axis=axis, epsilon=float(epsilon))


# -- layer, RMS -------------------------------------------------------------------------------------------------------
def _check_axes(name: str, types, axes) -> None:
    require_same_dtype(name, *types)
    require_float(name, *types)
    if not axes or list(axes) != sorted(set(axes)) or not 0 <= axes[0] <= axes[-1] < types[0].rank:
        raise shape_error(name, types, f"ascending axes below rank {types[0].rank}, got {axes}")
    for index in range(1, len(types)):
        require_broadcast_to(name, types, index, types[0].shape)


def _infer_layer(x, gamma, beta, *, axes, epsilon):
    _check_axes("layer_norm", (x, gamma, beta), axes)
    return x


@widened
def _reference_layer(x, gamma, beta, *, axes, epsilon):
    centre = x.mean(axes, keepdims=True)
    variance = np.square(x - centre).mean(axes, keepdims=True)
    return (x - centre) / np.sqrt(variance + x.dtype.type(epsilon)) * gamma + beta


def _gradient_layer(cotangents, inputs, outputs, *, axes, epsilon):
    cotangent, x, gamma, beta = float32_at_least(*cotangents, *inputs)
    to_x, normal = _gradient_normal(ops.mul(cotangent, gamma), x, axes, epsilon, centre=True)
    to_gamma = unbroadcast(ops.mul(cotangent, normal), gamma)
    return _narrowed((to_x, to_gamma, unbroadcast(cotangent, beta)), inputs)


def _gradient_normal(scaled, x, axes, epsilon: float, *, centre: bool):
    """Cotangent of x through the normalised values, and these; `scaled` is the normalised values' cotangent."""
    if centre:
        shape = tuple(1 if a in axes else s for a, s in enumerate(x.shape))
        middle, variance = (ops.reshape(m, shape=shape) for m in ops.moments(x, axes=axes))
        inverse = _inverse_deviation(variance, epsilon)
        normal = ops.mul(ops.sub(x, middle), inverse)
    else:
        inverse = _inverse_deviation(mean(ops.mul(x, x), axes), epsilon)
        normal = ops.mul(x, inverse)
    inner = ops.sub(scaled, ops.mul(normal, mean(ops.mul(scaled, normal), axes)))
    if centre:
        inner = ops.sub(inner, mean(scaled, axes))
    return ops.mul(inner, inverse), normal


def _samples_layer(operands: int):
    def sample(name, shape, axes, parameters=None, epsilon=1e-3, dtype="float32"):
        parameters = tuple(shape[a] for a in axes) if parameters is None else parameters
        extra = [uniform(parameters, 0.5, 2, seed=1 + i) for i in range(operands)]
        arrays = tuple(a.astype(TensorType((), dtype).np_dtype) for a in (uniform(shape), *extra))
        return Sample(arrays, {"axes": axes, "epsilon": epsilon}, name)

    return [
        sample("last axis", (3, 17), (1,)),
        sample("sequence", (2, 5, 33), (2,), epsilon=1e-6),
        sample("two axes", (2, 3, 5), (1, 2)),
        sample("middle axis", (2, 5, 3), (1,), (1, 5, 1)),
        sample("scalar parameters", (4, 7), (1,), ()),
        sample("empty batch", (0, 7), (1,)),
        sample("bfloat16", (3, 17), (1,), dtype="bfloat16"),
    ]


LAYER_NORM = register(
    Primitive(
        name="layer_norm",
        infer=_infer_layer,
        reference=_reference_layer,
        gradient=_gradient_layer,
        traits=frozenset({"coarse"}),
        samples=lambda: _samples_layer(2),
        tolerance=1e-5,
    )
)


def layer_norm(x, gamma, beta, *, axes=(-1,), epsilon: float = 1e-3):
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta with the statistics of x over `axes`.

    x: any rank, float. gamma, beta: of the dtype of x, broadcast against it ([x.shape[-1]] for the last axis).
    Gives the type of x; half precisions are computed in float32. Raises ShapeError, DTypeError.
    """
    axes = normalize_axes("layer_norm", axes, len(x.shape))
    return bind(LAYER_NORM, x, gamma, beta, axes=axes, epsilon=float(epsilon))


def _infer_rms(x, gamma, *, axes, epsilon):
    _check_axes("rms_norm", (x, gamma), axes)
    return x


@widened
def _reference_rms(x, gamma, *, axes, epsilon):
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + x.dtype.type(epsilon)) * gamma


def _gradient_rms(cotangents, inputs, outputs, *, axes, epsilon):
    cotangent, x, gamma = float32_at_least(*cotangents, *inputs)
    to_x, normal = _gradient_normal(ops.mul(cotangent, gamma), x, axes, epsilon, centre=False)
    return _narrowed((to_x, unbroadcast(ops.mul(cotangent, normal), gamma)), inputs)


RMS_NORM = register(
    Primitive(
        name="rms_norm",
        infer=_infer_rms,
        reference=_reference_rms,
        gradient=_gradient_rms,
        traits=frozenset({"coarse"}),
        samples=lambda: _samples_layer(1),
        tolerance=1e-5,
    )
)


def rms_norm(x, gamma, *, axes=(-1,), epsilon: float = 1e-6):
    """x / sqrt(mean(x * x) + epsilon) * gamma with the mean over `axes`.

    x: any rank, float. gamma: of the dtype of x, broadcasts against it. Gives the type of x. Raises ShapeError,
    DTypeError.
    """
    return bind(RMS_NORM, x, gamma, axes=normalize_axes("rms_norm", axes, len(x.shape)), epsilon=float(epsilon))


# -- group ------------------------------------------------------------------------------------------------------------
def _infer_group(x, gamma, beta, *, groups, epsilon):
    types = (x, gamma, beta)
    require_same_dtype("group_norm", *types)
    require_float("group_norm", *types)
    if x.rank < 2:
        raise shape_error("group_norm", types, "x[N, *spatial, channels]")
    for index in (1, 2):
        _require_vector("group_norm", types, index, x.shape[-1])
    if groups < 1 or sizes_differ(x.shape[-1] % groups, 0):
        raise shape_error("group_norm", types, f"channels that divide into {groups} groups")
    return x


def _grouped_shape(x, groups: int) -> tuple:
    return (*x.shape[:-1], groups, x.shape[-1] // groups)


def _group_axes(x) -> tuple:
    """The axes of the grouped x that a group's statistics cover: all but the batch and the groups."""
    rank = len(x.shape)
    return (*range(1, rank - 1), rank)


@widened
def _reference_group(x, gamma, beta, *, groups, epsilon):
    split = x.reshape(_grouped_shape(x, groups))
    ones = x.dtype.type(1), x.dtype.type(0)
    normal = _reference_layer(split, *ones, axes=_group_axes(x), epsilon=epsilon)
    return normal.reshape(x.shape) * gamma + beta


def _gradient_group(cotangents, inputs, outputs, *, groups, epsilon):
    cotangent, x, gamma, beta = float32_at_least(*cotangents, *inputs)
    grouped = _grouped_shape(x, groups)
    scaled = ops.reshape(ops.mul(cotangent, gamma), shape=grouped)
    to_x, normal = _gradient_normal(scaled, ops.reshape(x, shape=grouped), _group_axes(x), epsilon, centre=True)
    shape = tuple(x.shape)
    to_gamma = unbroadcast(ops.mul(cotangent, ops.reshape(normal, shape=shape)), gamma)
    return _narrowed((ops.reshape(to_x, shape=shape), to_gamma, unbroadcast(cotangent, beta)), inputs)


def _samples_group():
    def sample(name, shape, groups, epsilon=1e-3):
        size = shape[-1]
        arrays = (uniform(shape), uniform((size,), 0.5, 2, seed=1), uniform((size,), seed=2))
        return Sample(arrays, {"groups": groups, "epsilon": epsilon}, name)

    return [
        sample("images", (2, 3, 5, 6), 3),
        sample("one group", (2, 5, 6), 1, 1e-5),
        sample("a group per channel", (2, 5, 3), 3),
        sample("no spatial axes", (3, 8), 2),
        sample("empty batch", (0, 3, 4), 2),
    ]


GROUP_NORM = register(
    Primitive(
        name="group_norm",
        infer=_infer_group,
        reference=_reference_group,
        gradient=_gradient_group,
        traits=frozenset({"coarse"}),
        samples=_samples_group,
        tolerance=1e-5,
    )
)


def group_norm(x, gamma, beta, *, groups: int, epsilon: float = 1e-3):
    """Normalise x[N, *spatial, C] by the mean and variance of each sample's group of C / groups channels.

    gamma, beta: [C] of the dtype of x. Gives the type of x. Raises ShapeError where C does not divide, DTypeError.
    """
    return bind(GROUP_NORM, x, gamma, beta, groups=int(groups), epsilon=float(epsilon))
