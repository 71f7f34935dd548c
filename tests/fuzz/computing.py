"""Reductions, contractions and normalisations of random graphs."""

from __future__ import annotations

import math

import numpy as np

from kgraph import ops
from kgraph.ir import Dim
from tests.fuzz.building import FLOATS, Builder, Fact, SkipOperation
from tests.fuzz.operations import (
    ANY,
    INTS,
    NUMBERS,
    has_batch,
    moved,
    operation,
    product_fact,
    same,
    small,
    spatial_operand,
    weights,
)


# -- reductions -------------------------------------------------------------------------------------------------------
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
    pairs = [(i, j) for i, m in enumerate(x.shape) for j, n in enumerate(y.shape) if same(m, n)]
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
    name = b.choice(("layer_norm", "rms_norm", "group_norm", "batch_norm", "moments"))
    if name == "layer_norm":
        y = ops.layer_norm(x, gamma, beta, axes=(len(x.shape) - 1,), epsilon=0.5)
    elif name == "rms_norm":
        y = ops.rms_norm(x, gamma, axes=(len(x.shape) - 1,), epsilon=0.5)
    elif name == "group_norm":
        if any(isinstance(s, Dim) for s in x.shape[1:]):
            raise SkipOperation
        y = ops.group_norm(x, gamma, beta, groups=b.choice([g for g in (1, 2, 4) if size % g == 0]), epsilon=0.5)
    elif name == "moments":
        if any(isinstance(s, Dim) for s in x.shape):
            raise SkipOperation  # of no rows there are none
        mean, variance = ops.moments(x, axes=(len(x.shape) - 1,))
        y = ops.add(mean, ops.sqrt(ops.add(variance, b.constant(0.5, dtype))))
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
