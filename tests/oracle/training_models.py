"""Small models with data, loss and metrics for training runs, in plain Keras for any backend.

Each entry of MODELS is a function that gives a `Task`. What they share keeps 50 steps comparable between backends:

- nothing random happens in a step, and every step sees the same rows;
- functions are smooth, or their kinks are hit seldom;
- no weight has a gradient that is zero up to rounding, which Adam or Lion would scale to full steps: no biases ahead
  of a normalisation of the same channel, none in the keys of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops

ROWS = 24
CROSSENTROPY = "sparse_categorical_crossentropy"


@dataclass
class Task:
    """A model with its data. loss, metrics: as `Model.compile` takes them, further options in `options`."""

    model: keras.Model
    x: Any
    y: Any
    loss: Any
    metrics: Any
    options: dict


def task(inputs, outputs, x, y, loss, metrics=None, **options) -> Task:
    return Task(keras.Model(inputs, outputs), x, y, loss, metrics, options)


def from_logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def integers(high: int, *shape, low: int = 0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (ROWS, *shape)).astype("int32")


def dense():
    inputs = keras.Input((12,))
    x = layers.Dense(16, "tanh", kernel_regularizer=keras.regularizers.L2(1e-3))(inputs)
    x = layers.Dense(16, "gelu", activity_regularizer=keras.regularizers.L2(1e-3))(x)
    outputs = layers.Dense(3, "softmax")(x)
    data = normal(12)
    return task(inputs, outputs, data, np.abs(data[:, 0] * 3).astype("int32") % 3, CROSSENTROPY, ["accuracy"])


def convolution():
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(12, 3, strides=2, activation="swish")(x)
    outputs = layers.Dense(4)(layers.Flatten()(x))
    return task(inputs, outputs, normal(10, 10, 3), integers(4), from_logits(), ["accuracy"])


def residual():
    def normalised(x, filters, size, **options):
        x = layers.Conv2D(filters, size, padding="same", use_bias=False, **options)(x)
        return layers.BatchNormalization(momentum=0.8)(x)

    inputs = keras.Input((8, 8, 3))
    x = layers.Activation("swish")(normalised(inputs, 8, 3))
    y = normalised(layers.Activation("swish")(normalised(x, 8, 3)), 8, 3)
    x = layers.Activation("swish")(x + y)
    y = normalised(layers.Activation("gelu")(normalised(x, 8, 3, strides=2)), 12, 3)
    x = layers.Activation("swish")(y + normalised(x, 12, 1, strides=2))
    outputs = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    metrics = ["sparse_categorical_accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top_2")]
    return task(inputs, outputs, normal(8, 8, 3), integers(4), from_logits(), metrics)


class Positions(layers.Layer):
    """Adds a learnt vector to each position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def transformer():
    inputs = keras.Input((8,), dtype="int32")
    x = Positions()(layers.Embedding(20, 16)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8, use_bias=False)(y, y)
        x = x + layers.Dense(16)(layers.Dense(32, "gelu")(layers.LayerNormalization()(x)))
    tokens = integers(20, 8)
    labels = (tokens.sum(1) % 2).astype("float32")[:, None]
    outputs = layers.Dense(1, "sigmoid")(layers.GlobalAveragePooling1D()(x))
    return task(inputs, outputs, tokens, labels, "binary_crossentropy", [keras.metrics.AUC(name="auc")])


class Block(layers.Layer):
    """Causal attention with grouped keys, and a gated feed-forward part, each after an RMS normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = layers.GroupQueryAttention(4, 4, 2, use_bias=False)
        self.first, self.second = layers.RMSNormalization(), layers.RMSNormalization()
        self.gate, self.up = layers.Dense(24, "silu", use_bias=False), layers.Dense(24, use_bias=False)
        self.down = layers.Dense(width, use_bias=False)

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (self.first, self.second, self.gate, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 24))

    def call(self, x):
        y = self.first(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        y = self.second(x)
        return x + self.down(self.gate(y) * self.up(y))


def decoder():
    inputs = keras.Input((9,), dtype="int32")
    embedding = layers.ReversibleEmbedding(20, 16)
    x = Positions()(embedding(inputs))
    for _ in range(2):
        x = Block(16)(x)
    outputs = embedding(layers.RMSNormalization()(x), reverse=True)
    tokens = integers(20, 10)
    return task(inputs, outputs, tokens[:, :-1], tokens[:, 1:], from_logits(), ["sparse_categorical_accuracy"])


def lstm():
    inputs = keras.Input((9, 5))
    x = layers.LSTM(8, return_sequences=True)(inputs)
    outputs = layers.Dense(1)(layers.LSTM(6)(x))
    data = normal(9, 5)
    return task(inputs, outputs, data, np.sin(data.sum((1, 2)))[:, None], "mse", ["mae"])


def gru():
    inputs = keras.Input((7, 4))
    x = layers.Bidirectional(layers.GRU(6, return_sequences=True))(inputs)
    outputs = layers.Dense(2)(layers.GRU(5, reset_after=False, go_backwards=True)(x))
    data = normal(7, 4)
    wanted = np.tanh(data[:, :2, 0] + data[:, 2:4, 1])
    return task(inputs, outputs, data, wanted, keras.losses.LogCosh(), ["mse", "cosine_similarity"])


def recurrent():
    inputs = keras.Input((6, 4))
    x = layers.SimpleRNN(8, return_sequences=True)(inputs)
    x = layers.RNN(layers.StackedRNNCells([layers.LSTMCell(5), layers.GRUCell(6)]))(x)
    return task(inputs, layers.Dense(3)(x), normal(6, 4), integers(3), from_logits(), ["accuracy"])


def autoencoder():
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="gelu")(inputs)
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="tanh")(x)
    x = layers.Conv2DTranspose(8, 3, strides=2, padding="same", activation="gelu")(x)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    outputs = layers.Conv2DTranspose(2, 4, padding="same")(x)
    data = np.cumsum(normal(8, 8, 2), axis=1) * np.float32(0.3)
    return task(inputs, outputs, data, data, "mse", ["mae", "root_mean_squared_error"])


def two_inputs():
    """Two inputs, two outputs with losses of different weight, sample weights within the loss."""
    image, row = keras.Input((6, 6, 2), name="image"), keras.Input((5,), name="row")
    a = layers.AveragePooling2D(2)(layers.Conv2D(6, 3, activation="softplus")(image))
    b = layers.Dense(8, "elu")(row)
    x = layers.Concatenate()([layers.Flatten()(a), layers.Multiply()([b, layers.Dense(8, "sigmoid")(row)])])
    outputs = {"kind": layers.Dense(3, "softmax", name="kind")(x), "size": layers.Dense(2, name="size")(x)}
    data = {"image": normal(6, 6, 2), "row": normal(5, seed=2)}
    wanted = {"kind": integers(3), "size": np.tanh(data["row"][:, :2])}
    return task(
        {"image": image, "row": row},
        outputs,
        data,
        wanted,
        {"kind": keras.losses.SparseCategoricalCrossentropy(ignore_class=2), "size": "mse"},
        {"kind": ["accuracy"], "size": ["mae"]},
        loss_weights={"kind": 0.7, "size": 2.0},
    )


def masked():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(15, 6, mask_zero=True)(inputs)
    x = layers.GRU(8, return_sequences=True)(x)
    x = layers.LSTM(6, return_sequences=True)(x)
    tokens = integers(15, 7, low=1)
    tokens[np.arange(7) >= integers(8, 1, low=2, seed=3)] = 0
    outputs = layers.TimeDistributed(layers.Dense(15))(x)
    # No metrics: those of Keras' train step on JAX do not see the mask of the predictions.
    return task(inputs, outputs, tokens, (tokens * 2) % 15, from_logits())


def mixed_precision():
    """Computes in bfloat16; weights and optimizer in float32."""
    low = {"dtype": "mixed_bfloat16"}
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="gelu", **low)(inputs)
    x = layers.Flatten(**low)(layers.AveragePooling2D(2, **low)(x))
    x = layers.LayerNormalization(**low)(layers.Dense(16, use_bias=False, **low)(x))
    outputs = layers.Dense(4, dtype="float32")(layers.Activation("tanh", **low)(x))
    return task(inputs, outputs, normal(6, 6, 3), integers(4), from_logits(), ["accuracy"])


def separable():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, activation="gelu")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="swish")(x)
    gate = layers.Dense(16, "sigmoid")(layers.Dense(4, "swish")(layers.GlobalAveragePooling2D()(x)))
    x = layers.Multiply()([x, layers.Reshape((1, 1, 16))(gate)])
    x = layers.SeparableConv2D(8, 3, strides=2, activation="tanh")(x)
    outputs = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    return task(inputs, outputs, normal(8, 8, 3), integers(4), from_logits(), ["accuracy"])


def convolution_1d():
    """Causal and dilated convolutions with gates over time, and a skip connection."""
    inputs = keras.Input((16, 3))
    x = layers.Conv1D(8, 1)(inputs)
    for dilation in (1, 2, 4):
        gate = layers.Conv1D(8, 2, padding="causal", dilation_rate=dilation, activation="sigmoid")(x)
        x = x + gate * layers.Conv1D(8, 2, padding="causal", dilation_rate=dilation, activation="tanh")(x)
    data = np.cumsum(normal(17, 3), axis=1) * np.float32(0.3)
    return task(inputs, layers.Dense(3)(x), data[:, :-1], data[:, 1:], keras.losses.Huber(0.7), ["mse"])


def normalisations():
    """Group, layer and RMS normalisation, in channels-first layout at first."""
    inputs = keras.Input((3, 8, 8))
    x = layers.Conv2D(8, 3, data_format="channels_first")(inputs)
    x = layers.Activation("gelu")(layers.GroupNormalization(2, axis=1)(x))
    x = layers.AveragePooling2D(2, data_format="channels_first")(x)
    x = layers.Permute((2, 3, 1))(x)
    x = layers.Conv2D(8, 3, padding="same", groups=2, activation="softsign")(layers.RMSNormalization()(x))
    x = layers.LayerNormalization(axis=(1, 2, 3))(x)
    outputs = layers.Dense(4)(layers.GlobalAveragePooling2D()(layers.UnitNormalization()(x)))
    return task(inputs, outputs, normal(3, 8, 8), integers(4), from_logits(), ["accuracy"])


def volumes():
    inputs = keras.Input((4, 6, 6, 2))
    x = layers.Conv3D(4, 3, padding="same", activation="softplus")(inputs)
    x = layers.TimeDistributed(layers.Conv2D(4, 3, activation="tanh"))(x)
    x = layers.ConvLSTM2D(3, 3)(x)
    x = layers.Dense(6, "tanh")(layers.Flatten()(x))
    outputs = layers.Dense(1)(x)
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1)
    return task(inputs, outputs, normal(4, 6, 6, 2), integers(2, 1).astype("float32"), loss, ["mse"])


def contrastive():
    """Two towers with shared weights, einsum, take, top-k and sorting in between."""
    a, b = keras.Input((5,)), keras.Input((5,))
    tower = keras.Sequential([layers.Dense(8, "tanh"), layers.EinsumDense("bi,io->bo", output_shape=6)])
    u, v = tower(a), tower(b)
    u, v = layers.UnitNormalization()(u), layers.UnitNormalization()(v)
    likeness = ops.einsum("bi,ci->bc", u, v)
    best = ops.mean(ops.top_k(likeness, 3)[0], -1, keepdims=True) + ops.sort(u, -1)[:, ::2]
    outputs = layers.Concatenate()([best, layers.Dot(axes=1)([u, v]), ops.logsumexp(likeness, -1, keepdims=True) - 3.0])
    data = [normal(5), normal(5, seed=2)]
    return task([a, b], outputs, data, np.tanh(data[0]), "mse", ["mae"])


MODELS = {
    f.__name__: f
    for f in (
        dense,
        convolution,
        residual,
        transformer,
        decoder,
        lstm,
        gru,
        recurrent,
        autoencoder,
        two_inputs,
        masked,
        mixed_precision,
        separable,
        convolution_1d,
        normalisations,
        volumes,
        contrastive,
    )
}
