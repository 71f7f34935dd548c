"""`keras.remat` and `RematScope`: less memory for more computing, and the same gradients."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.codegen.target import host_target
from kgraph.frontend.capture import capture_function
from kgraph.translation import optimise
from tests.models.training_runs import assert_equal_weights

ROWS = 256


class Block(layers.Layer):
    """A residual block with dropout: some state, some randomness, several saved activations."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.drop = layers.BatchNormalization(), layers.Dropout(0.1)
        self.wide, self.narrow = layers.Dense(4 * width, "gelu"), layers.Dense(width)

    def build(self, shape):
        self.norm.build(shape)
        self.wide.build(shape)
        self.narrow.build((*shape[:-1], self.wide.units))

    def call(self, x, training=False):
        h = self.wide(self.norm(x, training=training))
        return x + self.drop(self.narrow(h), training=training)


def deep_mlp():
    return keras.Sequential(
        [keras.Input((32,)), *(Block(32) for _ in range(8)), layers.Dense(1, kernel_initializer="zeros")]
    )


def deep_conv():
    inputs = keras.Input((12, 12, 8))
    x = inputs
    for _ in range(6):
        h = layers.Conv2D(16, 3, padding="same", activation="swish")(x)
        x = x + layers.Conv2D(8, 3, padding="same", activation="tanh")(h)
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))


def trained(build, shape, mode=None, **options):
    """The model after three steps, the losses, and the step's figures."""
    keras.utils.set_random_seed(0)
    if mode is None:
        model = build()
    else:
        with keras.RematScope(mode=mode, **options):
            model = build()
    model.compile(keras.optimizers.SGD(0.01), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, *shape)).astype("float32")
    y = x.reshape(ROWS, -1)[:, :1]
    losses = [model.train_on_batch(x, y) for _ in range(3)]
    return model, losses, model._compiled_train_step.stats()


@pytest.mark.parametrize(("build", "shape"), [(deep_mlp, (32,)), (deep_conv, (12, 12, 8))], ids=["mlp", "conv"])
def test_the_arena_shrinks_and_the_weights_agree(build, shape):
    plain, plain_losses, kept = trained(build, shape)
    remat, remat_losses, recomputed = trained(build, shape, "full")
    np.testing.assert_allclose(remat_losses, plain_losses, rtol=1e-5)
    assert_equal_weights(plain, remat, rtol=1e-4, atol=1e-6)
    assert recomputed["arena_bytes"] < 0.6 * kept["arena_bytes"]
    assert recomputed["native_steps"] > kept["native_steps"]


def test_layers_are_chosen_by_name_by_size_and_by_activation():
    plain, _, kept = trained(deep_conv, (12, 12, 8))
    names = [layer.name for layer in plain.layers if isinstance(layer, layers.Conv2D) and layer.filters == 16]

    def counted(mode, **options):
        keras.utils.clear_session()
        model, _, stats = trained(deep_conv, (12, 12, 8), mode, **options)
        assert_equal_weights(plain, model, rtol=1e-4, atol=1e-6)
        return stats["arena_bytes"]

    keras.utils.clear_session()
    renamed = [name for name in (layer.name for layer in deep_conv().layers) if name.startswith("conv2d")][::2]
    assert len(renamed) == len(names)
    assert counted("list_of_layers", layer_names=renamed) < kept["arena_bytes"]
    assert counted("larger_than", output_size_threshold=12 * 12 * 8) < kept["arena_bytes"]
    assert counted("larger_than", output_size_threshold=10**9) == kept["arena_bytes"]
    assert counted("activations") <= kept["arena_bytes"]


def test_a_function_computes_its_inner_values_again():
    def inner(x, w):
        for _ in range(3):
            x = ops.tanh(ops.matmul(x, w))
        return ops.sum(ops.square(x))

    x, w = np.random.default_rng(1).normal(size=(2, 5, 5)).astype("float32")
    value, gradients = kgraph.value_and_grad(inner, (0, 1))(x, w)
    for function in (keras.remat(inner), keras.remat(keras.remat(inner))):
        found, again = kgraph.jit(kgraph.value_and_grad(function, (0, 1)))(x, w)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        for a, b in zip(again, gradients):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(keras.remat(inner)(x, w), inner(x, w))


def products(function, *args) -> int:
    """How many matrix products the optimised graph of value and gradient holds."""
    return str(optimise(capture_function(kgraph.value_and_grad(function), *args).graph, host_target())[0]).count(
        "dot_general("
    )


def test_only_what_gradients_read_is_computed_again():
    w = np.eye(4, dtype="float32")

    def linear(x):
        return ops.sum(ops.matmul(ops.matmul(x, w), w))

    def saved(x):
        return ops.sum(ops.exp(ops.matmul(ops.tanh(ops.matmul(x, w)), w)))

    x = np.ones((3, 4), "float32")
    assert products(keras.remat(linear), x) == products(linear, x)
    assert products(keras.remat(saved), x) > products(saved, x)


def test_second_derivatives_and_loops():
    def f(x):
        return ops.sum(ops.sin(x) ** 3)

    def in_a_loop(step):
        def f(x):
            last, _ = ops.scan(lambda c, _: (step(c), None), x, None, length=3)
            return ops.sum(last)

        return f

    def step(c):
        return ops.sin(c) * 1.5

    x = np.linspace(-1, 1, 7).astype("float32")

    def second(g):
        return kgraph.grad(lambda x: ops.sum(kgraph.grad(g)(x)))(x)

    np.testing.assert_allclose(second(keras.remat(f)), second(f), rtol=1e-4, atol=1e-5)
    looped, plain = (kgraph.value_and_grad(in_a_loop(s))(x) for s in (keras.remat(step), step))
    for a, b in zip(looped, plain):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_other_functions_keep_is_not_computed_again():
    """Of two functions in a row, the first one's result is kept as the second one's input."""
    w = np.eye(4, dtype="float32")

    def first(x):
        return ops.tanh(ops.matmul(x, w))

    def both(wrap):
        return lambda x: ops.sum(wrap(first)(wrap(first)(x)))

    x = np.ones((3, 4), "float32")
    # Two products forward, two backward, and one again: the second function's, whose result nothing keeps.
    assert products(both(lambda f: f), x) == 4
    assert products(both(keras.remat), x) == 5
