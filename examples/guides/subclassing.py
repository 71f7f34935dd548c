"""Layers and models as classes: weights made when shapes are known, losses from inside, a configuration to save.

Run: python examples/guides/subclassing.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

# isort: off
import kgraph  # (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable(package="guide")
class Linear(layers.Layer):
    """y = x w + b, with a penalty on what it gives in training."""

    def __init__(self, units: int, penalty: float = 0.0, **options):
        super().__init__(**options)
        self.units, self.penalty = units, penalty

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], self.units), initializer="glorot_uniform", name="w")
        self.b = self.add_weight(shape=(self.units,), initializer="zeros", name="b")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=False):
        outputs = ops.matmul(inputs, self.w) + self.b
        if training:
            self.calls.assign_add(1.0)
            self.add_loss(self.penalty * ops.mean(ops.square(outputs)))
        return outputs

    def get_config(self):
        return {**super().get_config(), "units": self.units, "penalty": self.penalty}


@keras.saving.register_keras_serializable(package="guide")
class Ring(keras.Model):
    """Tells points inside of a ring from those outside."""

    def __init__(self, width: int = 24, **options):
        super().__init__(**options)
        self.width = width
        self.first, self.second = Linear(width, 1e-4), Linear(width, 1e-4)
        self.drop = layers.Dropout(0.1)
        self.head = Linear(1)

    def call(self, inputs, training=False):
        x = ops.relu(self.first(inputs, training=training))
        x = self.drop(ops.relu(self.second(x, training=training)), training=training)
        return ops.sigmoid(self.head(x, training=training))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def points(rows: int, seed: int = 0):
    """Points of the plane, and whether they lie in the ring."""
    x = np.random.default_rng(seed).uniform(-2, 2, (rows, 2)).astype("float32")
    radius = np.sqrt((x * x).sum(1))
    return x, ((radius > 0.7) & (radius < 1.5)).astype("float32")[:, None]


def main(verbose: int = 1) -> float:
    """Train, save and load, and give the accuracy on new points."""
    keras.utils.set_random_seed(0)
    model = Ring()
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy", metrics=["accuracy"])
    x, y = points(4000)
    model.fit(x, y, batch_size=100, epochs=12, verbose=verbose)
    assert float(model.first.calls) == 12 * 40
    test_x, test_y = points(1000, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ring.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    fast = kgraph.compile(loaded, example=test_x)
    np.testing.assert_allclose(fast(test_x), model.predict(test_x, verbose=0), rtol=1e-5, atol=1e-6)
    accuracy = float(((fast(test_x) > 0.5) == test_y).mean())
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
