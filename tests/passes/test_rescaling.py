"""Regions that reduce rows and rescale them, and products that scale by row and by column: structure and values."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Dim
from kgraph.passes.dead_code import dead_code
from kgraph.passes.reshape_motion import reshape_motion
from tests.passes.test_pipeline import check_same, f32, fused, kinds, names, traced

N = Dim.symbol("N")


def scale_of(x):
    largest = ops.reduce_max(ops.abs(x), axes=(1,), keepdims=True)
    return ops.div(np.float32(127), ops.add(largest, np.float32(1e-7)))


def test_quantised_rows_are_one_kernel():
    def function(x):
        scale = scale_of(x)
        return ops.convert(ops.round_nearest_even(ops.mul(x, scale)), dtype="int8"), scale

    graph = traced(function, [f32(N, 40)])
    after, _ = fused(graph)
    assert kinds(after) == ["rescale"]
    check_same(graph, after)


def test_a_product_of_scales_is_no_rescaled_row():
    """Where a layer is as wide as its inputs, a scale for each row and column has the shape of the rows."""

    def function(x, columns):
        scale = scale_of(x)
        return ops.mul(columns, scale), ops.relu(ops.mul(x, scale))

    graph = traced(function, [f32(N, 40), f32(40)])
    after, _ = fused(graph)
    (region,) = [n for n in after.nodes if n.name == "fusion" and n.attrs["kind"] == "rescale"]
    assert names(region.attrs["body"])[-2:] == ["mul", "relu"]
    check_same(graph, after)


def test_what_is_reduced_of_two_operands_is_left_to_reductions():
    def function(x, y):
        z = ops.mul(x, y)
        return ops.mul(x, ops.reduce_max(z, axes=(1,), keepdims=True))

    graph = traced(function, [f32(N, 40), f32(N, 40)])
    after, _ = fused(graph)
    assert "rescale" not in kinds(after)
    check_same(graph, after)


def test_rows_that_several_elementwise_nodes_read_are_left_to_loops():
    def function(x, y):
        scaled = ops.mul(x, scale_of(x))
        return ops.relu(scaled), ops.dot_general(ops.add(scaled, y), y, lhs_contract=(1,), rhs_contract=(1,))

    graph = traced(function, [f32(N, 40), f32(1, 40)])
    after, _ = fused(graph)
    assert "rescale" not in kinds(after)
    check_same(graph, after)


def test_whole_arrays_and_columns_are_left_to_reductions():
    for axes in ((0,), (0, 1)):
        graph = traced(lambda x: ops.mul(x, ops.reduce_max(x, axes=axes, keepdims=True)), [f32(64, 40)])  # noqa: B023
        assert "rescale" not in kinds(fused(graph)[0])


def test_a_scale_for_each_row_and_column_joins_the_product():
    def function(x, w, columns, rows):
        y = ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,), lhs_batch=(), rhs_batch=())
        return ops.div(y, ops.mul(columns, rows))

    graph = traced(function, [f32(N, 16), f32(16, 24), f32(24), f32(N, 1)])
    after, _ = fused(graph)
    assert kinds(after) == ["dot"]
    check_same(graph, after)


def test_such_scales_follow_a_product_through_a_reshape():
    def function(x, w, columns, rows):
        y = ops.dot_general(x, w, lhs_contract=(2,), rhs_contract=(0,), lhs_batch=(), rhs_batch=())
        scales = ops.mul(columns, ops.reshape(rows, shape=(N, 5, 1, 1)))
        return ops.div(ops.reshape(y, shape=(N, 5, 4, 6)), scales)

    graph = traced(function, [f32(N, 5, 16), f32(16, 24), f32(1, 1, 4, 6), f32(N, 5, 1)])
    after, _ = fused(dead_code(reshape_motion(graph)))
    assert [kind for kind in kinds(after) if kind != "reshape"] == ["dot"]
    check_same(graph, after)
