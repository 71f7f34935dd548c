"""Small training runs, written with plain Keras for any backend: 20 steps from fixed weights, over 5 fixed batches.

Each entry of MODELS is a function that gives (model, x, y, loss); each of RUNS names a model and an optimizer.
Nothing random happens in a step, so that a run gives the same numbers on every backend up to rounding.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

STEPS, BATCH = 20, 16
ROWS = 5 * BATCH

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=1.0),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 30)),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.02),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.005, momentum=0.5, centered=True),
    "lion": lambda: keras.optimizers.Lion(0.002),
}


def _rng(seed: int = 0):
    return np.random.default_rng(seed)


def _normal(*shape, seed: int = 0):
    return _rng(seed).normal(size=shape).astype("float32")


def dense():
    inputs = keras.Input((12,))
    x = layers.Dense(16, "tanh", kernel_regularizer=keras.regularizers.L2(1e-3))(inputs)
    x = layers.Dense(16, "gelu", activity_regularizer=keras.regularizers.L1(1e-3))(x)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(x))
    x = _normal(ROWS, 12)
    return model, x, (np.abs(x[:, 0] * 3).astype("int32") % 3), "sparse_categorical_crossentropy"


def convolution():
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(12, 3, strides=2, activation="swish")(x)
    x = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3, padding="same")(x))
    model = keras.Model(inputs, layers.Dense(4)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, _normal(ROWS, 10, 10, 3), _rng(1).integers(0, 4, ROWS).astype("int32"), loss


def lstm():
    inputs = keras.Input((9, 5))
    x = layers.LSTM(8, return_sequences=True)(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.LSTM(6)(x)))
    x = _normal(ROWS, 9, 5)
    return model, x, np.sin(x.sum((1, 2))).astype("float32")[:, None], "mse"


class Positions(layers.Layer):
    """Adds a learnt vector to each position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def transformer():
    inputs = keras.Input((8,), dtype="int32")
    x = Positions()(layers.Embedding(20, 16)(inputs))
    # Without biases: the gradient by that of the keys is zero up to rounding, which Adam would scale to full steps.
    normal = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 8, use_bias=False)(normal, normal)
    x = x + layers.Dense(16)(layers.Dense(32, "gelu")(layers.LayerNormalization()(x)))
    model = keras.Model(inputs, layers.Dense(20)(x))
    tokens = _rng().integers(0, 20, (ROWS, 8)).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, tokens, np.roll(tokens, 1, axis=1), loss


def masked():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(15, 6, mask_zero=True)(inputs)
    x = layers.GRU(8, return_sequences=True)(x)
    model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(15))(x))
    tokens = _rng().integers(1, 15, (ROWS, 7)).astype("int32")
    tokens[np.arange(7) >= _rng(1).integers(2, 8, (ROWS, 1))] = 0
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, tokens, (tokens * 2) % 15, loss


MODELS = {f.__name__: f for f in (dense, convolution, lstm, transformer, masked)}
RUNS = [
    *(f"dense_{optimizer}" for optimizer in OPTIMIZERS),
    "convolution_sgd",
    "lstm_adam",
    "transformer_adamw",
    "masked_rmsprop",
]


def run(name: str, prepare=lambda x: x) -> list[np.ndarray]:
    """[loss of every step, metric of every step, all weights at the end as one vector]. prepare: applied to data."""
    model_name, optimizer = name.split("_")
    model, x, y, loss = MODELS[model_name]()
    rng = _rng(7)
    model.set_weights([_initial(v, rng) for v in model.weights])
    metric = "mae" if model_name == "lstm" else "sparse_categorical_accuracy"
    model.compile(OPTIMIZERS[optimizer](), loss, metrics=[metric])
    logs = []
    for step in range(STEPS):
        i = step * BATCH % ROWS
        logs.append(model.train_on_batch(prepare(x[i : i + BATCH]), prepare(y[i : i + BATCH]), return_dict=True))
    weights = np.concatenate([np.asarray(w, "float64").reshape(-1) for w in model.get_weights()])
    return [np.array([log["loss"] for log in logs]), np.array([log[metric] for log in logs]), weights]


def _initial(variable, rng) -> np.ndarray:
    value = np.asarray(variable)
    return value if len(value.shape) < 2 else rng.normal(size=value.shape) * 0.5 / np.sqrt(value.shape[-2])
