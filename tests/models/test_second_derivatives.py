"""Gradients of gradients: against central differences in float64, and compiled against the interpreter."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import GradientError
from kgraph.frontend.capture import capture_function
from kgraph.ir.interpreter import evaluate

STEP = 1e-5


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


KERNEL, FILTER, QUERY = rows(4, 6, seed=1), rows(3, 2, 5, seed=2), rows(4, 4, seed=3)


def attention(x):
    q = ops.reshape(ops.matmul(x, QUERY), (2, 5, 2, 2))
    return ops.sum(ops.sin(ops.dot_product_attention(q, ops.reshape(x, (2, 5, 2, 2)), q, is_causal=True)))


# name -> (function of one array with a scalar value, the array)
FUNCTIONS = {
    "dense and tanh": (lambda x: ops.sum(ops.tanh(ops.matmul(x, KERNEL)) ** 3), rows(3, 4)),
    "softmax": (lambda x: ops.sum(ops.softmax(x, -1) * ops.sin(x)), rows(3, 5)),
    "log softmax": (lambda x: ops.sum(ops.log_softmax(x, 0)[1] * x[0]), rows(3, 5)),
    "crossentropy": (
        lambda x: ops.mean(ops.sparse_categorical_crossentropy(np.array([1, 0, 3]), x, from_logits=True)),
        rows(3, 4),
    ),
    "convolution by its filter": (lambda w: ops.sum(ops.sigmoid(ops.conv(rows(2, 9, 2), w, 2)) ** 2), FILTER),
    "convolution by its input": (
        lambda x: ops.sum(ops.tanh(ops.conv(x, FILTER, 1, "same")) * ops.cos(ops.average_pool(x, 1)[..., :1])),
        rows(2, 9, 2),
    ),
    "transposed convolution": (
        lambda w: ops.sum(ops.tanh(ops.conv_transpose(rows(2, 4, 5), w, 2)) ** 2),
        FILTER,
    ),
    "gelu, swish and softplus": (lambda x: ops.sum(ops.gelu(x) * ops.silu(x) * ops.softplus(x)), rows(7)),
    "layer normalisation": (
        lambda x: ops.sum(ops.sin(ops.layer_normalization(x, np.ones(6, "f4"), np.zeros(6, "f4")))),
        rows(3, 6),
    ),
    "batch moments": (lambda x: ops.sum(ops.cos(x - ops.mean(x, 0)) / ops.sqrt(ops.var(x, 0) + 0.1)), rows(5, 3)),
    "attention": (attention, rows(2, 5, 4)),
    "reductions": (lambda x: ops.logsumexp(x) * ops.max(x) + ops.prod(x[:2]) / ops.norm(x), rows(5)),
    "indices": (lambda x: ops.sum(ops.take(x**3, np.array([0, 2, 2]), 0) * ops.sort(x, -1)[:1]), rows(3, 4)),
    "scan": (
        lambda x: ops.sum(ops.scan(lambda h, v: (ops.tanh(h + v), h * v), ops.zeros(3), x)[1]),
        rows(4, 3),
    ),
    "solve": (lambda x: ops.sum(ops.solve(ops.matmul(x, ops.transpose(x)) + 3 * np.eye(3, dtype="f4"), x)), rows(3, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name):
    function, x = FUNCTIONS[name]
    along = rows(*x.shape, seed=9)
    first = kgraph.grad(function)
    second = kgraph.grad(lambda x, v: ops.sum(first(x) * v))
    one, two = (capture_function(f, *args).graph for f, args in ((first, (x,)), (second, (x, along))))
    (product,) = evaluate(two, [x, along], precision="float64")
    ends = [evaluate(one, [x.astype("float64") + s * STEP * along], precision="float64")[0] for s in (1, -1)]
    np.testing.assert_allclose(product, (ends[0] - ends[1]) / (2 * STEP), rtol=1e-5, atol=1e-7 * np.abs(product).max())
    compiled = kgraph.jit(second)(x, along)
    np.testing.assert_allclose(compiled, product, rtol=1e-3, atol=2e-5 * np.abs(product).max())


def test_a_gradient_penalty_in_a_training_step():
    """The loss holds the norm of a gradient by the input, as in Wasserstein GANs; aux values of both come along."""
    keras.utils.set_random_seed(0)
    critic = keras.Sequential([keras.Input((6, 2)), layers.Conv1D(4, 3, activation="tanh"), layers.Flatten()])
    critic.add(layers.Dense(1))
    weights = [np.asarray(v.value) for v in critic.trainable_variables]
    x = rows(5, 6, 2)

    def score(x, weights):
        out, _ = critic.stateless_call(weights, [], x, training=True)
        return ops.sum(out), out

    def loss(weights, x):
        (total, out), by_x = kgraph.value_and_grad(score, has_aux=True)(x, weights)
        penalty = ops.mean((ops.sqrt(ops.sum(by_x**2, axis=(1, 2))) - 1.0) ** 2)
        return ops.mean(out) + 10.0 * penalty, {"penalty": penalty, "total": total}

    step = kgraph.value_and_grad(loss, has_aux=True)
    captured = capture_function(step, weights, x)
    leaves = captured.inputs.flatten_call((weights, x), {})
    wanted = evaluate(captured.graph, leaves, precision="float64")
    (value, aux), gradients = kgraph.jit(step)(weights, x)
    for a, b in zip(wanted, captured.outputs.flatten(((value, aux), gradients)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5 * np.max(np.abs(a), initial=1e-3))
    directions = [rows(*w.shape, seed=4 + i) for i, w in enumerate(weights)]
    ends = []
    for sign in (1, -1):
        moved = [w.astype("float64") + sign * STEP * d for w, d in zip(weights, directions)]
        ends.append(evaluate(captured.graph, [*moved, x], precision="float64")[0])
    slope = sum(np.sum(g * d) for g, d in zip(wanted[-len(weights) :], directions))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * STEP), rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "primitive"),
    [(layers.MaxPooling1D(2), (6, 2), "select_and_scatter_add"), (layers.LSTM(3), (6, 2), "rnn_gradient")],
    ids=["max pooling", "recurrent"],
)
def test_second_derivatives_that_do_not_exist_are_refused(layer, shape, primitive):
    model = keras.Sequential([keras.Input(shape), layer])
    inner = kgraph.grad(lambda x: ops.sum(model(x) ** 2))
    with pytest.raises(GradientError, match=primitive):
        kgraph.grad(lambda x: ops.sum(inner(x) ** 2))(rows(2, *shape))
