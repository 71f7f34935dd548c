"""Makes what `train.c` needs: a convolutional network's training step and its forward pass as C libraries, and digits.

    python examples/embed/training.py FOLDER     (needs scikit-learn)

writes `digits_step.h`, `digits.h`, their libraries, and the images and labels as plain numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kgraph  # isort: skip  (before Keras: it becomes its backend)

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

layers = keras.layers


def build() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ],
        name="digits",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    return model


def main(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = (digits.images / 16).astype("float32")[..., None]
    labels = digits.target.astype("int32")
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    model = build()
    folder.mkdir(parents=True, exist_ok=True)
    kgraph.compile_step(model, (train_x[:64], train_y[:64])).export(folder, name="digits_step")
    kgraph.compile(model).export(folder, name="digits", weights="state")
    for name, array in {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}.items():
        np.ascontiguousarray(array).tofile(folder / f"{name}.bin")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
