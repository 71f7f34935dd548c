"""Updates of state in a program: small ones joined in one kernel, large ones right after their gradients."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.updates import LARGEST_MEMBER
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import GraphTracer
from kgraph.ir import TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.passes.pipeline import TRAINING

RNG = np.random.default_rng(0)


def momentum_step(shapes, transforms=None):
    """A step `m = 0.9 m + t(g), w = w - rate * m` for weights of the shapes: (graph, donations)."""
    tracer = GraphTracer("step")
    with tracer.active():
        rate = tracer.add_input(TensorType((), "float32"))
        outputs = []
        for shape, transform in zip(shapes, transforms or [lambda g: g] * len(shapes)):
            w, m, g = (tracer.add_input(TensorType(shape, "float32")) for _ in range(3))
            m = ops.add(ops.mul(m, np.float32(0.9)), transform(g))
            outputs += [ops.sub(w, ops.mul(rate, m)), m]
        tracer.graph.outputs = [tracer.lift(o) for o in outputs]
    donations = [(1 + 3 * n + k, 2 * n + k) for n in range(len(shapes)) for k in range(2)]
    return tracer.graph, donations


def run(graph, donations, shapes):
    arrays = [np.float32(0.1).reshape(())]
    arrays += [RNG.standard_normal(s).astype(np.float32) for s in shapes for _ in range(3)]
    expected = evaluate(graph, [a.astype(np.float64) for a in arrays], [])
    compiled = compile_graph(graph, None, TRAINING, donations)
    given = [a.copy() for a in arrays]
    results = compiled.program(given)
    for number, (result, wanted) in enumerate(zip(results, expected)):
        assert result is given[{o: i for i, o in donations}[number]]
        np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-6)
    return compiled


@pytest.mark.parametrize("count", [2, 5, 40])
def test_small_updates_of_one_form_are_one_kernel(count):
    sizes = [1, 2, 3, 17, 64, 511, 512, 513, 2000, 0]
    shapes = [(sizes[i % len(sizes)] + i // len(sizes) * 7 + 2,) if i % 3 else (i + 2, 5) for i in range(count)]
    compiled = run(*momentum_step(shapes), shapes)
    assert [s.label for s in compiled.program.steps if s.label.endswith("_group")] == [compiled.program.steps[0].label]
    assert len(compiled.program.steps) == 1


def test_large_updates_stay_alone():
    shapes = [(LARGEST_MEMBER + 1,), (300, 200), (10,), (20,)]
    compiled = run(*momentum_step(shapes), shapes)
    assert sorted(s.label.endswith("_group") for s in compiled.program.steps) == [False, False, True]


def test_updates_of_different_forms_are_not_mixed():
    shapes = [(5,), (9,), (5,), (9,)]
    compiled = run(*momentum_step(shapes, [ops.abs, ops.neg, ops.abs, ops.neg]), shapes)
    assert [s.label.endswith("_group") for s in compiled.program.steps] == [True, True]
    assert len({s.kernel for s in compiled.program.steps}) == 2


def test_a_large_update_comes_right_after_its_gradient():
    """Two products give gradients; each is used up before the next is made, so the arena holds one at a time."""
    n = 256
    tracer = GraphTracer("step")
    with tracer.active():
        weights = [tracer.add_input(TensorType((n, n), "float32")) for _ in range(3)]
        x = tracer.add_input(TensorType((64, n), "float32"))
        gradients = [ops.matmul(ops.transpose(x, permutation=(1, 0)), ops.mul(x, np.float32(k + 1))) for k in range(3)]
        # The norm of all gradients is not needed, so nothing keeps them.
        new = [ops.sub(w, ops.mul(g, ops.abs(g))) for w, g in zip(weights, gradients)]
        tracer.graph.outputs = [tracer.lift(o) for o in new]
    donations = [(i, i) for i in range(3)]
    compiled = compile_graph(tracer.graph, None, TRAINING, donations)
    binding = compiled.program.bind({})
    assert binding.storage.arena_bound < 2 * n * n * 4
    arrays = [RNG.standard_normal(tuple(b)).astype(np.float32) for b in [(n, n)] * 3 + [(64, n)]]
    expected = evaluate(tracer.graph, [a.astype(np.float64) for a in arrays], [])
    for result, wanted in zip(compiled.program([a.copy() for a in arrays]), expected):
        np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=2e-3)


def test_updates_that_read_each_others_state_keep_their_order():
    """b reads the old a: a must not be overwritten before."""
    n = LARGEST_MEMBER * 2
    tracer = GraphTracer("step")
    with tracer.active():
        a, b, g = (tracer.add_input(TensorType((n,), "float32")) for _ in range(3))
        tracer.graph.outputs = [tracer.lift(ops.add(a, g)), tracer.lift(ops.mul(ops.exp(b), ops.abs(a)))]
    compiled = compile_graph(tracer.graph, None, TRAINING, [(0, 0), (1, 1)])
    arrays = [RNG.standard_normal(n).astype(np.float32) for _ in range(3)]
    expected = evaluate(tracer.graph, arrays, [])
    for result, wanted in zip(compiled.program([x.copy() for x in arrays]), expected):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)
