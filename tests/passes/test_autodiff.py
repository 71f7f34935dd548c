"""Reverse mode over graphs: what is appended, what is left out, and values against central differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops
from kgraph.errors import DTypeError, GradientError, ShapeError
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType, Value
from kgraph.ir.interpreter import evaluate
from kgraph.ir.parser import parse_graph
from kgraph.ir.verifier import verify
from kgraph.passes.autodiff import differentiate
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.pipeline import TRAINING

N = Dim.symbol("N")
STEP = 1e-6


def f32(*shape):
    return TensorType(shape, "float32")


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.name not in ("constant", "full")]


def total(x):
    return ops.reduce_sum(x, axes=tuple(range(len(x.shape))), keepdims=False)


def check_by_differences(graph: Graph, wrt, seed=0):
    """`differentiate` of a graph with one float scalar as output, against central differences."""
    joint = differentiate(graph, wrt)
    verify(joint, after="differentiate")
    rng = np.random.default_rng(seed)
    values = [*graph.inputs, *graph.params]

    def draw(value):
        shape = tuple(s if isinstance(s, int) else s.evaluate({"N": 3}) for s in value.shape)
        return rng.uniform(0.5, 1.5, shape) if value.type.is_float else rng.integers(0, 2, shape).astype(value.dtype)

    arrays = {v: draw(v) for v in values}
    run = lambda g, a: evaluate(g, [a[v] for v in g.inputs], [a[v] for v in g.params], precision="float64")
    gradients = run(joint, arrays)[len(graph.outputs) :]
    for value, gradient in zip(wrt, gradients, strict=True):
        direction = rng.standard_normal(arrays[value].shape)
        ends = [run(graph, {**arrays, value: arrays[value] + s * STEP * direction})[0] for s in (1, -1)]
        assert gradient.shape == arrays[value].shape
        np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / (2 * STEP), rtol=1e-6, atol=1e-7)
    return joint


# -- structure --------------------------------------------------------------------------------------------------------
def test_backward_nodes_follow_the_forward_nodes():
    graph = trace(lambda x, y: total(ops.mul(ops.sin(x), y)), f32(3), f32(3))
    joint = check_by_differences(graph, [graph.inputs[0]])
    assert joint.nodes[:3] == graph.nodes, "the forward nodes are shared"
    assert names(joint) == ["sin", "mul", "reduce_sum", "mul", "cos", "mul"]
    assert joint.outputs[0] is graph.outputs[0]
    assert joint.outputs[1].type == graph.inputs[0].type
    assert len(graph.outputs) == 1, "the given graph stays as it is"


def test_only_what_wrt_needs_is_computed():
    def function(x, w, v):
        return total(ops.dot_general(ops.tanh(ops.mul(x, v)), w, lhs_contract=(1,), rhs_contract=(0,)))

    graph = trace(function, f32(N, 3), f32(3, 2), f32(3))
    by_weight = check_by_differences(graph, [graph.inputs[1]])
    assert names(by_weight).count("dot_general") == 2
    assert "sub" not in names(by_weight), "nothing of the derivative of tanh"
    everything = check_by_differences(graph, graph.inputs)
    assert names(everything).count("dot_general") == 3


def test_dead_branches_are_pruned():
    graph = trace(lambda x: (total(x), ops.exp(x))[0], f32(3))
    assert names(graph) == ["reduce_sum", "exp"]
    assert "exp" not in names(differentiate(graph, graph.inputs))


def test_provenance_is_the_forward_layers_with_a_mark():
    graph = parse_graph("""graph "g" {
      inputs (%x: f32[3])
      %y: f32[3] = sin(%x) @ "block/first:sin"
      %z: f32[3] = exp(%y) @ "block/second:exp"
      %s: f32[] = reduce_sum(%z) {axes=(0,), keepdims=False}
      return (%s)
    }""")
    joint = differentiate(graph, graph.inputs)
    verify(joint)
    backward = joint.nodes[3:]
    marks = {p for n in backward for p in n.provenance}
    assert marks == {"block/first:sin (backward)", "block/second:exp (backward)"}
    assert next(n for n in backward if n.name == "cos").provenance == {"block/first:sin (backward)"}


# -- values -----------------------------------------------------------------------------------------------------------
def test_cotangents_of_a_value_used_several_times_are_summed():
    def function(x, y):
        s = ops.mul(x, y)
        return total(ops.add(ops.mul(s, s), ops.mul(ops.exp(s), x)))

    graph = trace(function, f32(2, 3), f32(3))
    check_by_differences(graph, graph.inputs)


def test_a_wrt_value_that_is_the_output_or_unused():
    graph = trace(lambda x, y: total(x), f32(2), f32(4))
    joint = differentiate(graph, [graph.outputs[0], graph.inputs[1]])
    one, zeros = evaluate(joint, [np.ones(2), np.ones(4)])[1:]
    assert one == 1
    np.testing.assert_array_equal(zeros, np.zeros(4, np.float32))


def test_intermediate_values_as_wrt():
    graph = trace(lambda x: total(ops.exp(ops.sin(x))), f32(3))
    hidden = graph.nodes[0].outputs[0]
    joint = differentiate(graph, [hidden, graph.inputs[0]])
    x = np.linspace(0, 1, 3).astype(np.float32)
    _, to_hidden, to_input = evaluate(joint, [x])
    np.testing.assert_allclose(to_hidden, np.exp(np.sin(x)), rtol=1e-6)
    np.testing.assert_allclose(to_input, np.exp(np.sin(x)) * np.cos(x), rtol=1e-6)


def test_several_outputs_with_given_cotangents():
    graph = trace(lambda x: [ops.sin(x), ops.mul(x, x), ops.argmax(x, axis=0, dtype="int32")], f32(3))
    cotangent = Value(f32(3), name="dy")
    joint = differentiate(graph, graph.inputs, graph.outputs[:2], [cotangent, np.full(3, 2.0, np.float32)])
    verify(joint)
    assert joint.inputs == [*graph.inputs, cotangent]
    x, dy = np.linspace(0, 1, 3).astype(np.float32), np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(evaluate(joint, [x, dy])[-1], dy * np.cos(x) + 4 * x, rtol=1e-6)
    half = differentiate(graph, graph.inputs, graph.outputs[:2], [None, np.ones(3, np.float32)])
    assert "cos" not in names(half)


def test_a_primitive_with_several_results_of_which_one_is_used():
    graph = trace(lambda x: total(ops.top_k(x, k=2)[0]), f32(4))
    joint = differentiate(graph, graph.inputs)
    (gradient,) = evaluate(joint, [np.array([3, 1, 4, 2], np.float32)])[1:]
    np.testing.assert_array_equal(gradient, [1, 0, 1, 0])


def test_integers_and_bools_are_skipped():
    def function(table, indices, x):
        rows = ops.take(table, indices, axis=0)
        return total(ops.select(ops.lt(rows, x), rows, ops.mul(rows, rows)))

    graph = trace(function, f32(2, 3), TensorType((N,), "int32"), f32(3))
    check_by_differences(graph, [graph.inputs[0], graph.inputs[2]])


def test_stop_gradient_cuts_the_path():
    graph = trace(lambda x: total(ops.mul(x, ops.stop_gradient(ops.sin(x)))), f32(3))
    joint = differentiate(graph, graph.inputs)
    assert "cos" not in names(joint)
    x = np.linspace(0, 1, 3).astype(np.float32)
    np.testing.assert_allclose(evaluate(joint, [x])[1], np.sin(x), rtol=1e-6)


def test_symbolic_sizes():
    def function(x, w, b):
        h = ops.relu(ops.add(ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,)), b))
        return total(ops.log_softmax(h, axis=-1))

    graph = trace(function, f32(N, 4), f32(4, 3), f32(3))
    check_by_differences(graph, graph.inputs)


def test_params_as_wrt():
    graph = trace(lambda x, w: total(ops.mul(ops.exp(x), w)), f32(N, 3), f32(3))
    graph.params, graph.inputs = graph.inputs[1:], graph.inputs[:1]
    check_by_differences(graph, graph.params)


def test_second_derivatives():
    graph = trace(lambda x: total(ops.mul(ops.sin(x), ops.exp(x))), f32(3))
    first = differentiate(graph, graph.inputs)
    by_sum = Graph(first.inputs, first.params, first.nodes, [first.outputs[1]])
    second = differentiate(by_sum, by_sum.inputs, by_sum.outputs, [np.ones(3, np.float32)])
    verify(second)
    x = np.linspace(0, 1, 3).astype(np.float32)
    np.testing.assert_allclose(evaluate(second, [x])[-1], 2 * np.cos(x) * np.exp(x), rtol=1e-5, atol=1e-6)


def test_the_training_passes_keep_values():
    def function(x, w, g):
        y = ops.conv(x, w, strides=1, padding="same")
        mean = ops.reduce_sum(y, axes=(0, 1, 2), keepdims=True)
        return total(ops.mul(ops.relu(ops.mul(ops.sub(y, mean), g)), y))

    graph = trace(function, f32(N, 5, 4, 2), f32(3, 3, 2, 3), f32(3))
    joint = differentiate(graph, graph.inputs)
    after = run_passes(joint, TRAINING, PassContext())
    verify(after)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((2, 5, 4, 2), (3, 3, 2, 3), (3,))]
    wanted, got = (evaluate(g, arrays, precision="float64") for g in (joint, after))
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# -- errors -----------------------------------------------------------------------------------------------------------
NEXT = """graph "g" {
  inputs (%x: f32[3], %y: f32[3])
  %z: f32[3] = nextafter(%y, %y) @ "model/odd:nextafter"
  %p: f32[3] = mul(%x, %z)
  %s: f32[] = reduce_sum(%p) {axes=(0,), keepdims=False}
  return (%s)
}"""


def test_a_missing_derivative_on_the_way_is_named_with_its_layer():
    graph = parse_graph(NEXT)
    with pytest.raises(GradientError, match=r"nextafter.*model/odd.*one unit in the last place"):
        differentiate(graph, [graph.inputs[1]])


def test_a_missing_derivative_off_the_way_does_not_matter():
    graph = parse_graph(NEXT)
    joint = differentiate(graph, [graph.inputs[0]])
    x = np.ones(3, np.float32)
    np.testing.assert_allclose(evaluate(joint, [x, x])[1], 1, rtol=1e-6)


def test_what_cannot_be_differentiated():
    graph = trace(lambda x, i: ops.take(x, i, axis=0), f32(3), TensorType((2,), "int32"))
    with pytest.raises(DTypeError, match="int32"):
        differentiate(graph, [graph.inputs[1]])
    with pytest.raises(ShapeError, match="scalar"):
        differentiate(graph, [graph.inputs[0]])
    with pytest.raises(ShapeError, match="needs its type"):
        differentiate(graph, [graph.inputs[0]], graph.outputs, [np.ones(3, np.float32)])
