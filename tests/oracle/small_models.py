"""Small Keras models that together use what a capture has to cope with; built with plain Keras on any backend.

Each entry of MODELS is a function that gives (model, example inputs); `benchmarks.models.fill_weights` sets weights.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

MODELS = {}


def model(function):
    MODELS[function.__name__] = function
    return function


def floats(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype("float32")


def ids(*shape, high=20, seed=0, low=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype("int32")


@model
def sequential_mlp():
    m = keras.Sequential(
        [keras.Input((13,)), layers.Dense(17, "tanh"), layers.Dropout(0.3), layers.Dense(3, "softmax")]
    )
    return m, floats(7, 13)


@model
def activations():
    inputs = keras.Input((11,))
    names = (
        "relu relu6 sigmoid tanh softplus softsign silu gelu elu selu exponential leaky_relu hard_sigmoid hard_silu "
        "mish log_sigmoid hard_tanh tanh_shrink soft_shrink hard_shrink squareplus sparse_plus celu log_softmax"
    ).split()
    outs = [layers.Activation(name)(layers.Dense(5)(inputs)) for name in names]
    return keras.Model(inputs, layers.Concatenate()(outs)), floats(6, 11, low=-3, high=3)


@model
def shared_layers_and_lists():
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    shared = layers.Dense(9, "relu")
    x, y = shared(a), shared(b)
    merged = layers.Multiply()([x, y])
    return keras.Model([a, b], [merged, layers.Subtract()([x, y])]), [floats(5, 8), floats(5, 8, seed=1)]


@model
def dict_inputs_and_outputs():
    inputs = {"image": keras.Input((9, 9, 2), name="image"), "meta": keras.Input((4,), name="meta")}
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3, activation="relu")(inputs["image"]))
    x = layers.Concatenate()([x, layers.Dense(5)(inputs["meta"])])
    outputs = {"class": layers.Dense(3, "softmax")(x), "score": layers.Dense(1)(x)}
    return keras.Model(inputs, outputs), {"image": floats(40, 9, 9, 2), "meta": floats(40, 4)}


@keras.saving.register_keras_serializable()
class Gate(layers.Layer):
    """A layer of its own, written in keras.ops."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")
        self.b = self.add_weight(shape=(shape[-1],), initializer="zeros", name="bias")

    def call(self, x):
        gate = ops.sigmoid(ops.matmul(x, self.w) + self.b)
        return ops.where(gate > 0.5, x * gate, ops.square(x) - ops.mean(x, axis=-1, keepdims=True))


@model
def custom_layer():
    inputs = keras.Input((6, 10))
    return keras.Model(inputs, Gate()(Gate()(inputs))), floats(4, 6, 10)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = layers.Dense(12, "relu")
        self.stack = keras.Sequential([layers.Dense(8), layers.LayerNormalization()])
        self.last = layers.Dense(2)

    def call(self, x, training=False):
        y = self.first(x)
        for _ in range(2):
            y = self.stack(y)
            y = ops.concatenate([y, y[:, :4]], axis=-1)
        return self.last(y), ops.argmax(y, axis=-1)


@model
def subclassed_nested():
    m = Subclassed()
    x = floats(5, 12)
    m(x)
    return m, x


@model
def nested_functional():
    inner_in = keras.Input((7,))
    inner = keras.Model(inner_in, layers.Dense(7, "relu")(inner_in))
    inputs = keras.Input((7,))
    return keras.Model(inputs, inner(inputs) + inner(inner(inputs))), floats(3, 7)


@model
def embedding_masked_lstm():
    m = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(20, 8, mask_zero=True),
            layers.LSTM(6, return_sequences=True),
            layers.LSTM(5),
        ]
    )
    x = ids(4, 9)
    x[1, 5:] = 0
    x[2, 2:] = 0
    return m, x


@model
def gru_bidirectional():
    inputs = keras.Input((None, 5))
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(inputs)
    x = layers.Bidirectional(layers.GRU(3, reset_after=False), merge_mode="sum")(x)
    return keras.Model(inputs, x), floats(3, 8, 5)


@model
def simple_rnn_masking():
    m = keras.Sequential(
        [
            keras.Input((6, 3)),
            layers.Masking(0.0),
            layers.SimpleRNN(4, return_sequences=True),
            layers.TimeDistributed(layers.Dense(2)),
        ]
    )
    x = floats(4, 6, 3)
    x[0, 3:] = 0
    return m, x


@model
def rnn_states_go_backwards():
    inputs = keras.Input((5, 4))
    out, h, c = layers.LSTM(3, return_sequences=True, return_state=True, go_backwards=True, activation="relu")(inputs)
    return keras.Model(inputs, [out, h, c]), floats(2, 5, 4)


@model
def conv1d_causal_dilated():
    inputs = keras.Input((None, 6))
    x = layers.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="relu")(inputs)
    x = layers.SeparableConv1D(7, 3, padding="same")(x)
    x = layers.MaxPooling1D(2)(x)
    return keras.Model(inputs, layers.GlobalMaxPooling1D()(x)), floats(3, 17, 6)


@model
def conv2d_variants():
    inputs = keras.Input((17, 15, 6))
    a = layers.Conv2D(8, 3, strides=2, padding="same")(inputs)
    b = layers.Conv2D(8, (3, 5), dilation_rate=2, padding="same", groups=2)(inputs)
    c = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(inputs)
    d = layers.SeparableConv2D(9, 3, strides=2, padding="valid")(inputs)
    e = layers.Conv2DTranspose(5, 3, strides=2, padding="same")(inputs)
    f = layers.Conv2DTranspose(5, 4, strides=3, padding="valid", output_padding=1)(inputs)
    return keras.Model(inputs, [a, b, c, d, e, f]), floats(2, 17, 15, 6)


@model
def conv2d_channels_first():
    inputs = keras.Input((3, 12, 14))
    x = layers.Conv2D(8, 3, padding="same", data_format="channels_first")(inputs)
    x = layers.BatchNormalization(axis=1)(x)
    x = layers.ReLU()(x)
    x = layers.MaxPooling2D(2, data_format="channels_first")(x)
    x = layers.DepthwiseConv2D(3, data_format="channels_first")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(data_format="channels_first")(x)), floats(2, 3, 12, 14)


@model
def conv3d():
    inputs = keras.Input((6, 7, 8, 2))
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.AveragePooling3D(2, padding="same")(x)
    x = layers.Conv3DTranspose(3, 2, strides=2)(x)
    return keras.Model(inputs, x), floats(2, 6, 7, 8, 2)


@model
def pooling():
    inputs = keras.Input((13, 11, 3))
    outs = [
        layers.MaxPooling2D(3, strides=2, padding="same")(inputs),
        layers.AveragePooling2D(3, strides=2, padding="same")(inputs),
        layers.AveragePooling2D((2, 3))(inputs),
        layers.GlobalMaxPooling2D(keepdims=True)(inputs),
        layers.AdaptiveAveragePooling2D((4, 3))(inputs) if hasattr(layers, "AdaptiveAveragePooling2D") else inputs,
    ]
    return keras.Model(inputs, outs), floats(2, 13, 11, 3)


@model
def normalisations():
    inputs = keras.Input((5, 6, 8))
    outs = [
        layers.BatchNormalization()(inputs),
        layers.LayerNormalization()(inputs),
        layers.LayerNormalization(axis=(-2, -1))(inputs),
        layers.GroupNormalization(groups=4)(inputs),
        layers.RMSNormalization()(inputs),
        layers.UnitNormalization()(inputs),
    ]
    return keras.Model(inputs, outs), floats(3, 5, 6, 8)


@model
def residual_batch_norm():
    inputs = keras.Input((10, 10, 4))
    x = inputs
    for _ in range(2):
        y = layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
        y = layers.BatchNormalization()(y)
        y = layers.ReLU()(y)
        y = layers.Conv2D(4, 3, padding="same")(y)
        y = layers.BatchNormalization()(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Flatten()(x)), floats(2, 10, 10, 4)


@model
def attention_masked():
    q, k = keras.Input((None, 16), name="q"), keras.Input((None, 16), name="k")
    mask = keras.Input((None, None), dtype="bool", name="mask")
    x = layers.MultiHeadAttention(4, 8)(q, k, attention_mask=mask)
    rng = np.random.default_rng(3)
    m = rng.random((3, 5, 7)) < 0.7
    m[:, :, 0] = True
    return keras.Model([q, k, mask], x), [floats(3, 5, 16), floats(3, 7, 16, seed=1), m]


@model
def attention_causal_grouped():
    inputs = keras.Input((None, 16))
    x = layers.GroupQueryAttention(head_dim=8, num_query_heads=4, num_key_value_heads=2)(
        inputs, inputs, use_causal_mask=True
    )
    x = layers.Attention(use_scale=True)([x, inputs])
    x = layers.AdditiveAttention()([x, inputs])
    return keras.Model(inputs, x), floats(2, 6, 16)


@model
def transformer_masked():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(30, 16, mask_zero=True)(inputs)
    y = layers.MultiHeadAttention(2, 8)(x, x)
    x = layers.LayerNormalization()(x + y)
    x = layers.LayerNormalization()(x + layers.Dense(16)(layers.Dense(32, "gelu")(x)))
    x = layers.GlobalAveragePooling1D()(x)
    tokens = ids(3, 10, high=30, low=1)
    tokens[1, 6:] = 0
    return keras.Model(inputs, layers.Dense(2)(x)), tokens


@model
def free_image_size_unet():
    inputs = keras.Input((None, None, 3))
    a = layers.Conv2D(6, 3, padding="same", activation="relu")(inputs)
    b = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(a)
    c = layers.UpSampling2D(2, interpolation="bilinear")(b)
    d = layers.Conv2DTranspose(6, 2, strides=2)(b)
    x = layers.Concatenate()([a, c, d])
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x)), floats(2, 16, 24, 3)


@model
def shape_layers():
    inputs = keras.Input((6, 4, 3))
    x = layers.Permute((2, 1, 3))(inputs)
    x = layers.Reshape((12, -1))(x)
    x = layers.ZeroPadding1D(2)(x)
    x = layers.Cropping1D((1, 2))(x)
    x = layers.UpSampling1D(2)(x)
    y = layers.ZeroPadding2D(((1, 2), (0, 3)))(inputs)
    y = layers.Cropping2D(1)(y)
    y = layers.UpSampling2D((2, 3))(y)
    z = layers.RepeatVector(3)(layers.Flatten()(inputs))
    return keras.Model(inputs, [x, y, z]), floats(2, 6, 4, 3)


@model
def ops_zoo():
    inputs = keras.Input((7, 5))

    @keras.saving.register_keras_serializable()
    class Zoo(layers.Layer):
        def call(self, x):
            s = ops.sort(x, axis=-1)
            values, indices = ops.top_k(x, 3)
            c = ops.cumsum(x, axis=1)
            t = ops.einsum("bij,bkj->bik", x, x)
            u = ops.take(x, ops.convert_to_tensor([0, 2, -1]), axis=1)
            v = ops.logsumexp(x, axis=-1) + ops.var(x, axis=1)[:, :1] + ops.max(ops.abs(x), axis=(1, 2))[:, None]
            w = ops.one_hot(ops.argmax(x, axis=-1), 5) * ops.floor(x * 3) % 2
            n = ops.cast(ops.shape(x)[0], "float32")
            return s, values, ops.cast(indices, "int32"), c, t, u, v, w, ops.clip(x, -0.5, 0.5) / n, ops.flip(x, axis=1)

    return keras.Model(inputs, Zoo()(inputs)), floats(3, 7, 5)


@model
def integer_and_bool_outputs():
    inputs = keras.Input((9,), dtype="int32")
    x = inputs * 3 + 1
    return keras.Model(inputs, [x // 4, x % 5, x > 10, ops.cast(x, "float32") / 7.0]), ids(4, 9, low=-9)


@model
def one_dimensional_sequence_net():
    inputs = keras.Input((None, 4))
    x = layers.Conv1D(16, 5, strides=2, padding="same", activation="silu")(inputs)
    x = layers.Conv1DTranspose(8, 4, strides=2, padding="same")(x)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(3)(x)), floats(3, 20, 4)


@model
def squeeze_and_excite():
    inputs = keras.Input((8, 8, 12))
    x = layers.DepthwiseConv2D(5, padding="same")(inputs)
    x = layers.Activation("silu")(layers.BatchNormalization()(x))
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Conv2D(12, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="silu")(s))
    return keras.Model(inputs, x * s), floats(2, 8, 8, 12)


@model
def mixed_precision_bfloat16():
    inputs = keras.Input((10,))
    x = layers.Dense(8, "relu", dtype="mixed_bfloat16")(inputs)
    return keras.Model(inputs, layers.Dense(3, dtype="float32")(x)), floats(5, 10)


@model
def float16_model():
    inputs = keras.Input((10,), dtype="float16")
    x = layers.Dense(8, "tanh", dtype="float16")(inputs)
    return keras.Model(inputs, layers.LayerNormalization(dtype="float16")(x)), floats(5, 10).astype("float16")


@model
def float64_model():
    inputs = keras.Input((10,), dtype="float64")
    x = layers.Dense(8, "tanh", dtype="float64")(inputs)
    return keras.Model(inputs, layers.Dense(4, dtype="float64")(x)), floats(5, 10).astype("float64")
