"""Scans that become one: structure and values."""

from __future__ import annotations

import numpy as np

import kgraph
from kgraph import ops
from kgraph.dims import Dim
from kgraph.frontend.tracer import trace
from kgraph.ir import Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.region_gradient import record_region
from kgraph.passes.dead_code import dead_code
from kgraph.passes.merge_scans import merge_scans

N, T = Dim.symbol("N"), Dim.symbol("T")
H, X, W = (TensorType(shape, "float32") for shape in ((N, 3), (T, N, 3), (3,)))
LOOP = {"num_carry": 1, "num_xs": 1, "length": T, "reverse": False}


def body(build, *types):
    return record_region("body", types or (H, H, W), build)


def count(graph: Graph) -> int:
    return sum(n.name == "scan" for n in graph.nodes)


def check_same(before: Graph, after: Graph):
    verify(after, after="merge_scans")
    rng = np.random.default_rng(0)
    for rows, steps in ((2, 3), (4, 1), (2, 0)):
        arrays = [rng.normal(size=s).astype(np.float32) for s in ((rows, 3), (steps, rows, 3), (3,))]
        for a, b in zip(evaluate(before, arrays), evaluate(after, arrays), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def new(h, x, w):
    return ops.tanh(ops.add(ops.mul(h, w), x))


def test_equal_carries_and_other_results_join():
    first, second = body(lambda h, x, w: [n := new(h, x, w), n]), body(lambda h, x, w: [new(h, x, w), h, ops.exp(x)])

    def function(h, x, w):
        one = ops.scan(h, x, w, body=first, **LOOP)
        shifted = ops.add(one[1], np.float32(1))
        two = ops.scan(h, x, w, body=second, **LOOP)
        return [shifted, one[0], *two]

    graph = trace(function, H, X, W)
    after = merge_scans(graph)
    assert count(graph) == 2
    assert count(after) == 1
    check_same(graph, after)


def test_scans_that_differ_stay_apart():
    first, second = body(lambda h, x, w: [n := new(h, x, w), n]), body(lambda h, x, w: [ops.sin(new(h, x, w)), h])
    graph = trace(lambda *v: [*ops.scan(*v, body=first, **LOOP), *ops.scan(*v, body=second, **LOOP)], H, X, W)
    assert count(merge_scans(graph)) == 2
    backward = dict(LOOP, reverse=True)
    graph = trace(lambda *v: [*ops.scan(*v, body=first, **LOOP), *ops.scan(*v, body=first, **backward)], H, X, W)
    assert count(merge_scans(graph)) == 2
    graph = trace(lambda h, x, w: ops.scan(ops.scan(h, x, w, body=first, **LOOP)[0], x, w, body=first, **LOOP), H, X, W)
    assert count(merge_scans(graph)) == 2


def test_a_gradient_needs_one_scan_each_way():
    step = body(lambda h, x, w: [n := new(h, x, w), ops.mul(n, n)])

    def loss(h, x, w):
        last, ys = ops.scan(h, x, w, body=step, **LOOP)
        return ops.add(ops.reduce_sum(last, axes=(0, 1)), ops.reduce_sum(ys, axes=(0, 1, 2)))

    def function(*operands):
        value, gradients = kgraph.value_and_grad(loss, argnums=(0, 1, 2))(*operands)
        return [value, *gradients]

    graph = dead_code(trace(function, H, X, W))
    after = merge_scans(graph)
    assert count(graph) == 3
    assert count(after) == 2
    check_same(graph, after)
