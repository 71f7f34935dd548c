"""Callbacks: stopping early, checkpoints, rates that fall, and one of one's own that watches a training.

Run: python examples/guides/callbacks.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

# isort: off
import kgraph  # noqa: F401  (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers


class Watcher(keras.callbacks.Callback):
    """Notes what happens, and ends a training whose loss is good enough."""

    def __init__(self, enough: float):
        super().__init__()
        self.enough, self.batches, self.rates = enough, 0, []

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))
        if logs["val_loss"] < self.enough:
            self.model.stop_training = True


def spirals(rows: int, seed: int = 0):
    """Points on two spirals, and which one it is."""
    rng = np.random.default_rng(seed)
    which, along = rng.integers(0, 2, rows), rng.random(rows) * 2.5 + 0.5
    angle = along * 2.2 + which * np.pi
    x = along[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.2, (rows, 2))
    return x.astype("float32"), which.astype("float32")[:, None]


def build() -> keras.Model:
    stack = [layers.Dense(48, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((2,)), *stack, layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(5e-3), "binary_crossentropy", metrics=["accuracy"])
    return model


def main(verbose: int = 1) -> float:
    """Train under callbacks; give the accuracy of the best checkpoint on new points."""
    keras.utils.set_random_seed(0)
    model, watcher = build(), Watcher(enough=0.005)
    x, y = spirals(1500)
    with tempfile.TemporaryDirectory() as folder:
        best = Path(folder) / "best.keras"
        history = model.fit(
            x,
            y,
            batch_size=50,
            epochs=60,
            validation_data=spirals(300, seed=2),
            verbose=verbose,
            callbacks=[
                keras.callbacks.ModelCheckpoint(best, monitor="val_loss", save_best_only=True),
                keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=4),
                keras.callbacks.EarlyStopping(monitor="val_loss", patience=10, restore_best_weights=True),
                keras.callbacks.CSVLogger(Path(folder) / "log.csv"),
                keras.callbacks.TerminateOnNaN(),
                watcher,
            ],
        )
        lines = (Path(folder) / "log.csv").read_text().splitlines()
        loaded = keras.saving.load_model(best)
    epochs = len(history.epoch)
    assert len(lines) == epochs + 1
    assert watcher.batches == 30 * epochs
    assert watcher.rates == sorted(watcher.rates, reverse=True)
    _, accuracy = loaded.evaluate(*spirals(500, seed=3), verbose=0)
    print(f"{epochs} epochs, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
