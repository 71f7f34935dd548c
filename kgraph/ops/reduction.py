"""Reductions over axes, positions of extrema, and cumulative reductions along one axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ir.dims import product
from kgraph.ops.common import (
    BOOL,
    NUMBERS,
    ORDERED,
    Array,
    booleans,
    describe,
    distinct,
    dtype_of,
    highest,
    integers,
    like,
    lowest,
    normalize_axes,
    normalize_axis,
    require,
    require_dtype,
    uniform,
    widened,
)

# -- reductions -------------------------------------------------------------------------------------------------------


def reduced_shape(shape: tuple, axes: tuple, keepdims: bool) -> tuple:
    """The shape left by a reduction: reduced axes go, or become 1."""
    if keepdims:
        return tuple(1 if i in axes else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _reduction_infer(name: str, dtypes: frozenset) -> Callable:
    def infer(x: TensorType, axes: tuple, keepdims: bool) -> TensorType:
        require_dtype(name, dtypes, x)
        require(
            all(0 <= a < x.rank for a in axes) and len(set(axes)) == len(axes),
            lambda: f"{name}({x}): axes {axes} repeat or are out of range",
        )
        return x.with_shape(reduced_shape(x.shape, axes, keepdims))

    return infer


def _reduction_samples(dtypes: frozenset, make: Callable = uniform) -> list[Sample]:
    attrs = lambda *axes, keepdims=False: {"axes": axes, "keepdims": keepdims}
    out = []
    if "float32" in dtypes:
        out = [
            Sample((make((3, 5)),), attrs(1)),
            Sample((make((3, 5)),), attrs(0, keepdims=True)),
            Sample((make((2, 3, 17)),), attrs(0, 2)),
            Sample((make((2, 3, 4, 5)),), attrs(1, 2, keepdims=True)),
            Sample((make((7,)),), attrs(0)),
            Sample((make((3, 33)),), attrs(0, 1)),
            Sample((make((3, 5)),), attrs()),
            Sample((make(()),), attrs()),
            Sample((make((0, 3)),), attrs(0), "empty"),
            Sample((make((0, 3)),), attrs(1), "empty"),
            Sample((np.array([[1, np.nan, 2], [np.inf, 1, -np.inf]], "float32"),), attrs(1), "special"),
            Sample((np.array([[1, 1, 0], [0, 2, 0]], "float32"),), attrs(1), "special"),
        ]
        out += [Sample((make((5, 19), dtype=d),), attrs(1), d) for d in ("float16", "bfloat16")]
    if "int32" in dtypes:
        out.append(Sample((integers((3, 7)),), attrs(1), "int32"))
        out.append(Sample((integers((3, 7), 0, 99, "uint8"),), attrs(0), "uint8"))
    if "bool" in dtypes:
        out.append(Sample((booleans((3, 7)),), attrs(1), "bool"))
        out.append(Sample((booleans((3, 3)),), attrs(0, 1, keepdims=True), "bool"))
        out.append(Sample((booleans((3, 0)),), attrs(1), "empty"))
    return out


def expanded(reduced: Array, x: Array, axes: tuple) -> Array:
    """A reduction's result (or its cotangent) with the reduced axes back as size 1, so that it broadcasts to x."""
    return ops.reshape(reduced, shape=reduced_shape(tuple(x.shape), axes, True))


def _reduction(name: str, reference, gradient, doc: str, *, dtypes: frozenset, make: Callable = uniform, **rules):
    """Register a reduction and give its function; `gradient(c, x, y, axes)` with c and y shaped to broadcast to x."""

    def vjp(cotangents, inputs, outputs, axes, keepdims):
        (x,) = inputs
        return (gradient(expanded(cotangents[0], x, axes), x, expanded(outputs[0], x, axes), axes),)

    record = register(
        Primitive(
            name,
            infer=_reduction_infer(name, dtypes),
            reference=widened(reference),
            gradient=gradient if isinstance(gradient, NotDifferentiable) else vjp,
            traits=frozenset({"reduction"}),
            samples=lambda: _reduction_samples(dtypes, make),
            **rules,
        )
    )

    def function(x: Array, *, axes=None, keepdims: bool = False) -> Array:
        return bind(record, x, axes=normalize_axes(name, axes, len(x.shape)), keepdims=bool(keepdims))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{doc}\n\n    x: any shape, {describe(dtypes)}. axes: an int or a tuple of them, None for all axes.\n"
        "    Gives x's dtype; reduced axes go, or stay with size 1 for keepdims.\n"
        "    Raises ShapeError for axes that repeat or are out of range, DTypeError for other dtypes.\n    "
    )
    return function


def _sum_gradient(c, x, y, axes):
    return ops.broadcast_to(c, shape=x.shape)


def _prod_gradient(c, x, y, axes):
    # The product of all other elements, free of divisions: an exclusive product from the left times one from the right.
    if not axes:
        return c
    rank = len(x.shape)
    kept = tuple(i for i in range(rank) if i not in axes)
    order = kept + axes
    front = ops.transpose(x, permutation=order)
    flat = ops.reshape(front, shape=(*(x.shape[i] for i in kept), product(x.shape[i] for i in axes)))
    left, right = (0,) * len(kept) + (1,), (0,) * len(kept) + (-1,)
    one = like(x, 1)
    before = ops.cumprod(ops.pad(flat, one, low=left, high=right), axis=-1)
    after = ops.cumprod(ops.pad(flat, one, low=right, high=left), axis=-1, reverse=True)
    others = ops.reshape(ops.mul(before, after), shape=front.shape)
    return ops.mul(c, ops.transpose(others, permutation=tuple(int(i) for i in np.argsort(order))))


def _extremum_gradient(c, x, y, axes):
    # Shared equally between the elements that attain the extremum.
    hit = ops.convert(ops.eq(x, y), dtype=dtype_of(x))
    return ops.mul(hit, ops.div(c, ops.reduce_sum(hit, axes=axes, keepdims=True)))


reduce_sum = _reduction(
    "reduce_sum",
    lambda x, axes, keepdims: np.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype),
    _sum_gradient,
    "The sum over axes; 0 over none. Ints wrap.",
    dtypes=NUMBERS,
)
reduce_prod = _reduction(
    "reduce_prod",
    lambda x, axes, keepdims: np.prod(x, axis=axes, keepdims=keepdims, dtype=x.dtype),
    _prod_gradient,
    "The product over axes; 1 over none. Ints wrap.",
    dtypes=NUMBERS,
)
reduce_max = _reduction(
    "reduce_max",
    lambda x, axes, keepdims: np.max(x, axis=axes, keepdims=keepdims, initial=lowest(x.dtype)),
    _extremum_gradient,
    "The maximum over axes, NaN if one is among them; the dtype's least value over none.",
    dtypes=ORDERED,
    make=distinct,
    tolerance=0.0,
)
reduce_min = _reduction(
    "reduce_min",
    lambda x, axes, keepdims: np.min(x, axis=axes, keepdims=keepdims, initial=highest(x.dtype)),
    _extremum_gradient,
    "The minimum over axes, NaN if one is among them; the dtype's greatest value over none.",
    dtypes=ORDERED,
    make=distinct,
    tolerance=0.0,
)
reduce_and = _reduction(
    "reduce_and",
    lambda x, axes, keepdims: np.all(x, axis=axes, keepdims=keepdims),
    NotDifferentiable("its result is bool"),
    "Whether all elements over axes are true; true over none.",
    dtypes=BOOL,
    tolerance=0.0,
)
reduce_or = _reduction(
    "reduce_or",
    lambda x, axes, keepdims: np.any(x, axis=axes, keepdims=keepdims),
    NotDifferentiable("its result is bool"),
    "Whether any element over axes is true; false over none.",
    dtypes=BOOL,
    tolerance=0.0,
)

# -- positions of extrema ---------------------------------------------------------------------------------------------


def _position(name: str, reference: Callable, doc: str):
    def infer(x: TensorType, axis: int, dtype: str) -> TensorType:
        require_dtype(name, ORDERED, x)
        require(0 <= axis < x.rank, lambda: f"{name}({x}): axis {axis} is out of range")
        if isinstance(x.shape[axis], int) and x.shape[axis] == 0:
            raise ShapeError(f"{name}({x}): axis {axis} is empty and has no extremum")
        return TensorType(reduced_shape(x.shape, (axis,), False), dtype)

    attrs = lambda axis, dtype="int32": {"axis": axis, "dtype": dtype}
    record = register(
        Primitive(
            name,
            infer=infer,
            reference=lambda x, axis, dtype: np.asarray(reference(x, axis)).astype(np_dtype(dtype)),
            gradient=NotDifferentiable("its result is an index"),
            traits=frozenset(),
            samples=lambda: [
                Sample((distinct((3, 5)),), attrs(1)),
                Sample((distinct((2, 3, 17)),), attrs(1, "int64")),
                Sample((distinct((33,)),), attrs(0)),
                Sample((integers((5, 19), 0, 3),), attrs(1), "ties"),
                Sample((booleans((3, 7)),), attrs(1), "bool"),
                Sample((distinct((5, 3), dtype="bfloat16"),), attrs(0), "bfloat16"),
                Sample((uniform((0, 3)),), attrs(1), "empty"),
                Sample((np.array([[1, np.nan, 2], [np.inf, 1, -np.inf]], "float32"),), attrs(1), "special"),
            ],
            tolerance=0.0,
        )
    )

    def function(x: Array, *, axis: int, dtype: str = "int32") -> Array:
        return bind(record, x, axis=normalize_axis(name, axis, len(x.shape)), dtype=dtype_name(dtype))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{doc} The first one at ties; the first NaN if there is one.\n\n"
        f"    x: any shape, {describe(ORDERED)}. Gives x's shape without `axis`, in the int `dtype`.\n"
        "    Raises ShapeError for an empty axis or one out of range.\n    "
    )
    return function


argmax = _position("argmax", lambda x, axis: np.argmax(x, axis), "The position of the maximum along an axis.")
argmin = _position("argmin", lambda x, axis: np.argmin(x, axis), "The position of the minimum along an axis.")
