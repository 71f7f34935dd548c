"""Primitives that move elements by shape alone: reshape, transpose, broadcast, reverse, concatenate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph import ops
from kgraph.errors import DimDecisionError, ShapeError
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ir.dims import product
from kgraph.ops.common import (
    Array,
    booleans,
    integers,
    listing,
    normalize_axes,
    normalize_axis,
    require,
    require_same_dtype,
    require_size,
    shape_attr,
    sizes_differ,
    unbroadcast,
    uniform,
)

# -- reshape ----------------------------------------------------------------------------------------------------------


def _reshape_infer(x: TensorType, shape: tuple) -> TensorType:
    if sizes_differ(x.size, product(shape)):
        raise ShapeError(f"reshape({x}) to {shape}: {x.size} elements do not fill {product(shape)}")
    return x.with_shape(shape)


RESHAPE = register(
    Primitive(
        "reshape",
        infer=_reshape_infer,
        reference=lambda x, shape: np.reshape(x, shape),
        gradient=lambda cotangents, inputs, outputs, shape: (ops.reshape(cotangents[0], shape=inputs[0].shape),),
        traits=frozenset({"view"}),
        samples=lambda: [
            Sample((uniform((3, 10)),), {"shape": (5, 6)}),
            Sample((uniform((3, 5)),), {"shape": (3, 1, 5, 1)}),
            Sample((uniform(()),), {"shape": (1, 1)}),
            Sample((integers((2, 3, 7)),), {"shape": (42,)}),
            Sample((uniform((0, 3)),), {"shape": (3, 0)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def reshape(x: Array, *, shape) -> Array:
    """The elements of x in row-major order in another shape; x itself where it has that shape already.

    shape: sizes, ints or Dims, at most one of them -1: that one takes what is left, by exact division.
    Gives x's dtype. Raises ShapeError where the element counts differ or the division is not exact.
    """
    shape = shape_attr(shape)
    if -1 in shape:
        shape = _fill_unknown(tuple(x.shape), shape)
    return x if tuple(x.shape) == shape else bind(RESHAPE, x, shape=shape)


def _fill_unknown(old: tuple, new: tuple) -> tuple:
    """`new` with its -1 replaced by the size that is left of `old`."""
    where = [i for i, s in enumerate(new) if isinstance(s, int) and s == -1]
    require(len(where) == 1, lambda: f"reshape: at most one size may be -1, got {new}")
    known = product(s for i, s in enumerate(new) if i != where[0])
    total = product(old)
    require(known != 0, lambda: f"reshape: the size for -1 in {new} is not determined for the shape {old}")
    try:
        exact = total // known
        inexact = sizes_differ(exact * known, total)
        require(not inexact, lambda: f"reshape: {old} with {total} elements does not fit {new}")
    except DimDecisionError:
        raise DimDecisionError(f"reshape: the size for -1 in {new} is not a polynomial in the sizes of {old}") from None
    return (*new[: where[0]], exact, *new[where[0] + 1 :])


# -- transpose --------------------------------------------------------------------------------------------------------


def _transpose_infer(x: TensorType, permutation: tuple) -> TensorType:
    require(
        sorted(permutation) == list(range(x.rank)),
        lambda: f"transpose({x}): {permutation} is not a permutation of its {x.rank} axes",
    )
    return x.with_shape(x.shape[p] for p in permutation)


def _transpose_gradient(cotangents, inputs, outputs, permutation):
    return (ops.transpose(cotangents[0], permutation=tuple(int(i) for i in np.argsort(permutation))),)


TRANSPOSE = register(
    Primitive(
        "transpose",
        infer=_transpose_infer,
        reference=lambda x, permutation: np.ascontiguousarray(np.transpose(x, permutation)).reshape(
            [x.shape[p] for p in permutation]
        ),
        gradient=_transpose_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)),), {"permutation": (1, 0)}),
            Sample((uniform((2, 3, 17)),), {"permutation": (2, 0, 1)}),
            Sample((uniform((2, 1, 5, 3)),), {"permutation": (0, 3, 1, 2)}),
            Sample((uniform(()),), {"permutation": ()}),
            Sample((integers((17, 33)),), {"permutation": (1, 0)}),
            Sample((booleans((3, 7)),), {"permutation": (1, 0)}),
            Sample((uniform((0, 3)),), {"permutation": (1, 0)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def transpose(x: Array, *, permutation: Sequence[int] | None = None) -> Array:
    """x with its axes reordered: axis i of the result is axis permutation[i] of x; None reverses them.

    Gives x's dtype, dense; x itself for the identity. Raises ShapeError if it is not a permutation of the axes.
    """
    rank = len(x.shape)
    if permutation is None:
        permutation = range(rank)[::-1]
    permutation = tuple(normalize_axis("transpose", p, rank) for p in permutation)
    return x if permutation == tuple(range(rank)) else bind(TRANSPOSE, x, permutation=permutation)


# -- broadcast_to -----------------------------------------------------------------------------------------------------


def _broadcast_infer(x: TensorType, shape: tuple) -> TensorType:
    extra = len(shape) - x.rank
    require(extra >= 0, lambda: f"broadcast_to({x}) to {shape}: the rank cannot shrink")
    for i, size in enumerate(x.shape):
        if size != 1:
            require_size("broadcast_to", (x,), f"size {i} of the target {shape}", shape[extra + i], size)
    return x.with_shape(shape)


BROADCAST_TO = register(
    Primitive(
        "broadcast_to",
        infer=_broadcast_infer,
        reference=lambda x, shape: np.broadcast_to(x, shape).copy(),
        gradient=lambda cotangents, inputs, outputs, shape: (unbroadcast(cotangents[0], inputs[0]),),
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((5,)),), {"shape": (3, 5)}),
            Sample((uniform((3, 1)),), {"shape": (2, 3, 17)}),
            Sample((uniform(()),), {"shape": (7,)}),
            Sample((uniform((1, 3, 1)),), {"shape": (2, 3, 5)}),
            Sample((integers((3, 1)),), {"shape": (3, 7)}),
            Sample((uniform((1, 3)),), {"shape": (0, 3)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def broadcast_to(x: Array, *, shape) -> Array:
    """x repeated along new leading axes and along axes of size 1, as NumPy does; x itself where it has the shape.

    shape: sizes, ints or Dims. Gives x's dtype. Raises ShapeError where x does not broadcast to it.
    """
    shape = shape_attr(shape)
    return x if tuple(x.shape) == shape else bind(BROADCAST_TO, x, shape=shape)


# -- rev --------------------------------------------------------------------------------------------------------------


def _rev_infer(x: TensorType, axes: tuple) -> TensorType:
    require(
        all(0 <= a < x.rank for a in axes) and len(set(axes)) == len(axes),
        lambda: f"rev({x}): axes {axes} repeat or are out of range",
    )
    return x


REV = register(
    Primitive(
        "rev",
        infer=_rev_infer,
        reference=lambda x, axes: np.flip(x, axes).copy(),
        gradient=lambda cotangents, inputs, outputs, axes: (ops.rev(cotangents[0], axes=axes),),
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)),), {"axes": (1,)}),
            Sample((uniform((2, 3, 17)),), {"axes": (0, 2)}),
            Sample((integers((7,)),), {"axes": (0,)}),
            Sample((uniform((0, 3)),), {"axes": (0, 1)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def rev(x: Array, *, axes) -> Array:
    """x with the order of elements reversed along `axes`. Gives x's type. Raises ShapeError for bad axes."""
    axes = normalize_axes("rev", axes, len(x.shape))
    return bind(REV, x, axes=axes) if axes else x


# -- concatenate ------------------------------------------------------------------------------------------------------


def _concatenate_infer(*types: TensorType, axis: int) -> TensorType:
    require(len(types) > 0, lambda: "concatenate: expected at least one operand")
    require_same_dtype("concatenate", *types)
    first = types[0]
    require(0 <= axis < first.rank, lambda: f"concatenate({listing(types)}): axis {axis} is out of range")
    for t in types[1:]:
        require(t.rank == first.rank, lambda: f"concatenate({listing(types)}): expected operands of one rank")
        for i in range(first.rank):
            if i != axis:
                require_size("concatenate", types, f"size {i} of an operand", t.shape[i], first.shape[i])
    total = sum(t.shape[axis] for t in types)
    return first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _concatenate_gradient(cotangents, inputs, outputs, axis):
    (c,) = cotangents
    out, offset = [], 0
    for x in inputs:
        start, limit = [0] * len(c.shape), list(c.shape)
        start[axis], limit[axis] = offset, offset + x.shape[axis]
        out.append(ops.slice(c, start=start, limit=limit))
        offset = limit[axis]
    return tuple(out)


CONCATENATE = register(
    Primitive(
        "concatenate",
        infer=_concatenate_infer,
        reference=lambda *xs, axis: np.concatenate(xs, axis),
        gradient=_concatenate_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)), uniform((3, 2), seed=1)), {"axis": 1}),
            Sample((uniform((1, 5)), uniform((3, 5), seed=1), uniform((2, 5), seed=2)), {"axis": 0}),
            Sample((uniform((2, 3, 7)), uniform((2, 1, 7), seed=1)), {"axis": 1}),
            Sample((uniform((3,)),), {"axis": 0}),
            Sample((integers((3, 5)), integers((3, 2), seed=1)), {"axis": 1}, "int32"),
            Sample((uniform((0, 3)), uniform((2, 3), seed=1)), {"axis": 0}, "empty"),
        ],
        tolerance=0.0,
    )
)


def concatenate(*xs: Array, axis: int) -> Array:
    """Operands joined along an axis.

    xs: one dtype and rank, equal sizes except along `axis`. Gives their dtype; a single operand itself.
    Raises ShapeError or DTypeError where they do not fit.
    """
    require(len(xs) > 0, lambda: "concatenate: expected at least one operand")
    axis = normalize_axis("concatenate", axis, len(xs[0].shape))
    return xs[0] if len(xs) == 1 else bind(CONCATENATE, *xs, axis=axis)
