"""Whole models in the simulator, on a GPU or an emulated one, against the interpreter, and the host steps
that are left in them."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

import kgraph
from kgraph.ir.interpreter import evaluate
from tests.codegen.samples import compare
from tests.cuda.driver import DEVICE, few_rows
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import models as benchmark_models
import small_models

# Host steps that are left, by model; the others have none.
HOST_STEPS: dict[str, list[str]] = {}
# Narrow floats are compared with the interpreter in their own precision, which rounds at other places.
NARROW = {"mixed_precision_bfloat16": 3e-2, "float16_model": 4e-3}
TOLERANCE = 2e-5


def compiled_model(name: str):
    """(model for the device, a few rows of its example inputs)"""
    model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    return kgraph.compile(model, target=DEVICE), few_rows(x, 2)


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
