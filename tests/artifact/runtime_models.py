"""Saves models, with inputs and results, for `runtime_check.py` to run elsewhere: `runtime_models.py folder`."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers


def main(folder: Path) -> None:
    keras.utils.set_random_seed(1)
    sequence = keras.Input((None, 32))
    models = {
        "resnet50": (keras.applications.ResNet50(weights=None), (1, 224, 224, 3)),
        "lstm": (keras.Model(sequence, layers.LSTM(64)(layers.LSTM(64, return_sequences=True)(sequence))), (4, 50, 32)),
    }
    for name, (model, shape) in models.items():
        compiled = kgraph.compile(model)
        x = np.random.default_rng(0).random(shape, "float32")
        compiled.save(folder / f"{name}.kgraph")
        np.savez(folder / f"{name}.npz", x=x, y=compiled(x))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
