"""Models of many kinds, small, with inputs for them."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import keras
import numpy as np
import pytest
from keras import layers


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(7)


def dense():
    x = keras.Input((12,))
    return keras.Model(x, layers.Dense(5, activation="softmax")(layers.Dense(33, activation="gelu")(x))), [
        normal(3, 12)
    ]


def convolution():
    x = keras.Input((None, None, 3), name="image")
    y = layers.Conv2D(24, 3, padding="same", use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.DepthwiseConv2D(3, strides=2, padding="same")(y)
    return keras.Model(x, layers.GlobalAveragePooling2D()(y)), [normal(2, 17, 20, 3)]


def recurrent():
    x = keras.Input((None, 6))
    return keras.Model(x, layers.Bidirectional(layers.LSTM(9, return_sequences=True))(x)), [normal(2, 11, 6)]


def several():
    """Two inputs in a dict, one of them int64, and outputs in a dict."""
    tokens = keras.Input((None,), dtype="int64", name="tokens")
    scale = keras.Input((4,), name="scale")
    y = layers.Embedding(50, 4)(tokens)
    y = layers.LayerNormalization()(y + layers.RepeatVector(1)(scale))
    outputs = {"sequence": y, "pair": (layers.GlobalMaxPooling1D()(y), keras.ops.argmax(y, axis=-1))}
    inputs = {"tokens": tokens, "scale": scale}
    return keras.Model(inputs, outputs), {"tokens": RANDOM.integers(0, 50, (3, 8)), "scale": normal(3, 4)}


def attention():
    x = keras.Input((None, 16))
    y = layers.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)
    return keras.Model(x, layers.GroupNormalization(4)(y)), [normal(2, 9, 16)]


def narrow():
    """bfloat16 inside, float16 out."""
    x = keras.Input((8,), dtype="bfloat16")
    y = layers.Dense(7, dtype="bfloat16")(x)
    return keras.Model(x, keras.ops.cast(y, "float16")), [normal(4, 8).astype(np.dtype("float32"))]


RANDOM = np.random.default_rng(5)
MODELS = {f.__name__: f for f in (dense, convolution, recurrent, several, attention, narrow)}


def normal(*shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return RANDOM.standard_normal(shape).astype("float32")


def inputs_of(arguments):
    """The argument of one call."""
    return arguments[0] if isinstance(arguments, list) else arguments


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(name)`: the compiled model of that name, inputs for a call, and the file it was saved to."""
    folder, made = tmp_path_factory.mktemp("saved"), {}

    def get(name: str):
        if name not in made:
            keras.utils.set_random_seed(7)
            model, arguments = MODELS[name]()
            compiled = kgraph.compile(model)
            compiled.save(folder / f"{name}.kgraph")
            made[name] = compiled, inputs_of(arguments), folder / f"{name}.kgraph"
        return made[name]

    return get


def assert_same(got, wanted) -> None:
    """Equal structures, shapes, dtypes and bits."""
    got, wanted = keras.tree.flatten(got), keras.tree.flatten(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
