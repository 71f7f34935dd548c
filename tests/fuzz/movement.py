"""Operations of random graphs that move, index and create elements."""

from __future__ import annotations

from kgraph import ops
from kgraph.ir import Dim
from tests.fuzz.building import FLOATS, Builder, Fact, N, SkipOperation
from tests.fuzz.operations import (
    ANY,
    NUMBERS,
    grids,
    moved,
    one,
    operation,
    same,
)


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
def drop_axis_ofone(b: Builder):
    x = b.pick(where=lambda v: any(map(one, v.shape)))
    at = b.choice([i for i, s in enumerate(x.shape) if one(s)])
    moved(b, x, ops.reshape(x, shape=x.shape[:at] + x.shape[at + 1 :]))


@operation(1)
def broadcast(b: Builder):
    x = b.pick(rank=range(4))
    shape = [b.small_size() if one(s) and b.chance(0.7) else s for s in x.shape]
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
        and all(same(m, n) for i, (m, n) in enumerate(zip(x.shape, v.shape)) if i != axis)
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
