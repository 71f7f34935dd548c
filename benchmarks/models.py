"""The models that are measured: built with plain Keras, on whatever backend the process runs.

Weights are drawn from a generator seeded by the weight's path and shape, so that every engine computes the same
function without weights being passed around.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import architectures


@dataclass(frozen=True)
class Case:
    """One model at one batch size. `inputs(batch, rng)` gives the arrays of one call."""

    name: str
    model: str
    batch: int

    @property
    def key(self) -> str:
        return f"{self.model}@{self.batch}"


def tiny_mlp():
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(1),
        ],
        name="tiny_mlp",
    )


def mlp():
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(10, activation="softmax"),
        ],
        name="mlp",
    )


def convnet():
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ],
        name="convnet",
    )


def resnet20():
    """CIFAR ResNet-20: three stages of three residual blocks with 16, 32 and 64 filters."""
    import keras

    layers = keras.layers

    def conv_bn(x, filters, stride=1, size=3):
        x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(conv_bn(inputs, 16))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(conv_bn(x, filters, stride))
            y = conv_bn(y, filters)
            shortcut = conv_bn(x, filters, stride, 1) if stride > 1 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="resnet20")


def transformer(blocks=4, width=256, heads=8, feed_forward=1024, tokens=128, vocabulary=8000):
    """Pre-norm encoder over token ids, mean-pooled to two classes."""
    import keras

    layers = keras.layers

    class PositionEmbedding(layers.Layer):
        def build(self, input_shape):
            self.embeddings = self.add_weight(shape=(tokens, width), initializer="normal", name="embeddings")

        def call(self, x):
            return x + self.embeddings

    inputs = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(inputs)
    x = PositionEmbedding()(x)
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(heads, width // heads)(y, y)
        x = x + y
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(feed_forward, activation="gelu")(y)
        x = x + layers.Dense(width)(y)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x), name="transformer")


def lstm():
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((100,), dtype="int32"),
            layers.Embedding(20000, 128),
            layers.Bidirectional(layers.LSTM(64, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(64)),
            layers.Dense(1, activation="sigmoid"),
        ],
        name="lstm",
    )


def _application(name: str) -> Callable:
    def build():
        import keras

        return getattr(keras.applications, name)(weights=None)

    return build


MODELS: dict[str, Callable] = {
    "tiny_mlp": tiny_mlp,
    "mlp": mlp,
    "convnet": convnet,
    "resnet20": resnet20,
    "transformer": transformer,
    "lstm": lstm,
    "resnet50": _application("ResNet50"),
    "mobilenetv2": _application("MobileNetV2"),
    "efficientnetb0": _application("EfficientNetB0"),
    "densenet121": _application("DenseNet121"),
    "convnexttiny": _application("ConvNeXtTiny"),
    "efficientnetv2b0": _application("EfficientNetV2B0"),
    "vgg16": _application("VGG16"),
    **architectures.MODELS,
}

CASES = [
    Case("infer", model, batch)
    for model, batch in [
        ("tiny_mlp", 1),
        ("mlp", 1),
        ("mlp", 256),
        ("convnet", 64),
        ("resnet20", 1),
        ("transformer", 1),
        ("transformer", 16),
        ("lstm", 1),
        ("lstm", 64),
        ("resnet50", 1),
        ("resnet50", 8),
        ("mobilenetv2", 1),
        ("efficientnetb0", 1),
    ]
]

TRAINING_CASES = [
    Case("train", model, batch)
    for model, batch in [
        ("tiny_mlp", 32),
        ("mlp", 128),
        ("convnet", 128),
        ("resnet20", 64),
        ("transformer", 16),
        ("lstm", 64),
        ("mobilenetv2", 8),
    ]
]

# Architectures that came later, under the same bounds.
FURTHER_CASES = [Case("infer", model, batch) for model, batch in architectures.INFERENCE]
FURTHER_TRAINING_CASES = [Case("train", model, batch) for model, batch in architectures.TRAINING]

# Losses of models that do not classify with a softmax.
LOSSES = {
    "tiny_mlp": "mean_squared_error",
    **dict.fromkeys(("lstm", "gru", "unet"), "binary_crossentropy"),
}

# Length of a row of tokens, and how many tokens there are.
TOKENS = {"transformer": (128, 8000), "lstm": (100, 20000), **architectures.TOKENS}
SHAPES = {
    "tiny_mlp": (32,),
    "mlp": (784,),
    "convnet": (28, 28, 1),
    "resnet20": (32, 32, 3),
    **architectures.INPUTS,
}
# Models that scale their inputs themselves take bytes' values.
PIXELS = ("efficientnetb0", "efficientnetv2b0", "convnexttiny")
_BLOCK = 1 << 20  # numbers that are drawn at once


def build(name: str):
    """The model called `name` with its reproducible weights."""
    model = MODELS[name]()
    fill_weights(model)
    return model


def fill_weights(model, seed: int = 0) -> None:
    """Set every float weight to values that keep activations in range; integer state stays as it is.

    One by one and in blocks, so that the most memory a process has had is that of its engine.
    """
    for position, variable in enumerate(model.weights):
        shape, path = tuple(variable.shape), variable.path
        if "float" not in str(variable.dtype):
            continue
        rng = np.random.default_rng([seed, position, zlib.crc32(repr(shape).encode())])
        last = path.rsplit("/", 1)[-1]
        if last in ("moving_variance", "variance"):
            draw = functools.partial(rng.uniform, 0.5, 1.5)
        elif last in ("gamma", "scale"):
            draw = functools.partial(rng.uniform, 0.7, 1.3)
        elif last in ("beta", "bias", "moving_mean", "mean"):
            draw = functools.partial(rng.normal, 0, 0.1)
        else:
            depthwise = "depthwise" in path
            fan_in = np.prod(shape[:-2] if depthwise else shape[:-1]) if len(shape) > 1 else 1
            draw = functools.partial(_scaled_normal, rng, np.sqrt(1.5 / max(fan_in, 1)))
        values = np.empty(shape, "float32")
        flat = values.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            flat[start : start + _BLOCK] = draw(min(_BLOCK, flat.size - start))
        variable.assign(values)


def _scaled_normal(rng: np.random.Generator, scale: float, count: int) -> np.ndarray:
    return rng.normal(0, 1, count) * scale


def example_inputs(name: str, batch: int, seed: int = 0) -> np.ndarray:
    """The array of one call."""
    rng = np.random.default_rng(seed)
    if name in TOKENS:
        length, vocabulary = TOKENS[name]
        return rng.integers(0, vocabulary, (batch, length)).astype("int32")
    scale = 255.0 if name in PIXELS else 1.0
    return (rng.random((batch, *SHAPES.get(name, (224, 224, 3)))) * scale).astype("float32")


def loss(name: str):
    """The loss that a model is trained with, or its name."""
    if name == "gpt":
        import keras

        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return LOSSES.get(name, "sparse_categorical_crossentropy")


def training_data(name: str, classes: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of `rows` examples, for a model with `classes` outputs."""
    x = example_inputs(name, rows, seed)
    rng = np.random.default_rng([seed, 1])
    if name == "tiny_mlp":
        return x, rng.normal(0, 1, (rows, 1)).astype("float32")
    if name == "gpt":
        return x, np.roll(x, -1, axis=1)
    if name == "unet":
        return x, rng.integers(0, 2, (rows, 128, 128, 1)).astype("float32")
    if classes == 1:
        return x, rng.integers(0, 2, (rows, 1)).astype("float32")
    return x, rng.integers(0, classes, rows).astype("int32")
