"""The examples of training run, and reach what they promise."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from tests.oracle import comparison


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    folder = comparison.ROOT / "examples"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(folder / "guides"))
    yield
    for path in [*folder.glob("*.py"), *folder.glob("guides/*.py")]:
        sys.modules.pop(path.stem, None)


def test_a_loop_by_hand_reads_digits():
    pytest.importorskip("sklearn")
    assert importlib.import_module("custom_loop").main() >= 0.96


def test_sequences_of_many_lengths():
    assert importlib.import_module("sequences").main(verbose=0) >= 0.9


def test_a_variational_autoencoder_draws_digits():
    pytest.importorskip("sklearn")
    assert importlib.import_module("autoencoder").main(verbose=0) < 0.06


# The least that each guide reaches.
GUIDES = {
    "sequential": 0.95,
    "functional_api": (0.95, 0.95),
    "subclassing": 0.9,
    "built_in_training": 0.95,
    "masking": 0.95,
    "callbacks": 0.9,
    "transfer_learning": (0.85, 0.85),
}


@pytest.mark.parametrize("name", GUIDES)
def test_guides(name):
    if name == "transfer_learning":
        pytest.importorskip("sklearn")
    reached = importlib.import_module(name).main(verbose=0)
    for value, least in zip(np.atleast_1d(reached), np.atleast_1d(GUIDES[name]), strict=True):
        assert value >= least


def test_every_guide_is_tested():
    assert sorted(p.stem for p in (comparison.ROOT / "examples" / "guides").glob("*.py")) == sorted(GUIDES)
