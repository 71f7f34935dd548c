"""A stack of layers: built step by step, looked into, used to extract features, trained and compiled.

Run: python examples/guides/sequential.py
"""

from __future__ import annotations

# isort: off
import kgraph  # (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers


def stripes(rows: int, seed: int = 0):
    """Images [rows, 16, 16, 1] of noisy stripes, and whether they stand upright."""
    rng = np.random.default_rng(seed)
    upright = rng.integers(0, 2, rows)
    phase, period = rng.random((rows, 1, 1)) * 6, rng.uniform(2, 4, (rows, 1, 1))
    y, x = np.mgrid[0:16, 0:16]
    along = np.where(upright[:, None, None] == 1, x, y)
    images = np.sin(2 * np.pi * along / period + phase) + rng.normal(0, 0.5, (rows, 16, 16))
    return images[..., None].astype("float32"), upright.astype("float32")


def main(verbose: int = 1) -> float:
    """Train, and give the accuracy on new images."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(name="stripes")
    model.add(keras.Input((16, 16, 1)))
    model.add(layers.Conv2D(8, 5, activation="relu"))
    model.add(layers.MaxPooling2D(2))
    # With an input shape the shapes are known at every step, which helps while a model grows.
    assert model.output_shape == (None, 6, 6, 8)
    model.add(layers.Conv2D(16, 3, activation="relu", name="features"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(1, activation="sigmoid"))

    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
    x, y = stripes(2000)
    model.fit(x, y, batch_size=50, epochs=6, verbose=verbose)

    # Without a declared shape the layers are built by the first call.
    late = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(2)])
    late(np.zeros((3, 7), "float32"))
    assert late.weights[0].shape == (7, 4)
    # A layer in the middle is the output of another model over the same layers.
    extractor = keras.Model(model.inputs, model.get_layer("features").output)
    assert kgraph.compile(extractor)(x[:5]).shape == (5, 4, 4, 16)

    test_x, test_y = stripes(500, seed=1)
    fast = kgraph.compile(model)
    accuracy = float(((fast.predict(test_x)[:, 0] > 0.5) == test_y).mean())
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
