"""The operations that random graphs are made of: each draws operands and attributes and keeps its results.

`OPERATIONS` maps a name to (weight, function of a Builder); a function raises SkipOperation where nothing fits.
`COVERED` names the primitives that these functions record.
"""

from __future__ import annotations

import math

import numpy as np

from kgraph import ops
from kgraph.ir import Dim
from tests.fuzz.building import FLOATS, Builder, Fact, N, SkipOperation

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


# -- elementwise ------------------------------------------------------------------------------------------------------
# name: (largest magnitude of the operand, bound of the result from that of the operand)
SMOOTH = {
    "exp": (3, math.exp),
    "exp2": (4, lambda m: 2.0**m),
    "expm1": (3, math.exp),
    "sin": (32, lambda m: 1),
    "cos": (32, lambda m: 1),
    "atan": (32, lambda m: 2),
    "sinh": (3, math.cosh),
    "cosh": (3, math.cosh),
    "tanh": (32, lambda m: 1),
    "asinh": (32, lambda m: math.asinh(m) + 0.1),
    "erf": (32, lambda m: 1),
    "erfc": (3, lambda m: 2),
    "logistic": (32, lambda m: 1),
    "silu": (32, lambda m: m + 1),
    "softplus": (32, lambda m: m + 1),
    "relu": (32, lambda m: m),
    "relu6": (32, lambda m: 6),
    "elu": (32, lambda m: m + 1),
    "leaky_relu": (32, lambda m: m),
    "gelu": (32, lambda m: m + 1),
    "neg": (32, lambda m: m),
    "abs": (32, lambda m: m),
    "stop_gradient": (32, lambda m: m),
}
KEEPS_GRID = {"relu", "neg", "abs", "stop_gradient"}


def small(b: Builder, x, limit: float):
    """x, or x scaled down to magnitudes below `limit`."""
    fact = b.fact(x)
    if fact.bound <= limit:
        return x, fact
    shift = math.ceil(math.log2(fact.bound / limit))
    x = ops.mul(x, b.constant(2.0**-shift, b.dtype_of(x)))
    grid = fact.grid + shift if fact.exact else None
    return x, Fact(fact.bound * 2.0**-shift, grid)


@operation(6)
def smooth(b: Builder):
    name = b.choice(sorted(SMOOTH))
    limit, bound = SMOOTH[name]
    x, fact = small(b, b.pick_float(), limit)
    attrs = {}
    if name == "gelu":
        attrs = {"approximate": b.chance(0.5)}
    elif name == "elu":
        attrs = {"alpha": 0.5}
    elif name == "leaky_relu":
        attrs = {"negative_slope": 0.25}
    b.keep(getattr(ops, name)(x, **attrs), Fact(bound(fact.bound), fact.grid if name in KEEPS_GRID else None))


@operation(2)
def positive_domain(b: Builder):
    """Functions with a pole or branch at zero, on |x| + c."""
    x, _ = small(b, b.pick_float(), 30)
    shifted = ops.add(ops.abs(x), b.constant(0.5, b.dtype_of(x)))
    name = b.choice(("log", "log2", "log1p", "sqrt", "rsqrt", "cbrt", "lgamma", "digamma"))
    bound = {"sqrt": 6, "lgamma": 80, "cbrt": 4}.get(name, 6)
    b.keep(getattr(ops, name)(shifted), Fact(bound))


@operation(1)
def unit_domain(b: Builder):
    """Functions on (-1, 1), or on (1, inf)."""
    x, _ = small(b, b.pick_float(), 0.9)
    name = b.choice(("asin", "acos", "atanh", "erf_inv", "tan", "acosh"))
    if name == "acosh":
        x = ops.add(ops.abs(x), b.constant(1.25, b.dtype_of(x)))
    b.keep(getattr(ops, name)(x), Fact(4))


def broadcastable(b: Builder, x, y) -> bool:
    return all(_same(m, n) or _one(m) or _one(n) for m, n in zip(x.shape[::-1], y.shape[::-1]))


def _same(m, n) -> bool:
    return type(m) is type(n) and m == n if isinstance(m, Dim) or isinstance(n, Dim) else m == n


def _one(n) -> bool:
    return isinstance(n, int) and n == 1


def same_shape(x, y) -> bool:
    return len(x.shape) == len(y.shape) and all(map(_same, x.shape, y.shape))


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


@operation(8)
def arithmetic(b: Builder):
    x = b.pick(*NUMBERS)
    y = partner(b, x)
    if b.chance(0.5):
        x, y = y, x
    f, g = b.fact(x), b.fact(y)
    name = b.choice(("add", "sub", "mul", "maximum", "minimum"))
    grid = grids(f, g)
    if name == "mul":
        bound, grid = f.bound * g.bound, (f.grid + g.grid if grid is not None else None)
    else:
        bound = f.bound + g.bound if name in ("add", "sub") else max(f.bound, g.bound)
    b.keep(getattr(ops, name)(x, y), Fact(bound, grid))


@operation(2)
def division(b: Builder):
    x = b.pick_float()
    y = partner(b, x)
    dtype = b.dtype_of(x)
    below = ops.add(ops.abs(y), b.constant(0.5, dtype))
    name = b.choice(("div", "atan2", "hypot", "logaddexp", "pow"))
    f, g = b.fact(x), b.fact(y)
    if name == "div":
        b.keep(ops.div(x, below), Fact(f.bound * 2))
    elif name == "atan2":
        b.keep(ops.atan2(x, below), Fact(4))
    elif name == "pow":
        exponent = b.constant(b.choice((2.0, 3.0, 0.5, -0.5, -1.0, 1.0, 0.0, 1.5)), dtype)
        base, _ = small(b, x, 30)
        base = ops.add(ops.abs(base), b.constant(0.5, dtype))
        b.keep(ops.pow(base, exponent), Fact(max(f.bound + 0.5, 2) ** 3))
    else:
        b.keep(getattr(ops, name)(x, y), Fact(f.bound + g.bound + 1))


@operation(2)
def integer_arithmetic(b: Builder):
    x = b.pick(*INTS)
    y = partner(b, x)
    dtype = b.dtype_of(x)
    f, g = b.fact(x), b.fact(y)
    name = b.choice("floor_divide mod rem bitwise_and bitwise_or bitwise_xor shift_left shift_right".split())
    if name in ("floor_divide", "mod", "rem"):
        y = ops.add(ops.abs(y), b.constant(1, dtype)) if b.chance(0.7) else b.constant(b.choice((-3, 2, 7)), dtype)
        return b.keep(getattr(ops, name)(x, y), Fact(max(f.bound, g.bound + 1, 7), 0))
    if name.startswith("shift"):
        y = ops.bitwise_and(y, b.constant(3, dtype))
        return b.keep(getattr(ops, name)(x, y), Fact(f.bound * (8 if name == "shift_left" else 1), 0))
    return b.keep(getattr(ops, name)(x, y), Fact(2 ** math.ceil(math.log2(max(f.bound, g.bound) + 1)), 0))


@operation(1)
def float_remainder(b: Builder):
    x = b.pick_float(exact=True)
    name = b.choice(("floor_divide", "mod", "rem"))
    y = b.constant(b.choice((0.75, -1.5, 2.0)), b.dtype_of(x))
    f = b.fact(x)
    # The quotient itself is rounded where the elements are large, so that only small ones have one right answer.
    if f.bound * 2**f.grid > 2**6:
        raise SkipOperation
    grid = 0 if name == "floor_divide" else max(f.grid, 2)
    b.keep(getattr(ops, name)(x, y), Fact(f.bound * 2 + 2, grid))


@operation(1)
def rounding(b: Builder):
    x = b.pick_float(exact=True)
    name = b.choice("floor ceil trunc round_nearest_even sign".split())
    b.keep(getattr(ops, name)(x), Fact(b.fact(x).bound + 1, 0))


@operation(1)
def bits(b: Builder):
    x = b.pick(*INTS, "bool")
    if b.dtype_of(x) == "bool":
        return b.keep(ops.logical_not(x), Fact(1, 0))
    name = b.choice(("bitwise_not", "neg", "abs", "sign"))
    return b.keep(getattr(ops, name)(x), Fact(b.fact(x).bound + 1, 0))


@operation(3)
def comparison(b: Builder):
    x = b.pick(*NUMBERS, exact=True)
    y = partner(b, x, exact=True)
    if not b.exact(y):
        raise SkipOperation
    b.keep(getattr(ops, b.choice("eq ne lt le gt ge".split()))(x, y), Fact(1, 0))


@operation(1)
def logic(b: Builder):
    x = b.pick("bool")
    y = partner(b, x)
    b.keep(getattr(ops, b.choice(("logical_and", "logical_or", "logical_xor")))(x, y), Fact(1, 0))


@operation(1)
def classify(b: Builder):
    b.keep(getattr(ops, b.choice(("is_finite", "is_nan", "is_inf")))(b.pick_float()), Fact(1, 0))


@operation(3)
def select(b: Builder):
    x = b.pick(*ANY)
    y = partner(b, x)
    shape = x if len(x.shape) >= len(y.shape) else y
    try:
        p = b.pick(
            "bool", where=lambda v: broadcastable(b, shape, v) and broadcastable(b, x, v) and broadcastable(b, y, v)
        )
    except SkipOperation:
        if not b.exact(x) or b.dtype_of(x) == "bool":
            raise
        p = ops.gt(x, b.constant(0, b.dtype_of(x)))
    f, g = b.fact(x), b.fact(y)
    b.keep(ops.select(p, x, y), Fact(max(f.bound, g.bound), grids(f, g)))


@operation(3)
def conversion(b: Builder):
    x = b.pick(*ANY)
    target = b.choice(ANY)
    if target in FLOATS and b.dtype_of(x) in FLOATS and b.chance(0.5):
        target = b.dtype
    b.as_type(x, target)


@operation(0.3)
def bit_pattern(b: Builder):
    x = b.pick("int32", "float32", exact=True)
    if b.dtype_of(x) == "float32":
        y = ops.bitwise_and(ops.bitcast_convert(x, dtype="int32"), b.constant(0xFF << 20, "int32"))
        return b.keep(ops.shift_right(y, b.constant(20, "int32")), Fact(256, 0))
    y = ops.bitcast_convert(ops.add(ops.abs(x), b.constant(0x3F800000, "int32")), dtype="float32")
    return b.keep(y, Fact(2))


# -- data movement ----------------------------------------------------------------------------------------------------
@operation(3)
def transpose(b: Builder):
    x = b.pick(rank=range(2, 6))
    moved(b, x, ops.transpose(x, permutation=tuple(b.rng.permutation(len(x.shape)).tolist())))


@operation(3)
def reshape(b: Builder):
    x = b.pick(rank=range(1, 6))
    shape = list(x.shape)
    way = b.integer(0, 3)
    if way == 0:
        shape.insert(b.integer(0, len(shape)), 1)
    elif way == 1 and len(shape) > 1:
        at = b.integer(0, len(shape) - 2)
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    elif way == 2:
        at = b.integer(0, len(shape) - 1)
        if isinstance(shape[at], Dim) or shape[at] < 4 or shape[at] % 2:
            raise SkipOperation
        shape[at : at + 1] = b.choice(([2, shape[at] // 2], [shape[at] // 2, 2]))
    else:
        shape = [x.size]
    if len(shape) > 5:
        raise SkipOperation
    moved(b, x, ops.reshape(x, shape=tuple(shape)))


@operation(1)
def drop_axis_of_one(b: Builder):
    x = b.pick(where=lambda v: any(map(_one, v.shape)))
    at = b.choice([i for i, s in enumerate(x.shape) if _one(s)])
    moved(b, x, ops.reshape(x, shape=x.shape[:at] + x.shape[at + 1 :]))


@operation(1)
def broadcast(b: Builder):
    x = b.pick(rank=range(4))
    shape = [b.small_size() if _one(s) and b.chance(0.7) else s for s in x.shape]
    if b.chance(0.4):
        shape.insert(0, b.choice((N, 2, 3)))
    moved(b, x, ops.broadcast_to(x, shape=tuple(shape)))


@operation(3)
def window(b: Builder):
    x = b.pick(rank=range(1, 6))
    start, limit, stride = [], [], []
    for size in x.shape:
        if isinstance(size, Dim) or size < 3 or b.chance(0.4):
            start.append(0), limit.append(size), stride.append(1)
        else:
            low = b.integer(0, size - 2)
            start.append(low), limit.append(b.integer(low + 1, size)), stride.append(b.choice((1, 1, 1, 2, 3)))
    moved(b, x, ops.slice(x, start=tuple(start), limit=tuple(limit), stride=tuple(stride)))


@operation(2)
def pad(b: Builder):
    x = b.pick(*ANY, rank=range(1, 6))
    dtype = b.dtype_of(x)
    low, high, interior = [], [], []
    for size in x.shape:
        free = b.chance(0.5)
        shrinks = not isinstance(size, Dim) and size > 3
        low.append(b.integer(-1 if shrinks else 0, 2) if free else 0)
        high.append(b.integer(-1 if shrinks else 0, 2) if free else 0)
        interior.append(b.choice((0, 0, 1, 2)) if free and not isinstance(size, Dim) else 0)
    value = b.constant(b.choice((0, 1)), dtype)
    f = b.fact(x)
    b.keep(ops.pad(x, value, low=low, high=high, interior=interior), Fact(max(f.bound, 1), f.grid))


@operation(1)
def pad_mirror(b: Builder):
    x = b.pick(rank=range(1, 5))
    low = [0 if isinstance(s, Dim) else b.integer(0, 3) for s in x.shape]
    high = [0 if isinstance(s, Dim) else b.integer(0, 3) for s in x.shape]
    moved(b, x, ops.pad_mirror(x, low=low, high=high, mode=b.choice(("reflect", "symmetric", "edge", "wrap"))))


@operation(1)
def reverse(b: Builder):
    x = b.pick(rank=range(1, 6))
    moved(b, x, ops.rev(x, axes=b.subset(range(len(x.shape)), least=1)))


@operation(2)
def concatenate(b: Builder):
    x = b.pick(rank=range(1, 6))
    axis = b.integer(0, len(x.shape) - 1)
    others = lambda v: (
        len(v.shape) == len(x.shape)
        and b.dtype_of(v) == b.dtype_of(x)
        and all(_same(m, n) for i, (m, n) in enumerate(zip(x.shape, v.shape)) if i != axis)
    )
    parts = [x] + [b.pick(where=others) for _ in range(b.integer(1, 3))]
    b.rng.shuffle(order := list(range(len(parts))))
    parts = [parts[i] for i in order]
    facts = [b.fact(p) for p in parts]
    b.keep(ops.concatenate(*parts, axis=axis), Fact(max(f.bound for f in facts), grids(*facts)))


@operation(0.7)
def moving_window(b: Builder):
    x = b.pick(rank=range(1, 4))
    starts = []
    for _ in x.shape:
        try:
            i = b.pick("int32", rank=0) if b.chance(0.3) else b.constant(b.integer(-2, 4), "int32")
        except SkipOperation:
            i = b.constant(1, "int32")
        starts.append(i)
    shape = tuple(s if isinstance(s, Dim) else b.integer(1, s) if s else 0 for s in x.shape)
    part = ops.dynamic_slice(x, *starts, shape=shape)
    if b.chance(0.5):
        return moved(b, x, part)
    return moved(b, x, ops.dynamic_update_slice(x, part, *(b.constant(b.integer(0, 3), "int32") for _ in starts)))


# -- creation ---------------------------------------------------------------------------------------------------------
@operation(1)
def creation(b: Builder):
    dtype = b.choice((b.dtype, "int32"))
    shape = b.choice(((N, 3), (N, 1), (5,), (2, N), (1, 4), ()))
    way = b.choice(("iota", "full", "dim_value"))
    if way == "dim_value":
        return b.keep(ops.dim_value(dim=b.choice((N, 2 * N + 1)), dtype=dtype), Fact(17, 0))
    if way == "full" or not shape:
        return b.keep(ops.full(shape=shape, value=b.choice((0, 1, -2)), dtype=dtype), Fact(2, 0))
    return b.keep(ops.iota(shape=shape, dtype=dtype, axis=b.integer(0, len(shape) - 1)), Fact(8, 0))


# -- indexing ---------------------------------------------------------------------------------------------------------
@operation(1)
def take(b: Builder):
    x = b.pick(rank=range(1, 4))
    axis = b.integer(0, len(x.shape) - 1)
    if isinstance(x.shape[axis], Dim) or not x.shape[axis]:
        raise SkipOperation
    try:
        indices = b.pick("int32", "int64", rank=range(3))
    except SkipOperation:
        indices = b.constant(b.rng.integers(-2, 3, (3,)), "int32")
    modes = ("clip", "wrap") if b.dtype_of(x) in FLOATS else ("clip", "wrap", "fill")
    mode = b.choice(modes)
    if mode == "fill" and b.dtype_of(x) != "bool":
        mode = "clip"
    moved(b, x, ops.take(x, indices, axis=axis, mode=mode))


@operation(1)
def take_along_axis(b: Builder):
    x = b.pick(rank=range(1, 4))
    axis = b.integer(0, len(x.shape) - 1)
    if isinstance(x.shape[axis], Dim):
        raise SkipOperation
    shape = tuple(b.small_size() if i == axis else s for i, s in enumerate(x.shape))
    if any(isinstance(s, Dim) for s in shape):
        indices = ops.iota(shape=shape, dtype="int32", axis=axis)
    else:
        indices = b.constant(b.rng.integers(-3, 4, shape), "int32")
    moved(b, x, ops.take_along_axis(x, indices, axis=axis))


@operation(0.7)
def gather_nd(b: Builder):
    x = b.pick(rank=range(1, 4), where=lambda v: not isinstance(v.shape[0], Dim) and v.shape[0])
    indices = b.constant(b.rng.integers(-1, x.shape[0], (b.small_size(), 1)), "int32")
    moved(b, x, ops.gather_nd(x, indices))


@operation(0.7)
def scatter(b: Builder):
    x = b.pick(*NUMBERS, rank=range(1, 4), where=lambda v: not isinstance(v.shape[0], Dim) and v.shape[0])
    count = b.small_size()
    indices = b.constant(b.rng.integers(0, x.shape[0] + 1, (count, 1)), "int32")
    rest = x.shape[1:]
    updates = ops.full(shape=(count, *rest), value=1.5, dtype=b.dtype_of(x))
    f = b.fact(x)
    reduction = b.choice(("update", "add", "max", "min"))
    b.keep(
        ops.scatter_nd(x, indices, updates, reduction=reduction),
        Fact(f.bound + 2 * count, None if not f.exact else max(f.grid, 1)),
    )


@operation(0.5)
def scatter_along_axis(b: Builder):
    x = b.pick(*NUMBERS, rank=range(1, 4))
    axis = b.integer(0, len(x.shape) - 1)
    if isinstance(x.shape[axis], Dim):
        raise SkipOperation
    indices = ops.iota(shape=x.shape, dtype="int32", axis=axis)
    f = b.fact(x)
    updates = ops.neg(x)
    b.keep(ops.scatter_along_axis(x, indices, updates, axis=axis, reduction=b.choice(("update", "add", "max"))), f)


# -- reductions -------------------------------------------------------------------------------------------------------
def has_batch(x, axes) -> bool:
    return any(isinstance(x.shape[a], Dim) for a in axes)


@operation(5)
def reduction(b: Builder):
    x = b.pick(*ANY, rank=range(1, 6))
    axes = b.subset(range(len(x.shape)), least=1)
    keepdims = b.chance(0.5)
    dtype, f = b.dtype_of(x), b.fact(x)
    count = b.count(x.shape[a] for a in axes)
    if dtype == "bool":
        name = b.choice(("reduce_and", "reduce_or"))
        return b.keep(getattr(ops, name)(x, axes=axes, keepdims=keepdims), f)
    name = b.choice(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"))
    if has_batch(x, axes) or not count:
        name = "reduce_sum"
    if name == "reduce_prod":
        if count > 12:
            raise SkipOperation
        if dtype in FLOATS:
            x = ops.tanh(x)
            return b.keep(ops.reduce_prod(x, axes=axes, keepdims=keepdims), Fact(1))
        bound = f.bound**count
        if bound > 2**31:
            raise SkipOperation
        return b.keep(ops.reduce_prod(x, axes=axes, keepdims=keepdims), Fact(bound, f.grid))
    bound = f.bound * count if name == "reduce_sum" else f.bound
    return b.keep(getattr(ops, name)(x, axes=axes, keepdims=keepdims), Fact(bound, f.grid))


@operation(1)
def position_of_extreme(b: Builder):
    x = b.pick(*NUMBERS, rank=range(1, 5), exact=True)
    axis = b.integer(0, len(x.shape) - 1)
    if has_batch(x, (axis,)) or not b.known(x.shape[axis]):
        raise SkipOperation
    b.keep(getattr(ops, b.choice(("argmax", "argmin")))(x, axis=axis), Fact(b.known(x.shape[axis]), 0))


@operation(1)
def cumulative(b: Builder):
    x = b.pick(*NUMBERS, rank=range(1, 5))
    axis = b.integer(0, len(x.shape) - 1)
    name = b.choice(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"))
    f, count = b.fact(x), b.known(x.shape[axis])
    if name in ("cumprod", "cumlogsumexp"):
        if b.dtype_of(x) not in FLOATS:
            raise SkipOperation
        x, f = ops.tanh(x), Fact(1 + math.log(max(count, 1)))
    bound = f.bound * count if name == "cumsum" else f.bound
    grid = f.grid if name in ("cumsum", "cummax", "cummin") else None
    b.keep(getattr(ops, name)(x, axis=axis, reverse=b.chance(0.5)), Fact(bound, grid))


@operation(1)
def sorting(b: Builder):
    x = b.pick(*NUMBERS, rank=range(1, 4))
    axis = b.integer(0, len(x.shape) - 1)
    f, way = b.fact(x), b.choice(("sort", "argsort", "top_k", "searchsorted"))
    if way == "sort":
        return moved(b, x, ops.sort(x, axis=axis, descending=b.chance(0.5)))
    size = x.shape[-1]
    if way == "top_k":
        if isinstance(size, Dim) or not size:
            raise SkipOperation
        values, indices = ops.top_k(x, k=b.integer(1, size))
        if f.exact:
            b.keep(indices, Fact(size, 0))
        return moved(b, x, values)
    if not f.exact:
        raise SkipOperation
    if way == "argsort":
        return b.keep(ops.argsort(x, axis=axis, descending=b.chance(0.5)), Fact(b.known(x.shape[axis]), 0))
    edges = b.constant([-2, 0, 1], b.dtype_of(x))
    return b.keep(ops.searchsorted(edges, x, side=b.choice(("left", "right"))), Fact(3, 0))


# -- contractions -----------------------------------------------------------------------------------------------------
def weights(b: Builder, shape: tuple, dtype: str):
    """A second operand: a parameter of that shape where there is one, or a constant; (tensor, fact)."""
    try:
        like = lambda v: len(v.shape) == len(shape) and all(map(_same, v.shape, shape))
        w = b.pick(dtype, where=like)
        return w, b.fact(w)
    except SkipOperation:
        array, f = b.random_array(shape, dtype)
        return b.register(array, f), f


def product_fact(f: Fact, g: Fact, depth: int) -> Fact:
    return Fact(f.bound * g.bound * max(depth, 1), f.grid + g.grid if f.exact and g.exact else None)


@operation(3)
def dense(b: Builder):
    x = b.pick(b.dtype, rank=range(2, 5))
    depth = x.shape[-1]
    if isinstance(depth, Dim):
        raise SkipOperation
    w, g = weights(b, (depth, b.size()), b.dtype)
    y = ops.dot_general(x, w, lhs_contract=(len(x.shape) - 1,), rhs_contract=(0,))
    b.keep(y, product_fact(b.fact(x), g, depth))


@operation(2)
def general_product(b: Builder):
    """Two values contracted and batched along axes of equal size, in any order."""
    x = b.pick(b.dtype, *INTS, rank=range(1, 5))
    y = b.pick(b.dtype_of(x), rank=range(1, 5))
    pairs = [(i, j) for i, m in enumerate(x.shape) for j, n in enumerate(y.shape) if _same(m, n)]
    b.rng.shuffle(pairs)
    contract, batch, left, right = [], [], set(), set()
    for i, j in pairs:
        if i in left or j in right or b.chance(0.3):
            continue
        (contract if b.chance(0.5) else batch).append((int(i), int(j)))
        left.add(i), right.add(j)
    if (not contract and b.chance(0.8)) or len(x.shape) + len(y.shape) - len(batch) - 2 * len(contract) > 5:
        raise SkipOperation
    depth = b.count(x.shape[i] for i, _ in contract)
    fact = product_fact(b.fact(x), b.fact(y), depth)
    y = ops.dot_general(
        x,
        y,
        lhs_contract=tuple(i for i, _ in contract),
        rhs_contract=tuple(j for _, j in contract),
        lhs_batch=tuple(i for i, _ in batch),
        rhs_batch=tuple(j for _, j in batch),
    )
    b.keep(y, fact)


def spatial_operand(b: Builder):
    """A value [N, spatial.., channels] with static spatial sizes, and its number of spatial axes."""
    x = b.pick(
        b.dtype, rank=range(3, 6), where=lambda v: not any(isinstance(s, Dim) for s in v.shape[1:]) and all(v.shape[1:])
    )
    return x, len(x.shape) - 2


@operation(3)
def conv(b: Builder):
    x, rank = spatial_operand(b)
    channels = x.shape[-1]
    depthwise = channels <= 8 and b.chance(0.3)
    groups = channels if depthwise else b.choice([g for g in (1, 1, 1, 2, 4) if channels % g == 0])
    filters = groups * b.integer(1, 2) if groups > 1 else b.size()
    kernel = tuple(b.choice([k for k in (1, 2, 3) if k <= s] or [1]) for s in x.shape[1:-1])
    w, g = weights(b, (*kernel, channels // groups, filters), b.dtype)
    transposed = b.chance(0.2)
    padding = tuple((b.integer(0, k - 1), b.integer(0, k - 1)) for k in kernel)
    y = ops.conv(
        x,
        w,
        strides=(1,) * rank if transposed else tuple(b.choice((1, 1, 2)) for _ in kernel),
        padding=tuple((p + 1, q + 1) for p, q in padding) if transposed else padding,
        lhs_dilation=tuple(b.choice((1, 2)) for _ in kernel) if transposed else (1,) * rank,
        rhs_dilation=tuple(b.choice((1, 2)) if 2 * k - 1 <= s else 1 for k, s in zip(kernel, x.shape[1:-1])),
        feature_groups=groups,
    )
    b.keep(y, product_fact(b.fact(x), g, math.prod(kernel) * channels // groups))


@operation(2)
def pooling(b: Builder):
    x, rank = spatial_operand(b)
    window = (1, *(b.choice([k for k in (1, 2, 3) if k <= s] or [1]) for s in x.shape[1:-1]), 1)
    kind = b.choice(("max", "sum", "min"))
    padding = tuple((b.integer(0, k - 1), b.integer(0, k - 1)) if kind == "sum" or k > 2 else (0, 0) for k in window)
    padding = tuple((min(p, 1), min(q, 1)) for p, q in padding)
    y = ops.reduce_window(
        x,
        kind=kind,
        window=window,
        strides=(1, *(b.choice((1, 2, 3)) for _ in range(rank)), 1),
        padding=padding,
        window_dilation=(1,) * len(window),
    )
    f = b.fact(x)
    b.keep(y, Fact(f.bound * (math.prod(window) if kind == "sum" else 1), f.grid))


# -- normalisation ----------------------------------------------------------------------------------------------------
def vector(b: Builder, size: int, dtype: str):
    return weights(b, (size,), dtype)[0]


@operation(2)
def softmax(b: Builder):
    x = b.pick_float(rank=range(1, 5))
    axis = b.integer(0, len(x.shape) - 1)
    if isinstance(x.shape[axis], Dim) or not x.shape[axis]:
        raise SkipOperation
    name = b.choice(("softmax", "log_softmax", "logsumexp"))
    f = b.fact(x)
    if name == "logsumexp":
        return b.keep(ops.logsumexp(x, axes=(axis,), keepdims=b.chance(0.5)), Fact(f.bound + 5))
    return b.keep(getattr(ops, name)(x, axis=axis), Fact(1 if name == "softmax" else 2 * f.bound + 5))


@operation(2)
def norm(b: Builder):
    x = b.pick_float(rank=range(2, 5), where=lambda v: not isinstance(v.shape[-1], Dim) and v.shape[-1])
    size, dtype = x.shape[-1], b.dtype_of(x)
    x, _ = small(b, x, 8)
    gamma, beta = vector(b, size, dtype), vector(b, size, dtype)
    name = b.choice(("layer_norm", "rms_norm", "group_norm", "batch_norm"))
    if name == "layer_norm":
        y = ops.layer_norm(x, gamma, beta, axes=(len(x.shape) - 1,), epsilon=0.5)
    elif name == "rms_norm":
        y = ops.rms_norm(x, gamma, axes=(len(x.shape) - 1,), epsilon=0.5)
    elif name == "group_norm":
        if any(isinstance(s, Dim) for s in x.shape[1:]):
            raise SkipOperation
        y = ops.group_norm(x, gamma, beta, groups=b.choice([g for g in (1, 2, 4) if size % g == 0]), epsilon=0.5)
    else:
        variance = ops.add(ops.abs(vector(b, size, dtype)), b.constant(0.5, dtype))
        mean = vector(b, size, dtype)
        y = ops.batch_norm(x, mean, variance, gamma, beta, axis=len(x.shape) - 1, epsilon=0.25)
    b.keep(y, Fact(64 * 32))


@operation(0.7)
def attention(b: Builder):
    x = b.pick(b.dtype, rank=4, where=lambda v: not any(isinstance(s, Dim) for s in v.shape[1:]) and all(v.shape[1:]))
    x, _ = small(b, x, 4)
    mask = ()
    causal = b.chance(0.5)
    if b.chance(0.4):
        mask = (b.constant(np.tri(x.shape[1], dtype=bool), "bool"),)
    y = ops.attention(x, x, x, *mask, scale=0.5, is_causal=causal, has_mask=bool(mask), has_bias=False)
    b.keep(y, Fact(4))


@operation(0.7)
def rnn(b: Builder):
    x = b.pick(
        "float32",
        "float64",
        rank=3,
        where=lambda v: not any(isinstance(s, Dim) for s in v.shape[1:]) and all(v.shape[1:]),
    )
    x, _ = small(b, x, 4)
    cell = b.choice(("lstm", "gru", "simple"))
    gates, units, dtype = {"lstm": 4, "gru": 3, "simple": 1}[cell], b.small_size(), b.dtype_of(x)
    draw = lambda *shape: b.random_array(shape, dtype)[0]
    states = [ops.full(shape=(x.shape[0], units), value=0.25, dtype=dtype)] * (2 if cell == "lstm" else 1)
    outputs = ops.rnn(
        x,
        draw(x.shape[2], gates * units),
        draw(units, gates * units),
        draw(gates * units),
        draw(gates * units),
        *states,
        cell=cell,
        activation="tanh",
        recurrent_activation="sigmoid",
        reset_after=b.chance(0.5),
        reverse=b.chance(0.5),
    )
    for y in outputs:
        b.keep(y, Fact(x.shape[1] + 1))


@operation(0.7)
def resize(b: Builder):
    x = b.pick(
        b.dtype, rank=range(3, 5), where=lambda v: not any(isinstance(s, Dim) for s in v.shape[1:]) and all(v.shape[1:])
    )
    size = tuple(b.integer(1, 2 * s) for s in x.shape[1:-1])
    y = ops.resize(x, size=size, method=b.choice(("nearest", "bilinear", "bicubic")), antialias=b.chance(0.5))
    b.keep(y, Fact(b.fact(x).bound * 2.5))


# -- what frontends write: chains that the passes look for -------------------------------------------------------------
@operation(2)
def padded_window(b: Builder):
    """Zero padding before a convolution or a window reduction, perhaps of what is not negative."""
    x, rank = spatial_operand(b)
    fact = b.fact(x)
    if b.chance(0.5):
        x = ops.relu(x)
    sides = lambda: (0, *(b.integer(0, 2) for _ in range(rank)), 0)
    padded = ops.pad(x, b.constant(0, b.dtype), low=sides(), high=sides(), interior=0)
    kernel = tuple(b.choice([k for k in (1, 2, 3) if k <= s] or [1]) for s in padded.shape[1:-1])
    own = tuple((b.integer(0, k - 1), b.integer(0, k - 1)) for k in kernel)
    strides = tuple(b.choice((1, 1, 2)) for _ in kernel)
    if b.chance(0.4):
        w, g = weights(b, (*kernel, x.shape[-1], b.size()), b.dtype)
        y = ops.conv(padded, w, strides=strides, padding=own)
        return b.keep(y, Fact(fact.bound * g.bound * math.prod(kernel) * x.shape[-1]))
    y = ops.reduce_window(
        padded,
        kind=b.choice(("max", "max", "sum", "min")),
        window=(1, *kernel, 1),
        strides=(1, *strides, 1),
        padding=((0, 0), *own, (0, 0)),
    )
    return b.keep(y, Fact(fact.bound * math.prod(kernel)))


@operation(2)
def channels_first(b: Builder):
    """Channels moved last, work on them, and back; with weights along the channels as a column."""
    x = b.pick(b.dtype, rank=range(3, 5))
    rank = len(x.shape)
    last = (0, *range(2, rank), 1)
    first = (0, rank - 1, *range(1, rank - 1))
    fact = b.fact(x)
    y = ops.transpose(x, permutation=last)
    for _ in range(b.integer(1, 3)):
        channels = y.shape[-1]
        if isinstance(channels, Dim):
            raise SkipOperation
        v, g = weights(b, (channels,), b.dtype)
        way = b.integer(0, 3)
        if way == 0:
            y, fact = ops.add(y, v), Fact(fact.bound + g.bound)
        elif way == 1:
            y, fact = ops.mul(y, v), Fact(fact.bound * g.bound)
        elif way == 2:
            y, fact = ops.tanh(y), Fact(1)
        else:
            column = ops.reshape(v, shape=(channels, *(1,) * (rank - 2)))
            y = ops.add(ops.transpose(y, permutation=first), column)
            y, fact = ops.transpose(y, permutation=last), Fact(fact.bound + g.bound)
    if b.chance(0.3):
        return b.keep(ops.reduce_max(y, axes=(rank - 1,), keepdims=b.chance(0.5)), fact)
    return b.keep(ops.transpose(y, permutation=first) if b.chance(0.7) else y, fact)


@operation(2)
def scaled_product(b: Builder):
    """A product or convolution with biases, scales and shifts from weights, as normalisation leaves them."""
    x = b.pick(b.dtype, rank=range(2, 5))
    depth = x.shape[-1]
    if isinstance(depth, Dim):
        raise SkipOperation
    w, g = weights(b, (depth, b.size()), b.dtype)
    y = ops.dot_general(x, w, lhs_contract=(len(x.shape) - 1,), rhs_contract=(0,))
    bound = b.fact(x).bound * g.bound * max(depth, 1)
    y = ops.mul(y, b.constant(2.0 ** -math.ceil(math.log2(max(bound, 1))), b.dtype)) if b.chance(0.5) else y
    for _ in range(b.integer(1, 4)):
        v, g = weights(b, (y.shape[-1],), b.dtype)
        v = ops.reshape(v, shape=(1,) * b.integer(0, 2) + v.shape) if b.chance(0.2) else v
        pair = (y, v) if b.chance(0.7) else (v, y)
        y = b.choice((ops.add, ops.add, ops.mul, ops.sub))(*pair)
        bound = max(bound * g.bound, bound + g.bound)
    b.keep(y, Fact(bound))


@operation(1)
def heads(b: Builder):
    """The products of an attention, with the reshapes and transposes around them."""
    x = b.pick(b.dtype, rank=3, where=lambda v: not isinstance(v.shape[-1], Dim) and 0 < v.shape[-1] <= 64)
    batch, length, width = x.shape
    count, depth = b.choice((1, 2, 3)), b.choice((1, 2, 4, 5))
    x, fact = small(b, x, 4)
    q, k, v = (
        ops.reshape(
            ops.dot_general(x, weights(b, (width, count * depth), b.dtype)[0], lhs_contract=(2,), rhs_contract=(0,)),
            shape=(batch, length, count, depth),
        )
        for _ in range(3)
    )
    q, k, v = (ops.transpose(t, permutation=(0, 2, 1, 3)) for t in (q, k, v))
    scores = ops.dot_general(q, k, lhs_contract=(3,), rhs_contract=(3,), lhs_batch=(0, 1), rhs_batch=(0, 1))
    scores = ops.tanh(ops.mul(scores, b.constant(0.125, b.dtype)))
    shares = ops.softmax(scores, axis=3)
    y = ops.dot_general(shares, v, lhs_contract=(3,), rhs_contract=(2,), lhs_batch=(0, 1), rhs_batch=(0, 1))
    y = ops.reshape(ops.transpose(y, permutation=(0, 2, 1, 3)), shape=(batch, length, count * depth))
    b.keep(y, Fact(fact.bound * 2.02 * width))


@operation(1)
def written_out_norm(b: Builder):
    """Mean, variance and softmax as elementwise operations and reductions."""
    x = b.pick_float(rank=range(2, 5), where=lambda v: not isinstance(v.shape[-1], Dim) and v.shape[-1])
    x, _fact = small(b, x, 4)
    dtype, axes = b.dtype_of(x), (len(x.shape) - 1,)
    total = lambda t: ops.reduce_sum(t, axes=axes, keepdims=True)
    if b.chance(0.5):
        e = ops.exp(ops.sub(x, ops.reduce_max(x, axes=axes, keepdims=True)))
        return b.keep(ops.div(e, total(e)), Fact(1))
    count = b.constant(float(x.shape[-1]), dtype)
    centred = ops.sub(x, ops.div(total(x), count))
    variance = ops.div(total(ops.mul(centred, centred)), count)
    return b.keep(ops.mul(centred, ops.rsqrt(ops.add(variance, b.constant(0.5, dtype)))), Fact(16))
