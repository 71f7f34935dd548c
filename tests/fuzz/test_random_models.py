"""Random small Keras models: compiled against eager Keras on the NumPy references, at several batches and sizes.

A failure prints the seed and the layers up to the first tensor that is wrong.
"""

from __future__ import annotations

import pytest

from tests.fuzz.models import run_model_seed


@pytest.fixture(autouse=True)
def _verified(monkeypatch):
    monkeypatch.setenv("KGRAPH_VERIFY", "1")


@pytest.mark.filterwarnings("ignore:You are using a softmax")
@pytest.mark.parametrize("first", range(0, 40, 4))
def test_random_models(first):
    for seed in range(first, first + 4):
        run_model_seed(seed)


POLICIES = ("mixed_float16", "float16", "mixed_bfloat16", "bfloat16", "float64")


@pytest.mark.filterwarnings("ignore:You are using a softmax")
@pytest.mark.parametrize("policy", POLICIES)
def test_random_models_of_other_dtypes(policy):
    for seed in range(3):
        run_model_seed(seed, length=4, policy=policy)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:You are using a softmax")
@pytest.mark.parametrize("policy", POLICIES)
def test_many_random_models_of_other_dtypes(policy):
    for seed in range(100):
        run_model_seed(seed, length=4, policy=policy)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:You are using a softmax")
@pytest.mark.parametrize("first", range(10_000, 11_000, 50))
def test_many_random_models(first):
    for seed in range(first, first + 50):
        run_model_seed(seed)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:You are using a softmax")
@pytest.mark.parametrize("seed", range(20_000, 20_040))
def test_deep_random_models(seed):
    run_model_seed(seed, length=25)
