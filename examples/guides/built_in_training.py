"""`fit`, `evaluate` and `predict`: own losses and metrics, weights of classes and samples, data sources, schedules.

Run: python examples/guides/built_in_training.py
"""

from __future__ import annotations

# isort: off
import kgraph  # noqa: F401  (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers, ops


def huber_like(y_true, y_pred):
    """A loss of one's own: squares near zero, absolute values far from it."""
    error = ops.abs(y_true - y_pred)
    return ops.mean(ops.where(error < 1.0, 0.5 * error * error, error - 0.5), axis=-1)


class WithinHalf(keras.metrics.Metric):
    """The share of predictions that are off by less than a half."""

    def __init__(self, name="within_half", **options):
        super().__init__(name=name, **options)
        self.hits = self.add_weight(name="hits", initializer="zeros")
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        hit = ops.cast(ops.abs(y_true - y_pred) < 0.5, "float32")
        weight = ops.ones_like(hit) if sample_weight is None else ops.reshape(sample_weight, (-1, 1))
        self.hits.assign_add(ops.sum(hit * weight))
        self.total.assign_add(ops.sum(weight))

    def result(self):
        return self.hits / ops.maximum(self.total, 1.0)


class Batches(keras.utils.PyDataset):
    """Data that is made batch by batch."""

    def __init__(self, count: int, **options):
        super().__init__(**options)
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return waves(64, seed=index)


def waves(rows: int, seed: int = 0):
    """Points and the height of a surface over them."""
    x = np.random.default_rng(seed).uniform(-1, 1, (rows, 3)).astype("float32")
    y = 3 * np.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:]
    return x, y.astype("float32")


def build() -> keras.Model:
    inputs = keras.Input((3,))
    x = layers.Dense(64, activation="tanh", kernel_regularizer=keras.regularizers.L2(1e-5))(inputs)
    x = layers.Dense(64, activation="tanh")(x)
    model = keras.Model(inputs, layers.Dense(1)(x))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=600)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss=huber_like, metrics=[WithinHalf()])
    return model


def main(verbose: int = 1) -> float:
    """Train on arrays, on a PyDataset and on a generator; give the metric on new data."""
    keras.utils.set_random_seed(0)
    model = build()
    x, y = waves(2000)
    # Weights of samples: the region x0 > 0 counts twice.
    weight = np.where(x[:, 0] > 0, 2.0, 1.0).astype("float32")
    history = model.fit(x, y, sample_weight=weight, batch_size=50, epochs=8, validation_split=0.1, verbose=verbose)
    assert history.history["val_loss"][-1] < history.history["val_loss"][0]
    model.fit(Batches(30), epochs=4, verbose=verbose)
    model.fit((waves(64, seed) for seed in range(1000, 1030)), steps_per_epoch=30, verbose=verbose)
    _, share = model.evaluate(*waves(1000, seed=9), verbose=0)
    print(f"within a half: {share:.3f}")
    return share


if __name__ == "__main__":
    main()
