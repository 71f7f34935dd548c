"""Kernels of the cotangents of attention against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import attention_gradient
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.attention_gradient import ATTENTION_GRADIENT
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample, compare
from tests.codegen.test_attention import arrays_for

FEW = settings(max_examples=8, deadline=None, derandomize=True)
N, L, S = (Dim.symbol(s) for s in "NLS")
assert ops


@pytest.mark.parametrize("sample", ATTENTION_GRADIENT.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_samples(sample, parts):
    check_sample(attention_gradient, ATTENTION_GRADIENT, sample, parts)


def run(arrays, tolerance, declared=None, sizes=None, parts=1, target=None, **attrs):
    """The results of the kernel for operands of attention and a cotangent, compared with the reference's."""
    (batch, queries, heads, _), value_depth = arrays[0].shape, arrays[2].shape[3]
    cotangent = np.random.default_rng(1).standard_normal((batch, queries, heads, value_depth)).astype(arrays[0].dtype)
    arrays = [*arrays, cotangent]
    declared = declared or [a.shape for a in arrays]
    values = [
        Value(TensorType(tuple(s), "bool" if a.dtype == bool else a.dtype.name)) for s, a in zip(declared, arrays)
    ]
    node = make_node(ATTENTION_GRADIENT, values, attrs)
    assert attention_gradient.accepts(node) is None
    results = run_node(attention_gradient.lower, node, arrays, sizes, parts, target)
    wide = [a if a.dtype == bool else a.astype(np.float64) for a in arrays]
    for result, wanted in zip(results, ATTENTION_GRADIENT.reference(*wide, **attrs), strict=True):
        compare(result, wanted, tolerance)
    return results


@FEW
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 140),
    keys=st.one_of(st.integers(1, 70), st.integers(500, 600)),
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
    attrs = {"scale": depth**-0.5, "is_causal": is_causal, "has_mask": masks[0], "has_bias": masks[1]}
    run(arrays, 2e-5, parts=parts, **attrs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_symbolic_sizes_and_dtypes(dtype, is_causal):
    arrays = arrays_for(2, 45, 600, 2, 2, 32, 64, (2, 1, 1, 600), dtype=dtype)
    declared = [(N, L, 2, 32), (N, S, 2, 32), (N, S, 2, 64), (N, 1, 1, S), (N, L, 2, 64)]
    attrs = {"scale": 0.2, "is_causal": is_causal, "has_mask": True, "has_bias": False}
    sizes = {"N": 2, "L": 45, "S": 600}
    tolerance = 1e-13 if dtype == "float64" else 2e-5
    whole = run(arrays, tolerance, declared, sizes, **attrs)
    for part, result in zip(run(arrays, tolerance, declared, sizes, 3, **attrs), whole, strict=True):
        np.testing.assert_array_equal(part, result)


def test_narrower_vectors():
    arrays = arrays_for(1, 40, 50, 2, 1, 20, 24)
    attrs = {"scale": 0.3, "is_causal": True, "has_mask": False, "has_bias": False}
    run(arrays, 2e-5, target=host_target(16), **attrs)
