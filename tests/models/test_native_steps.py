"""Training steps with draws, conditions and loops: without host steps where that holds, and equal to eager ones."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

BATCH = 16


class Cell(layers.Layer):
    """A recurrent cell that only the general loop knows."""

    def __init__(self, units: int, **options):
        super().__init__(**options)
        self.units = self.state_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units))
        self.recurrent = self.add_weight(shape=(self.units, self.units), initializer="orthogonal")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs, states, training=False):
        new = keras.ops.sin(keras.ops.matmul(inputs, self.kernel) + states[0] @ self.recurrent + self.bias)
        return new * 0.5, [new]


def dense(*extra) -> list:
    return [keras.Input((12,)), layers.Dense(24, activation="relu"), *extra, layers.Dense(3)]


MODELS = {
    "dropout": (lambda: dense(layers.Dropout(0.4)), keras.optimizers.Adam, {}, 0),
    "noise": (lambda: dense(layers.GaussianNoise(0.5), layers.GaussianDropout(0.2)), keras.optimizers.Adam, {}, 0),
    "spatial dropout": (
        lambda: [keras.Input((7, 5)), layers.SpatialDropout1D(0.3), layers.Flatten(), layers.Dense(3)],
        keras.optimizers.SGD,
        {},
        0,
    ),
    "accumulation": (dense, keras.optimizers.Adam, {"gradient_accumulation_steps": 3}, 0),
    "clipped accumulation": (
        dense,
        keras.optimizers.SGD,
        {"gradient_accumulation_steps": 2, "global_clipnorm": 0.1},
        0,
    ),
    "averages": (dense, keras.optimizers.SGD, {"use_ema": True, "ema_overwrite_frequency": 2}, 0),
    "loss scale": (
        dense,
        lambda **options: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), **options),
        {"initial_scale": 1024.0, "dynamic_growth_steps": 2},
        0,
    ),
    "cell": (
        lambda: [keras.Input((9, 5)), layers.RNN(Cell(6), return_sequences=True), layers.Flatten(), layers.Dense(3)],
        keras.optimizers.Adam,
        {},
        2,
    ),
    "stacked cells": (
        lambda: [
            keras.Input((6, 4)),
            layers.RNN(layers.StackedRNNCells([layers.LSTMCell(5), layers.GRUCell(4)]), go_backwards=True),
            layers.Dense(3),
        ],
        keras.optimizers.Adam,
        {},
        2,
    ),
    "convolutional cell": (
        lambda: [keras.Input((4, 6, 5, 2)), layers.ConvLSTM2D(3, 3, padding="same"), layers.Flatten(), layers.Dense(3)],
        keras.optimizers.SGD,
        {},
        2,
    ),
}


def trained(name: str, run_eagerly: bool):
    """(weights and optimizer state after some steps, statistics of the compiled step)"""
    build, optimizer, options, _ = MODELS[name]
    keras.utils.set_random_seed(3)
    model = keras.Sequential(build())
    model.compile(optimizer(**options), "mse", run_eagerly=run_eagerly)
    rng = np.random.default_rng(0)
    for step in range(5):
        rows = BATCH if step != 3 else 5
        x = rng.normal(size=(rows, *model.input_shape[1:])).astype("float32")
        model.train_on_batch(x, rng.normal(size=(rows, 3)).astype("float32"))
    values = [np.asarray(v.value, np.float64) for v in (*model.weights, *model.optimizer.variables)]
    return values, None if run_eagerly else model._compiled_train_step.stats()


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_eager_ones(name):
    compiled, stats = trained(name, run_eagerly=False)
    eager, _ = trained(name, run_eagerly=True)
    assert stats["host_steps"] == MODELS[name][-1]
    for a, b in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max(initial=0)))
