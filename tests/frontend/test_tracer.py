"""Tracing: what is recorded, what stays concrete, nested traces, and the errors that name a layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops as K

from kgraph import ops
from kgraph.errors import CaptureError, DimDecisionError
from kgraph.frontend.capture import capture, capture_function
from kgraph.frontend.keras_backend import core
from kgraph.frontend.tracer import GraphTracer, TracedArray, is_tracing, trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify

N, L = Dim.symbol("N"), Dim.symbol("L")


def f32(*shape):
    return TensorType(shape, "float32")


def run(graph, *inputs):
    verify(graph)
    return evaluate(graph, list(inputs))


def names(graph):
    return [node.name for node in graph.nodes]


# -- recording ---------------------------------------------------------------------------------------------------------
def test_trace_records_and_evaluates():
    graph = trace(lambda x, y: (K.matmul(x, y) + 1, x.shape[0]), f32(N, 3), f32(3, 4))
    x, y = np.random.rand(5, 3).astype("float32"), np.random.rand(3, 4).astype("float32")
    product, size = run(graph, x, y)
    np.testing.assert_allclose(product, x @ y + 1, rtol=1e-6)
    assert size == 5
    assert size.dtype == np.int32


def test_description_of_a_traced_array():
    def inspect(x):
        assert x.shape == (N, 3)
        assert x.dtype == np.float32
        assert x.ndim == 2
        assert x.size == 3 * N
        assert K.shape(x) == (N, 3)
        assert is_tracing()
        assert core.is_tensor(x)
        return x

    assert trace(inspect, f32(N, 3)).nodes == []
    assert not is_tracing()


def test_constants_are_shared_by_identity():
    table = np.arange(6, dtype="float32")
    graph = trace(lambda x: (x + table) * table, f32(6))
    assert names(graph).count("constant") == 1


def test_uniform_constants_are_fills():
    graph = trace(lambda x: x + np.zeros((64, 64), "float32"), f32(64, 64))
    assert names(graph) == ["full", "add"]
    signed = np.zeros((64,), "float32")
    signed[5] = -0.0
    assert names(trace(lambda x: x + signed, f32(64))) == ["constant", "add"]


def test_what_does_not_depend_on_an_input_is_computed_at_once():
    graph = trace(lambda x: x * K.exp(K.ones((2,))), f32(2))
    assert names(graph) == ["constant", "mul"]


def test_operators_and_methods():
    def calculate(x):
        y = 2.0 - x / 3 + x**2 - abs(-x) % 0.7
        y = np.float32(2) * y + np.ones(3, "float32")
        mask = (x > 0.5) & ~(y >= 0) | (x == y)
        return y.sum(axis=0), y.T, y.reshape(-1), y.astype("int32"), mask, y.mean(), y.max(axis=1, keepdims=True)

    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    for traced, eager in zip(run(trace(calculate, f32(4, 3)), x), calculate(x)):
        np.testing.assert_allclose(traced, eager, rtol=1e-5, atol=1e-6)


def test_promotion_is_keras():
    graph = trace(lambda x: (x / 2, x * 1.5, x + np.uint8(1)), TensorType((3,), "int32"))
    assert [v.dtype for v in graph.outputs] == ["float32", "float32", "int32"]


# -- indexing ----------------------------------------------------------------------------------------------------------
KEYS = [
    np.s_[1],
    np.s_[-1],
    np.s_[..., 0],
    np.s_[1:3],
    np.s_[:, ::2],
    np.s_[::-1],
    np.s_[:, 4:0:-2, None],
    np.s_[None, 1, ..., None, -2],
    np.s_[-2:, :-1],
    np.s_[3:2],
    np.s_[[0, 2, -1]],
    np.s_[:, [0, 2, -1]],
    np.s_[[0, 1], [2, 3]],
    np.s_[:, [0, 1], [2, 3]],
    np.s_[[0, 1], :, [2, 3]],
    np.s_[0, :, [1, 2]],
    np.s_[np.array([[0, 1], [2, 0]]), 1:3],
    np.s_[None, [0, 1], None, [2, 3]],
    np.s_[[0, 1], None, :, [2, 3]],
    np.s_[np.array([True, False, True])],
    np.s_[()],
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_as_numpy(key):
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    (traced,) = run(trace(lambda t: t[key], f32(3, 5, 4)), x)
    np.testing.assert_array_equal(traced, x[key])


@pytest.mark.parametrize(
    "key", [np.s_[:, 1:], np.s_[:, :-1], np.s_[:, -1], np.s_[:, 0], np.s_[:, ::2], np.s_[:, ::-1], np.s_[0]], ids=str
)
def test_indexing_of_symbolic_axes(key):
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    (traced,) = run(trace(lambda t: t[key], f32(N, L, 4)), x)
    np.testing.assert_array_equal(traced, x[key])


def test_traced_indices():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    graph = trace(lambda t, i: (t[i[0]], t[:, i], t[i, i]), f32(3, 5), TensorType((2,), "int32"))
    i = np.array([2, -1], "int32")
    for traced, expected in zip(run(graph, x, i), (x[2], x[:, i], x[i, i])):
        np.testing.assert_array_equal(traced, expected)


def test_index_errors():
    with pytest.raises(IndexError):
        trace(lambda x: x[3], f32(3))
    with pytest.raises(IndexError):
        trace(lambda x: x[0, 0], f32(3))
    with pytest.raises(CaptureError, match="boolean"):
        trace(lambda x: x[x > 0], f32(3))
    with pytest.raises(DimDecisionError):
        trace(lambda x: x[5:], f32(N))
    with pytest.raises(CaptureError, match="slice_update"):
        trace(lambda x: x.__setitem__(0, 1.0), f32(3))


# -- values that are not there -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "use", [bool, int, float, np.asarray, lambda x: [0, 1][x], lambda x: x.item(), lambda x: x.tolist(), np.sin]
)
def test_a_value_is_refused(use):
    with pytest.raises((CaptureError, TypeError)):
        trace(lambda x: use(x), f32())


class Undecided(layers.Layer):
    def call(self, x):
        return x * 2 if K.sum(x) > 0 else x


def test_the_error_names_the_layer():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), Undecided(name="undecided", dtype="float32")][:2])
    inputs = keras.Input((3,))
    layer = Undecided(name="undecided")
    with pytest.raises(CaptureError, match="undecided"):
        keras.Model(inputs, layer(model(inputs)))


def test_a_leaked_value_is_refused():
    kept = []
    trace(lambda x: kept.append(x + 1) or x, f32(3))
    with pytest.raises(CaptureError, match="after its trace"):
        kept[0] + 1
    with pytest.raises(CaptureError, match="outside of the trace"):
        trace(lambda x: x + kept[0], f32(3))


def test_length_and_iteration():
    graph = trace(lambda x: list(x), f32(2, 3))
    assert len(graph.outputs) == 2
    with pytest.raises(CaptureError):
        trace(lambda x: len(x), f32(N))


# -- provenance --------------------------------------------------------------------------------------------------------
def test_provenance_names_layer_and_function():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="relu", name="head")], name="inner")
    graph = capture(keras.Model(inputs, inner(inputs))).graph
    assert [sorted(n.provenance) for n in graph.nodes] == [
        ["inner/head:matmul"],
        ["inner/head:add"],
        ["inner/head:relu"],
    ]


# -- variables ---------------------------------------------------------------------------------------------------------
def test_variables_become_parameters_once():
    weight = keras.Variable(np.ones((3,), "float32"), name="weight")
    captured = capture_function(lambda x: x * weight + weight, np.ones((2, 3), "float32"))
    assert captured.variables == [weight]
    assert [p.type for p in captured.graph.params] == [f32(3)]
    assert captured.updates == []


def test_assignments_become_updates():
    counter = keras.Variable(0.0)

    def step(x):
        counter.assign_add(K.sum(x))
        return counter * 2

    captured = capture_function(step, np.ones((2, 3), "float32"))
    doubled, new = evaluate(captured.graph, [np.ones((2, 3), "float32")], [np.float32(1)])
    assert captured.updates == [counter]
    assert (doubled, new) == (14, 7)
    assert float(counter.value) == 0


def test_versions_count_assignments():
    variable = keras.Variable(np.zeros(2, "float32"))
    before, total = variable.version, core.weights_version
    variable.assign([1.0, 2.0])
    variable.assign_add([1.0, 1.0])
    assert variable.version == before + 2
    assert core.weights_version == total + 2
    assert not variable.value.flags.writeable
    np.testing.assert_array_equal(variable.numpy(), [2, 3])


def test_the_stored_value_does_not_follow_the_callers_array():
    source = np.zeros(2, "float32")
    variable = keras.Variable(source)
    source[:] = 5
    np.testing.assert_array_equal(variable.value, [0, 0])


# -- control flow ------------------------------------------------------------------------------------------------------
def test_cond_with_closed_over_values():
    weight = keras.Variable(3.0)

    def choose(x):
        y = x * 2
        return K.cond(K.sum(x) > 0, lambda: {"a": y + weight, "b": x}, lambda: {"a": x, "b": y})

    captured = capture_function(choose, np.ones(2, "float32"))
    verify(captured.graph)
    for x in (np.ones(2, "float32"), -np.ones(2, "float32")):
        a, b = evaluate(captured.graph, [x], [np.float32(3)])
        expected = choose(x)
        np.testing.assert_allclose(a, expected["a"])
        np.testing.assert_allclose(b, expected["b"])
    assert [v.path for v in captured.variables] == [weight.path]


def test_concrete_conditions_take_their_branch():
    graph = trace(lambda x: K.cond(True, lambda: x + 1, lambda: x - 1), f32(2))
    assert names(graph) == ["constant", "add"]


def test_variable_updates_inside_of_a_branch():
    counter = keras.Variable(1.0)

    def step(x):
        K.cond(K.sum(x) > 0, lambda: counter.assign_add(1.0), lambda: counter.value)
        return x

    captured = capture_function(step, np.ones(2, "float32"))
    assert captured.updates == [counter]
    for sign, expected in ((1, 2), (-1, 1)):
        _, new = evaluate(captured.graph, [np.full(2, sign, "float32")], [np.float32(1)])
        assert new == expected


def test_switch():
    graph = trace(
        lambda i, x: K.switch(i, [lambda t: t + 1, lambda t: t * 2, lambda t: -t], x), TensorType((), "int32"), f32(2)
    )
    x = np.array([1.0, 2.0], "float32")
    for i, expected in ((0, x + 1), (1, x * 2), (2, -x), (9, -x), (-3, x + 1)):
        np.testing.assert_array_equal(run(graph, np.int32(i), x)[0], expected)


def test_while_loop():
    limit = keras.Variable(20.0)

    def grow(x):
        i, y = K.while_loop(lambda i, y: K.sum(y) < limit, lambda i, y: (i + 1, y + x), (0, K.zeros_like(x)))
        return i, y, K.while_loop(lambda v: v < 100.0, lambda v: v * 2.0, K.sum(x), maximum_iterations=3)

    x = np.ones(3, "float32")
    captured = capture_function(grow, x)
    verify(captured.graph)
    results = evaluate(captured.graph, [x], [np.float32(20)])
    for traced, eager in zip(results, grow(x)):
        np.testing.assert_array_equal(traced, eager)


@pytest.mark.parametrize(("lower", "upper"), [(0, 5), (-2, 3), (4, 4), (5, 1)])
def test_fori_loop(lower, upper):
    def loop(x, upper):
        return K.fori_loop(lower, upper, lambda i, v: v + K.cast(i, "float32") * x, K.zeros_like(x))

    x, expected = np.ones(3, "float32"), np.full(3, float(sum(range(lower, upper))))
    known = trace(lambda x: loop(x, upper), f32(3))
    # A scan has a derivative. Where the end is known at run time only, there is none.
    assert "while_loop" not in names(known)
    np.testing.assert_array_equal(run(known, x)[0], expected)
    unknown = trace(loop, f32(3), TensorType((), "int32"))
    assert "while_loop" in names(unknown)
    np.testing.assert_array_equal(run(unknown, x, np.int32(upper))[0], expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(reverse):
    def accumulate(xs, w):
        def step(carry, x):
            new = {"s": carry["s"] * w + x["a"], "n": carry["n"] + 1}
            return new, (new["s"], x["b"])

        init = {"s": K.zeros((2,)), "n": 0}
        return K.scan(step, init, {"a": xs, "b": xs * 2}, reverse=reverse)

    graph = trace(lambda xs, w: keras.tree.flatten(accumulate(xs, w)), f32(L, 2), f32(2))
    xs, w = np.random.rand(5, 2).astype("float32"), np.array([0.5, 2.0], "float32")
    for traced, eager in zip(run(graph, xs, w), keras.tree.flatten(accumulate(xs, w))):
        np.testing.assert_allclose(traced, eager, rtol=1e-6)


def test_nested_control_flow_captures_through_levels():
    def nested(x, flag):
        def step(carry, row):
            return K.cond(K.sum(row) > 0, lambda: carry + row * flag, lambda: carry - x[0]), carry

        return K.scan(step, K.zeros((3,)), x)

    graph = trace(nested, f32(4, 3), f32())
    x = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    for traced, eager in zip(run(graph, x, np.float32(2)), nested(x, np.float32(2))):
        np.testing.assert_allclose(traced, eager, rtol=1e-6)


def test_variable_updates_inside_of_a_loop():
    total = keras.Variable(1.0)

    def step(xs):
        def body(carry, x):
            total.assign_add(x)
            return carry, total * 1

        return K.scan(body, 0.0, xs)[1]

    xs = np.array([1.0, 2.0, 3.0], "float32")
    captured = capture_function(step, xs)
    verify(captured.graph)
    history, new = evaluate(captured.graph, [xs], [np.float32(1)])
    np.testing.assert_array_equal(history, [2, 4, 7])
    assert new == 7


def test_map_and_vectorized_map():
    def apply(x, y):
        return K.map(lambda row: row * 2 + K.sum(row), x), K.vectorized_map(lambda p: p[0] @ p[1], (x, y))

    graph = trace(apply, f32(N, 3), f32(N, 3))
    x, y = np.random.rand(2, 4, 3).astype("float32")
    for traced, eager in zip(run(graph, x, y), apply(x, y)):
        np.testing.assert_allclose(traced, eager, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan(size, reverse):
    x = np.random.default_rng(0).uniform(0.5, 1.5, (2, size)).astype("float32")
    expected = np.cumprod(x[:, ::-1], 1)[:, ::-1] if reverse else np.cumprod(x, 1)
    scan = lambda t: K.associative_scan(lambda a, b: a * b, t, reverse=reverse, axis=1)
    np.testing.assert_allclose(scan(x), expected, rtol=1e-5)
    np.testing.assert_allclose(run(trace(scan, f32(2, size)), x)[0], expected, rtol=1e-5)


# -- shape inference ---------------------------------------------------------------------------------------------------
def test_compute_output_spec_with_unknown_sizes():
    spec = core.compute_output_spec(
        lambda x: K.reshape(x, (-1, 8)) @ np.ones((8, 3), "float32"), keras.KerasTensor((None, 4, 2))
    )
    assert spec.shape == (None, 3)
    spec = core.compute_output_spec(lambda x: {"y": x[:, 5:], "n": 3}, keras.KerasTensor((None, None, 2), "int8"))
    assert spec["y"].shape == (None, None, 2)
    assert spec["y"].dtype == "int8"
    assert spec["n"] == 3


def test_compute_output_spec_creates_no_values():
    calls = []

    def initializer(shape, dtype=None):
        calls.append(shape)
        return np.zeros(shape, dtype)

    layer = layers.Dense(3, kernel_initializer=initializer)
    core.compute_output_spec(lambda x: layer(x), keras.KerasTensor((None, 4)))
    assert calls == [(4, 3)]  # once, when the layer's variables are initialised at the end
    assert isinstance(layer.kernel.value, np.ndarray)


def test_tracer_is_independent_per_trace():
    first, second = GraphTracer("a"), GraphTracer("b")
    with first.active():
        x = first.add_input(f32(2))
        with pytest.raises(CaptureError), second.active():
            ops.add(x, x)
    assert isinstance(x, TracedArray)
