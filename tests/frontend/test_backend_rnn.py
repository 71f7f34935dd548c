"""Layers that must arrive whole in a graph: normalisation, attention, recurrent layers; and scanned cells."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from kgraph.frontend.keras_backend import rnn
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType, type_of
from tests.frontend.agreement import both, floats

N = Dim.symbol("N")


# -- coarse layers -----------------------------------------------------------------------------------------------------
def primitives(layer, *shape):
    layer.build((None, *shape))
    graph = trace(lambda x: layer(x), TensorType((N, *shape), "float32"))
    return [node.name for node in graph.nodes]


def test_normalisation_layers_stay_whole():
    assert primitives(layers.LayerNormalization(), 4, 6) == ["layer_norm"]
    assert primitives(layers.RMSNormalization(), 4, 6) == ["rms_norm"]
    assert primitives(layers.GroupNormalization(2), 4, 6) == ["group_norm"]
    assert primitives(layers.BatchNormalization(), 4, 6) == ["batch_norm"]


@pytest.mark.parametrize("axis", [-1, 1, [1, 2], [1, 3]])
def test_layer_normalization_over_axes(axis):
    x = floats(2, 3, 4, 5)
    layer = layers.LayerNormalization(axis=axis)
    layer.build(x.shape)
    for variable in layer.weights:
        variable.assign(floats(*variable.shape, seed=1))
    axes = tuple([axis] if isinstance(axis, int) else axis)
    shape = [x.shape[a] if a in {b % 4 for b in axes} else 1 for a in range(4)]
    centred = x - x.mean(axes, keepdims=True)
    expected = centred / np.sqrt(x.var(axes, keepdims=True) + 1e-3)
    expected = expected * layer.gamma.numpy().reshape(shape) + layer.beta.numpy().reshape(shape)
    np.testing.assert_allclose(both(lambda t: layer(t), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_group_normalization_over_axes(axis):
    x = floats(2, 6, 4, 6)
    layer = layers.GroupNormalization(3, axis=axis)
    grouped = x.reshape(2, 6, 4, 3, 2) if axis == -1 else x.reshape(2, 3, 2, 4, 6)
    over = (1, 2, 4) if axis == -1 else (2, 3, 4)
    expected = (grouped - grouped.mean(over, keepdims=True)) / np.sqrt(grouped.var(over, keepdims=True) + 1e-3)
    np.testing.assert_allclose(both(lambda t: layer(t), x), expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_attention_with_an_idle_dropout_rate_stays_whole():
    layer = layers.MultiHeadAttention(2, 3, dropout=0.5)
    layer.build((None, 4, 6), (None, 4, 6))
    call = lambda training: trace(lambda x: layer(x, x, training=training), TensorType((2, 4, 6), "float32"))
    assert "attention" in [n.name for n in call(False).nodes]
    layer._dropout_layer.rate = 0.0
    assert "attention" not in [n.name for n in call(True).nodes]


# -- recurrent layers --------------------------------------------------------------------------------------------------
def steps_by_hand(layer, x, mask=None):
    """Outputs in the order of processing and final states, by the cell alone."""
    states = [np.zeros((len(x), n), "float32") for n in np.atleast_1d(layer.cell.state_size)]
    outputs = []
    for t in range(x.shape[1])[:: -1 if layer.go_backwards else 1]:
        y, new = layer.cell(x[:, t], states)
        if mask is None:
            states = new
        else:
            valid = mask[:, t, None]
            y = np.where(valid, y, 0 if layer.zero_output_for_mask else states[0])
            states = [np.where(valid, a, b) for a, b in zip(new, states)]
        outputs.append(y)
    return np.stack(outputs, 1), states


@pytest.mark.parametrize("cell", [layers.LSTM, layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"go_backwards": True},
        {"activation": "relu", "use_bias": False},
        {"zero_output_for_mask": True},
        {"activation": "mish"},
        {"unroll": True},
    ],
    ids=str,
)
def test_recurrent_layers(cell, masked, options):
    layer = cell(4, return_sequences=True, return_state=True, **options)
    x = floats(3, 6, 5)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]], bool) if masked else None
    layer.build(x.shape)
    for variable in layer.trainable_weights:
        variable.assign(floats(*variable.shape, seed=2, low=-1, high=1))
    outputs, states = steps_by_hand(layer, x, mask)
    arrays = (x,) if mask is None else (x, mask)
    got = both(lambda x, m=None: layer(x, mask=m), *arrays)
    np.testing.assert_allclose(got[0], outputs, rtol=1e-4, atol=1e-5)
    for a, b in zip(got[1:], states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    graph = trace(lambda *t: layer(t[0], mask=t[1] if masked else None), *map(type_of, arrays))
    names = {n.name for n in graph.nodes}
    if options.get("activation") == "mish":
        assert "rnn" not in names
    else:
        assert "rnn" in names
        assert "scan" not in names
    layer.return_sequences = layer.return_state = False
    np.testing.assert_allclose(layer(x, mask=mask), outputs[:, -1], rtol=1e-4, atol=1e-5)


def test_gru_without_reset_after():
    layer = layers.GRU(4, reset_after=False, return_sequences=True)
    x = floats(2, 5, 3)
    layer.build(x.shape)
    np.testing.assert_allclose(both(lambda t: layer(t), x), steps_by_hand(layer, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", None])
@pytest.mark.parametrize("cell", [layers.LSTM, layers.GRU])
def test_bidirectional(cell, merge_mode):
    x = floats(2, 5, 3)
    layer = layers.Bidirectional(cell(4, return_sequences=True), merge_mode=merge_mode)
    layer.build(x.shape)
    forward = layer.forward_layer(x)
    backward = layer.backward_layer(x)[:, ::-1]
    got = both(lambda t: layer(t), x)
    merged = {"concat": np.concatenate([forward, backward], -1), "sum": forward + backward, None: (forward, backward)}
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(merged[merge_mode]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_subclassed_cell_is_scanned():
    class Doubling(layers.LSTMCell):
        def call(self, inputs, states, training=False):
            y, states = super().call(inputs, states, training=training)
            return y * 2, states

    layer = layers.RNN(Doubling(4), return_sequences=True)
    x = floats(2, 5, 3)
    layer.build(x.shape)
    assert "scan" in [n.name for n in trace(lambda t: layer(t), type_of(x)).nodes]
    np.testing.assert_allclose(both(lambda t: layer(t), x), steps_by_hand(layer, x)[0], rtol=1e-4, atol=1e-5)


def test_rnn_with_constants_and_time_major():
    def step(x, states):
        state, constant = states
        return x + state, [state * constant]

    x, c = floats(4, 2, 3), np.float32(0.5)
    start = np.ones((2, 3), "float32")
    last, outputs, (final,) = rnn.rnn(step, x, [start], constants=[c], time_major=True)
    np.testing.assert_allclose(outputs, x + start * (0.5 ** np.arange(4))[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(last, outputs[-1])
    np.testing.assert_allclose(final, start / 16)
