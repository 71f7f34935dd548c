"""attention against a loop over queries."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType

RNG = np.random.default_rng(0)


def attention_loop(q, k, v, mask, bias, scale, is_causal):
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    shape = (batch, heads, queries, keys)
    mask = np.broadcast_to(True if mask is None else mask, shape)
    bias = np.broadcast_to(0.0 if bias is None else bias, shape)
    out = np.zeros((batch, queries, heads, v.shape[3]))
    for b, t, h in np.ndindex(batch, queries, heads):
        source = h // (heads // k.shape[2])
        seen = [s for s in range(keys) if mask[b, h, t, s] and (s <= t or not is_causal)]
        if not seen:
            out[b, t, h] = v[b, :, source].mean(0)
            continue
        logits = np.array([q[b, t, h] @ k[b, s, source] * scale + bias[b, h, t, s] for s in seen])
        weights = np.exp(logits - logits.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, source]
    return out


@pytest.mark.parametrize("sample", PRIMITIVES["attention"].samples(), ids=lambda s: s.name)
def test_attention_agrees_with_a_loop(sample):
    attrs = sample.attrs
    arrays = [a if a.dtype == bool else a.astype(np.float64) for a in sample.args]
    rest = arrays[3:]
    mask = rest.pop(0) if attrs["has_mask"] else None
    bias = rest.pop(0) if attrs["has_bias"] else None
    expected = attention_loop(*arrays[:3], mask, bias, attrs["scale"], attrs["is_causal"])
    tolerance = 1e-2 if sample.args[0].dtype.name == "bfloat16" else 1e-5
    got = ops.attention(*sample.args, **attrs).astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_the_default_scale_is_that_of_the_depth():
    q, k, v = (RNG.standard_normal((1, 3, 2, 16)).astype(np.float32) for _ in range(3))
    np.testing.assert_array_equal(ops.attention(q, k, v), ops.attention(q, k, v, scale=0.25))


def test_wrong_operands_are_refused():
    q, k = np.zeros((1, 3, 4, 8), np.float32), np.zeros((1, 5, 3, 8), np.float32)
    with pytest.raises(ShapeError, match="H a multiple of K"):
        ops.attention(q, k, k)
    with pytest.raises(ShapeError, match="attention"):
        ops.attention(q, q[:, :, :, :7], q)
    with pytest.raises(DTypeError, match="bool mask"):
        ops.attention(q, q, q, np.zeros((3, 3), np.float32), has_mask=True)
    with pytest.raises(ShapeError, match="broadcast"):
        ops.attention(q, q, q, np.zeros((3, 4), bool), has_mask=True)


def test_batch_and_sequence_may_be_symbolic():
    n, t = Dim.symbol("N"), Dim.symbol("T")
    q = TensorType((n, t, 4, 8), "float32")
    mask = TensorType((n, 1, 1, t), "bool")
    attrs = {"scale": 1.0, "is_causal": False, "has_mask": True, "has_bias": False}
    assert PRIMITIVES["attention"].infer(q, q, q, mask, **attrs) == q
