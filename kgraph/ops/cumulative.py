"""Cumulative reductions along one axis, forwards or backwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ir.types import FLOATS
from kgraph.ops.common import (
    NUMBERS,
    REAL,
    Array,
    describe,
    distinct,
    integers,
    like,
    normalize_axis,
    require,
    require_dtype,
    uniform,
    widened,
    zeros_like,
)


def _cumulative(
    name: str, step: np.ufunc, gradient: Callable, doc: str, *, dtypes: frozenset, make=uniform, **rules
) -> Callable[..., Array]:
    """Register a cumulative reduction by `step` and give its function.

    gradient: `gradient(c, x, y, axis)` of the forward direction; the other one is its mirror image.
    """

    def infer(x: TensorType, axis: int, reverse: bool) -> TensorType:
        require_dtype(name, dtypes, x)
        require(0 <= axis < x.rank, lambda: f"{name}({x}): axis {axis} is out of range")
        return x

    def reference(x: np.ndarray, axis: int, reverse: bool) -> np.ndarray:
        if x.size == 0:
            return x.copy()
        if reverse:
            return np.flip(step.accumulate(np.flip(x, axis), axis, dtype=x.dtype), axis)
        return step.accumulate(x, axis, dtype=x.dtype)

    def vjp(cotangents, inputs, outputs, axis, reverse):
        operands = (cotangents[0], inputs[0], outputs[0])
        if not reverse:
            return (gradient(*operands, axis),)
        return (ops.rev(gradient(*(ops.rev(v, axes=axis) for v in operands), axis), axes=axis),)

    def samples() -> list[Sample]:
        attrs = lambda axis, reverse=False: {"axis": axis, "reverse": reverse}
        zeros = np.array([[1, 0, 2, 3], [2, 3, 0, 0], [0, 1, 2, 3]], "float32")
        out = [
            Sample((make((3, 5)),), attrs(1)),
            Sample((make((3, 5)),), attrs(0, True)),
            Sample((make((2, 3, 17)),), attrs(2)),
            Sample((make((2, 17, 3)),), attrs(1, True)),
            Sample((make((1,)),), attrs(0)),
            Sample((zeros,), attrs(1), "special" if make is distinct else "zeros"),
            Sample((make((0, 3)),), attrs(0), "empty"),
            Sample((np.array([1, np.nan, 2, np.inf, -np.inf], "float32"),), attrs(0), "special"),
        ]
        out += [Sample((make((19,), dtype=d),), attrs(0), d) for d in ("float16", "bfloat16")]
        if "int32" in dtypes:
            out.append(Sample((integers((3, 7)),), attrs(1), "int32"))
        return out

    record = register(Primitive(name, infer, widened(reference), vjp, frozenset(), samples, **rules))

    def function(x: Array, *, axis: int, reverse: bool = False) -> Array:
        return bind(record, x, axis=normalize_axis(name, axis, len(x.shape)), reverse=bool(reverse))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{doc} Element i combines elements 0 to i along the axis, for `reverse` those from i on.\n\n"
        f"    x: any shape of rank at least 1, {describe(dtypes)}. Gives x's type.\n"
        "    Raises ShapeError for an axis out of range, DTypeError for other dtypes.\n    "
    )
    return function


def _prod_gradient(c, x, y, axis):
    # dx_k = (sum over i >= k of c_i y_i) / x_k holds up to the first zero (y is 0 from there on) and is 0 behind it;
    # at the first zero itself the products leave it out.
    zero, one = like(x, 0), like(x, 1)
    is_zero = ops.eq(x, zero)
    count = ops.cumsum(ops.convert(is_zero, dtype="int32"), axis=axis)
    first = ops.logical_and(is_zero, ops.eq(count, np.array(1, "int32")))
    without_first = ops.cumprod(ops.select(first, one, x), axis=axis)
    at_first = ops.cumsum(ops.mul(c, without_first), axis=axis, reverse=True)
    total = ops.cumsum(ops.mul(c, y), axis=axis, reverse=True)
    quotient = ops.div(total, ops.select(is_zero, one, x))
    return ops.select(first, at_first, ops.select(is_zero, zero, quotient))


def _extremum_gradient(c, x, y, axis):
    # Each result comes from the latest element that equals it.
    position = ops.iota(shape=x.shape, dtype="int32", axis=axis)
    source = ops.cummax(ops.select(ops.eq(x, y), position, np.array(0, "int32")), axis=axis)
    return ops.scatter_along_axis(zeros_like(x), source, c, axis=axis, reduction="add")


def _logsumexp_gradient(c, x, y, axis):
    # dx_k = sum over i >= k of c_i exp(x_k - y_i), in logarithms apart for positive and negative c: nothing overflows.
    def part(weights):
        return ops.exp(ops.add(x, ops.cumlogsumexp(ops.sub(ops.log(weights), y), axis=axis, reverse=True)))

    zero = like(c, 0)
    return ops.sub(part(ops.maximum(c, zero)), part(ops.maximum(ops.neg(c), zero)))


cumsum: Callable[..., Array] = _cumulative(
    "cumsum",
    np.add,
    lambda c, x, y, axis: ops.cumsum(c, axis=axis, reverse=True),
    "Running sums.",
    dtypes=NUMBERS,
)
cumprod = _cumulative("cumprod", np.multiply, _prod_gradient, "Running products.", dtypes=NUMBERS)
cummax = _cumulative(
    "cummax", np.maximum, _extremum_gradient, "Running maxima, NaN from the first NaN on.", dtypes=REAL, make=distinct
)
cummin = _cumulative(
    "cummin", np.minimum, _extremum_gradient, "Running minima, NaN from the first NaN on.", dtypes=REAL, make=distinct
)
cumlogsumexp = _cumulative(
    "cumlogsumexp", np.logaddexp, _logsumexp_gradient, "Running log(sum(exp(x))).", dtypes=FLOATS, tolerance=2e-6
)
