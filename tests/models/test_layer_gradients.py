"""Gradients through every Keras layer: central differences in float64, and the compiled step against float64.

The layers are those of `layer_table`, which holds every class of keras.layers or the reason why not.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import KGraphError
from kgraph.frontend.capture import capture_function
from kgraph.ir.interpreter import evaluate
from tests.models.layer_table import CASES
from tests.models.test_every_layer import make_model

STEP = 1e-6
# Layers without a derivative by anything, and why. That each of them has none is tested.
NO_DERIVATIVE = {
    "CategoryEncoding": "takes integers",
    "ContrastLimitedAdaptiveHistogramEqualization": "looks pixels up in tables of their rounded values",
    "Discretization": "gives the numbers of intervals",
    "RandomPosterization": "drops bits of rounded pixels",
}
# Layers that draw in training what a compiled function has to know before. That they are refused is tested; outside
# of training they are as compiled as the others.
NOT_COMPILED = {
    "RandomCrop": "slices with drawn Python indices",
    "RandomElasticTransform": "draws the size of a filter",
}
# Layers with another reason.
NOT_COMPARED = {
    "AugMix": "draws the kind of its transformations with Python's random numbers: every trace is another function",
    "SpectralNormalization": "stops the gradient of its vectors; the combination with converged vectors is compared",
}


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
    # At the singular vectors, the norm does not change with them, so that stopping their gradient changes nothing.
    "spectral normalization": ((5,), lambda: layers.SpectralNormalization(layers.Dense(4), power_iterations=60)),
    "stacked cells": ((4, 3), lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(4)]))),
    "transposed": ((5, 6, 2), lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same")),
    "unit normalization": ((5, 4), after_dense(layers.UnitNormalization)),
}


def check_gradients(model: keras.Model, x) -> bool:
    """Gradients of a quadratic loss by all trainable weights and all float inputs, in training.

    The interpreter in float64 against central differences along one random direction each, and the compiled function
    in float32 against the interpreter. Gives whether any gradient is other than zero.
    """
    weights = [np.asarray(v.value) for v in model.trainable_variables]
    state = [np.asarray(v.value) for v in model.non_trainable_variables]
    flat = keras.tree.flatten(x)
    floats = [i for i, a in enumerate(flat) if a.dtype.kind == "f"]
    rng = np.random.default_rng(0)
    shapes = [np.shape(out) for out in keras.tree.flatten(model(x, training=False))]
    targets = [rng.normal(size=shape).astype("float32") for shape in shapes]

    def loss(weights, moving, state, fixed, targets):
        parts = list(fixed)
        for i, part in zip(floats, moving, strict=True):
            parts[i] = part
        outputs, state = model.stateless_call(weights, state, keras.tree.pack_sequence_as(x, parts), training=True)
        outputs = [ops.cast(out, "float32") for out in keras.tree.flatten(outputs)]
        return sum(ops.mean(ops.square(out - t)) for out, t in zip(outputs, targets, strict=True)), state

    gradients_of = kgraph.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    arguments = (weights, [flat[i] for i in floats], state, flat, targets)
    captured = capture_function(gradients_of, *arguments)
    assert not captured.variables, "everything enters by the arguments"
    leaves = captured.inputs.flatten_call(arguments, {})
    wanted = evaluate(captured.graph, leaves, precision="float64")
    count = len(weights) + len(floats)
    gradients = wanted[len(wanted) - count :]

    def value_at(which, direction, step):
        moved = [a.astype("float64") + step * direction if i == which else a for i, a in enumerate(leaves)]
        return evaluate(captured.graph, moved, precision="float64")[0]

    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        # Where a kink lies within a step, a smaller one, which rounds more, decides.
        for step, tolerance in ((STEP, 1e-6), (STEP / 50, 5e-5)):
            slope = (value_at(i, direction, step) - value_at(i, direction, -step)) / (2 * step)
            error = abs(np.sum(gradient * direction) - slope)
            allowed = tolerance * (abs(slope) + np.linalg.norm(gradient)) + 1e-7 * abs(wanted[0])
            if error <= allowed:
                break
        what = model.trainable_variables[i].path if i < len(weights) else f"input {floats[i - len(weights)]}"
        assert error <= allowed, f"by {what}: {np.sum(gradient * direction)}, differences say {slope}"

    compiled = captured.outputs.flatten(kgraph.jit(gradients_of)(*arguments))
    for a, b in zip(wanted, compiled, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5 * np.max(np.abs(a), initial=1e-2))
    return any(np.any(g) for g in gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_combinations(name):
    shape, make = LAYERS[name]
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, make()(inputs))
    assert check_gradients(model, np.random.default_rng(0).normal(size=(3, *shape)).astype("float32"))


@pytest.mark.parametrize("name", [name for name in CASES if name.split("(")[0] not in NOT_COMPARED])
def test_every_layer(name):
    model, example = make_model(name)
    kind = name.split("(")[0]
    if kind in NOT_COMPILED:
        with pytest.raises(KGraphError):
            check_gradients(model, example)
    else:
        assert check_gradients(model, example) == (kind not in NO_DERIVATIVE)


def test_reasons_are_of_layers_that_exist():
    assert {*NO_DERIVATIVE, *NOT_COMPILED, *NOT_COMPARED} <= {name.split("(")[0] for name in CASES}
