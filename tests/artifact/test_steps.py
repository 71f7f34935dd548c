"""Saved training steps go on exactly as the compiled step would have."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import keras
import numpy as np
import pytest
from keras import layers
from safetensors import numpy as safetensors

from kgraph.errors import CaptureError, InputError, KGraphError
from tests.artifact.conftest import RANDOM, assert_same, normal


def classifier(optimizer="adam"):
    x = keras.Input((8,))
    y = layers.Dropout(0.3)(layers.BatchNormalization()(layers.Dense(16, activation="relu")(x)))
    model = keras.Model(x, layers.Dense(4, activation="softmax")(y))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def batches(count: int, rows: int = 6):
    return [(normal(rows, 8), RANDOM.integers(0, 4, rows)) for _ in range(count)]


def schedule():
    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5), momentum=0.9)


@pytest.mark.parametrize("optimizer", ["adam", schedule, "rmsprop"])
def test_goes_on(optimizer, tmp_path):
    """Losses, metrics, weights, slots, seeds: all as without saving, to the bit."""
    model = classifier(optimizer() if callable(optimizer) else optimizer)
    data = batches(9)
    step = kgraph.compile_step(model, data[0])
    assert int(model.optimizer.iterations) == 0
    for batch in data[:3]:
        step(batch)
    step.save(tmp_path / "s.kgraph")
    loaded = kgraph.load(tmp_path / "s.kgraph")
    assert isinstance(loaded, kgraph.LoadedStep)
    for batch in data[3:6]:
        assert_same(loaded(batch), step(batch))
    loaded.reset_metrics()
    model.reset_metrics()
    half = data[6][0][:3], data[6][1][:3]
    assert_same(loaded(half), step(half))
    weights = loaded.weights()
    assert sorted(weights) == sorted(w.path for w in model.weights)
    for variable in [*model.weights, *model.optimizer.variables]:
        if variable.path in loaded.state:
            assert_same(loaded.state[variable.path], variable.numpy())
    loaded.save_weights(tmp_path / "w.safetensors")
    for name, value in safetensors.load_file(tmp_path / "w.safetensors").items():
        if not name.startswith("padding."):
            assert_same(value, weights[name])
    # Saved again, it goes on from there; a state from earlier is gone back to.
    loaded.save(tmp_path / "s.kgraph")
    again, before = kgraph.load(tmp_path / "s.kgraph"), loaded.state
    logs = [step(batch) for batch in data[7:]]
    assert_same([again(batch) for batch in data[7:]], logs)
    assert_same([loaded(batch) for batch in data[7:]], logs)
    loaded.set_state(before)
    assert_same([loaded(batch) for batch in data[7:]], logs)


def test_without_the_whole_package(tmp_path):
    """Loading a step imports neither Keras nor the compiler."""
    import subprocess
    import sys

    data = batches(1)[0]
    kgraph.compile_step(classifier(), data).save(tmp_path / "s.kgraph", levels="native")
    code = (
        "import sys, kgraph, numpy as np\n"
        f"step = kgraph.load({str(tmp_path / 's.kgraph')!r})\n"
        "logs = step((np.zeros((2, 8)), [1, 2]))\n"
        "assert set(logs) == {'loss', 'accuracy'}\n"
        "assert not {'keras', 'llvmlite', 'kgraph.ir', 'kgraph.codegen'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_frozen_layers_and_other_levels(tmp_path):
    model = classifier()
    model.layers[1].trainable = False
    data = batches(3)
    step = kgraph.compile_step(model, data[0])
    step.save(tmp_path / "s.kgraph", levels=["x86-64-v3", "native"])
    wanted = step(data[0])
    for level in ("native", "x86-64-v3"):
        loaded = kgraph.load(tmp_path / "s.kgraph", level=level)
        logs = loaded(data[0])
        np.testing.assert_allclose(logs["loss"], wanted["loss"], rtol=1e-5)
    frozen = [w.path for w in model.layers[1].weights]
    assert set(frozen) <= set(loaded.weights())
    loaded.set_state({frozen[0]: loaded.state[frozen[0]]})
    with pytest.raises(KGraphError, match="only reads"):
        loaded.set_state({frozen[0]: loaded.state[frozen[0]] + 1})
    with pytest.raises(ValueError, match="expected float32"):
        loaded.set_state({frozen[0]: np.zeros(3)})
    with pytest.raises(KeyError, match="nothing"):
        loaded.set_state({"nothing": np.zeros(3)})


def test_rebuilt(tmp_path, monkeypatch):
    model, data = classifier(), batches(3)
    step = kgraph.compile_step(model, data[0])
    step.save(tmp_path / "s.kgraph", levels="native")
    monkeypatch.setattr("kgraph.runtime.artifact_level.Requirement.missing", lambda self: ["a feature"])
    loaded = kgraph.load(tmp_path / "s.kgraph")
    assert loaded.level == "rebuilt"
    for batch in data:
        assert_same(loaded(batch), step(batch))


def test_looking_inside_and_errors(tmp_path):
    model, data = classifier(), batches(2)
    step = kgraph.compile_step(model, (*data[0], np.ones(6)))
    step.save(tmp_path / "s.kgraph", levels="native")
    loaded = kgraph.load(tmp_path / "s.kgraph")
    batch = (*data[1], np.linspace(0.5, 2, 6))
    before = loaded.state
    assert loaded.profile(batch, repeats=1).kernels
    assert_same(loaded.state, before)
    profile = step.profile(batch, repeats=1)  # nothing is trained by it: the calls below still agree
    assert all(row.microseconds > 0 for row in profile.kernels)
    assert "dense" in str(profile)
    assert_same(loaded(batch), step(batch))
    assert str(loaded.explain()) == str(step.explain())
    assert loaded.stats()["native_steps"] == step.stats()["native_steps"]
    assert "native" in repr(loaded)
    assert step.graph.nodes
    with pytest.raises(InputError):
        loaded(data[0])
    with pytest.raises(InputError, match="a batch is"):
        kgraph.compile_step(model, data[0][0])
    with pytest.raises(TypeError, match="takes a Keras model"):
        kgraph.compile_step(step, data[0])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises(CaptureError, match="trains eagerly"):
        kgraph.compile_step(model, data[0])
