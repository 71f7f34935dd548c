"""Scaled dot-product attention over whole sequences."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Dim, Primitive, Sample, bind, register
from kgraph.ops.common import booleans, dtype_of, require_same_dtype, sizes_differ, unbroadcast, uniform, zeros_like
from kgraph.ops.rules import (
    convert,
    dtype_error,
    float32_at_least,
    require_broadcast_to,
    require_float,
    scalar,
    shape_error,
    total,
    wide,
)

__all__ = ["attention"]

# What takes the place of masked logits: finite, so that a row that is masked whole attends to all keys alike.
MASKED = -0.7 * float(np.finfo(np.float32).max)


def split(operands, has_mask: bool, has_bias: bool) -> tuple:
    """(q, k, v, mask or None, bias or None) of the operands."""
    rest = list(operands[3:])
    mask = rest.pop(0) if has_mask else None
    return (*operands[:3], mask, rest.pop(0) if has_bias else None)


def _infer(*types, scale, is_causal, has_mask, has_bias):
    return infer("attention", types, has_mask, has_bias)


def infer(name: str, types: tuple, has_mask: bool, has_bias: bool):
    """The type of the result of `attention`; `name` is told in errors."""
    if len(types) != 3 + has_mask + has_bias:
        raise shape_error(name, types, "q, k, v, then a mask with has_mask, then a bias with has_bias")
    q, k, v, mask, _ = split(types, has_mask, has_bias)
    floats = [t for t in types if t is not mask]
    require_same_dtype(name, *floats)
    require_float(name, *floats)
    if mask is not None and mask.dtype != "bool":
        raise dtype_error(name, types, "a bool mask")
    layout = "q[B,T,H,D], k[B,S,K,D], v[B,S,K,E] with H a multiple of K"
    if any(t.rank != 4 for t in (q, k, v)):
        raise shape_error(name, types, layout)
    batch, queries, heads, depth = q.shape
    keys, key_heads = k.shape[1], k.shape[2]
    expected = ((k.shape[0], batch), (k.shape[3], depth), *zip(v.shape[:3], (batch, keys, key_heads)))
    if any(sizes_differ(a, b) for a, b in expected) or (heads != key_heads and sizes_differ(heads % key_heads, 0)):
        raise shape_error(name, types, layout)
    for index in range(3, len(types)):
        require_broadcast_to(name, types, index, (batch, heads, queries, keys))
    return q.with_shape((batch, queries, heads, v.shape[3]))


def _reference(*arrays, scale, is_causal, has_mask, has_bias):
    q, k, v, mask, bias = split([wide(a) for a in arrays], has_mask, has_bias)
    q, k, v = heads_first(q, k, v)
    weights, _ = reference_weights(q, k, mask, bias, scale, is_causal)
    return np.matmul(weights, v).transpose(0, 2, 1, 3).astype(arrays[0].dtype)


def heads_first(q, k, v) -> list:
    """The arrays as [B, H, T or S, depth], keys and values once for every head of q."""
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    return [a.transpose(0, 2, 1, 3) for a in (q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2))]


def reference_weights(q, k, mask, bias, scale, is_causal) -> tuple:
    """(weights [B, H, T, S], which of them are not masked) of q[B, H, T, D] and k[B, H, S, D]."""
    logits = np.matmul(q, k.swapaxes(2, 3)) * q.dtype.type(scale)
    if bias is not None:
        logits = logits + bias
    queries, keys = logits.shape[2:]
    allowed = np.tri(queries, keys, dtype=bool) if is_causal else np.True_
    if mask is not None:
        allowed = allowed & mask
    logits = np.where(allowed, logits, logits.dtype.type(MASKED))
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=MASKED))
    return weights / weights.sum(-1, keepdims=True), allowed


def _allowed(q, k, mask, is_causal: bool):
    """The bool mask of the logits [B,H,T,S] or a shape that broadcasts to it; None where nothing is masked."""
    if not is_causal:
        return mask
    shape = (q.shape[1], k.shape[1])
    rows, columns = (ops.iota(shape=shape, dtype="int32", axis=axis) for axis in (0, 1))
    causal = ops.ge(rows, columns)
    return causal if mask is None else ops.logical_and(causal, mask)


def _gradient(cotangents, inputs, outputs, **attrs):
    """By `attention_gradient`, which has a kernel where the heads and depths are known."""
    if any(isinstance(n, Dim) for x in inputs[:3] for n in x.shape[2:]):
        to_inputs = list(composed_gradient(*inputs, *cotangents, **attrs))
    else:
        to_inputs = list(ops.attention_gradient(*inputs, *cotangents, **attrs))
    if attrs["has_bias"]:
        to_inputs[-1] = convert(unbroadcast(to_inputs[-1], inputs[-1]), dtype_of(inputs[-1]))
    if attrs["has_mask"]:
        to_inputs.insert(3, None)
    return tuple(to_inputs)


def composed_gradient(*operands, scale, is_causal, has_mask, has_bias) -> list:
    """`attention_gradient` written with products, for its operands: the weights are computed again from q and k.

    Heads of one key head form a group axis g.
    """
    inputs = operands[:-1]
    original = split(inputs, has_mask, has_bias)
    (cotangent, *floats) = float32_at_least(operands[-1], *(a for a in inputs if dtype_of(a) != "bool"))
    q, k, v = floats[:3]
    mask, bias = original[3], floats[3] if has_bias else None
    dtype = dtype_of(q)
    batch, queries, heads, depth = q.shape
    keys, key_heads = k.shape[1], k.shape[2]
    group = 1 if heads == key_heads else heads // key_heads
    flat, grouped = (batch, heads, queries, keys), (batch, key_heads, group, queries, keys)
    q = ops.reshape(q, shape=(batch, queries, key_heads, group, depth))
    cotangent = ops.reshape(cotangent, shape=(batch, queries, key_heads, group, v.shape[3]))

    logits = ops.reshape(ops.einsum("btkgd,bskd->bkgts", q, k), shape=flat)
    logits = ops.mul(logits, scalar(scale, dtype))
    if bias is not None:
        logits = ops.add(logits, bias)
    allowed = _allowed(inputs[0], inputs[1], mask, is_causal)
    if allowed is not None:
        logits = ops.select(allowed, logits, scalar(MASKED, dtype))
    weights = ops.softmax(logits, axis=-1)

    to_v = ops.einsum("bkgts,btkge->bske", ops.reshape(weights, shape=grouped), cotangent)
    to_weights = ops.reshape(ops.einsum("btkge,bske->bkgts", cotangent, v), shape=flat)
    weighted = ops.mul(to_weights, weights)
    to_logits = ops.sub(weighted, ops.mul(weights, total(weighted, (3,))))
    if allowed is not None:
        to_logits = ops.select(allowed, to_logits, zeros_like(to_logits))
    to_products = ops.reshape(ops.mul(to_logits, scalar(scale, dtype)), shape=grouped)
    to_q = ops.reshape(ops.einsum("bkgts,bskd->btkgd", to_products, k), shape=tuple(inputs[0].shape))
    to_k = ops.einsum("bkgts,btkgd->bskd", to_products, q)
    out = [convert(c, dtype_of(x)) for c, x in zip((to_q, to_k, to_v), inputs)]
    if has_bias:
        out.append(to_logits)
    return out


def samples() -> list[Sample]:
    """Applications of `attention`: masks, bias, grouped heads, dtypes."""

    def sample(name, q, k, depth_v, scale=0.5, is_causal=False, mask=None, bias=None, dtype="float32"):
        arrays = [uniform(q, dtype=dtype), uniform(k, seed=1, dtype=dtype)]
        arrays.append(uniform((*k[:3], depth_v), seed=2, dtype=dtype))
        if mask is not None:
            arrays.append(mask)
        if bias is not None:
            arrays.append(uniform(bias, seed=3, dtype=dtype))
        attrs = {"scale": scale, "is_causal": is_causal, "has_mask": mask is not None, "has_bias": bias is not None}
        return Sample(tuple(arrays), attrs, name)

    whole_row = booleans((2, 1, 3, 5))
    whole_row[0, 0, 1] = False
    return [
        sample("plain", (2, 3, 2, 4), (2, 5, 2, 4), 4),
        sample("causal", (1, 5, 2, 3), (1, 5, 2, 3), 3, 1 / np.sqrt(3), True),
        sample("causal, fewer queries than keys", (1, 3, 1, 4), (1, 5, 1, 4), 2, is_causal=True),
        sample("padding mask", (2, 3, 2, 4), (2, 5, 2, 4), 3, mask=booleans((2, 1, 1, 5), seed=2)),
        sample("a row masked whole", (2, 3, 2, 4), (2, 5, 2, 4), 3, mask=whole_row),
        sample("mask of keys, causal, bias", (2, 4, 2, 3), (2, 4, 2, 3), 3, 0.7, True, booleans((4,), 3), (2, 1, 4)),
        sample("bias", (2, 3, 2, 4), (2, 5, 2, 4), 4, bias=(2, 2, 3, 5)),
        sample("grouped queries", (2, 3, 6, 4), (2, 5, 2, 4), 3, bias=(6, 1, 1)),
        sample("one key head", (1, 3, 4, 5), (1, 7, 1, 5), 5, is_causal=True),
        sample("empty batch", (0, 3, 2, 4), (0, 5, 2, 4), 4),
        sample("bfloat16", (1, 3, 2, 4), (1, 5, 2, 4), 4, dtype="bfloat16"),
    ]


ATTENTION = register(
    Primitive(
        name="attention",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=samples,
        tolerance=1e-5,
    )
)


def attention(
    q,
    k,
    v,
    *mask_and_bias,
    scale: float | None = None,
    is_causal: bool = False,
    has_mask: bool = False,
    has_bias: bool = False,
):
    """softmax(q k^T * scale + bias) v per head.

    q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, E]. H is a multiple of K; head h of q uses head h // (H / K) of k
    and v (grouped-query attention). Gives [B, T, H, E]. All float, of one dtype; logits and the softmax are computed
    in float32 for half precisions.
    mask_and_bias: with `has_mask` a bool tensor that broadcasts to [B, H, T, S], whose False entries take no part;
        then with `has_bias` a tensor of the dtype of q that broadcasts to [B, H, T, S].
    is_causal: query t sees the keys 0..t only. A row without any key left is the mean of all keys' values, as in JAX.
    scale: 1 / sqrt(D) by default. Raises ShapeError, DTypeError.
    """
    scale = 1.0 / float(np.sqrt(q.shape[3])) if scale is None else float(scale)
    attrs = {"scale": scale, "is_causal": bool(is_causal), "has_mask": bool(has_mask), "has_bias": bool(has_bias)}
    return bind(ATTENTION, q, k, v, *mask_and_bias, **attrs)
