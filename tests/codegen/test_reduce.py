"""Reduction kernels against NumPy in float64, over axes, shapes, partitions; accuracy of sums."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kgraph import ops
from kgraph.codegen.cpu import reduce
from kgraph.codegen.reductions import KINDS
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample
from tests.codegen.test_loop import fused, normal


@pytest.mark.parametrize("name", sorted(KINDS))
def test_primitive(name):
    for sample in PRIMITIVES[name].samples():
        if not any(a.dtype.kind == "c" for a in sample.args):
            check_sample(reduce, PRIMITIVES[name], sample, parts=2)


def reduced(name, x, parts=1, **attrs):
    node = make_node(PRIMITIVES[name], [Value(TensorType(x.shape, x.dtype.name))], attrs)
    assert reduce.accepts(node) is None
    return run_node(reduce.lower, node, [x], parts=parts)[0]


CASES = [
    ((7, 49, 100), (1,)),
    ((3, 1000, 5), (1,)),
    ((100_000,), (0,)),
    ((300_000,), (0,)),
    ((5000, 64), (0,)),
    ((20, 30, 40, 17), (0, 1, 2)),
    ((20, 30, 40, 17), (1, 3)),
    ((6, 5, 4, 3), (0, 2)),
    ((200, 333), (0, 1)),
    ((0, 5), (0,)),
    ((3, 0, 5), (1,)),
    ((1, 5, 1), (1,)),
    ((1, 1), (0, 1)),
    ((4, 5), ()),
    ((70_000, 3), (0,)),
    ((8, 12, 300, 77), (0, 2)),
]


@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_sum_and_max(shape, axes):
    x = normal(*shape)
    total = reduced("reduce_sum", x, axes=axes, keepdims=False)
    wide = x.astype(np.float64)
    # Relative to the sum of magnitudes: a few units of float32 whatever the length.
    error = np.abs(total - wide.sum(axes)) / np.maximum(np.abs(wide).sum(axes), 1e-30)
    assert error.max(initial=0) < 1.2e-7
    wanted = x.max(axes, keepdims=True, initial=-np.inf)
    np.testing.assert_array_equal(reduced("reduce_max", x, axes=axes, keepdims=True), wanted)
    for parts in (2, 5):
        np.testing.assert_array_equal(reduced("reduce_sum", x, parts, axes=axes, keepdims=False), total)


def test_long_sums_keep_their_digits():
    x = np.full(3_000_017, 0.1, np.float32)
    wanted = x.astype(np.float64).sum()
    # A rounding of each of the few sums that are left in the end, which depends on how many lanes there are.
    assert abs(reduced("reduce_sum", x, axes=(0,), keepdims=False) / wanted - 1) < 2 * np.finfo(np.float32).eps
    column = x[: 300_000 * 10].reshape(-1, 10)
    result = reduced("reduce_sum", column, axes=(0,), keepdims=False)
    np.testing.assert_allclose(result, column.astype(np.float64).sum(0), rtol=3e-7)


def test_infinities_survive_compensation():
    x = np.ones((3, 5000), np.float32)
    x[0, 77], x[1, 4000], x[2, 5] = np.inf, -np.inf, np.nan
    result = reduced("reduce_sum", x, axes=(1,), keepdims=False)
    np.testing.assert_array_equal(result, [np.inf, -np.inf, np.nan])
    assert reduced("reduce_sum", np.full(9000, 3e38, np.float32), axes=(0,), keepdims=False) == np.inf


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_axes(data):
    rank = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 20), min_size=rank, max_size=rank))
    axes = tuple(a for a in range(rank) if data.draw(st.booleans()))
    x = np.round(normal(*shape) * 8)
    parts = data.draw(st.integers(1, 3))
    result = reduced("reduce_sum", x, parts, axes=axes, keepdims=data.draw(st.booleans()))
    np.testing.assert_array_equal(result.reshape(-1), x.sum(axes).reshape(-1))
    axis = data.draw(st.integers(0, rank - 1))
    np.testing.assert_array_equal(reduced("argmax", x, parts, axis=axis, dtype="int64"), x.argmax(axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_positions_at_ties_infinities_and_nan(axis):
    x = np.round(normal(70, 53) * 2).astype(np.float32)
    x[:, 7] = x[9] = -np.inf
    x[33, 21] = x[34, 21] = x[33, 50] = np.nan
    np.testing.assert_array_equal(reduced("argmax", x, axis=axis, dtype="int32"), x.argmax(axis))
    np.testing.assert_array_equal(reduced("argmin", x, axis=axis, dtype="int32"), x.argmin(axis))


@pytest.mark.parametrize("axes", [(1, 2), (0, 1), (0,), (0, 1, 2)])
@pytest.mark.parametrize("keepdims", [True, False])
def test_prologue_several_results_epilogue(axes, keepdims):
    x, y = normal(50, 90, 40), normal(40, seed=1)
    shape = x.sum(axes, keepdims=keepdims).shape
    bias = normal(*shape[-1:], seed=2)

    def moments(x, y, bias):
        shifted = ops.sub(x, y)
        total = ops.reduce_sum(shifted, axes=axes, keepdims=keepdims)
        squares = ops.reduce_sum(ops.mul(shifted, shifted), axes=axes, keepdims=keepdims)
        return [ops.add(total, bias), ops.sqrt(squares)]

    node = fused(moments, x, y, bias, kind="reduce")
    assert reduce.accepts(node) is None
    total, root = run_node(reduce.lower, node, [x, y, bias], parts=3)
    wide = x.astype(np.float64) - y
    np.testing.assert_allclose(total, wide.sum(axes, keepdims=keepdims) + bias, atol=1e-6 * np.abs(wide).sum())
    np.testing.assert_allclose(root, np.sqrt((wide**2).sum(axes, keepdims=keepdims)), rtol=1e-6)


def test_symbolic_sizes():
    n = Dim.symbol("N")
    for shape, axes in [((n, 7, 33), (0,)), ((n, 7, 33), (1,)), ((n, 7, 33), (0, 2)), ((n, 7, 33), (0, 1, 2))]:
        node = make_node(
            PRIMITIVES["reduce_sum"], [Value(TensorType(shape, "float32"))], {"axes": axes, "keepdims": False}
        )
        for size in (0, 1, 5, 700):
            x = np.round(normal(size, 7, 33) * 4)
            (result,) = run_node(reduce.lower, node, [x], {"N": size}, parts=2)
            np.testing.assert_array_equal(result, x.sum(axes))


def test_large_reductions_take_two_stages():
    stages = {}
    for shape, axes in [((1 << 20,), (0,)), ((4096, 64), (0,)), ((4096, 64), (1,)), ((100,), (0,))]:
        value = Value(TensorType(shape, "float32"))
        node = make_node(PRIMITIVES["reduce_sum"], [value], {"axes": axes, "keepdims": False})
        stages[shape, axes] = len(reduce.lower(node, host_target()))
    assert list(stages.values()) == [2, 2, 1, 1]


def test_refusals_name_the_reason():
    x = normal(5, 6)
    twice = lambda x: [ops.reduce_sum(ops.reduce_sum(x, axes=(0,), keepdims=True), axes=(1,), keepdims=True)]
    assert reduce.accepts(fused(twice, x, kind="reduce")) is not None
    mixed = lambda x: [ops.reduce_sum(x, axes=(0,), keepdims=True), ops.reduce_max(x, axes=(1,), keepdims=True)]
    assert "axes" in reduce.accepts(fused(mixed, x, kind="reduce"))
