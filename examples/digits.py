"""Train a small convolutional network on scikit-learn's handwritten digits: at least 98 % of the test digits right.

Run: python examples/digits.py   (needs scikit-learn)
"""

from __future__ import annotations

# isort: off
import kgraph  # noqa: F401  (before keras: it becomes Keras' backend)
import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def data():
    """((x, y) for training, (x, y) for testing): images [rows, 8, 8, 1] in 0..1, labels 0..9."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., None]
    x, test_x, y, test_y = train_test_split(
        images, digits.target.astype("int32"), test_size=0.2, random_state=0, stratify=digits.target
    )
    return (x, y), (test_x, test_y)


def build() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.BatchNormalization(momentum=0.9),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(epochs: int = 12, verbose: int | str = "auto") -> float:
    """Train, print, and give the accuracy on the test digits."""
    keras.utils.set_random_seed(0)
    (x, y), (test_x, test_y) = data()
    model = build()
    model.fit(
        x,
        y,
        batch_size=64,
        epochs=epochs,
        validation_split=0.1,
        callbacks=[keras.callbacks.ReduceLROnPlateau(patience=2, factor=0.3)],
        verbose=verbose,
    )
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    print(f"test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
