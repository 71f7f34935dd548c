"""Scatter kernels against the references: every reduction, repeated and dropped indices, any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import scatter
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample, compare

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops
REDUCTIONS = ["update", "add", "mul", "max", "min"]
ND, ALONG = PRIMITIVES["scatter_nd"], PRIMITIVES["scatter_along_axis"]
SAMPLES = [(p, s) for p in (ND, ALONG) for s in p.samples()]


@pytest.mark.parametrize(("primitive", "sample"), SAMPLES, ids=lambda v: getattr(v, "name", ""))
def test_samples(primitive, sample):
    check_sample(scatter, primitive, sample, parts=2)


def run(primitive, arrays, declared, sizes, parts, **attrs):
    values = [Value(TensorType(s, a.dtype.name)) for s, a in zip(declared, arrays)]
    node = Node(primitive, values, attrs, [values[0].type])
    assert scatter.accepts(node) is None
    (y,) = run_node(scatter.lower, node, arrays, sizes, parts)
    return y


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    row=st.integers(1, 150),
    count=st.integers(0, 40),
    reduction=st.sampled_from(REDUCTIONS),
    dtype=st.sampled_from(["float32", "int32", "float64", "int8"]),
    index_dtype=st.sampled_from(["int32", "int64"]),
    parts=st.integers(1, 4),
    dynamic=st.booleans(),
)
def test_scatter_nd(leading, row, count, reduction, dtype, index_dtype, parts, dynamic):
    rng = np.random.default_rng(0)
    base = rng.integers(-3, 4, (*leading, row)).astype(dtype)
    indices = np.stack([rng.integers(-n - 2, n + 2, count) for n in leading], -1).astype(index_dtype)
    updates = rng.integers(-3, 4, (count, row)).astype(dtype)
    arrays = [base, indices, updates]
    declared = [a.shape for a in arrays]
    if dynamic:
        declared = [(L, *base.shape[1:]), (N, len(leading)), (N, row)]
    sizes = {"L": leading[0], "N": count}
    y = run(ND, arrays, declared, sizes, parts, reduction=reduction)
    compare(y, ND.reference(*arrays, reduction=reduction), 1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 130)),
    axis=st.integers(0, 2),
    count=st.integers(1, 12),
    reduction=st.sampled_from(REDUCTIONS),
    parts=st.integers(1, 3),
)
def test_scatter_along_axis(shape, axis, count, reduction, parts):
    rng = np.random.default_rng(0)
    base = rng.integers(-3, 4, shape).astype(np.float32)
    where = (*shape[:axis], count, *shape[axis + 1 :])
    n = shape[axis]
    arrays = [base, rng.integers(-n - 1, n + 1, where).astype("int32"), rng.integers(-3, 4, where).astype("float32")]
    attrs = {"axis": axis, "reduction": reduction}
    y = run(ALONG, arrays, [a.shape for a in arrays], {}, parts, **attrs)
    compare(y, ALONG.reference(*arrays, **attrs), 1e-6)


def test_sums_do_not_depend_on_the_split():
    rng = np.random.default_rng(0)
    for row in (5, 200):
        arrays = [rng.random((30, row), np.float32), rng.integers(0, 30, (500, 1)), rng.random((500, row), np.float32)]
        results = [run(ND, arrays, [a.shape for a in arrays], {}, parts, reduction="add") for parts in (1, 3, 16)]
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])
