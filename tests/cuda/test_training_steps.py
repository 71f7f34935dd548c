"""Training steps of whole models, in the simulator, on a GPU or an emulated one, against those of the CPU."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

import kgraph
from tests.cuda.driver import DEVICE, IS_EMULATED, few_rows
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import models as benchmark_models
import training_models

# Those that have most kernels between them; compiling for an emulated GPU takes ten seconds a model.
EMULATED = ("transformer", "residual", "lstm", "mixed_precision", "decoder")
ROWS = {"contrastive": 4}  # of a batch, of which three are looked for; others have two


def one_step(name: str, device: str):
    """(loss and metrics, weights) after one step on a few rows."""
    kgraph.set_device(device)
    try:
        keras.utils.set_random_seed(0)
        task = training_models.MODELS[name]()
        benchmark_models.fill_weights(task.model)
        task.model.compile(keras.optimizers.SGD(0.1), task.loss, metrics=task.metrics, **task.options)
        x, y = (few_rows(part, ROWS.get(name, 2)) for part in (task.x, task.y))
        results = task.model.train_on_batch(x, y)
        return results, task.model.get_weights()
    finally:
        kgraph.set_device("cpu")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if IS_EMULATED and name not in EMULATED else [])
        for name in training_models.MODELS
    ],
)
def test_a_training_step_is_that_of_the_cpu(name):
    results, weights = one_step(name, "cpu")
    there, weights_there = one_step(name, DEVICE)
    np.testing.assert_allclose(there, results, rtol=1e-4, atol=1e-6)
    for a, b in zip(weights_there, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
