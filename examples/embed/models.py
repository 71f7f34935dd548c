"""Makes what the other programs here run: three small models as C libraries and as artifacts, with inputs and results.

    python examples/embed/models.py FOLDER

writes for each model `NAME.h`, `libNAME.so`, `libNAME.a`, `NAME.kgraph`, an input `NAME.input` and the compiled model's
output for it, `NAME.expected` (plain numbers in row-major order).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The level of the instruction set that this process computes on, so that results agree to the last bit with libraries
# for the same level.
LEVEL = os.environ.setdefault("KGRAPH_CPU", "x86-64-v3")

import kgraph  # noqa: E402  # isort: skip  (before Keras: it becomes its backend)

import keras  # noqa: E402
import numpy as np  # noqa: E402

layers = keras.layers


def convnet() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ],
        name="convnet",
    )


def transformer() -> keras.Model:
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(100, 32)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 8)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(32)(layers.Dense(64, activation="gelu")(y))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x), name="transformer")


def lstm() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(100, 16),
            layers.Bidirectional(layers.LSTM(24)),
            layers.Dense(1, activation="sigmoid"),
        ],
        name="lstm",
    )


def tiny_mlp() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((32,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(1),
        ],
        name="tiny_mlp",
    )


def example_input(model: keras.Model, rows: int) -> np.ndarray:
    """An array that the model takes."""
    rng = np.random.default_rng(0)
    (declared,) = model.inputs
    shape = (rows, *declared.shape[1:])
    return rng.integers(0, 100, shape).astype("int32") if "int" in declared.dtype else rng.random(shape, np.float32)


def write(build, folder: Path, rows: int = 5, machine: str = "x86_64") -> None:
    """One model's files."""
    keras.utils.set_random_seed(1)
    model = build()
    compiled = kgraph.compile(model)
    x = example_input(model, rows)
    compiled.export(folder, format="c", machine=machine, levels=[LEVEL] if machine == "x86_64" else None)
    compiled.save(folder / f"{model.name}.kgraph", levels=[LEVEL])
    x.tofile(folder / f"{model.name}.input")
    compiled(x).tofile(folder / f"{model.name}.expected")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for build in (convnet, transformer, lstm, tiny_mlp):
        write(build, target)
        print(f"{build.__name__}: {target}")
