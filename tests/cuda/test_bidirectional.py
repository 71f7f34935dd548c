"""Recurrent layers that read one sequence, on CUDA: one launch, whose parts write the joined sequences."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kgraph
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import simulator_target
from kgraph.ir import PRIMITIVES, Graph, Node, Value, type_of
from kgraph.ir.interpreter import evaluate
from kgraph.ops.recurrent import RNN, RNN_GRADIENT
from tests.codegen.samples import compare
from tests.cuda.driver import DEVICE, run_node

STEPS, FEATURES, UNITS = 5, 3, 17  # more units than a block of the simulator has threads
LAYERS = {
    "lstm": lambda **options: keras.layers.LSTM(UNITS, **options),
    "gru": lambda **options: keras.layers.GRU(UNITS, **options),
    "gru, reset before": lambda **options: keras.layers.GRU(UNITS, reset_after=False, **options),
    "simple": lambda **options: keras.layers.SimpleRNN(UNITS, **options),
}
SAMPLES = {s.name: s for s in RNN.samples()}
GRADIENTS = {s.name: s for s in RNN_GRADIENT.samples()}


def joined(sample, reverse: list[bool]) -> tuple[Node, list[np.ndarray]]:
    """Layers of weights of their own over one sequence, whose sequences are concatenated; and what they give."""
    random = np.random.default_rng(0)
    count = 5 + len(RNN.reference(*sample.args, **sample.attrs)) - 1
    graph = Graph([Value(type_of(sample.args[0]))])
    arrays, sequences, states, results = [sample.args[0]], [], [], []
    for backward in reverse:
        own = [random.uniform(-1, 1, a.shape).astype(a.dtype) for a in sample.args[1:count]] + list(sample.args[count:])
        operands = [Value(type_of(a)) for a in own]
        graph.inputs = [*graph.inputs, *operands]
        attrs = sample.attrs | {"reverse": backward}
        sequence, *finals = graph.add(RNN, [graph.inputs[0], *operands], **attrs)
        results.append(RNN.reference(sample.args[0], *own, **attrs))
        arrays += own
        sequences.append(sequence)
        states += finals
    graph.outputs = [graph.add(PRIMITIVES["concatenate"], sequences, axis=2), *states]
    inputs = [Value(v.type) for v in graph.inputs]
    node = Node(PRIMITIVES["fusion"], inputs, {"kind": "rnn", "body": graph}, [v.type for v in graph.outputs])
    whole = np.concatenate([r[0] for r in results], axis=2)
    return (node, arrays), [whole, *(s for r in results for s in r[1:])]


NAMES = [
    "odd sizes",
    "lstm, backward in time, masked",
    "gru",
    "gru, reset before",
    "gru, reset before, masked with zeros",
    "simple, softplus, masked with zeros",
    "one step, one unit",
    "no steps",
]


@pytest.mark.parametrize("reverse", [[False, True], [True, False, True]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layers_write_one_sequence(name, reverse):
    (node, arrays), wanted = joined(SAMPLES[name], reverse)
    *_, call = families.lower(node, simulator_target())
    assert tuple(call.operands[-len(node.outputs) :]) == node.outputs  # the whole once, then the states of each
    for result, expected in zip(run_node(node, arrays), wanted, strict=True):
        assert result.shape == expected.shape
        compare(result, expected, RNN.tolerance)


@pytest.mark.parametrize("reverse", [[False, True], [True, False, True]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_several_layers_are_two_launches(name, reverse):
    sample, random = GRADIENTS[name], np.random.default_rng(0)
    graph = Graph([Value(type_of(sample.args[0]))])
    arrays, results, wanted = [sample.args[0]], [], []
    for backward in reverse:
        own = [a if a.dtype == bool else random.uniform(-1, 1, a.shape).astype(a.dtype) for a in sample.args[1:]]
        graph.inputs = [*graph.inputs, *(Value(type_of(a)) for a in own)]
        attrs = sample.attrs | {"reverse": backward}
        results += graph.add(RNN_GRADIENT, [graph.inputs[0], *graph.inputs[len(arrays) :]], **attrs)
        wanted += RNN_GRADIENT.reference(sample.args[0], *own, **attrs)
        arrays += own
    graph.outputs = results
    inputs, types = [Value(v.type) for v in graph.inputs], [v.type for v in results]
    node = Node(PRIMITIVES["fusion"], inputs, {"kind": "rnn_gradient", "body": graph}, types)
    kernels = [call.spec.name for call in families.lower(node, simulator_target())]
    cell = sample.attrs["cell"]
    assert [k for k in kernels if k.startswith(cell)] == [f"{cell}_bidirectional_{k}" for k in ("kept", "back")]
    for result, expected in zip(run_node(node, arrays), wanted, strict=True):
        assert result.shape == expected.shape
        compare(result, expected, RNN_GRADIENT.tolerance)


def model_of(layer: str, merge_mode: str = "concat", mask: bool = False, **options) -> keras.Model:
    """A bidirectional layer between others, with the same weights every time."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((STEPS, FEATURES))
    if mask:
        x = keras.layers.Masking()(x)
    backward = LAYERS[layer](**options | {"go_backwards": False}) if options.get("go_backwards") else None
    x = keras.layers.Bidirectional(LAYERS[layer](**options), merge_mode=merge_mode, backward_layer=backward)(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def inputs_of(rows: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).uniform(-1, 1, (rows, STEPS, FEATURES)).astype(np.float32)
    x[0, 3:] = 0  # steps that a mask leaves out
    return x


CASES = [
    *({"layer": layer, "return_sequences": sequences} for layer in LAYERS for sequences in (True, False)),
    {"layer": "lstm", "return_sequences": True, "go_backwards": True},
    {"layer": "gru", "return_sequences": True, "mask": True},
    {"layer": "lstm", "return_sequences": False, "mask": True},
    *({"layer": "lstm", "return_sequences": True, "merge_mode": m} for m in ("sum", "mul", "ave")),
    {"layer": "gru", "return_sequences": False, "merge_mode": "sum", "go_backwards": True},
]


def case_name(case: dict) -> str:
    return ", ".join(case["layer"] if k == "layer" else f"{k}={v}" for k, v in case.items())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_models_agree_with_the_interpreter(case):
    compiled = kgraph.compile(model_of(**case), target=DEVICE)
    x = inputs_of()
    result = np.asarray(compiled(x))
    variant, arrays = compiled._bind((x,), {})
    (wanted,) = evaluate(variant.captured.graph, arrays, variant.weights(), precision="float64")
    compare(result, np.asarray(wanted), 2e-5)
    told = compiled.explain()
    assert not told.host_steps
    kernels = [step.label for step in variant.compiled.program.steps]
    assert sum(label.endswith("bidirectional") for label in kernels) == 1
    # Final states are joined by a kernel of their own.
    apart = not case["return_sequences"] and case.get("merge_mode", "concat") == "concat"
    assert kernels.count("concatenate") == apart


def one_step(case: dict, device: str) -> tuple[list[np.ndarray], list[str]]:
    """(weights, labels of kernels) after a training step."""
    kgraph.set_device(device)
    try:
        model, x = model_of(**case), inputs_of()
        model.compile("sgd", "mse")
        y = np.ones(model(x).shape, np.float32)
        model.train_on_batch(x, y)
        steps = kgraph.compile_step(model, (x, y))._program().compiled.program.steps
        return model.get_weights(), [step.label for step in steps]
    finally:
        kgraph.set_device("cpu")


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_training_steps_are_those_of_the_cpu(case):
    wanted, _ = one_step(case, "cpu")
    weights, kernels = one_step(case, DEVICE)
    for a, b in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    cell = case["layer"].partition(",")[0]
    assert [k for k in kernels if k.startswith(cell)] == [f"{cell}_bidirectional{k}" for k in ("", "_kept", "_back")]
