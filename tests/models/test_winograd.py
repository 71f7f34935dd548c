"""Models with Winograd convolutions: changed weights, saved models, C libraries, training."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from kgraph.codegen.cpu import winograd
from kgraph.codegen.target import host_target
from tests.c_export.library import CLibrary

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import models

LEVEL = "x86-64-v4" if host_target().has("avx512f") else "x86-64-v3"


def residual() -> keras.Model:
    inputs = keras.Input((26, 26, 32))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Add()([layers.Conv2D(32, 3, padding="same")(x), inputs])
    x = layers.Conv2D(40, 3)(layers.ReLU()(x))
    model = keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)), name="residual")
    models.fill_weights(model)
    return model


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 26, 26, 32)).astype("float32")


def winograd_kernels(compiled) -> int:
    labels = [row.label for row in compiled.explain().kernels]
    return sum("winograd" in label and label != "winograd_inputs" for label in labels)


@pytest.fixture(scope="module")
def compiled():
    return kgraph.compile(residual())


def test_results_and_changed_weights(monkeypatch):
    model = residual()
    fast = kgraph.compile(model)
    assert winograd_kernels(fast) == 3
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    direct = kgraph.compile(model)
    assert winograd_kernels(direct) == 0
    for scale in (1.0, 0.5):
        model.set_weights([w * scale for w in model.get_weights()])
        for rows in (1, 5, 0):
            np.testing.assert_allclose(fast(images(rows)), direct(images(rows)), rtol=1e-5, atol=1e-5)


def test_saved(compiled, tmp_path):
    compiled.save(tmp_path / "m.kgraph")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    for rows in (1, 7):
        np.testing.assert_array_equal(loaded(images(rows)), compiled(images(rows)))


def test_c_library(compiled, tmp_path):
    files = compiled.export(tmp_path, name="net", levels=[LEVEL])
    library = CLibrary(files.shared, "net")
    for rows in (1, 3):
        (got,) = library(images(rows))
        np.testing.assert_allclose(got, compiled(images(rows)), rtol=1e-5, atol=1e-5)


def test_training(monkeypatch):
    """A step transforms its weights itself, and those of the cotangents of inputs."""
    x, y = images(8), np.arange(8) % 5
    transformed = []
    make = winograd.filters_call
    monkeypatch.setattr(
        winograd,
        "filters_call",
        lambda *operands, **options: transformed.append(operands) or make(*operands, **options),
    )

    def losses() -> list[float]:
        model = residual()
        model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return [float(model.train_on_batch(x, y)) for _ in range(4)]

    ours = losses()
    assert len(transformed) == 5
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    np.testing.assert_allclose(ours, losses(), rtol=1e-4)
    assert len(transformed) == 5
    assert ours[-1] < ours[0]
