"""Comparisons and logic of two tensors, element by element, and choices by a condition."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph import ops
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axes_of,
    concrete,
    convert,
    flatten,
    insert_axes,
    promote,
    promote_inexact,
    scalar,
    to_bool,
)


def equal(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 == x2."""
    return ops.eq(*promote(x1, x2))


def not_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 != x2."""
    return ops.ne(*promote(x1, x2))


def less(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 < x2."""
    return ops.lt(*promote(x1, x2))


def less_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 <= x2."""
    return ops.le(*promote(x1, x2))


def greater(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 > x2."""
    return ops.gt(*promote(x1, x2))


def greater_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """Where x1 >= x2."""
    return ops.ge(*promote(x1, x2))


def logical_and(x1: Tensor, x2: Tensor) -> Tensor:
    """Where both are true."""
    return ops.logical_and(to_bool(x1), to_bool(x2))


def logical_or(x1: Tensor, x2: Tensor) -> Tensor:
    """Where either is true."""
    return ops.logical_or(to_bool(x1), to_bool(x2))


def logical_xor(x1: Tensor, x2: Tensor) -> Tensor:
    """Where one of the two is true."""
    return ops.logical_xor(to_bool(x1), to_bool(x2))


def isclose(x1: Tensor, x2: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """Where |x1 - x2| <= atol + rtol * |x2|; equal infinities are close, NaN only with `equal_nan`."""
    x1, x2 = promote_inexact(x1, x2)
    distance, size = ops.abs(ops.sub(x1, x2)), ops.abs(x2)
    limit = ops.add(scalar(atol, size), ops.mul(scalar(rtol, size), size))
    # An infinite limit must not make a finite x1 close to an infinite x2.
    close = ops.logical_and(ops.le(distance, limit), ops.is_finite(limit))
    close = ops.logical_or(close, ops.eq(x1, x2))
    if equal_nan:
        close = ops.logical_or(close, ops.logical_and(ops.ne(x1, x1), ops.ne(x2, x2)))
    return close


def allclose(x1: Tensor, x2: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """Whether `isclose` holds everywhere; a boolean of rank 0."""
    close = isclose(x1, x2, rtol, atol, equal_nan)
    return ops.reduce_and(close, axes=tuple(range(close.ndim)), keepdims=False)


def isin(x1: Tensor, x2: Tensor, assume_unique: bool = False, invert: bool = False) -> Tensor:
    """Where an element of x1 is found among those of x2; of the shape of x1. `assume_unique` changes nothing."""
    x1, x2 = promote(x1, x2)
    candidates = flatten(x2)
    # One comparison per pair, reduced in the same kernel: nothing of the size of the product is stored.
    found = ops.reduce_or(ops.eq(insert_axes(x1, (x1.ndim,)), candidates), axes=(x1.ndim,), keepdims=False)
    return ops.logical_not(found) if invert else found


# -- choices --------------------------------------------------------------------------------------------------------
def where(condition: Tensor, x1: Tensor | None = None, x2: Tensor | None = None) -> Tensor | tuple:
    """x1 where the condition holds, x2 elsewhere; without x1 and x2 the indices where it holds, as `nonzero`."""
    if x1 is None and x2 is None:
        return nonzero(condition)
    if x1 is None or x2 is None:
        raise ValueError("where: give both `x1` and `x2`, or neither of them")
    return ops.select(to_bool(condition), *promote(x1, x2))


def select(condlist: Sequence, choicelist: Sequence, default: Tensor = 0) -> Tensor:
    """For every element the choice of the first condition that holds there, `default` where none does."""
    if len(condlist) != len(choicelist):
        raise ValueError(
            f"select: as many conditions as choices are needed. Received: {len(condlist)} and {len(choicelist)}"
        )
    *choices, out = promote(*choicelist, default)
    for condition, choice in zip(reversed(list(condlist)), reversed(choices), strict=True):
        out = ops.select(to_bool(condition), choice, out)
    return out


def nonzero(x: Tensor) -> tuple[Tensor, ...]:
    """Indices of the elements that are not 0, an int32 array per axis. Raises UnsupportedError under trace."""
    (array,) = concrete("nonzero", x)
    return tuple(convert(indices, "int32") for indices in array.nonzero())


def count_nonzero(x: Tensor, axis: int | tuple | None = None) -> Tensor:
    """The number of elements that are not 0, int32."""
    mask = to_bool(x)
    return ops.reduce_sum(convert(mask, "int32"), axes=axes_of(axis, mask.ndim), keepdims=False)
