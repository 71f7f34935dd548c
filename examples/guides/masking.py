"""Sequences of unequal length: padding, masks that layers make, carry and use, and a layer of one's own that does.

Run: python examples/guides/masking.py
"""

from __future__ import annotations

# isort: off
import kgraph  # (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers, ops

WORDS = 50


class MaskedMean(layers.Layer):
    """The mean over the steps that count."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        if mask is None:
            return ops.mean(inputs, axis=1)
        weight = ops.expand_dims(ops.cast(mask, inputs.dtype), -1)
        return ops.sum(inputs * weight, axis=1) / ops.maximum(ops.sum(weight, axis=1), 1.0)

    def compute_mask(self, inputs, previous_mask=None):
        return None  # no steps are left that could be masked


def sentences(rows: int, seed: int = 0):
    """Word numbers, padded with 0 behind, and whether the highest one comes last."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, WORDS, rng.integers(3, 15)) for _ in range(rows)]
    rising = rng.random(rows) < 0.5
    texts = [np.sort(t) if up else np.sort(t)[::-1] for t, up in zip(texts, rising)]
    padded = keras.utils.pad_sequences(texts, padding="post", dtype="int32")
    return padded, rising.astype("float32")[:, None]


def build() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, 16, mask_zero=True)(inputs)  # makes the mask
    x = layers.Bidirectional(layers.LSTM(16, return_sequences=True))(x)  # skips masked steps, and passes the mask on
    x = layers.MultiHeadAttention(2, 8)(x, x)  # attends to no masked step
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(MaskedMean()(x)))


def main(verbose: int = 1) -> float:
    """Train; show that padding makes no difference; give the accuracy on new sentences."""
    keras.utils.set_random_seed(0)
    model = build()
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    model.fit(*sentences(1500), batch_size=50, epochs=4, verbose=verbose)
    x, y = sentences(300, seed=1)
    fast = kgraph.compile(model)
    more = np.pad(x, ((0, 0), (0, 7)))
    np.testing.assert_allclose(fast(x), fast(more), rtol=1e-4, atol=1e-5)
    # Steps can be masked by a value too.
    values = np.ones((1, 4, 2), "float32")
    values[:, 2:] = -1.0
    assert layers.Masking(-1.0).compute_mask(values).tolist() == [[True, True, False, False]]
    accuracy = float(((fast(x) > 0.5) == y).mean())
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
