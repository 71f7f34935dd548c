"""The oracle: evaluation over references, symbolic sizes, float64 mode."""

import ml_dtypes
import numpy as np
import pytest

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.errors import InputError
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value
from kgraph.ir.interpreter import bind_sizes, evaluate

P = PRIMITIVES
N, M = Dim.symbol("N"), Dim.symbol("M")


def value(shape, dtype="float32", name=""):
    return Value(TensorType(shape, dtype), name=name)


def test_evaluates_with_params_and_symbolic_sizes():
    graph = Graph([value((N, 4))], [value((4,))])
    y = graph.add(P["mul"], [graph.inputs[0], graph.params[0]])
    flat = graph.add(P["reshape"], [y], shape=(N * 4,))
    size = graph.add(P["dim_value"], [], dim=2 * N + 1, dtype="int32")
    graph.outputs = [flat, size]
    x, w = np.arange(12, dtype="float32").reshape(3, 4), np.array([1, 2, 3, 4], "float32")
    for params in ([w], {graph.params[0]: w}):
        flat, size = evaluate(graph, [x], params)
        np.testing.assert_array_equal(flat, (x * w).reshape(-1))
        assert flat.dtype == np.float32
        assert (size, size.dtype) == (7, np.int32)


def test_float64_mode_widens_every_float():
    graph = Graph([value((3,), "bfloat16"), value((3,), "int32"), value((3,), "complex64")])
    third = graph.add(P["constant"], [], value=np.array(0.5, ml_dtypes.bfloat16))
    outputs = [
        graph.add(P["mul"], [graph.inputs[0], third]),
        graph.add(P["convert"], [graph.inputs[1]], dtype="float16"),
        graph.add(P["iota"], [], shape=(3,), dtype="float32", axis=0),
        graph.add(P["full"], [], shape=(3,), value=0.1, dtype="float32"),
        graph.add(P["dim_value"], [], dim=3, dtype="float32"),
        graph.add(P["neg"], [graph.inputs[2]]),
        graph.add(P["neg"], [graph.inputs[1]]),
        graph.add(P["real"], [graph.inputs[2]]),
    ]
    graph.outputs = outputs
    inputs = [np.ones(3, ml_dtypes.bfloat16), np.array([1, 2, 3], "int32"), np.ones(3, "complex64")]
    wide = [o.dtype.name for o in evaluate(graph, inputs, precision="float64")]
    assert wide == ["float64"] * 5 + ["complex128", "int32", "float64"]
    assert evaluate(graph, inputs, precision="float64")[3][0] == 0.1
    native = [o.dtype.name for o in evaluate(graph, inputs)]
    assert native == [o.dtype for o in outputs]


def test_float64_mode_is_precise():
    graph = Graph([value((2,))])
    one = graph.add(P["full"], [], shape=(), value=1.0, dtype="float32")
    total = graph.add(P["add"], [graph.inputs[0], one])
    graph.outputs = [graph.add(P["sub"], [total, one])]
    x = np.array([1e-9, 1e-12], "float32")
    np.testing.assert_array_equal(evaluate(graph, [x])[0], 0)
    np.testing.assert_allclose(evaluate(graph, [x], precision="float64")[0], x, rtol=1e-3)


def test_bit_casts_keep_their_dtype_in_float64_mode():
    graph = Graph([value((2,))])
    bits = graph.add(P["bitcast_convert"], [graph.inputs[0]], dtype="int32")
    graph.outputs = [bits, graph.add(P["bitcast_convert"], [bits], dtype="float32")]
    x = np.array([1.5, -2], "float32")
    bits, back = evaluate(graph, [x], precision="float64")
    np.testing.assert_array_equal(bits, x.view("int32"))
    assert back.dtype == np.float64
    np.testing.assert_array_equal(back, x)


def test_nested_evaluation_takes_over_sizes_and_precision(monkeypatch):
    from kgraph.ir import NotDifferentiable, Primitive

    inner = Graph([value((N,))], name="inner")
    inner.outputs = [inner.add(P["dim_value"], [], dim=N * M, dtype="float32")]
    call = Primitive(
        "call",
        infer=lambda x, body: body.outputs[0].type,
        reference=lambda x, body: evaluate(body, [x])[0],
        gradient=NotDifferentiable("test"),
        traits=frozenset({"control"}),
        samples=list,
    )
    graph = Graph([value((N,)), value((M,))])
    graph.outputs = [graph.add(call, [graph.inputs[0]], body=inner)]
    (out,) = evaluate(graph, [np.ones(3, "float32"), np.ones(5, "float32")], precision="float64")
    assert (out, out.dtype) == (15, np.float64)


def test_operands_that_do_not_fit():
    graph = Graph([value((N, 4)), value((N,))], name="pair")
    graph.outputs = list(graph.inputs)
    ok = np.ones((3, 4), "float32")
    with pytest.raises(InputError, match="rank 2"):
        evaluate(graph, [np.ones(3), np.ones(3)])
    with pytest.raises(InputError, match="operand 1"):
        evaluate(graph, [ok, np.ones(5)])
    with pytest.raises(InputError, match="takes 2 inputs, got 1"):
        evaluate(graph, [ok])
    with pytest.raises(InputError, match="has 0 parameters, got 1"):
        evaluate(graph, [ok, np.ones(3)], [ok])


def test_bind_sizes():
    types = [TensorType((2 * N + 1, N), "float32"), TensorType((M,), "float32")]
    assert bind_sizes(types, [(7, 3), (5,)]) == {"N": 3, "M": 5}
    with pytest.raises(InputError, match="operand 0"):
        bind_sizes(types, [(8, 3), (5,)])
    with pytest.raises(InputError, match="operand 1"):
        bind_sizes(types, [(7, 3), (5,)], {"M": 4})
