"""Activation functions. Those that kernels know whole (relu, gelu, silu ...) stay whole; others are compositions."""

from __future__ import annotations

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar, to_inexact


def relu(x: Tensor) -> Tensor:
    return ops.relu(_number(x))


def relu6(x: Tensor) -> Tensor:
    return ops.relu6(_number(x))


def _number(x: Tensor) -> Tensor:
    x = convert_to_tensor(x)
    return ops.convert(x, dtype="int32") if x.dtype.name == "bool" else x


def sigmoid(x: Tensor) -> Tensor:
    return ops.logistic(to_inexact(x))


def sparse_sigmoid(x: Tensor) -> Tensor:
    """0 below -1, 1 above 1, linear between."""
    x = to_inexact(x)
    return _clip(ops.mul(scalar(0.5, x), ops.add(x, scalar(1, x))), 0, 1)


def tanh(x: Tensor) -> Tensor:
    return ops.tanh(to_inexact(x))


def tanh_shrink(x: Tensor) -> Tensor:
    x = to_inexact(x)
    return ops.sub(x, ops.tanh(x))


def softplus(x: Tensor) -> Tensor:
    return ops.softplus(to_inexact(x))


def softsign(x: Tensor) -> Tensor:
    x = to_inexact(x)
    return ops.div(x, ops.add(scalar(1, x), ops.abs(x)))


def soft_shrink(x: Tensor, threshold: float = 0.5) -> Tensor:
    x = to_inexact(x)
    t = scalar(threshold, x)
    inner = ops.select(ops.lt(x, ops.neg(t)), ops.add(x, t), scalar(0, x))
    return ops.select(ops.gt(x, t), ops.sub(x, t), inner)


def sparse_plus(x: Tensor) -> Tensor:
    """0 below -1, x above 1, (x + 1)^2 / 4 between."""
    x = to_inexact(x)
    one, y = scalar(1, x), ops.add(x, scalar(1, x))
    middle = ops.mul(scalar(0.25, x), ops.mul(y, y))
    return ops.select(ops.le(x, scalar(-1, x)), scalar(0, x), ops.select(ops.ge(x, one), x, middle))


def silu(x: Tensor) -> Tensor:
    return ops.silu(to_inexact(x))


def squareplus(x: Tensor, b: float = 4) -> Tensor:
    x = to_inexact(x)
    root = ops.sqrt(ops.add(ops.mul(x, x), scalar(b, x)))
    return ops.mul(scalar(0.5, x), ops.add(x, root))


def log_sigmoid(x: Tensor) -> Tensor:
    return ops.neg(ops.softplus(ops.neg(to_inexact(x))))


def leaky_relu(x: Tensor, negative_slope: float = 0.2) -> Tensor:
    return ops.leaky_relu(to_inexact(x), negative_slope=float(negative_slope))


def hard_sigmoid(x: Tensor) -> Tensor:
    x = to_inexact(x)
    # Through relu6, as the mobile networks define it.
    return ops.mul(ops.relu6(ops.add(x, scalar(3, x))), scalar(1 / 6, x))


def hard_silu(x: Tensor) -> Tensor:
    x = to_inexact(x)
    return ops.mul(x, hard_sigmoid(x))


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return ops.elu(to_inexact(x), alpha=float(alpha))


def selu(x: Tensor) -> Tensor:
    x = to_inexact(x)
    return ops.mul(scalar(1.0507009873554804934193349852946, x), ops.elu(x, alpha=1.6732632423543772848170429916717))


def gelu(x: Tensor, approximate: bool = True) -> Tensor:
    return ops.gelu(to_inexact(x), approximate=bool(approximate))


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    x = to_inexact(x)
    a, zero = scalar(alpha, x), scalar(0, x)
    negative = ops.mul(a, ops.expm1(ops.div(ops.minimum(x, zero), a)))
    return ops.add(ops.maximum(x, zero), negative)


def glu(x: Tensor, axis: int = -1) -> Tensor:
    x = to_inexact(x)
    if x.shape[axis] % 2 != 0:
        raise ValueError(f"axis size must be divisible by 2. Received: x.shape={tuple(x.shape)} with axis={axis}")
    value, gate = knp.split(x, 2, axis=axis)
    return ops.mul(value, ops.logistic(gate))


def hard_tanh(x: Tensor) -> Tensor:
    return _clip(to_inexact(x), -1, 1)


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    return ops.minimum(ops.maximum(x, scalar(low, x)), scalar(high, x))


def hard_shrink(x: Tensor, threshold: float = 0.5) -> Tensor:
    x = to_inexact(x)
    return ops.select(ops.gt(ops.abs(x), scalar(threshold, x)), x, scalar(0, x))


def threshold(x: Tensor, threshold: float, default_value: float) -> Tensor:
    x = _number(x)
    return ops.select(ops.gt(x, scalar(threshold, x)), x, scalar(default_value, x))


def _softmax_axis(x: Tensor, axis):
    rank = len(x.shape)
    if axis is None:
        return tuple(range(rank))
    if isinstance(axis, (tuple, list)):
        return tuple(sorted(a % rank for a in axis))
    return axis % rank if rank else 0


def softmax(x: Tensor, axis: int | tuple | None = -1) -> Tensor:
    x = to_inexact(x)
    return ops.softmax(x, axis=_softmax_axis(x, axis))


def log_softmax(x: Tensor, axis: int | tuple | None = -1) -> Tensor:
    x = to_inexact(x)
    return ops.log_softmax(x, axis=_softmax_axis(x, axis))


def sparsemax(x: Tensor, axis: int = -1) -> Tensor:
    """The Euclidean projection on the probability simplex (Martins and Astudillo, 2016)."""
    logits = to_inexact(x)
    axis = axis % len(logits.shape)
    size = logits.shape[axis]
    ordered = ops.sort(logits, axis=axis, descending=True)
    total = ops.cumsum(ordered, axis=axis, reverse=False)
    shape = tuple(size if a == axis else 1 for a in range(len(logits.shape)))
    rank = ops.add(ops.iota(shape=shape, dtype=logits.dtype.name, axis=axis), scalar(1, logits))
    # The largest k for which the k-th logit stays above the threshold that k logits give.
    supported = ops.gt(ops.mul(ordered, rank), ops.sub(total, scalar(1, logits)))
    count = ops.reduce_sum(ops.convert(supported, dtype=logits.dtype.name), axes=(axis,), keepdims=True)
    kept = ops.reduce_sum(ops.select(supported, ordered, scalar(0, logits)), axes=(axis,), keepdims=True)
    tau = ops.div(ops.sub(kept, scalar(1, logits)), count)
    return ops.maximum(ops.sub(logits, tau), scalar(0, logits))
