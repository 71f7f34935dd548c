"""Pooling kernels against NumPy, with epilogues, dilations, every dtype, static and symbolic sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import pool, pool_gradient, pool_gradient_disjoint
from kgraph.ir import PRIMITIVES, Dim, Graph, Node, TensorType, Value, make_node, type_of
from kgraph.ops import pooling
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample, compare

FEW = settings(max_examples=25, deadline=None, derandomize=True)
N, L = Dim.symbol("N"), Dim.symbol("L")
UNDILATED = {"window_dilation": (1,) * 4, "base_dilation": (1,) * 4}
assert ops


@pytest.mark.parametrize("sample", pooling.REDUCE_WINDOW.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_samples(sample, parts):
    check_sample(pool, pooling.REDUCE_WINDOW, sample, parts)


def run(x, declared=None, sizes=None, parts=1, **attrs):
    value = Value(type_of(x) if declared is None else TensorType(declared, type_of(x).dtype))
    node = make_node(pooling.REDUCE_WINDOW, [value], attrs)
    assert pool.accepts(node) is None
    (y,) = run_node(pool.lower, node, [x], sizes, parts)
    return y


@FEW
@given(data=st.data(), parts=st.integers(1, 3), dynamic=st.booleans())
def test_any_window(data, parts, dynamic):
    rank = data.draw(st.integers(1, 4))
    draw = lambda low, high: tuple(data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))
    shape, window, strides = draw(1, 9), draw(1, 3), draw(1, 2)
    window_dilation, base_dilation = draw(1, 2), draw(1, 2)
    padding = tuple(zip(draw(0, 2), draw(0, 2)))
    for n, w, (lo, hi), wd, bd in zip(shape, window, padding, window_dilation, base_dilation):
        if (n - 1) * bd + 1 + lo + hi < (w - 1) * wd + 1:
            return
    kind = data.draw(st.sampled_from(["max", "min", "sum"]))
    dtype = data.draw(st.sampled_from(["float32", "float64", "int32", "uint8", "bfloat16", "int8"]))
    x = np.random.default_rng(0).integers(0, 30, shape).astype(TensorType((), dtype).np_dtype)
    attrs = {"kind": kind, "window": window, "strides": strides, "padding": padding,
             "window_dilation": window_dilation, "base_dilation": base_dilation}  # fmt: skip
    declared = ((N, *shape[1:]) if base_dilation[0] == strides[0] == window[0] == 1 else None) if dynamic else None
    y = run(x, declared, {"N": shape[0]}, parts, **attrs)
    compare(y, pooling.REDUCE_WINDOW.reference(x, **attrs), 1e-6)


@pytest.mark.parametrize("channels", [1, 3, 16, 40, 64, 130])
@pytest.mark.parametrize("kind", ["max", "sum"])
def test_images(channels, kind):
    x = np.random.default_rng(0).standard_normal((2, 9, 8, channels)).astype(np.float32)
    attrs = {"kind": kind, "window": (1, 3, 3, 1), "strides": (1, 2, 2, 1),
             "padding": ((0, 0), (1, 1), (0, 1), (0, 0)), **UNDILATED}  # fmt: skip
    expected = pooling.REDUCE_WINDOW.reference(x, **attrs)
    whole = run(x, **attrs)
    compare(whole, expected, 1e-6)
    symbolic = run(x, (N, 9, L, channels), {"N": 2, "L": 8}, 3, **attrs)
    np.testing.assert_array_equal(symbolic, whole)


def test_maximum_keeps_nan():
    x = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
    x[0, 1, 1, 0] = np.nan
    attrs = {"kind": "max", "window": (1, 2, 2, 1), "strides": (1, 2, 2, 1), "padding": ((0, 0),) * 4,
             **UNDILATED}  # fmt: skip
    np.testing.assert_array_equal(run(x, **attrs), pooling.REDUCE_WINDOW.reference(x, **attrs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_pooling_with_epilogue(dtype):
    """sum / counts + bias, relu, with a second output."""
    shape, out = (N, 7, 6, 20), (N, 4, 3, 20)
    attrs = {"kind": "sum", "window": (1, 3, 3, 1), "strides": (1, 2, 2, 1),
             "padding": ((0, 0), (1, 1), (0, 1), (0, 0)), **UNDILATED}  # fmt: skip
    graph = Graph([Value(TensorType(s, dtype)) for s in (shape, (1, 4, 3, 1), (20,), out)])
    x, counts, bias, residual = graph.inputs
    pooled = graph.add(pooling.REDUCE_WINDOW, (x,), **attrs)
    mean = graph.add(PRIMITIVES["div"], (pooled, counts))
    total = graph.add(PRIMITIVES["add"], (graph.add(PRIMITIVES["add"], (mean, bias)), residual))
    graph.outputs = [mean, graph.add(PRIMITIVES["relu"], (total,))]
    inputs = [Value(v.type) for v in graph.inputs]
    node = Node(PRIMITIVES["fusion"], inputs, {"kind": "pool", "body": graph}, [v.type for v in graph.outputs])
    assert pool.accepts(node) is None
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([2 if d is N else d for d in v.shape]).astype(v.type.np_dtype) for v in inputs]
    arrays[1] = pooling.REDUCE_WINDOW.reference(np.ones((1, 7, 6, 1), np.float32), **attrs).astype(arrays[0].dtype)
    means, results = run_node(pool.lower, node, arrays, {"N": 2}, 3)
    wide = [a.astype(np.float64) for a in arrays]
    expected = pooling.REDUCE_WINDOW.reference(wide[0], **attrs) / wide[1]
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(means.astype(float), expected, atol=tolerance * 4)
    np.testing.assert_allclose(results.astype(float), np.maximum(expected + wide[2] + wide[3], 0), atol=tolerance * 8)


def test_refuses_operand_that_spans_part_of_a_group():
    attrs = {"kind": "max", "window": (1, 1, 2, 1), "strides": (1,) * 4, "padding": ((0, 0),) * 4,
             **UNDILATED}  # fmt: skip
    graph = Graph([Value(TensorType((2, 3, 6, 4), "float32")), Value(TensorType((3, 5, 4), "float32"))])
    pooled = graph.add(pooling.REDUCE_WINDOW, (graph.inputs[0],), **attrs)
    graph.outputs = [graph.add(PRIMITIVES["add"], (pooled, graph.inputs[1]))]
    types = [v.type for v in graph.outputs]
    node = Node(PRIMITIVES["fusion"], [Value(v.type) for v in graph.inputs], {"kind": "pool", "body": graph}, types)
    assert "epilogue operand" in pool.accepts(node)


# -- the gradient of maxima -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sample", pooling.SELECT_AND_SCATTER_ADD.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_samples(sample, parts):
    check_sample(pool_gradient, pooling.SELECT_AND_SCATTER_ADD, sample, parts)


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_gradient_with_ties_and_symbolic_sizes(kind, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (2, 9, 8, 20)).astype(dtype)
    if dtype != "int32":
        x[rng.random(x.shape) < 0.05] = np.nan
    source = rng.integers(-9, 9, (2, 5, 4, 20)).astype(dtype)
    attrs = {"kind": kind, "window": (1, 3, 3, 1), "strides": (1, 2, 2, 1),
             "padding": ((0, 0), (1, 1), (0, 1), (0, 0)), **UNDILATED}  # fmt: skip
    values = [Value(TensorType(s, dtype)) for s in ((N, 9, L, 20), (N, 5, (L - 2) // 2 + 1, 20))]
    node = Node(pooling.SELECT_AND_SCATTER_ADD, values, attrs, [values[0].type])
    assert pool_gradient.accepts(node) is None
    (y,) = run_node(pool_gradient.lower, node, [x, source], {"N": 2, "L": 8}, 3)
    compare(y, pooling.SELECT_AND_SCATTER_ADD.reference(x, source, **attrs), 1e-6)


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("window", [(2,), (3, 2), (2, 2), (2, 1, 3)])
@pytest.mark.parametrize("channels", [1, 20, 35])
def test_gradient_of_windows_side_by_side(kind, dtype, window, channels):
    """With ties and NaN; also where channels come first."""
    rng = np.random.default_rng(0)
    results = (3, 4, 2)[: len(window)]
    shape = (2, *(n * w for n, w in zip(results, window)), channels)
    np_type = TensorType((), dtype).np_dtype
    x = rng.integers(0, 4, shape).astype(np_type)
    if dtype not in ("int32", "uint8"):
        x[rng.random(x.shape) < 0.1] = np.nan
    source = rng.integers(0, 9, (2, *results, channels)).astype(np_type)
    full = (1, *window, 1)
    attrs = {"kind": kind, "window": full, "strides": full, "padding": ((0, 0),) * len(full)}
    attrs |= {name: (1,) * len(full) for name in ("window_dilation", "base_dilation")}
    for symbolic in (False, True):
        first = N if symbolic else 2
        values = [Value(TensorType((first, *a.shape[1:]), dtype)) for a in (x, source)]
        node = Node(pooling.SELECT_AND_SCATTER_ADD, values, attrs, [values[0].type])
        assert pool_gradient.accepts(node) is None
        assert pool_gradient_disjoint.takes(node)
        (y,) = run_node(pool_gradient.lower, node, [x, source], {"N": 2}, 3)
        np.testing.assert_array_equal(y, pooling.SELECT_AND_SCATTER_ADD.reference(x, source, **attrs))


def test_gradient_of_windows_that_leave_elements_out():
    values = [Value(TensorType(s, "float32")) for s in ((2, 9, 4), (2, 4, 4))]
    attrs = {"kind": "max", "window": (1, 2, 1), "strides": (1, 2, 1), "padding": ((0, 0),) * 3}
    attrs |= dict.fromkeys(("window_dilation", "base_dilation"), (1,) * 3)
    node = Node(pooling.SELECT_AND_SCATTER_ADD, values, attrs, [values[0].type])
    assert not pool_gradient_disjoint.takes(node)
    x = np.random.default_rng(0).standard_normal((2, 9, 4)).astype("float32")
    source = np.ones((2, 4, 4), "float32")
    (y,) = run_node(pool_gradient.lower, node, [x, source], {}, 2)
    np.testing.assert_array_equal(y, pooling.SELECT_AND_SCATTER_ADD.reference(x, source, **attrs))
