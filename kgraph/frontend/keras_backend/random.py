"""kgraph's `keras.src.backend.<backend>.random`: draws from a seed, the same eagerly, compiled, and on every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.backend.common.variables import standardize_dtype
from keras.src.backend.config import floatx
from keras.src.random.seed_generator import SeedGenerator, draw_seed, make_default_seed

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.core import is_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    HALF_TYPES,
    Tensor,
    axis_of,
    convert,
    dtype_of,
    filled,
    scalar,
    shape_of,
    size_of,
    to_inexact,
)
from kgraph.ir import Traced

__all__ = [
    "SeedGenerator",
    "beta",
    "binomial",
    "categorical",
    "draw_seed",
    "dropout",
    "gamma",
    "make_default_seed",
    "normal",
    "randint",
    "shuffle",
    "truncated_normal",
    "uniform",
]


def _seed(seed: Any) -> Tensor:
    """The seed as uint32 [2]: drawn from a generator or made of an int; a seed that has been drawn stays itself."""
    if not (is_tensor(seed) or isinstance(seed, Traced)):
        seed = draw_seed(seed)
    return convert(convert_to_tensor(seed), "uint32")


def _float_dtype(dtype: Any) -> tuple[str, str]:
    """The dtype of the result and the one to draw in, which is at least float32."""
    dtype = standardize_dtype(dtype or floatx())
    return dtype, "float32" if dtype in HALF_TYPES else dtype


def _is_number(value: Any, number: float) -> bool:
    return type(value) in (int, float) and value == number


def _scaled(sample: Tensor, mean: Any, stddev: Any) -> Tensor:
    if not _is_number(stddev, 1):
        sample = ops.mul(sample, convert_to_tensor(stddev, dtype_of(sample)))
    if not _is_number(mean, 0):
        sample = ops.add(sample, convert_to_tensor(mean, dtype_of(sample)))
    return sample


def normal(shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: str | None = None, seed: Any = None) -> Tensor:
    """Draws from a normal distribution."""
    dtype, draw = _float_dtype(dtype)
    sample = ops.random_normal(_seed(seed), shape=shape_of(shape), dtype=draw)
    return convert(_scaled(sample, mean, stddev), dtype)


def truncated_normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: str | None = None, seed: Any = None
) -> Tensor:
    """Draws from a normal distribution cut off at two standard deviations."""
    dtype, draw = _float_dtype(dtype)
    sample = ops.truncated_normal(_seed(seed), shape=shape_of(shape), dtype=draw)
    return convert(_scaled(sample, mean, stddev), dtype)


def uniform(shape: Any, minval: float = 0.0, maxval: float = 1.0, dtype: str | None = None, seed: Any = None) -> Tensor:
    """Draws from [minval, maxval), all equally likely."""
    dtype, draw = _float_dtype(dtype)
    if _is_number(minval, 0) and _is_number(maxval, 1):
        return ops.random_uniform(_seed(seed), shape=shape_of(shape), dtype=dtype)
    low, high = (convert_to_tensor(v, draw) for v in (minval, maxval))
    sample = ops.random_uniform(_seed(seed), shape=shape_of(shape), dtype=draw)
    sample = convert(ops.add(low, ops.mul(sample, ops.sub(high, low))), dtype)
    # Rounding must not carry a draw up to the excluded bound.
    low, high = convert(low, dtype), convert(high, dtype)
    return ops.maximum(low, ops.minimum(sample, ops.nextafter(high, low)))


def randint(shape: Any, minval: int, maxval: int, dtype: str = "int32", seed: Any = None) -> Tensor:
    """Draws of integers from [minval, maxval), all equally likely."""
    low, high = (convert_to_tensor(v, "int64") for v in (minval, maxval))
    return ops.random_integers(_seed(seed), low, high, shape=shape_of(shape), dtype=standardize_dtype(dtype))


def categorical(logits: Tensor, num_samples: int, dtype: str = "int64", seed: Any = None) -> Tensor:
    """[batch, num_samples] of classes drawn with the probabilities softmax(logits), logits [batch, classes]."""
    logits = to_inexact(logits)
    dtype = standardize_dtype(dtype)
    draw = dtype if "int" in dtype else "int32"
    sample = ops.random_categorical(_seed(seed), logits, num_samples=size_of(num_samples), dtype=draw)
    return convert(sample, dtype)


def dropout(inputs: Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> Tensor:
    """Elements set to 0 with probability `rate`, the others divided by 1 - rate.

    noise_shape: shape of the mask, broadcast to the inputs; None stands for the size of the inputs.
    """
    inputs = convert_to_tensor(inputs)
    if _is_number(rate, 1):
        return filled(inputs.shape, 0, dtype_of(inputs))
    if _is_number(rate, 0):
        return inputs
    shape = tuple(inputs.shape)
    if noise_shape is not None:
        shape = tuple(inputs.shape[i] if n is None else n for i, n in enumerate(noise_shape))
    draws = ops.random_uniform(_seed(seed), shape=shape_of(shape), dtype="float32")
    keep = ops.sub(scalar(1, draws), convert_to_tensor(rate, "float32"))
    kept = ops.div(inputs, convert(keep, dtype_of(inputs)))
    return ops.select(ops.lt(draws, keep), kept, scalar(0, inputs))


def shuffle(x: Tensor, axis: int = 0, seed: Any = None) -> Tensor:
    """The elements along an axis in random order, each line along it in its own."""
    x = convert_to_tensor(x)
    axis = axis_of(axis, x.ndim)
    order = ops.random_permutation(_seed(seed), shape=tuple(x.shape), axis=axis, dtype="int32")
    return ops.take_along_axis(x, order, axis=axis)


def _drawn(primitive: Callable, shape: Any, dtype: Any, seed: Any, *parameters: Any) -> Tensor:
    """Draws of a distribution whose parameters broadcast to the shape."""
    dtype, draw = _float_dtype(dtype)
    operands = [convert_to_tensor(p, draw if "float" in draw else "float32") for p in parameters]
    return convert(primitive(_seed(seed), *operands, shape=shape_of(shape), dtype=draw), dtype)


def gamma(shape: Any, alpha: float, dtype: str | None = None, seed: Any = None) -> Tensor:
    """Draws from the gamma distribution of shape `alpha` and scale 1."""
    return _drawn(ops.random_gamma, shape, dtype, seed, alpha)


def binomial(shape: Any, counts: Any, probabilities: Any, dtype: str | None = None, seed: Any = None) -> Tensor:
    """Draws of the number of successes in `counts` trials."""
    return _drawn(ops.random_binomial, shape, dtype, seed, counts, probabilities)


def beta(shape: Any, alpha: Any, beta: Any, dtype: str | None = None, seed: Any = None) -> Tensor:
    """Draws from the beta distribution."""
    return _drawn(ops.random_beta, shape, dtype, seed, alpha, beta)
