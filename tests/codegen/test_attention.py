"""Attention kernels against the reference: masks, bias, grouped queries, tiles that do not come out even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import attention
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ir.interpreter import evaluate
from kgraph.ops.attention import ATTENTION
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample, compare

FEW = settings(max_examples=10, deadline=None, derandomize=True)
N, L, S = (Dim.symbol(s) for s in "NLS")
assert ops


@pytest.mark.parametrize("sample", ATTENTION.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_samples(sample, parts):
    check_sample(attention, ATTENTION, sample, parts)


def arrays_for(batch, queries, keys, heads, key_heads, depth, value_depth, mask=None, bias=None, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, depth), (batch, keys, key_heads, depth), (batch, keys, key_heads, value_depth)]
    out = [rng.standard_normal(s).astype(TensorType((), dtype).np_dtype) for s in shapes]
    if mask is not None:
        out.append(rng.random(mask) < 0.7)
    if bias is not None:
        out.append(rng.standard_normal(bias).astype(out[0].dtype))
    return out


def run(arrays, declared=None, sizes=None, parts=1, target=None, **attrs):
    declared = declared or [a.shape for a in arrays]
    values = [
        Value(TensorType(tuple(s), "bool" if a.dtype == bool else a.dtype.name)) for s, a in zip(declared, arrays)
    ]
    node = make_node(ATTENTION, values, attrs)
    assert attention.accepts(node) is None
    (y,) = run_node(attention.lower, node, arrays, sizes, parts, target)
    wide = [a if a.dtype == bool else a.astype(np.float64) for a in arrays]
    return y, ATTENTION.reference(*wide, **attrs)


@FEW
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 70),
    keys=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    depth=st.integers(1, 40),
    value_depth=st.integers(1, 40),
    is_causal=st.booleans(),
    masks=st.tuples(st.booleans(), st.booleans()),
    broadcast=st.lists(st.booleans(), min_size=4, max_size=4),
    parts=st.integers(1, 3),
)
def test_any_shape(batch, queries, keys, heads, depth, value_depth, is_causal, masks, broadcast, parts):
    full = (batch, heads[0], queries, keys)
    extra = tuple(1 if one else n for one, n in zip(broadcast, full))
    mask, bias = (extra if wanted else None for wanted in masks)
    arrays = arrays_for(batch, queries, keys, *heads, depth, value_depth, mask, bias)
    y, expected = run(arrays, parts=parts, scale=depth**-0.5, is_causal=is_causal, has_mask=masks[0], has_bias=masks[1])
    compare(y, expected, 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_symbolic_sizes_and_dtypes(dtype, is_causal):
    arrays = arrays_for(2, 45, 600, 2, 2, 32, 64, (2, 1, 1, 600), dtype=dtype)
    declared = [(N, L, 2, 32), (N, S, 2, 32), (N, S, 2, 64), (N, 1, 1, S)]
    attrs = {"scale": 0.2, "is_causal": is_causal, "has_mask": True, "has_bias": False}
    sizes = {"N": 2, "L": 45, "S": 600}
    y, expected = run(arrays, declared, sizes, **attrs)
    compare(y, expected, 1e-13 if dtype == "float64" else 1e-5)
    for parts in (2, 3):
        np.testing.assert_array_equal(run(arrays, declared, sizes, parts, **attrs)[0], y)


def test_large_logits_and_nan():
    arrays = arrays_for(1, 5, 20, 1, 1, 8, 8)
    arrays[0] *= 1e4
    arrays[1][0, 3] = 0
    attrs = {"scale": 1.0, "is_causal": False, "has_mask": False, "has_bias": False}
    y, expected = run(arrays, **attrs)
    compare(y, expected, 1e-2)
    arrays[0][0, 2] = np.nan
    y, _ = run(arrays, **attrs)
    assert np.isnan(y[0, 2]).all()
    assert np.isfinite(np.delete(y, 2, 1)).all()


def test_narrower_vectors():
    arrays = arrays_for(1, 40, 50, 2, 1, 20, 24)
    attrs = {"scale": 0.3, "is_causal": True, "has_mask": False, "has_bias": False}
    y, expected = run(arrays, target=host_target(32), **attrs)
    compare(y, expected, 1e-5)


@FEW
@given(
    batch=st.integers(1, 9),
    queries=st.integers(1, 4),
    keys=st.integers(1, 1100),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (8, 1), (12, 12)]),
    depth=st.integers(1, 70),
    value_depth=st.integers(1, 70),
    seen=st.lists(st.integers(0, 1100), min_size=2, max_size=2),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
    parts=st.integers(1, 3),
)
def test_few_queries_read_what_they_see(batch, queries, keys, heads, depth, value_depth, seen, dtype, parts):
    """A mask with whole blocks that are not seen, and one query that sees nothing: it weighs all keys alike."""
    arrays = arrays_for(batch, queries, keys, *heads, depth, value_depth, dtype=dtype)
    mask = np.zeros((batch, 1, queries, keys), bool)
    mask[..., min(seen) : max(seen)] = True
    mask[0, :, 0] = False
    arrays.append(mask)
    declared = [a.shape for a in arrays]
    declared[1:3] = [(batch, S, *a.shape[2:]) for a in arrays[1:3]]
    declared[3] = (*mask.shape[:3], S)
    attrs = {"scale": depth**-0.5, "is_causal": False, "has_mask": True, "has_bias": False}
    y, expected = run(arrays, declared, {"S": keys}, parts, **attrs)
    compare(y, expected, {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3}[dtype])


def test_few_queries_take_a_kernel_of_their_own():
    def kernel(queries, heads, key_heads, batch=8):
        shapes = [(batch, queries, heads, 16), (batch, S, key_heads, 16), (batch, S, key_heads, 16)]
        values = [Value(TensorType(shape, "float32")) for shape in shapes]
        attrs = {"scale": 1.0, "is_causal": True, "has_mask": False, "has_bias": False}
        (call,) = attention.lower(make_node(ATTENTION, values, attrs), host_target())
        return call.spec.name, call.extent

    assert kernel(1, 4, 4) == ("attention_rows", 8 * 4)
    assert kernel(2, 8, 2) == ("attention_rows", 8 * 2)  # the queries of four heads in a unit
    assert kernel(2, 16, 1, batch=1) == ("attention_rows", 16)
    assert kernel(9, 4, 4)[0] == kernel(L, 4, 4)[0] == "attention_causal"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 12])
def test_keys_and_values_are_read_out_of_a_cache(batch, queries):
    """Windows of one array that do not lie densely: few queries read them there, many after a copy."""
    layers, keys, heads, depth = 2, 37, 4, 24
    cache_type = TensorType((batch, layers, 2, keys, heads, depth), "float32")

    def build(q, cache):
        parts = []
        for which in range(2):
            start, limit = (0, 1, which, 0, 0, 0), (batch, 2, which + 1, keys, heads, depth)
            part = ops.slice(cache, start=start, limit=limit, stride=(1,) * 6)
            parts.append(ops.reshape(part, shape=(batch, keys, heads, depth)))
        return ops.attention(q, *parts, scale=0.2)

    graph = trace(build, TensorType((batch, queries, heads, depth), "float32"), cache_type)
    compiled = compile_graph(graph)
    labels = [s.label for s in compiled.program.steps]
    assert labels == (["attention_rows"] if queries == 1 else [*["slice"] * (0 if batch == 1 else 2), "attention"])
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(v.shape).astype(np.float32) for v in graph.inputs]
    (y,), (expected,) = compiled.program(arrays), evaluate(graph, arrays, precision="float64")
    compare(y, expected, 1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_parts_of_parts_of_a_cache(batch):
    def build(q, cache):
        layer = ops.slice(cache, start=(0, 1, 0, 0, 0), limit=(batch, 2, 12, 8, 8), stride=(1,) * 5)
        layer = ops.reshape(layer, shape=(batch, 12, 8, 8))
        parts = [ops.slice(layer, start=(0, n, 0, 0), limit=(batch, n + 5, 8, 8), stride=(1,) * 4) for n in (2, 7)]
        return ops.attention(q, *parts, scale=0.2)

    graph = trace(build, TensorType((batch, 1, 8, 8), "float32"), TensorType((batch, 3, 12, 8, 8), "float32"))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(v.shape).astype(np.float32) for v in graph.inputs]
    (y,), (expected,) = compile_graph(graph).program(arrays), evaluate(graph, arrays, precision="float64")
    compare(y, expected, 1e-5)


def test_a_part_of_a_cache_with_another_reader_is_copied_for_it():
    def build(q, cache):
        part = ops.slice(cache, start=(0, 3, 0, 0), limit=(2, 9, 4, 8), stride=(1,) * 4)
        return ops.attention(q, part, part, scale=0.2), ops.mul(part, np.float32(2))

    graph = trace(build, TensorType((2, 1, 4, 8), "float32"), TensorType((2, 12, 4, 8), "float32"))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(v.shape).astype(np.float32) for v in graph.inputs]
    wanted = evaluate(graph, arrays, precision="float64")
    for y, expected in zip(compile_graph(graph).program(arrays), wanted, strict=True):
        compare(y, expected, 1e-5)
