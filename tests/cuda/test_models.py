"""Whole models in the simulator or on a GPU against the interpreter, the host steps that are left in them, and
training steps."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

import kgraph
from kgraph.ir.interpreter import evaluate
from tests.codegen.samples import compare
from tests.cuda.driver import DEVICE
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import models as benchmark_models
import small_models
import training_models

# Those that take a second or two in the simulator; the rest runs with `-m long`.
QUICK = frozenset(
    (
        "sequential_mlp shared_layers_and_lists custom_layer nested_functional embedding_masked_lstm "
        "rnn_states_go_backwards simple_rnn_masking integer_and_bool_outputs attention_masked"
    ).split()
)
QUICK_TRAINING = frozenset({"gru", "two_inputs"})
# Host steps that are left, by model; the others have none.
HOST_STEPS: dict[str, list[str]] = {}
# Narrow floats are compared with the interpreter in their own precision, which rounds at other places.
NARROW = {"mixed_precision_bfloat16": 3e-2, "float16_model": 4e-3}
TOLERANCE = 2e-5


def marked(names, quick) -> list:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]


def compiled_model(name: str):
    """(model for the device, its example inputs)"""
    model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    return kgraph.compile(model, target=DEVICE), x


@pytest.mark.parametrize("name", marked(small_models.MODELS, QUICK))
def test_models_agree_with_the_interpreter(name):
    compiled, x = compiled_model(name)
    results = keras.tree.flatten(compiled(x))
    variant, arrays = compiled._bind((x,), {})
    precision = None if name in NARROW else "float64"
    wanted = evaluate(variant.captured.graph, arrays, variant.weights(), precision=precision)
    for result, expected in zip(results, wanted):
        compare(np.asarray(result), np.asarray(expected), NARROW.get(name, TOLERANCE))
    steps = sorted(step.label for step in compiled.explain().host_steps)
    assert steps == HOST_STEPS.get(name, [])


def one_step(name: str, device: str):
    """(loss and metrics, weights) after one step on a few rows."""
    kgraph.set_device(device)
    try:
        keras.utils.set_random_seed(0)
        task = training_models.MODELS[name]()
        benchmark_models.fill_weights(task.model)
        task.model.compile(keras.optimizers.SGD(0.1), task.loss, metrics=task.metrics, **task.options)
        x, y = (keras.tree.map_structure(lambda a: a[:4], part) for part in (task.x, task.y))
        results = task.model.train_on_batch(x, y)
        return results, task.model.get_weights()
    finally:
        kgraph.set_device("cpu")


@pytest.mark.parametrize("name", marked(training_models.MODELS, QUICK_TRAINING))
def test_a_training_step_is_that_of_the_cpu(name):
    results, weights = one_step(name, "cpu")
    there, weights_there = one_step(name, DEVICE)
    np.testing.assert_allclose(there, results, rtol=1e-4, atol=1e-6)
    for a, b in zip(weights_there, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
