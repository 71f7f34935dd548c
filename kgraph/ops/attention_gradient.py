"""The cotangents of the operands of `attention`."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.attention import composed_gradient, heads_first, infer, reference_weights, samples, split
from kgraph.ops.common import dtype_of, uniform, zeros_like
from kgraph.ops.region_gradient import pull_back, record_region, replay
from kgraph.ops.rules import shape_error, wide

__all__ = ["attention_gradient"]


def _infer(*types, scale, is_causal, has_mask, has_bias):
    name = "attention_gradient"
    if len(types) != 4 + has_mask + has_bias:
        raise shape_error(name, types, "the operands of attention, then the cotangent of its result")
    result = infer(name, types[:-1], has_mask, has_bias)
    if types[-1].dtype != result.dtype or types[-1].rank != 4:
        raise shape_error(name, types, f"a cotangent of type {result}")
    q, k, v = types[:3]
    if not has_bias:
        return q, k, v
    dtype = "float64" if q.dtype == "float64" else "float32"
    return q, k, v, TensorType((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype)


def _reference(*arrays, scale, is_causal, has_mask, has_bias):
    q, k, v, mask, bias = split([wide(a) for a in arrays[:-1]], has_mask, has_bias)
    batch, keys, key_heads, _ = k.shape
    q, k, v = heads_first(q, k, v)
    cotangent = wide(arrays[-1]).transpose(0, 2, 1, 3)
    weights, allowed = reference_weights(q, k, mask, bias, scale, is_causal)
    to_weights = np.matmul(cotangent, v.swapaxes(2, 3))
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True))
    to_logits = np.where(allowed, to_logits, to_logits.dtype.type(0))
    scaled = to_logits * q.dtype.type(scale)

    def of_key_heads(per_head):
        """Sums over the heads of each key head, [B, S, K, depth]."""
        group = per_head.shape[1] // key_heads
        return per_head.reshape(batch, key_heads, group, keys, per_head.shape[3]).sum(2).swapaxes(1, 2)

    to_q = np.matmul(scaled, k).swapaxes(1, 2)
    to_k = of_key_heads(np.matmul(scaled.swapaxes(2, 3), q))
    to_v = of_key_heads(np.matmul(weights.swapaxes(2, 3), cotangent))
    out = tuple(c.astype(a.dtype) for c, a in zip((to_q, to_k, to_v), arrays))
    return (*out, to_logits) if has_bias else out


def _gradient(cotangents, inputs, outputs, **attrs):
    """Through the same cotangents written with products."""
    types = [TensorType(tuple(x.shape), dtype_of(x)) for x in inputs]
    graph = record_region("attention_gradient", types, lambda *operands: composed_gradient(*operands, **attrs))
    _, values = replay(graph, inputs)
    found = pull_back(graph, values, cotangents)
    return tuple(
        None if t.dtype == "bool" else zeros_like(x) if c is None else c for t, x, c in zip(types, inputs, found)
    )


def _samples():
    out = []
    for sample in samples():
        q, _, v = sample.args[:3]
        cotangent = uniform((*q.shape[:3], v.shape[3]), dtype=q.dtype.name, seed=9)
        out.append(Sample((*sample.args, cotangent), sample.attrs, sample.name))
    return out


ATTENTION_GRADIENT = register(
    Primitive(
        name="attention_gradient",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
        results=0,
    )
)


def attention_gradient(*operands, scale: float, is_causal: bool, has_mask: bool, has_bias: bool) -> tuple:
    """The cotangents of q, k and v of `attention`, and with `has_bias` that of the logits [B, H, T, S].

    operands: those of `attention`, then the cotangent of its result. The attributes are those of `attention`. The
    weights are computed again. The cotangent of the logits is in float32 for half precisions; where a mask lets nothing
    through it is zero. Raises ShapeError, DTypeError.
    """
    attrs = {"scale": scale, "is_causal": is_causal, "has_mask": has_mask, "has_bias": has_bias}
    return bind(ATTENTION_GRADIENT, *operands, **attrs)
