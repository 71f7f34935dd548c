"""What frontends write: chains of operations that the passes look for."""

from __future__ import annotations

import math

from kgraph import ops
from kgraph.ir import Dim
from tests.fuzz.building import Builder, Fact, SkipOperation
from tests.fuzz.operations import (
    operation,
    small,
    spatial_operand,
    weights,
)


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
