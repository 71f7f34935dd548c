"""Sorting kernels for CUDA in the simulator: tiles, merges, unknown lengths, few greatest elements, special values."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import sort
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops import sorting
from tests.codegen.test_sort import with_specials
from tests.cuda.driver import run_node

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops


def names(calls) -> list[str]:
    return [c.spec.name for c in calls]


@pytest.mark.parametrize(
    ("n", "dtype", "descending", "length"),
    [
        (5, "float32", False, "known"),
        (21, "float32", True, "known"),
        (9, "bfloat16", False, "known"),
        (21, "int8", False, "symbolic"),
        (19, "float64", True, "symbolic"),
        (8, "uint64", False, "symbolic"),
    ],
)
def test_sort_and_argsort(n, dtype, descending, length):
    x = with_specials((2, n, 2), dtype)
    value = Value(TensorType((N, L, 2) if length == "symbolic" else x.shape, dtype))
    sizes, attrs = {"N": 2, "L": n}, {"axis": 1, "descending": descending}
    (y,) = run_node(make_node(sorting.SORT, [value], attrs), [x], sizes)
    word = f"u{x.dtype.itemsize}"
    np.testing.assert_array_equal(y.view(word), sorting.SORT.reference(x, **attrs).view(word))
    attrs |= {"stable": True, "dtype": "int32"}
    (order,) = run_node(make_node(sorting.ARGSORT, [value], attrs), [x], sizes, most_blocks=1)
    np.testing.assert_array_equal(order, sorting.ARGSORT.reference(x, **attrs))


@pytest.mark.parametrize(("n", "k"), [(7, 3), (70, 3), (70, 1), (20, 6)])
def test_top_k(n, k):
    x = with_specials((2, n), "float32")
    node = make_node(sorting.TOP_K, [Value(TensorType(x.shape, "float32"))], {"k": k, "sorted": True})
    for result, wanted in zip(run_node(node, [x]), sorting.TOP_K.reference(x, k=k, sorted=True), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_how_rows_are_sorted():
    def calls(primitive, shape, target, **attrs):
        return names(sort.lower(make_node(primitive, [Value(TensorType(shape, "float32"))], attrs), target))

    gpu, axis = make_target((9, 0)), {"axis": 1, "descending": False}
    assert calls(sorting.SORT, (4, 2048), gpu, **axis) == ["sort_tiles"]
    assert calls(sorting.SORT, (4, 5000), gpu, **axis) == ["sort_tiles", "sort_merge", "sort_merge"]
    assert calls(sorting.SORT, (4, N), gpu, **axis) == ["sort_rows"]
    assert calls(sorting.TOP_K, (4, 50257), gpu, k=50, sorted=True) == ["top_k_tiles"] * 2
    assert calls(sorting.TOP_K, (4, 70), simulator_target(), k=3, sorted=True) == ["top_k_tiles"] * 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float64", "float16"])
@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_searchsorted(side, dtype, n):
    sequence, values = np.sort(with_specials((n,), dtype)), with_specials((9, 3), dtype)
    types = [TensorType((L,), dtype), TensorType((N, 3), dtype)]
    attrs = {"side": side, "dtype": "int32"}
    node = make_node(sorting.SEARCHSORTED, [Value(t) for t in types], attrs)
    (y,) = run_node(node, [sequence, values], {"L": n, "N": 9})
    np.testing.assert_array_equal(y, sorting.SEARCHSORTED.reference(sequence, values, **attrs))
