"""What bodies of control flow have of the passes: weights prepared ahead of calls, constants, fewer operands."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kgraph
from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.region_gradient import record_region
from kgraph.runtime.control import While
from kgraph.runtime.steps import HostStep

X, W, COUNT = TensorType((3, 64), "float32"), TensorType((64, 64), "float32"), TensorType((), "int32")


def dot(a, b):
    return ops.dot_general(a, b, lhs_contract=(1,), rhs_contract=(0,), lhs_batch=(), rhs_batch=())


def with_params(build, inputs, params) -> Graph:
    """The graph of a function, the last arguments of which are params."""
    graph = trace(build, *inputs, *params)
    cut = len(inputs)
    return Graph(graph.inputs[:cut], graph.inputs[cut:], graph.nodes, graph.outputs, graph.name)


def counted(step, limit=3):
    """A loop of so many iterations over (number, x), in which the weights behind them are passed on."""

    def build(x, *weights):
        types = [COUNT, X, *(TensorType(w.shape, w.dtype.name) for w in weights)]
        body = record_region("body", types, lambda i, x, *w: [ops.add(i, np.int32(1)), step(x, *w), *w])
        body.outputs[2:] = body.inputs[2:]
        cond = record_region("cond", types, lambda i, x, *w: [ops.lt(i, np.int32(limit))])
        return ops.while_loop(np.int32(0), x, *weights, cond=cond, body=body)[1]

    return build


def scanned(step):
    def build(x, *weights):
        types = [X, *(TensorType(w.shape, w.dtype.name) for w in weights)]
        body = record_region("body", types, lambda x, *w: [step(x, *w)])
        attrs = {"num_carry": 1, "num_xs": 0, "length": 3, "reverse": False}
        return ops.scan(x, *weights, body=body, **attrs)[0]

    return build


def branched(step):
    def build(x, *weights):
        types = [X, *(TensorType(w.shape, w.dtype.name) for w in weights)]
        same = record_region("same", types, lambda x, *w: [ops.neg(x)])
        other = record_region("other", types, lambda x, *w: [step(step(step(x, *w), *w), *w)])
        chosen = ops.ge(ops.reduce_sum(ops.abs(x), axes=(0, 1), keepdims=False), np.float32(0))
        return ops.cond(chosen, x, *weights, branches=(same, other))[0]

    return build


def step(x, w, scale):
    """Reads the weight transposed and scaled, as what folding leaves behind."""
    return ops.tanh(dot(x, ops.mul(ops.transpose(w, permutation=(1, 0)), scale)))


@pytest.mark.parametrize("loop", [counted, scanned, branched])
def test_weights_of_bodies_are_packed_ahead_of_calls(loop):
    graph = with_params(loop(step), [X], [W, TensorType((64,), "float32")])
    compiled = compile_graph(graph)
    assert "pack" in {n.name for n in compiled.prologue.nodes}
    (control,) = [n for n in compiled.optimised.nodes if n.name in ("while_loop", "scan", "cond")]
    bodies = [g for a in control.attrs.values() for g in (a if isinstance(a, tuple) else (a,)) if isinstance(g, Graph)]
    for body in bodies:
        verify(body)
    inside = [n for body in bodies for n in body.nodes]
    assert not {"transpose", "mul", "pack"} & {n.name for n in inside}
    assert any(n.attrs.get("packed") for n in inside)

    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(3, 64)), rng.normal(size=(64, 64)) / 8, rng.normal(size=64)]
    arrays = [a.astype(np.float32) for a in arrays]
    (wanted,) = evaluate(graph, arrays[:1], arrays[1:], precision="float64")
    compiled.set_params(arrays[1:])
    sizes = compiled.program.resolve([arrays[0].shape])
    (got,) = compiled.program.bind(sizes)(arrays[:1])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_loop_gives_what_is_read_alone():
    graph = with_params(counted(step), [X], [W, TensorType((64,), "float32")])
    (host,) = [s for s in compile_graph(graph).program.steps if isinstance(s, HostStep)]
    assert isinstance(host.function, While)
    assert host.outputs == 1
    assert host.function.wanted == (1,)  # x, neither the number nor what is packed


def test_constants_move_into_bodies():
    def build(x):
        limit = ops.add(np.int32(1), np.int32(2))
        types = [COUNT, X, COUNT]
        body = record_region("body", types, lambda i, x, n: [ops.add(i, np.int32(1)), ops.sin(x), n])
        body.outputs[2] = body.inputs[2]
        cond = record_region("cond", types, lambda i, x, n: [ops.lt(i, n)])
        return ops.while_loop(np.int32(0), x, limit, cond=cond, body=body)[1:]

    graph = trace(build, X)
    compiled = compile_graph(graph)
    (loop,) = [n for n in compiled.optimised.nodes if n.name == "while_loop"]
    assert len(loop.inputs) == 2
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    got, limit = compiled.program.bind({})([x])
    np.testing.assert_allclose(got, np.sin(np.sin(np.sin(x))), rtol=1e-6)
    assert limit == 3


def test_weights_of_a_loop_can_be_assigned():
    dense = keras.layers.Dense(8)
    dense.build((None, 8))
    x = np.ones((2, 8), np.float32)

    @kgraph.jit
    def run(x):
        return keras.ops.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, keras.ops.tanh(dense(x))), (0, x))[1]

    def wanted():
        y = x
        for _ in range(3):
            y = np.tanh(y @ np.asarray(dense.kernel) + np.asarray(dense.bias))
        return y

    np.testing.assert_allclose(run(x), wanted(), rtol=1e-5, atol=1e-6)
    dense.set_weights([np.eye(8, dtype=np.float32) * 2, np.full(8, 0.5, np.float32)])
    np.testing.assert_allclose(run(x), wanted(), rtol=1e-5, atol=1e-6)
