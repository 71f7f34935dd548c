"""Models and data that the tests of training share."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers


def data(rows: int = 50):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 6)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0.5)


def classifier(optimizer="sgd", seed: int = 0, dropout: float = 0.0, **options) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(dropout),
            layers.Dense(3, name="head"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **options)
    return model


def assert_equal_weights(a: keras.Model, b: keras.Model, **tolerance):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)
