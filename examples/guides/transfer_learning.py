"""Transfer learning: a network learns one task; frozen, it serves another with few examples; then it is fine-tuned.

Run: python examples/guides/transfer_learning.py   (needs scikit-learn)
"""

from __future__ import annotations

# isort: off
import kgraph  # noqa: F401  (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits


def data():
    """Digits 0 to 6 for the first task; 7 to 9 for the second: 20 images of each to learn from, the rest to test."""
    digits = load_digits()
    images, labels = (digits.images / 16).astype("float32")[..., None], digits.target.astype("int32")
    first = labels < 7
    x, y = images[~first], labels[~first] - 7
    chosen = np.concatenate([np.flatnonzero(y == k)[:20] for k in range(3)])
    rest = np.setdiff1d(np.arange(len(y)), chosen)
    return (images[first], labels[first]), (x[chosen], y[chosen]), (x[rest], y[rest])


def body() -> keras.Model:
    """What both tasks share: from images to features."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
        ],
        name="body",
    )


def with_head(features: keras.Model, classes: int) -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    # training=False: batch normalisation goes on with its statistics, also when it is not frozen any more.
    x = features(inputs, training=False) if not features.trainable else features(inputs)
    return keras.Model(inputs, layers.Dense(classes)(layers.Dropout(0.2)(x)))


def compile_model(model: keras.Model, rate: float) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])


def main(verbose: int = 1) -> tuple[float, float]:
    """Give the accuracy on the second task with the frozen body, and after fine-tuning."""
    keras.utils.set_random_seed(0)
    source, (x, y), test = data()
    features = body()
    teacher = with_head(features, 7)
    compile_model(teacher, 2e-3)
    teacher.fit(*source, batch_size=64, epochs=6, verbose=verbose)

    features.trainable = False
    learned = [w.copy() for w in features.get_weights()]
    model = with_head(features, 3)
    compile_model(model, 1e-2)
    assert len(model.trainable_weights) == 2
    model.fit(x, y, batch_size=16, epochs=20, verbose=verbose)
    assert all((a == b).all() for a, b in zip(features.get_weights(), learned))
    _, frozen = model.evaluate(*test, verbose=0)

    features.trainable = True
    compile_model(model, 5e-4)  # what may change is settled when the model is compiled
    model.fit(x, y, batch_size=16, epochs=15, verbose=verbose)
    assert any((a != b).any() for a, b in zip(features.get_weights(), learned))
    _, tuned = model.evaluate(*test, verbose=0)
    print(f"frozen {frozen:.3f}, fine-tuned {tuned:.3f}")
    return frozen, tuned


if __name__ == "__main__":
    main()
