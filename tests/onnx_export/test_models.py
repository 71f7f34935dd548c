"""Layers of every kind as ONNX: results for several batches and lengths, names, shapes; architectures of Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kgraph
from benchmarks import models

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from kgraph.onnx_export import export  # noqa: E402
from kgraph.ops.recurrent_cells import ACTIVATIONS  # noqa: E402
from tests.onnx_export.test_export import run  # noqa: E402

RNG = np.random.default_rng(0)


def compare(model, path, *calls, optimised=True, rtol=2e-4, atol=2e-5):
    """Exports a model and compares calls with the compiled one; gives the ONNX model."""
    models.fill_weights(model)
    compiled = kgraph.compile(model)
    compiled.export(path, format="onnx", optimised=optimised)
    proto = onnx.load(path)
    for arrays in calls:
        results = run(proto, list(arrays))
        wanted = compiled(*arrays) if len(arrays) == 1 else compiled(list(arrays))
        wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        for got, expected in zip(results, wanted, strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)
    return proto


def floats(*shape):
    return RNG.random(shape).astype("float32") - np.float32(0.3)


# The input's shape without the batch, and what is done with it. None in a shape becomes 5, then 8.
LAYERS = {
    "conv1d": ((None, 4), lambda x: layers.Conv1D(6, 3, padding="causal", dilation_rate=2)(x)),
    "conv1d strided": ((11, 4), lambda x: layers.Conv1D(6, 4, strides=3, padding="same", groups=2)(x)),
    "conv3d": ((5, 6, 4, 2), lambda x: layers.Conv3D(3, (3, 2, 3), strides=(1, 2, 1), padding="same")(x)),
    "transposed 1d": ((9, 3), lambda x: layers.Conv1DTranspose(4, 5, strides=2)(x)),
    "transposed valid": ((5, 4, 3), lambda x: layers.Conv2DTranspose(4, 3, strides=2)(x)),
    "transposed same": ((5, 4, 3), lambda x: layers.Conv2DTranspose(4, (2, 3), strides=(2, 3), padding="same")(x)),
    "transposed dilated": ((5, 4, 3), lambda x: layers.Conv2DTranspose(4, 3, dilation_rate=2)(x)),
    "transposed padded": (
        (5, 4, 3),
        lambda x: layers.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=1)(x),
    ),
    "transposed 3d": ((3, 4, 3, 2), lambda x: layers.Conv3DTranspose(2, 3, strides=2, padding="same")(x)),
    "separable": ((9, 8, 3), lambda x: layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=2)(x)),
    "separable 1d": ((9, 3), lambda x: layers.SeparableConv1D(5, 3, padding="same")(x)),
    "upsampled nearest": ((4, 5, 2), lambda x: layers.UpSampling2D((2, 3))(x)),
    "upsampled bilinear": ((4, 5, 2), lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x)),
    "upsampled bicubic": ((4, 5, 2), lambda x: layers.UpSampling2D(2, interpolation="bicubic")(x)),
    "resized": ((9, 8, 2), lambda x: layers.Resizing(4, 5)(x)),
    "cropped and padded": (
        (6, 7, 2),
        lambda x: layers.ZeroPadding2D(((1, 2), (3, 0)))(layers.Cropping2D(((1, 2), (0, 3)))(x)),
    ),
    "pooled": ((8, 9, 4), lambda x: layers.AveragePooling2D(3, 2, padding="same")(layers.MaxPooling2D(2, 1)(x))),
    "pooled 1d": ((None, 4), lambda x: layers.AveragePooling1D(2)(layers.MaxPooling1D(3, 1, padding="same")(x))),
    "pooled globally": ((4, 5, 3), lambda x: [layers.GlobalMaxPooling2D()(x), layers.GlobalAveragePooling2D()(x)]),
    "layer norm": ((None, 6), lambda x: layers.LayerNormalization()(x)),
    "layer norm over two axes": ((5, 6), lambda x: layers.LayerNormalization(axis=(1, 2))(x)),
    "rms norm": ((5, 6), lambda x: layers.RMSNormalization()(x)),
    "group norm": ((5, 4, 6), lambda x: layers.GroupNormalization(3)(x)),
    "instance norm": ((5, 4, 6), lambda x: layers.GroupNormalization(-1)(x)),
    "unit norm": ((5, 6), lambda x: layers.UnitNormalization()(x)),
    "batch norm": ((5, 6), lambda x: layers.BatchNormalization(axis=1)(x)),
    "spectral norm": ((6,), lambda x: layers.SpectralNormalization(layers.Dense(4))(x)),
    "self attention": ((None, 8), lambda x: layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)),
    "grouped attention": ((5, 8), lambda x: layers.GroupQueryAttention(4, 4, 2)(x, x, use_causal_mask=True)),
    "dot attention": ((5, 8), lambda x: layers.Attention(use_scale=True)([x, x])),
    "additive attention": ((5, 8), lambda x: layers.AdditiveAttention()([x, x])),
    "ordered": (
        (7,),
        lambda x: [
            keras.ops.sort(x, axis=-1),
            keras.ops.argsort(x, axis=-1),
            *keras.ops.top_k(x, 3),
            keras.ops.argmax(x, axis=-1),
            keras.ops.argmin(x, axis=-1),
        ],
    ),
    "activations": (
        (7,),
        lambda x: [
            layers.Activation(name)(x)
            for name in (
                "relu", "relu6", "selu", "elu", "gelu", "silu", "softplus", "softsign", "tanh", "hard_tanh", "mish",
                "hard_sigmoid", "hard_silu", "leaky_relu", "celu", "log_sigmoid", "log_softmax", "softmax",
                "sparsemax", "squareplus", "tanh_shrink", "soft_shrink", "hard_shrink", "exponential",
            )
        ],
    ),
    "prelu": ((4, 5), lambda x: layers.PReLU(shared_axes=[1])(x)),
    "maxima along": ((None, 4), lambda x: keras.ops.cumsum(keras.ops.flip(x, axis=1), axis=1)),
    "einsum": ((5, 6), lambda x: layers.EinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="e")(x)),
    "rearranged": ((4, 6), lambda x: layers.Permute((2, 1))(layers.Reshape((8, 3))(layers.Flatten()(x)))),
    "channels first": ((3, 6, 5), lambda x: layers.Conv2D(4, 3, data_format="channels_first")(x)),
    "convolutional lstm": ((3, 6, 5, 2), lambda x: layers.ConvLSTM2D(3, 3, padding="same")(x)),
    "stacked cells": (
        (4, 3),
        lambda x: layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)], return_sequences=True)(x),
    ),
    "images of any size": (
        (None, None, 3),
        lambda x: [
            layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, strides=2, padding="same")(x)),
            layers.MaxPooling2D(2, padding="same")(x),
            layers.AveragePooling2D(3, 2, padding="same")(x),
            layers.DepthwiseConv2D(3, padding="same")(x),
            layers.Conv2DTranspose(2, 3, strides=2, padding="same")(x),
        ],
    ),
    "per step": ((4, 4), lambda x: layers.TimeDistributed(layers.Dense(3, "relu"))(x)),
}  # fmt: skip


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, optimised, tmp_path):
    shape, build = LAYERS[name]
    inputs = keras.Input(shape)
    model = keras.Model(inputs, build(inputs))
    calls = [(floats(n, *(s or length for s in shape)),) for n, length in ((1, 5), (3, 8))]
    compare(model, tmp_path / "model.onnx", *calls, optimised=optimised)


def test_half_precision(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, dtype="mixed_float16")(inputs)
    x = layers.GlobalAveragePooling2D(dtype="mixed_float16")(layers.BatchNormalization(dtype="mixed_float16")(x))
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="float32")(x))
    compare(model, tmp_path / "model.onnx", (floats(2, 8, 8, 3),), rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_recurrent_layers(activation, tmp_path):
    inputs = keras.Input((None, 3))
    a = layers.LSTM(4, activation=activation, return_sequences=True, go_backwards=True)(inputs)
    b = layers.GRU(4, activation=activation, reset_after=False, return_sequences=True)(inputs)
    c = layers.SimpleRNN(4, activation=activation, return_state=True)(inputs)
    d = layers.LSTM(4, recurrent_activation=activation, return_state=True)(inputs)
    model = keras.Model(inputs, [a, b, *c, *d])
    lengths = (1, 2) if activation == "exponential" else (4, 6)  # of which the states grow without bounds
    compare(model, tmp_path / "model.onnx", *[(floats(n, t, 3) / 4,) for n, t in enumerate(lengths, 1)])


@pytest.mark.parametrize("optimised", [True, False])
def test_masked_layers(optimised, tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(20, 6, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(x)
    model = keras.Model(inputs, layers.LSTM(3)(x))
    call = RNG.integers(0, 3, (3, 7)).astype("int32")
    compare(model, tmp_path / "model.onnx", (call,), (call[:1, :4],), optimised=optimised)


def sizes(values) -> list[list]:
    shapes = [value.type.tensor_type.shape.dim for value in values]
    return [[d.dim_param or d.dim_value for d in shape] for shape in shapes]


def test_names_and_shapes(tmp_path):
    # Operators are called conv_1 and so on inside; an input or output may be called that too.
    a, b = keras.Input((None, 4), name="conv_4"), keras.Input((3,), name="alpha")
    convolved = layers.Conv1D(2, 3, strides=2)(a)
    total = keras.ops.sum(b)
    model = keras.Model([a, b], {"same": b, "conv": convolved, "again": convolved, "alpha": total})
    compiled = kgraph.compile(model)
    for optimised in (True, False):
        compiled.export(tmp_path / "model.onnx", format="onnx", optimised=optimised)
        proto = onnx.load(tmp_path / "model.onnx")
        assert [i.name for i in proto.graph.input] == ["conv_4", "alpha"]
        assert sizes(proto.graph.input) == [["N", "L1", 4], ["N", 3]]
        assert [o.name for o in proto.graph.output] == ["again", "alpha_2", "conv", "same"]
        assert sizes(proto.graph.output) == [["N", "((L1+1)//2)-1", 2], [], ["N", "((L1+1)//2)-1", 2], ["N", 3]]
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        x, y = floats(2, 9, 4), floats(2, 3)
        results = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"alpha": y, "conv_4": x})))
        wanted = compiled([x, y])
        for name in ("same", "conv", "again"):
            np.testing.assert_allclose(results[name], wanted[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(results["alpha_2"], wanted["alpha"], rtol=1e-5)


def test_weights_are_those_of_the_moment(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    compiled = kgraph.compile(model)
    x = floats(2, 3)
    for factor in (1.0, 2.0):
        model.set_weights([np.full((3, 2), factor, "float32"), np.zeros(2, "float32")])
        compiled.export(tmp_path / "model.onnx", format="onnx")
        (got,) = run(onnx.load(tmp_path / "model.onnx"), [x])
        np.testing.assert_allclose(got, factor * x.sum(1, keepdims=True).repeat(2, 1), rtol=1e-5, atol=1e-6)


def test_large_weights_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    model = keras.Sequential([keras.Input((30,)), layers.Dense(20)])
    compiled = kgraph.compile(model)
    x = floats(2, 30)
    for _ in range(2):
        compiled.export(tmp_path / "model.onnx", format="onnx")
        assert 2400 <= (tmp_path / "model.onnx.data").stat().st_size < 5000
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: x})
        np.testing.assert_allclose(got, compiled(x), rtol=1e-5, atol=1e-6)


def test_nothing_is_written_that_no_output_needs(tmp_path):
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Bidirectional(layers.LSTM(2))(inputs))
    proto = compare(model, tmp_path / "model.onnx", (floats(1, 4, 3),))
    read = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= read
    results = read | {output.name for output in proto.graph.output}
    assert all(not results.isdisjoint(node.output) for node in proto.graph.node)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("MobileNetV2", 64),
        ("MobileNetV3Small", 64),
        ("EfficientNetB0", 64),
        ("EfficientNetV2B0", 64),
        ("DenseNet121", 64),
        ("ResNet50V2", 64),
        ("ConvNeXtTiny", 64),
        ("Xception", 96),
        ("NASNetMobile", 64),
    ],
)
def test_applications(name, size, tmp_path):
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
    compare(model, tmp_path / "model.onnx", (floats(2, size, size, 3),), rtol=1e-3, atol=1e-5)
