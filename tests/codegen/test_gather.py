"""Gather kernels against NumPy and the primitives' samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import gather
from kgraph.ir import Dim
from kgraph.ops import indexing
from tests.codegen.driver import run_node
from tests.codegen.nodes import node
from tests.codegen.samples import check_sample

FEW = settings(max_examples=20, deadline=None, derandomize=True)
N, L = Dim.symbol("N"), Dim.symbol("L")
SAMPLES = [(p, s) for p in (indexing.TAKE, indexing.TAKE_ALONG_AXIS, indexing.GATHER_ND) for s in p.samples()]


@pytest.mark.parametrize(("primitive", "sample"), SAMPLES, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("parts", [1, 2])
def test_samples(primitive, sample, parts):
    check_sample(gather, primitive, sample, parts)


@FEW
@given(
    outer=st.integers(1, 4),
    n=st.integers(1, 30),
    row=st.integers(1, 70),
    count=st.integers(1, 40),
    mode=st.sampled_from(["clip", "fill", "wrap"]),
    dtype=st.sampled_from(["float32", "int8", "float64"]),
    index_dtype=st.sampled_from(["int32", "int64", "uint8"]),
    dynamic=st.booleans(),
    parts=st.integers(1, 3),
)
def test_take(outer, n, row, count, mode, dtype, index_dtype, dynamic, parts):
    rng = np.random.default_rng(0)
    x = rng.integers(-100, 100, (outer, n, row)).astype(dtype)
    low = 0 if index_dtype == "uint8" else -2 * n
    indices = rng.integers(low, 2 * n, (count,)).astype(index_dtype)
    shape, places = ((outer, N, row), (L,)) if dynamic else (x.shape, indices.shape)
    attrs = {"axis": 1, "mode": mode}
    k = node("take", [(shape, dtype), (places, index_dtype)], [((outer, *places, row), dtype)], **attrs)
    (y,) = run_node(gather.lower, k, [x, indices], {"N": n, "L": count}, parts)
    np.testing.assert_array_equal(y, indexing.TAKE.reference(x, indices, **attrs))


def test_embedding_with_symbolic_batch():
    rng = np.random.default_rng(0)
    table, tokens = rng.random((50, 128), np.float32), rng.integers(0, 50, (3, 7)).astype("int32")
    k = node("take", [((50, 128), "float32"), ((N, L), "int32")], [((N, L, 128), "float32")], axis=0, mode="clip")
    (y,) = run_node(gather.lower, k, [table, tokens], {"N": 3, "L": 7}, 2)
    np.testing.assert_array_equal(y, table[tokens])


def test_take_along_axis_with_symbolic_sizes():
    rng = np.random.default_rng(0)
    x, indices = rng.random((4, 9, 5), np.float32), rng.integers(-9, 9, (4, 3, 1)).astype("int64")
    k = node("take_along_axis", [((N, L, 5), "float32"), ((N, 3, 1), "int64")], [((N, 3, 5), "float32")], axis=1)
    (y,) = run_node(gather.lower, k, [x, indices], {"N": 4, "L": 9}, 3)
    np.testing.assert_array_equal(y, np.take_along_axis(x, np.broadcast_to(indices, (4, 3, 5)), 1))
