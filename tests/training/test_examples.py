"""The examples of training run, and reach what they promise."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.oracle import comparison


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(comparison.ROOT / "examples"))
    yield
    for name in ("autoencoder", "custom_loop", "sequences"):
        sys.modules.pop(name, None)


def test_a_loop_by_hand_reads_digits():
    pytest.importorskip("sklearn")
    assert importlib.import_module("custom_loop").main() >= 0.96


def test_sequences_of_many_lengths():
    assert importlib.import_module("sequences").main(verbose=0) >= 0.9


def test_a_variational_autoencoder_draws_digits():
    pytest.importorskip("sklearn")
    assert importlib.import_module("autoencoder").main(verbose=0) < 0.06
