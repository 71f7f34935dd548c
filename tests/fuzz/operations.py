"""The operations that random graphs are made of: each draws operands and attributes and keeps its results.

`OPERATIONS` maps a name to (weight, function of a Builder); a function raises SkipOperation where nothing fits. Here
are the helpers; the operations are in `elementwise`, `movement`, `computing` and `chains`.
"""

from __future__ import annotations

import math

import numpy as np

from kgraph import ops
from kgraph.ir import Dim
from tests.fuzz.building import FLOATS, Builder, Fact, SkipOperation

OPERATIONS: dict = {}
INTS = ("int32", "int64")
NUMBERS = (*FLOATS, *INTS)
ANY = (*NUMBERS, "bool")


def operation(weight: float = 1.0):
    def add(function):
        OPERATIONS[function.__name__] = (weight, function)
        return function

    return add


def moved(b: Builder, x, result):
    """Keep a result that holds elements of x only."""
    return b.keep(result, b.fact(x))


def small(b: Builder, x, limit: float):
    """x, or x scaled down to magnitudes below `limit`."""
    fact = b.fact(x)
    if fact.bound <= limit:
        return x, fact
    shift = math.ceil(math.log2(fact.bound / limit))
    x = ops.mul(x, b.constant(2.0**-shift, b.dtype_of(x)))
    grid = fact.grid + shift if fact.exact else None
    return x, Fact(fact.bound * 2.0**-shift, grid)


def broadcastable(b: Builder, x, y) -> bool:
    return all(same(m, n) or one(m) or one(n) for m, n in zip(x.shape[::-1], y.shape[::-1]))


def same(m, n) -> bool:
    return type(m) is type(n) and m == n if isinstance(m, Dim) or isinstance(n, Dim) else m == n


def one(n) -> bool:
    return isinstance(n, int) and n == 1


def same_shape(x, y) -> bool:
    return len(x.shape) == len(y.shape) and all(map(same, x.shape, y.shape))


def partner(b: Builder, x, exact: bool = False):
    """A second operand of x's dtype: another value, a constant of a shape that broadcasts, or a scalar."""
    dtype = b.dtype_of(x)
    way = b.rng.random()
    if way < 0.5:
        try:
            return b.pick(dtype, exact=exact, where=lambda v: broadcastable(b, x, v))
        except SkipOperation:
            pass
    if way < 0.7 and not exact:
        try:  # a value of another dtype, converted
            other = b.pick(*NUMBERS, where=lambda v: broadcastable(b, x, v))
            return b.as_type(other, dtype)
        except SkipOperation:
            pass
    rank = b.integer(0, len(x.shape))
    shape = []
    for size in x.shape[len(x.shape) - rank :]:
        shape.append(1 if isinstance(size, Dim) or b.chance(0.3) else size)
    array, fact = b.random_array(tuple(shape), dtype)
    if exact and not fact.exact:
        array = np.asarray((np.round(array.astype("float64") * 4) / 4).astype(array.dtype))
        fact = Fact(2, 2)
    return b.register(array, fact)


def grids(*facts: Fact):
    return None if any(not f.exact for f in facts) else max(f.grid for f in facts)


def weights(b: Builder, shape: tuple, dtype: str):
    """A second operand: a parameter of that shape where there is one, or a constant; (tensor, fact)."""
    try:
        like = lambda v: len(v.shape) == len(shape) and all(map(same, v.shape, shape))
        w = b.pick(dtype, where=like)
        return w, b.fact(w)
    except SkipOperation:
        array, f = b.random_array(shape, dtype)
        return b.register(array, f), f


def product_fact(f: Fact, g: Fact, depth: int) -> Fact:
    return Fact(f.bound * g.bound * max(depth, 1), f.grid + g.grid if f.exact and g.exact else None)


def spatial_operand(b: Builder):
    """A value [N, spatial.., channels] with static spatial sizes, and its number of spatial axes."""
    x = b.pick(
        b.dtype, rank=range(3, 6), where=lambda v: not any(isinstance(s, Dim) for s in v.shape[1:]) and all(v.shape[1:])
    )
    return x, len(x.shape) - 2


def has_batch(x, axes) -> bool:
    return any(isinstance(x.shape[a], Dim) for a in axes)
