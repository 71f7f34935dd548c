"""Gradients through single Keras layers: central differences in float64, and the compiled step against float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.frontend.capture import capture_function
from kgraph.ir.interpreter import evaluate

STEP = 1e-6


class SelfAttention(layers.Layer):
    """Multi-head attention of the input to its own past."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 3)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x, use_causal_mask=True)


def after_dense(*rest):
    return lambda: keras.Sequential([layers.Dense(6), *(make() for make in rest)])


def after_convolution(*rest):
    return lambda: keras.Sequential([layers.Conv2D(2, 2), *(make() for make in rest)])


def sorted_sums(x):
    return ops.sort(x, -1) + ops.cumsum(x, -1) + ops.top_k(x, 6)[0]


def maxout(x):
    return ops.max(ops.reshape(x, (-1, 3, 2)), -1)


LAYERS = {
    "alpha dropout": ((8,), after_dense(lambda: layers.GaussianDropout(0.2), lambda: layers.AlphaDropout(0.1))),
    "batch normalization": ((5, 4), layers.BatchNormalization),
    "bidirectional": ((5, 4), lambda: layers.Bidirectional(layers.LSTM(3))),
    "causal attention": ((5, 4), SelfAttention),
    "causal convolution": ((9, 4), lambda: layers.Conv1D(8, 3, padding="causal")),
    "convolution of volumes": ((5, 6, 6, 2), lambda: layers.Conv3D(3, 3, padding="same")),
    "convolutional LSTM": ((3, 5, 5, 2), lambda: layers.ConvLSTM2D(3, 3)),
    "depthwise": ((7, 6, 4), lambda: layers.DepthwiseConv2D(3, strides=2, padding="same")),
    "depthwise, multiplier": ((7, 6, 4), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "depthwise 1D": ((9, 4), lambda: layers.DepthwiseConv1D(3, padding="same")),
    "dilated": ((9, 8, 4), lambda: layers.Conv2D(8, 3, dilation_rate=2)),
    "einsum": ((5, 4), lambda: layers.EinsumDense("abc,cd->abd", output_shape=(None, 3), bias_axes="d")),
    "group normalization": ((5, 5, 4), after_convolution(lambda: layers.GroupNormalization(2))),
    "grouped": ((7, 6, 4), lambda: layers.Conv2D(8, 3, groups=2, strides=2, padding="same")),
    "layer normalization": ((5, 4), after_dense(layers.LayerNormalization, lambda: layers.Dense(2))),
    "LSTM backwards": ((5, 4), lambda: layers.LSTM(3, return_sequences=True, go_backwards=True)),
    "masked GRU": ((5, 4), lambda: keras.Sequential([layers.Masking(), layers.GRU(3)])),
    "maxout": ((6,), after_dense(lambda: layers.Lambda(maxout))),
    "padding and cropping": (
        (5, 4, 3),
        after_convolution(lambda: layers.ZeroPadding2D(2), lambda: layers.Cropping2D(1)),
    ),
    "parametric rectifier": ((5, 4), layers.PReLU),
    "pointwise": ((6, 5, 4), lambda: layers.Conv2D(3, 1, strides=2)),
    "pooling": (
        (8, 8, 3),
        after_convolution(lambda: layers.AveragePooling2D(2), lambda: layers.MaxPooling2D(2, strides=1)),
    ),
    "resizing": ((5, 4, 3), after_convolution(lambda: layers.UpSampling2D(2, interpolation="bilinear"))),
    "RMS normalization": ((5, 4), after_dense(layers.RMSNormalization, lambda: layers.Dense(2))),
    "simple recurrent": ((5, 4), lambda: layers.SimpleRNN(3)),
    "sorting": ((6,), after_dense(lambda: layers.Lambda(sorted_sums))),
    "stacked cells": ((4, 3), lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(4)]))),
    "transposed": ((5, 6, 2), lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same")),
    "unit normalization": ((5, 4), after_dense(layers.UnitNormalization)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_weights_and_input(name):
    shape, make = LAYERS[name]
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, make()(inputs))
    weights = [np.asarray(v.value) for v in model.trainable_variables]
    state = [np.asarray(v.value) for v in model.non_trainable_variables]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *shape)).astype("float32")
    target = rng.normal(size=np.shape(model(x))).astype("float32")

    def loss(weights, state, x, target):
        out, state = model.stateless_call(weights, state, x, training=True)
        return ops.mean(ops.square(out - target)), state

    gradients_of = kgraph.value_and_grad(loss, argnums=(0, 2), has_aux=True)
    arguments = (weights, state, x, target)
    captured = capture_function(gradients_of, *arguments)
    leaves = captured.inputs.flatten_call(arguments, {})
    wanted = evaluate(captured.graph, leaves, precision="float64")

    places = [*range(len(weights)), len(weights) + len(state)]
    directions = {i: rng.standard_normal(np.shape(leaves[i])) for i in places}

    def value_at(step):
        moved = [a.astype("float64") + step * directions[i] if i in directions else a for i, a in enumerate(leaves)]
        return evaluate(captured.graph, moved, precision="float64")[0]

    slope = sum(np.sum(g * directions[i]) for g, i in zip(wanted[-len(places) :], places, strict=True))
    np.testing.assert_allclose(slope, (value_at(STEP) - value_at(-STEP)) / (2 * STEP), rtol=1e-6, atol=1e-7)

    compiled = captured.outputs.flatten(kgraph.jit(gradients_of)(*arguments))
    for a, b in zip(wanted, compiled, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5 * np.max(np.abs(a), initial=1e-2))
