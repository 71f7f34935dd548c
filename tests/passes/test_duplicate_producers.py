"""Values computed again rather than stored, and reductions that share a kernel: structure, bytes and values."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Dim, Graph
from kgraph.passes.duplicate_producers import duplicate_producers
from tests.passes.test_pipeline import check_same, f32, fused, kinds, names, traced

N = Dim.symbol("N")
IMAGE = f32(N, 40, 30, 24)


def normalised(x, gamma):
    """What batch normalisation does in training, with the mean and the spread composed."""
    centred = ops.sub(x, ops.reshape(ops.moments(x, axes=(0, 1, 2))[0], shape=(1, 1, 1, 24)))
    spread = ops.reduce_sum(ops.mul(centred, centred), axes=(0, 1, 2), keepdims=False)
    return ops.mul(centred, ops.mul(gamma, ops.rsqrt(spread)))


def full_results(graph: Graph) -> int:
    """Values of the image's size that kernels write."""
    return sum(o.shape == IMAGE.shape for n in graph.nodes for o in n.outputs)


def test_centred_values_are_not_stored():
    graph = traced(normalised, [IMAGE, f32(24)])
    after = duplicate_producers(graph)
    assert names(graph).count("sub") == 1
    assert names(after).count("sub") == 2
    check_same(graph, after)
    assert full_results(fused(graph)[0]) == 2
    result, _ = fused(after)
    assert full_results(result) == 1
    check_same(graph, result)


def test_chains_are_computed_again_as_a_whole():
    def function(x, gamma):
        scaled = ops.mul(ops.add(x, gamma), gamma)
        rows = ops.reduce_sum(scaled, axes=(3,), keepdims=True)
        return ops.reduce_max(scaled, axes=(0, 1, 2), keepdims=False), ops.reduce_sum(x, axes=(3,), keepdims=True), rows

    graph = traced(function, [IMAGE, f32(24)])
    after = duplicate_producers(graph)
    assert names(after).count("add") == 2
    assert full_results(fused(after)[0]) == 0
    check_same(graph, fused(after)[0])


def test_a_value_that_has_to_be_stored_is_read():
    def function(x, w, gamma):
        y = ops.add(x, gamma)
        total = ops.reduce_sum(y, axes=(0, 1, 2), keepdims=False)
        product = ops.dot_general(y, w, lhs_contract=(3,), rhs_contract=(0,), lhs_batch=(), rhs_batch=())
        return ops.mul(product, total), ops.relu(x)

    graph = traced(function, [IMAGE, f32(24, 24), f32(24)])
    assert duplicate_producers(graph) is graph


def test_epilogue_of_a_convolution_is_computed_once():
    def function(x, w, bias):
        y = ops.conv(
            x, w, strides=(1, 1), padding=((0, 0), (0, 0)), lhs_dilation=(1, 1), rhs_dilation=(1, 1), feature_groups=1
        )
        y = ops.add(y, bias)
        return ops.mul(y, ops.reduce_max(y, axes=(0, 1, 2), keepdims=False))

    graph = traced(function, [IMAGE, f32(1, 1, 24, 24), f32(24)])
    assert duplicate_producers(graph) is graph
    assert "conv" in kinds(fused(graph)[0])


def test_reductions_of_the_same_operands_share_a_kernel():
    def function(x, y):
        total = ops.reduce_sum(x, axes=(0, 1, 2), keepdims=False)
        products = ops.reduce_sum(ops.mul(x, y), axes=(0, 1, 2), keepdims=False)
        return total, ops.mul(products, products), ops.reduce_sum(x, axes=(3,), keepdims=False)

    graph = traced(function, [IMAGE, IMAGE])
    result, _ = fused(graph)
    assert [len(n.outputs) for n in result.nodes if n.name == "fusion"] == [2]
    assert full_results(result) == 0
    check_same(graph, result)


def test_a_reduction_that_needs_another_one_stays_apart():
    def function(x):
        total = ops.reduce_sum(x, axes=(0,), keepdims=True)
        return total, ops.reduce_max(ops.mul(x, total), axes=(0,), keepdims=True)

    graph = traced(function, [f32(N, 300)])
    result, _ = fused(graph)
    assert kinds(result) == ["reduce_sum", "reduce"]
    check_same(graph, result)


def test_what_only_later_kernels_read_is_left_to_them():
    def function(x, y, scale):
        cut = ops.select(ops.gt(x, np.float32(0)), y, np.float32(0))
        total = ops.reduce_sum(cut, axes=(0, 1, 2), keepdims=False)
        return cut, ops.add(ops.mul(cut, scale), total)

    graph = traced(function, [IMAGE, IMAGE, f32(24)])
    result, _ = fused(graph)
    assert full_results(result) == 2  # `cut` and the result
    check_same(graph, result)
