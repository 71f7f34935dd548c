"""Sorting kernels against the references: ties, NaN, both zeros, every dtype, short and long rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import sort
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops import sorting
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops
SAMPLES = [(p, s) for p in (sorting.SORT, sorting.ARGSORT, sorting.TOP_K, sorting.SEARCHSORTED) for s in p.samples()]


@pytest.mark.parametrize(("primitive", "sample"), SAMPLES, ids=lambda v: getattr(v, "name", ""))
def test_samples(primitive, sample):
    check_sample(sort, primitive, sample, parts=2)


def with_specials(shape, dtype) -> np.ndarray:
    """Values with many ties; floats with NaN, infinities and zeros of both signs."""
    rng = np.random.default_rng(0)
    kind = TensorType((), dtype).np_dtype
    if not dtype.startswith(("float", "bfloat")):
        return rng.integers(0 if dtype.startswith("u") else -50, 50, shape).astype(kind)
    x = (rng.standard_normal(shape) * 4).round(1)
    x[rng.random(shape) < 0.1] = np.nan
    x[rng.random(shape) < 0.1] = -0.0
    x[rng.random(shape) < 0.1] = 0.0
    x[rng.random(shape) < 0.05] = -np.inf
    return x.astype(kind)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([1, 2, 17, 128, 129, 1000]),
    others=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    descending=st.booleans(),
    dtype=st.sampled_from(["float32", "float64", "int32", "uint8", "int64", "bfloat16", "int8", "uint64"]),
    dynamic=st.booleans(),
)
def test_sort_and_argsort(n, others, descending, dtype, dynamic):
    x = with_specials((others[0], n, others[1]), dtype)
    declared = (N, L, others[1]) if dynamic else x.shape
    sizes = {"N": others[0], "L": n}
    value = Value(TensorType(declared, dtype))
    attrs = {"axis": 1, "descending": descending}
    node = make_node(sorting.SORT, [value], attrs)
    assert sort.accepts(node) is None
    (y,) = run_node(sort.lower, node, [x], sizes, 2)
    expected = sorting.SORT.reference(x, **attrs)
    word = f"u{x.dtype.itemsize}"
    np.testing.assert_array_equal(y.view(word), expected.view(word))
    attrs |= {"stable": True, "dtype": "int32"}
    (order,) = run_node(sort.lower, make_node(sorting.ARGSORT, [value], attrs), [x], sizes, 3)
    np.testing.assert_array_equal(order, sorting.ARGSORT.reference(x, **attrs))


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("k", [1, 5, 16, 17, 20])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_top_k(n, k, dtype):
    x = with_specials((3, n), dtype)
    for declared in (x.shape, (N, L)):
        if declared[1] is L:
            node = make_node(sorting.SORT, [Value(TensorType(declared, dtype))], {"axis": 1, "descending": True})
            node = type(node)(sorting.TOP_K, node.inputs, {"k": k, "sorted": True},
                              [TensorType((N, k), dtype), TensorType((N, k), "int32")])  # fmt: skip
        else:
            node = make_node(sorting.TOP_K, [Value(TensorType(declared, dtype))], {"k": k, "sorted": True})
        values, order = run_node(sort.lower, node, [x], {"N": 3, "L": n})
        wanted, wanted_order = sorting.TOP_K.reference(x, k=k, sorted=True)
        np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(order, wanted_order)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float64", "float16"])
@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_searchsorted(side, dtype, n):
    sequence, values = np.sort(with_specials((n,), dtype)), with_specials((50, 3), dtype)
    types = [TensorType((L,), dtype), TensorType((N, 3), dtype)]
    attrs = {"side": side, "dtype": "int32"}
    node = make_node(sorting.SEARCHSORTED, [Value(t) for t in types], attrs)
    (y,) = run_node(sort.lower, node, [sequence, values], {"L": n, "N": 50}, 2)
    np.testing.assert_array_equal(y, sorting.SEARCHSORTED.reference(sequence, values, **attrs))
