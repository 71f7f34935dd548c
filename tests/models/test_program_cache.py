"""Models compiled again from the cache of programs: nothing that can be seen of them differs."""

from __future__ import annotations

import sys
from pathlib import Path

import kgraph  # isort: skip  (before Keras)

import keras
import numpy as np
import pytest

from kgraph import translation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "oracle"))
import models as benchmark_models
import small_models


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("KGRAPH_PROGRAM_CACHE", "KGRAPH_VERIFY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def passes(monkeypatch):
    """Numbers of nodes of the graphs that the passes have run on."""
    graphs, run = [], translation.optimise
    monkeypatch.setattr(
        translation, "optimise", lambda graph, *more: graphs.append(len(graph.nodes)) or run(graph, *more)
    )
    return graphs


def seen(name: str, path: Path, last_first: bool = False) -> dict:
    """What can be seen of a model that is built and compiled anew; `last_first`: in another order of looking."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    compiled = kgraph.compile(model)
    results = [np.asarray(leaf).tobytes() for leaf in keras.tree.flatten(compiled(x))]
    looks = {
        "captured": lambda: str(compiled.captured_graph),
        "graph": lambda: str(compiled.graph),
        "explain": lambda: str(compiled.explain()),
        "saved": lambda: compiled.save(path, levels="native") and path.read_bytes(),
        "prologue": lambda: str(compiled._some_variant().compiled.prologue),
    }
    found = {key: looks[key]() for key in (reversed(looks) if last_first else looks)}
    return {"results": results, **found}


@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_model_is_the_same_cold_cached_and_without_the_cache(name, tmp_path, passes, monkeypatch):
    path = tmp_path / "m.kgraph"
    cold = seen(name, path)
    assert passes
    del passes[:]
    cached = seen(name, path, last_first=True)
    assert not passes
    monkeypatch.setenv("KGRAPH_PROGRAM_CACHE", "0")
    without = seen(name, path, last_first=True)
    assert passes
    for key, value in cold.items():
        assert value == cached[key] == without[key], key


def test_training_steps(tmp_path, passes):
    def run(path: Path):
        keras.backend.clear_session()
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(2)])
        model.compile("adam", "mse")
        x, y = np.ones((8, 6), np.float32), np.zeros((8, 2), np.float32)
        step = kgraph.compile_step(model, (x, y))
        losses = [step((x, y)) for _ in range(3)]
        step.save(path, levels="native")
        return repr(losses), path.read_bytes()

    cold = run(tmp_path / "step.kgraph")
    assert passes
    del passes[:]
    assert run(tmp_path / "step.kgraph") == cold
    assert not passes
