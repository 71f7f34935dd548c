"""Choices between algorithms by measurement."""

from __future__ import annotations

import itertools
import time

import keras
import numpy as np
import pytest

import kgraph
from kgraph.codegen import tuning
from kgraph.codegen.cpu import winograd
from kgraph.codegen.target import host_target, make_target
from kgraph.codegen.tuning import decide
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KGRAPH_TUNE", raising=False)
    tuning._known.cache_clear()
    yield
    tuning._known.cache_clear()


class Clock:
    """Candidates that take so many seconds on a clock of their own, and how often each was prepared and run."""

    def __init__(self, monkeypatch, **seconds: float):
        self.now, self.seconds = 0.0, seconds
        self.prepared, self.runs = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def candidates(self):
        def prepare(name):
            self.prepared[name] += 1

            def run():
                self.runs[name] += 1
                # The first run is the slow one that comes before those that count.
                self.now += self.seconds[name] * (10 if self.runs[name] == 1 else 1)

            return run

        return {name: (lambda name=name: prepare(name)) for name in self.seconds}


def test_estimates_decide_unless_asked(monkeypatch):
    clock = Clock(monkeypatch, a=2.0, b=1.0)
    assert decide(("p",), host_target(), "a", clock.candidates()) == ("a", "")
    with tuning.tuning(False):
        assert decide(("p",), host_target(), "a", clock.candidates()) == ("a", "")
    with tuning.tuning():
        assert decide(("p",), make_target("x86-64-v2"), "a", clock.candidates()) == ("a", "")  # another machine
    assert not any(clock.prepared.values())


def test_the_fastest_is_taken_and_remembered(monkeypatch):
    clock = Clock(monkeypatch, a=2.0, b=1.0, c=1.5)
    monkeypatch.setenv("KGRAPH_TUNE", "1")
    assert decide(("p",), host_target(), "a", clock.candidates()) == ("b", "a 2e+03 ms, b 1e+03 ms, c 1.5e+03 ms")
    assert clock.runs["a"] == 1 + tuning.FEWEST_ROUNDS
    for forget in (False, True):  # by the process, then by the disk
        if forget:
            tuning._known.cache_clear()
        assert decide(("p",), host_target(), "a", clock.candidates())[0] == "b"
    assert clock.prepared == {"a": 1, "b": 1, "c": 1}
    decide(("q",), host_target(), "a", clock.candidates())
    assert clock.prepared == {"a": 2, "b": 2, "c": 2}


def test_a_small_gain_is_none(monkeypatch):
    clock = Clock(monkeypatch, a=1.0, b=0.97)
    with tuning.tuning():
        assert decide(("p",), host_target(), "a", clock.candidates())[0] == "a"


def test_damaged_answers_are_measured_again(monkeypatch):
    clock = Clock(monkeypatch, a=2.0, b=1.0)
    cache = tuning.disk_cache()
    with tuning.tuning():
        decide(("p",), host_target(), "a", clock.candidates())
        (path,) = [p for p in cache.directory.glob("??/*") if cache.get(p.parent.name + p.name).startswith(b'{"a"')]
        for payload in (b"[1, 2]", b"nothing", b'{"a": 1.0}'):
            tuning._known.cache_clear()
            cache.put(path.parent.name + path.name, payload)
            assert decide(("p",), host_target(), "a", clock.candidates())[0] == "b"
    assert clock.prepared["a"] == 4


def conv(images, size=12, channels=32):
    x, w = (Value(TensorType(s, "float32")) for s in ((images, size, size, channels), (3, 3, channels, 64)))
    padding = ((1, 1), (1, 1))
    one = (1, 1)
    attrs = {"strides": one, "padding": padding, "lhs_dilation": one, "rhs_dilation": one, "feature_groups": 1}
    return make_node(PRIMITIVES["conv"], [x, w], attrs)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("images", [3, Dim.symbol("N")])
def test_each_way_to_convolve_is_measured(monkeypatch, prepared, images):
    """Whatever wins is what is compiled, and the text says so."""
    node, chosen = conv(images), {}

    def least(candidates):
        for run in [prepare() for prepare in candidates.values()]:
            run()
        return {name: 1.0 if name == wanted else 2.0 for name in candidates}

    monkeypatch.setattr(tuning, "_measure", least)
    with tuning.tuning():
        for wanted in ("direct", "2", "4"):
            tuning._known.cache_clear()
            monkeypatch.setenv("KGRAPH_CACHE", "0")
            how = winograd.schedule(node, host_target(), prepared)
            chosen[wanted] = how if isinstance(how, str) else str(how.outputs)
            reason = how if isinstance(how, str) else how.reason
            times = [f"{name} {1e3 if name == wanted else 2e3:.3g} ms" for name in ("direct", "2", "4")]
            assert reason.endswith("measured: " + ", ".join(times))
    assert chosen["2"] == "2"
    assert chosen["4"] == "4"


def test_a_tuned_model_is_another_program(monkeypatch):
    x = keras.Input((14, 14, 64))
    model = keras.Model(x, keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x))
    data = np.random.default_rng(0).standard_normal((3, 14, 14, 64)).astype("float32")
    wanted = kgraph.compile(model)(data)
    names = itertools.count()
    monkeypatch.setattr(tuning, "_measure", lambda candidates: {n: float(next(names)) for n in candidates})
    tuned = kgraph.compile(model, tune=True)  # the direct one is first, and so the fastest
    assert "winograd" not in str(tuned.explain())
    np.testing.assert_allclose(tuned(data), wanted, rtol=1e-4, atol=1e-4)
    assert "winograd" in str(kgraph.compile(model).explain())
    assert "winograd" not in str(kgraph.compile(model, tune=True).explain())
