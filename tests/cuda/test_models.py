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
from tests.cuda.driver import DEVICE, ON_GPU
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import models as benchmark_models
import small_models
import training_models

ROWS = 4 if ON_GPU else 2  # of a batch
# Host steps that are left, by model; the others have none.
HOST_STEPS: dict[str, list[str]] = {}
# Narrow floats are compared with the interpreter in their own precision, which rounds at other places.
NARROW = {"mixed_precision_bfloat16": 3e-2, "float16_model": 4e-3}
TOLERANCE = 2e-5


def few_rows(arrays):
    return keras.tree.map_structure(lambda a: a[:ROWS], arrays)


def compiled_model(name: str):
    """(model for the device, a few rows of its example inputs)"""
    model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    return kgraph.compile(model, target=DEVICE), few_rows(x)


@pytest.mark.parametrize("name", small_models.MODELS)
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
        results = task.model.train_on_batch(few_rows(task.x), few_rows(task.y))
        return results, task.model.get_weights()
    finally:
        kgraph.set_device("cpu")


@pytest.mark.parametrize("name", training_models.MODELS)
def test_a_training_step_is_that_of_the_cpu(name):
    results, weights = one_step(name, "cpu")
    there, weights_there = one_step(name, DEVICE)
    np.testing.assert_allclose(there, results, rtol=1e-4, atol=1e-6)
    for a, b in zip(weights_there, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
