"""Architectures beside those of the first comparison: other shapes of convolution, recurrence and attention.

Each builder gives a Keras model; `INPUTS` tells what one row of its input looks like.
"""

from __future__ import annotations


def unet(width=32, depth=4):
    """An image-to-image U-Net of 3x3 convolutions with batch normalisation; 128 x 128 pixels, one class per pixel."""
    import keras

    layers = keras.layers

    def block(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    inputs = keras.Input((128, 128, 3))
    x, skips = inputs, []
    for level in range(depth):
        x = block(x, width << level)
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = block(x, width << depth)
    for level in reversed(range(depth)):
        x = layers.Conv2DTranspose(width << level, 2, strides=2)(x)
        x = block(layers.Concatenate()([skips[level], x]), width << level)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x), name="unet")


def gru(units=128, depth=3):
    """Three stacked GRUs over token embeddings."""
    import keras

    layers = keras.layers
    stack = [layers.GRU(units, return_sequences=level < depth - 1) for level in range(depth)]
    return keras.Sequential(
        [keras.Input((100,), dtype="int32"), layers.Embedding(20000, 128), *stack, layers.Dense(1, "sigmoid")],
        name="gru",
    )


def gpt(blocks=6, width=384, heads=6, tokens=128, vocabulary=8000):
    """A GPT-like decoder: causal attention, and a product with the vocabulary at every position."""
    import keras

    layers = keras.layers

    class Positions(layers.Layer):
        def build(self, input_shape):
            self.embeddings = self.add_weight(shape=(tokens, width), initializer="normal", name="embeddings")

        def call(self, x):
            return x + self.embeddings

    inputs = keras.Input((tokens,), dtype="int32")
    x = Positions()(layers.Embedding(vocabulary, width)(inputs))
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * width, activation=lambda z: keras.activations.gelu(z, approximate=True))(y)
        x = x + layers.Dense(width)(y)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(inputs, layers.Dense(vocabulary, use_bias=False)(x), name="gpt")


def conv1d():
    """Dilated causal convolutions over a signal of 1024 samples and 16 channels, with residuals, as a TCN has them."""
    import keras

    layers = keras.layers
    inputs = keras.Input((1024, 16))
    x = layers.Conv1D(64, 1)(inputs)
    for level in range(6):
        y = layers.Conv1D(64, 3, padding="causal", dilation_rate=1 << level, activation="relu")(x)
        y = layers.Conv1D(64, 3, padding="causal", dilation_rate=1 << level, activation="relu")(y)
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="conv1d")


MODELS = {"unet": unet, "gru": gru, "gpt": gpt, "conv1d": conv1d}

# Shape of a row; for token models (length, vocabulary).
INPUTS = {"unet": (128, 128, 3), "conv1d": (1024, 16)}
TOKENS = {"gru": (100, 20000), "gpt": (128, 8000)}

# (model, batch) for inference and for training.
INFERENCE = [
    ("densenet121", 1),
    ("convnexttiny", 1),
    ("efficientnetv2b0", 1),
    ("vgg16", 1),
    ("unet", 1),
    ("unet", 8),
    ("gru", 1),
    ("gru", 64),
    ("gpt", 1),
    ("gpt", 8),
    ("conv1d", 1),
    ("conv1d", 16),
]
TRAINING = [("densenet121", 4), ("unet", 8), ("gru", 64), ("gpt", 8), ("conv1d", 32)]
