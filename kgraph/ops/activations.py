"""Coarse activations, kept whole so that kernels and autodiff need not find them again. Others are compositions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special as sp

from kgraph import ops
from kgraph.ir import Primitive, bind, register
from kgraph.ir.types import FLOATS
from kgraph.ops.common import REAL, Array, like, widened
from kgraph.ops.elementwise import elementwise_infer, unary, unary_gradient, unary_samples


def _parametric(name: str, reference: Callable, gradient: Callable, tolerance: float = 1e-6, **samples) -> Primitive:
    """The record of an activation with one attribute; `samples` gives the values of it to test."""
    ((attr, values),) = samples.items()
    return register(
        Primitive(
            name,
            infer=elementwise_infer(name, 1, FLOATS, attrs=(attr,)),
            reference=widened(reference),
            gradient=unary_gradient(gradient),
            traits=frozenset({"elementwise"}),
            samples=lambda: [s for value in values for s in unary_samples(FLOATS, (-4, 4), **{attr: value})],
            tolerance=tolerance,
        )
    )


def _where(pred: Array, value: Array) -> Array:
    """`value` where the predicate holds, else 0."""
    return ops.select(pred, value, like(value, 0))


# -- piecewise linear -------------------------------------------------------------------------------------------------

relu = unary(
    "relu",
    lambda x: np.maximum(x, x.dtype.type(0)),
    lambda c, x, y: _where(ops.gt(x, like(x, 0)), c),
    "max(x, 0); NaN stays NaN. Its derivative at 0 is 0.",
    dtypes=REAL,
)
relu6 = unary(
    "relu6",
    lambda x: np.minimum(np.maximum(x, x.dtype.type(0)), x.dtype.type(6)),
    lambda c, x, y: _where(ops.logical_and(ops.gt(x, like(x, 0)), ops.lt(x, like(x, 6))), c),
    "min(max(x, 0), 6); NaN stays NaN. Its derivative at 0 and 6 is 0.",
    dtypes=REAL,
    domain=(-4, 9),
)
LEAKY_RELU = _parametric(
    "leaky_relu",
    lambda x, negative_slope: np.where(x > 0, x, x * x.dtype.type(negative_slope)),
    lambda c, x, y, negative_slope: ops.select(ops.gt(x, like(x, 0)), c, ops.mul(c, like(c, negative_slope))),
    negative_slope=(0.2, 0.01),
)

# -- smooth -----------------------------------------------------------------------------------------------------------

logistic = unary(
    "logistic",
    sp.expit,
    lambda c, x, y: ops.mul(c, ops.mul(y, ops.sub(like(y, 1), y))),
    "1 / (1 + exp(-x)), the sigmoid.",
    dtypes=FLOATS,
    domain=(-6, 6),
)


def _silu_gradient(c, x, y):
    s = ops.logistic(x)
    return ops.mul(c, ops.mul(s, ops.add(like(x, 1), ops.mul(x, ops.sub(like(x, 1), s)))))


silu = unary(
    "silu",
    lambda x: np.where(x == -np.inf, x.dtype.type(0), x * sp.expit(x)),
    _silu_gradient,
    "x * logistic(x), also called swish; 0 at -inf.",
    dtypes=FLOATS,
    domain=(-6, 6),
)
softplus = unary(
    "softplus",
    lambda x: np.logaddexp(x, x.dtype.type(0)),
    lambda c, x, y: ops.mul(c, ops.logistic(x)),
    "log(1 + exp(x)) without overflow.",
    dtypes=FLOATS,
    domain=(-6, 6),
)
ELU = _parametric(
    "elu",
    lambda x, alpha: np.where(x > 0, x, x.dtype.type(alpha) * np.expm1(np.minimum(x, x.dtype.type(0)))),
    lambda c, x, y, alpha: ops.select(ops.gt(x, like(x, 0)), c, ops.mul(c, ops.add(y, like(y, alpha)))),
    alpha=(1.0, 0.3),
)

GELU_CUBIC = 0.044715
GELU_SCALE = math.sqrt(2 / math.pi)


def _gelu(x: np.ndarray, approximate: bool) -> np.ndarray:
    t = x.dtype.type
    if approximate:
        y = t(0.5) * x * (t(1) + np.tanh(t(GELU_SCALE) * (x + t(GELU_CUBIC) * x * x * x)))
    else:
        y = t(0.5) * x * sp.erfc(-x * t(math.sqrt(0.5)))
    return np.where(x == -np.inf, t(0), y)


def _gelu_gradient(c, x, y, approximate):
    half, one = like(x, 0.5), like(x, 1)
    square = ops.mul(x, x)
    if approximate:
        inner = ops.mul(ops.mul(like(x, GELU_SCALE), x), ops.add(one, ops.mul(like(x, GELU_CUBIC), square)))
        slope = ops.mul(like(x, GELU_SCALE), ops.add(one, ops.mul(like(x, 3 * GELU_CUBIC), square)))
        t = ops.tanh(inner)
        bell = ops.mul(ops.mul(half, slope), ops.sub(one, ops.mul(t, t)))
        return ops.mul(c, ops.add(ops.mul(half, ops.add(one, t)), ops.mul(x, bell)))
    distribution = ops.add(half, ops.mul(half, ops.erf(ops.mul(x, like(x, math.sqrt(0.5))))))
    density = ops.mul(like(x, 1 / math.sqrt(2 * math.pi)), ops.exp(ops.mul(like(x, -0.5), square)))
    return ops.mul(c, ops.add(distribution, ops.mul(x, density)))


GELU = _parametric("gelu", _gelu, _gelu_gradient, tolerance=2e-6, approximate=(False, True))

# -- functions of the parametric ones ---------------------------------------------------------------------------------


def leaky_relu(x: Array, *, negative_slope: float = 0.2) -> Array:
    """x above 0, negative_slope * x below.

    x: any shape, float. Gives x's type. Raises DTypeError for other dtypes.
    """
    return bind(LEAKY_RELU, x, negative_slope=float(negative_slope))


def elu(x: Array, *, alpha: float = 1.0) -> Array:
    """x above 0, alpha * (exp(x) - 1) below.

    x: any shape, float. Gives x's type. Raises DTypeError for other dtypes.
    """
    return bind(ELU, x, alpha=float(alpha))


def gelu(x: Array, *, approximate: bool = True) -> Array:
    """x times the normal distribution function of x, by erf or (approximate) by the usual tanh formula; 0 at -inf.

    x: any shape, float. Gives x's type. Raises DTypeError for other dtypes.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return bind(GELU, x, approximate=bool(approximate))
