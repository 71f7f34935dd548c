"""What leaves a loop: structure, values, sizes."""

from __future__ import annotations

import numpy as np
import pytest

import kgraph
from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.dims import Dim
from kgraph.frontend.tracer import trace
from kgraph.ir import Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.region_gradient import record_region
from kgraph.passes.dead_code import dead_code
from kgraph.passes.merge_scans import merge_scans
from kgraph.passes.pipeline import TRAINING
from kgraph.passes.split_scan import split_scan

N, T = Dim.symbol("N"), Dim.symbol("T")


def f32(*shape):
    return TensorType(shape, "float32")


def dot(a, b, lhs=(1,), rhs=(0,)):
    return ops.dot_general(a, b, lhs_contract=lhs, rhs_contract=rhs, lhs_batch=(), rhs_batch=())


def scanned(build, carries, xs, constants=(), reverse=False, length=T) -> Graph:
    slices = [TensorType(x.shape[1:], x.dtype) for x in xs]
    body = record_region("body", [*carries, *slices, *constants], build)
    attrs = {"body": body, "num_carry": len(carries), "num_xs": len(xs), "length": length, "reverse": reverse}
    return trace(lambda *operands: ops.scan(*operands, **attrs), *carries, *xs, *constants)


def scan_of(graph: Graph):
    (node,) = [n for n in graph.nodes if n.name == "scan"]
    return node


def inside(graph: Graph) -> list[str]:
    return [n.name for n in scan_of(graph).attrs["body"].nodes if n.name != "constant"]


def operands_for(graph: Graph, rows: int, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [[s if isinstance(s, int) else s.evaluate({"N": rows, "T": steps}) for s in v.shape] for v in graph.inputs]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check_same(before: Graph, after: Graph, sizes=((2, 3), (1, 1), (3, 0)), tolerance=1e-9):
    verify(after, after="split_scan")
    for rows, steps in sizes:
        arrays = operands_for(before, rows, steps)
        wanted = evaluate(before, arrays, precision="float64")
        for a, b in zip(evaluate(after, arrays, precision="float64"), wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def cell(h, x, k, r, b):
    new = ops.tanh(ops.add(ops.add(dot(x, k), dot(h, r)), b))
    return [new, new]


CELL = [f32(N, 4)], [f32(T, N, 3)], [f32(3, 4), f32(4, 4), f32(4)]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_product_with_the_inputs_comes_first(reverse):
    graph = scanned(cell, *CELL, reverse=reverse)
    after = split_scan(graph)
    assert inside(graph).count("dot_general") == 2
    assert inside(after).count("dot_general") == 1
    assert [n.name for n in after.nodes] == ["dot_general", "scan"]
    check_same(graph, after)


def test_products_of_results_come_after():
    def build(h, x, k):
        new = ops.sin(ops.add(h, x))
        return [new, ops.exp(ops.reshape(dot(new, k), shape=(5, N))), dot(k, h, (0,), (1,))]

    graph = scanned(build, [f32(N, 4)], [f32(T, N, 4)], [f32(4, 5)])
    after = split_scan(graph)
    assert "dot_general" not in inside(after)
    check_same(graph, after)


def test_products_of_inputs_alone_leave_the_loop():
    graph = scanned(lambda h, x, k: [ops.add(h, x), ops.neg(dot(x, k))], [f32(N, 4)], [f32(T, N, 4)], [f32(4, 5)])
    after = split_scan(graph)
    assert inside(after) == ["add"]
    check_same(graph, after)


def test_what_is_the_same_in_all_steps_is_computed_once():
    def build(h, x, k):
        return [ops.add(dot(h, ops.transpose(ops.exp(k))), x)]

    graph = scanned(build, [f32(N, 4)], [f32(T, N, 4)], [f32(4, 4)])
    after = split_scan(graph)
    assert inside(after) == ["dot_general", "add"]
    check_same(graph, after)


def test_sums_become_contractions():
    def build(state, total, bias, x):
        new = ops.cos(ops.add(state, x))
        product = ops.transpose(dot(x, new, (0,), (0,)))
        return [new, ops.add(total, product), ops.add(ops.reduce_sum(new, axes=(0,)), bias), new]

    graph = scanned(build, [f32(N, 4), f32(4, 4), f32(4)], [f32(T, N, 4)])
    after = split_scan(graph)
    assert inside(after) == ["add", "cos", "reduce_sum", "add"], "small sums stay"
    check_same(graph, after)


@pytest.mark.parametrize("reads", ["result", "other carry", "product of itself"])
def test_carries_that_are_read_stay(reads):
    def build(state, total, x):
        new = ops.add(total, dot(x, x, (0,), (0,)))
        if reads == "result":
            return [ops.sin(state), new, new]
        if reads == "other carry":
            return [ops.add(state, total), new]
        return [state, ops.add(total, dot(total, total))]

    graph = scanned(build, [f32(4, 4), f32(4, 4)], [f32(T, N, 4)])
    after = split_scan(graph)
    check_same(graph, after)
    assert scan_of(after).attrs["num_carry"] == 2


def convolution(x, w):
    return ops.conv(x, w, strides=(1, 1), padding=((1, 1), (1, 1)))


def loss_of(build, carries, xs, constants, reverse=False):
    body = record_region("body", [*carries, *(TensorType(x.shape[1:], x.dtype) for x in xs), *constants], build)

    def loss(*operands):
        attrs = {"num_carry": len(carries), "num_xs": len(xs), "length": T, "reverse": reverse}
        last, ys = ops.scan(*operands, body=body, **attrs)
        return ops.add(
            ops.reduce_sum(ops.mul(ys, ys), axes=tuple(range(len(ys.shape)))),
            ops.reduce_sum(last, axes=tuple(range(len(last.shape)))),
        )

    def function(*operands):
        value, gradients = kgraph.value_and_grad(loss, argnums=tuple(range(len(operands))))(*operands)
        return [value, *gradients]

    return dead_code(trace(function, *carries, *xs, *constants))


def conv_cell(h, x, k, r, b):
    first, second = (ops.slice(k, start=(0, 0, 0, i * 2), limit=(3, 3, 3, i * 2 + 2)) for i in range(2))
    gate = ops.logistic(ops.add(convolution(x, first), convolution(h, r)))
    new = ops.add(ops.mul(gate, h), ops.tanh(ops.add(convolution(x, second), b)))
    return [new, ops.mul(new, gate)]


CONV_CELL = [f32(N, 5, 4, 2)], [f32(T, N, 5, 4, 3)], [f32(3, 3, 3, 4), f32(3, 3, 2, 2), f32(2)]


@pytest.mark.parametrize(("build", "types", "products"), [(cell, CELL, 1), (conv_cell, CONV_CELL, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_keep_only_the_products_with_the_state(build, types, products, reverse):
    graph = loss_of(build, *types, reverse=reverse)
    after = split_scan(dead_code(merge_scans(graph)))
    loops = [n.attrs["body"] for n in after.nodes if n.name == "scan"]
    assert len(loops) == 2
    for body in loops:
        found = [n.name for n in body.nodes if n.name in ("dot_general", "conv", "conv_filter_gradient")]
        assert len(found) == products, found
    check_same(graph, after)


@pytest.mark.parametrize(("build", "types"), [(cell, CELL), (conv_cell, CONV_CELL)])
def test_compiled_gradients(build, types):
    graph = loss_of(build, *types)
    compiled = compile_graph(graph, passes=TRAINING)
    for rows, steps in ((3, 4), (1, 1), (2, 0)):
        arrays = operands_for(graph, rows, steps)
        wanted = evaluate(graph, arrays, precision="float64")
        for a, b in zip(compiled.program(arrays), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_large_intermediate_values_stay_in_the_loop():
    """Attention in chunks of queries: the scores of all chunks together are what the loop avoids."""

    def build(q, k, v):
        scores = dot(q, k, (1,), (1,))
        return [dot(ops.softmax(scores, axis=1), v)]

    graph = scanned(build, [], [f32(T, 8, 16)], [f32(2000, 16), f32(2000, 16)])
    after = split_scan(graph)
    assert inside(after) == inside(graph)


def test_random_bodies_and_loops_within_keep_their_order():
    def build(h, seed, x, k):
        kept = ops.lt(ops.random_uniform(seed, shape=(N, 4)), np.float32(0.5))
        new = ops.select(kept, ops.add(h, dot(x, k)), h)
        return [new, ops.add(seed, np.array([1, 0], np.uint32)), dot(new, k)]

    graph = scanned(build, [f32(N, 4), TensorType((2,), "uint32")], [f32(T, N, 4)], [f32(4, 4)])
    after = split_scan(graph)
    assert inside(after).count("random_uniform") == 1
    assert "dot_general" not in inside(after)
    verify(after, after="split_scan")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays = [draw(2, 4), np.array([5, 6], np.uint32), draw(3, 2, 4), draw(4, 4)]
    for a, b in zip(evaluate(after, arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
