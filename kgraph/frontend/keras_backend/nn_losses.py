"""Encodings of labels, cross-entropies, batch statistics, and signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
from keras.src import backend

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.nn_activations import log_sigmoid, log_softmax
from kgraph.frontend.keras_backend.numpy.common import Tensor, insert_axes, scalar, to_inexact
from kgraph.ir.types import FLOATS


def one_hot(x: Tensor, num_classes: int | None, axis: int = -1, dtype=None, sparse: bool = False) -> Tensor:
    """1 at the class of each element along a new axis; zeros where the class is outside [0, num_classes).

    num_classes: None for those up to the largest class in `x`, which has to be concrete. sparse: as a SparseTensor.
    """
    x = convert_to_tensor(x)
    dtype = backend.standardize_dtype(dtype)
    x = x if x.dtype.kind in "iu" else ops.convert(x, dtype="int32")
    num_classes = int(knp.max(x)) + 1 if num_classes is None else num_classes
    rank = len(x.shape)
    axis = axis + rank + 1 if axis < 0 else axis
    if sparse:
        return sparse_rules.one_hot(x, num_classes, axis, dtype)
    shape = tuple(num_classes if a == axis else 1 for a in range(rank + 1))
    classes = ops.iota(shape=shape, dtype=x.dtype.name, axis=axis)
    return ops.convert(ops.eq(insert_axes(x, (axis,)), classes), dtype=dtype)


def multi_hot(x: Tensor, num_classes: int, axis: int = -1, dtype=None, sparse: bool = False) -> Tensor:
    """1 at every class that a row holds. sparse: as a SparseTensor."""
    x = convert_to_tensor(x, "int32")
    reduced = 1 if len(x.shape) > 1 else 0
    if sparse:
        return sparse_rules.multi_hot(x, num_classes, axis, reduced, backend.standardize_dtype(dtype))
    return knp.max(one_hot(x, num_classes, axis=axis, dtype=dtype), axis=reduced)


# -- losses ------------------------------------------------------------------------------------------------------------
def _require_same_shape(target: Tensor, output: Tensor) -> None:
    if tuple(target.shape) != tuple(output.shape):
        raise ValueError(
            "Arguments `target` and `output` must have the same shape. "
            f"Received: target.shape={tuple(target.shape)}, output.shape={tuple(output.shape)}"
        )


def _clipped(output: Tensor) -> Tensor:
    epsilon = backend.epsilon()
    return knp.clip(output, epsilon, 1.0 - epsilon)


def _log_probabilities(output: Tensor, from_logits: bool, axis: int) -> Tensor:
    if from_logits:
        return log_softmax(output, axis=axis)
    output = ops.div(output, ops.reduce_sum(output, axes=(axis % len(output.shape),), keepdims=True))
    return ops.log(_clipped(output))


def categorical_crossentropy(target: Tensor, output: Tensor, from_logits: bool = False, axis: int = -1) -> Tensor:
    target, output = convert_to_tensor(target), to_inexact(output)
    _require_same_shape(target, output)
    if len(target.shape) < 1:
        raise ValueError(
            "Arguments `target` and `output` must be at least rank 1. "
            f"Received: target.shape={tuple(target.shape)}, output.shape={tuple(output.shape)}"
        )
    return knp.negative(knp.sum(knp.multiply(target, _log_probabilities(output, from_logits, axis)), axis=axis))


def sparse_categorical_crossentropy(
    target: Tensor, output: Tensor, from_logits: bool = False, axis: int = -1
) -> Tensor:
    """Cross-entropy with integer classes; 0 where a class is outside of the range."""
    target, output = convert_to_tensor(target, dtype="int32"), to_inexact(output)
    if len(target.shape) == len(output.shape) and target.shape[-1] == 1:
        target = knp.squeeze(target, axis=-1)
    if len(output.shape) < 1:
        raise ValueError(f"Argument `output` must be at least rank 1. Received: output.shape={tuple(output.shape)}")
    if tuple(target.shape) != tuple(output.shape[:-1]):
        raise ValueError(
            "Arguments `target` and `output` must have the same shape up until the last dimension: "
            f"target.shape={tuple(target.shape)}, output.shape={tuple(output.shape)}"
        )
    axis = axis % len(output.shape)
    log_probabilities = _log_probabilities(output, from_logits, axis)
    classes = np.asarray(output.shape[axis], "int32")
    known = ops.logical_and(ops.ge(target, np.asarray(0, "int32")), ops.lt(target, classes))
    index = insert_axes(ops.select(known, target, np.asarray(0, "int32")), (axis,))
    picked = knp.squeeze(ops.take_along_axis(log_probabilities, index, axis=axis), axis=axis)
    return ops.select(known, ops.neg(picked), scalar(0, picked))


def binary_crossentropy(target: Tensor, output: Tensor, from_logits: bool = False) -> Tensor:
    target, output = convert_to_tensor(target), to_inexact(output)
    _require_same_shape(target, output)
    target = cast(target, backend.result_type(target.dtype, output.dtype))
    output = cast(output, target.dtype)
    rest = ops.sub(scalar(1, target), target)
    if from_logits:
        positive, negative = log_sigmoid(output), log_sigmoid(ops.neg(output))
    else:
        output = _clipped(output)
        positive, negative = ops.log(output), ops.log(ops.sub(scalar(1, output), output))
    return ops.neg(ops.add(ops.mul(target, positive), ops.mul(rest, negative)))


def psnr(x1: Tensor, x2: Tensor, max_val: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, over all elements."""
    x1, x2 = convert_to_tensor(x1), convert_to_tensor(x2)
    if tuple(x1.shape) != tuple(x2.shape):
        raise ValueError(f"Input shapes {tuple(x1.shape)} and {tuple(x2.shape)} must match for PSNR calculation. ")
    max_val = convert_to_tensor(max_val, dtype=x2.dtype)
    error = knp.mean(knp.square(knp.subtract(x1, x2)))
    return knp.subtract(knp.multiply(20, knp.log10(max_val)), knp.multiply(10, knp.log10(error)))


# -- statistics --------------------------------------------------------------------------------------------------------
def moments(x: Tensor, axes, keepdims: bool = False, synchronized: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance over axes; half precisions are summed in float32 and clipped to the range of float16."""
    if synchronized:
        raise NotImplementedError("Argument synchronized=True is not supported with the kgraph backend.")
    x = convert_to_tensor(x)
    original = x.dtype.name
    half = original in ("float16", "bfloat16")
    x = cast(x, "float32") if half else x
    rank = len(x.shape)
    axes = tuple(sorted({a % rank for a in ((axes,) if isinstance(axes, int) else axes)}))
    if axes and x.dtype.name in FLOATS:
        mean, variance = ops.moments(x, axes=axes)
        if keepdims:
            shape = tuple(1 if a in axes else s for a, s in enumerate(x.shape))
            mean, variance = ops.reshape(mean, shape=shape), ops.reshape(variance, shape=shape)
    else:
        mean = knp.mean(x, axis=axes, keepdims=True)
        variance = knp.mean(knp.square(knp.subtract(x, mean)), axis=axes, keepdims=keepdims)
        mean = mean if keepdims else knp.squeeze(mean, axes)
    if half:
        limit = float(np.finfo(np.float16).max)
        mean, variance = (cast(knp.clip(v, -limit, limit), original) for v in (mean, variance))
    return mean, variance


def batch_normalization(
    x: Tensor, mean: Tensor, variance: Tensor, axis: int, offset=None, scale=None, epsilon: float = 1e-3
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * scale + offset, with statistics along one axis."""
    x = convert_to_tensor(x)
    channels = tuple(mean.shape)
    vectors = [
        convert_to_tensor(v, x.dtype) if v is not None else ops.full(shape=channels, value=fill, dtype=x.dtype.name)
        for v, fill in ((mean, 0), (variance, 1), (scale, 1), (offset, 0))
    ]
    return ops.batch_norm(x, *vectors, axis=axis % len(x.shape), epsilon=float(epsilon))
