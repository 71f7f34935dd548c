"""Small models, compiled by kgraph, against Keras on JAX with the same weights and inputs."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

import kgraph
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import models as benchmark_models
import small_models

pytestmark = pytest.mark.skipif(
    not comparison.JAX_PYTHON.exists(), reason="no environment with JAX (see README, Tests)"
)


@pytest.fixture(scope="module")
def jax_outputs():
    comparison.ensure_outputs(list(small_models.MODELS))


@pytest.mark.parametrize("name", list(small_models.MODELS))
def test_error_is_at_most_twice_that_of_jax(name, jax_outputs):
    model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    compiled = kgraph.compile(model)
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(compiled(x))]
    result = comparison.compare(name, leaves)
    assert result.passed, result
