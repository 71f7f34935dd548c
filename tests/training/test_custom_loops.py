"""Training loops by hand: `kgraph.jit`, `value_and_grad`, and the stateless methods of Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from tests.models.training_runs import classifier, data


def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=1),
            layers.Dense(3),
        ]
    )
    return model, keras.optimizers.Adam(0.01)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_step(model, optimizer, metric):
    """A step on explicit state, as in Keras' guide for JAX."""

    def loss_of(trainable, rest, x, y):
        y_pred, rest = model.stateless_call(trainable, rest, x, training=True)
        return LOSS(y, y_pred), {"predictions": y_pred, "state": (rest,)}

    differentiated = kgraph.value_and_grad(loss_of, has_aux=True)

    def step(state, x, y):
        trainable, rest, slots, counts = state
        (loss, aux), gradients = differentiated(trainable, rest, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        counts = metric.stateless_update_state(counts, y, aux["predictions"])
        return loss, (trainable, aux["state"][0], slots, counts)

    return step


def run(step_of, rows=32, steps=6):
    model, optimizer = build()
    optimizer.build(model.trainable_variables)
    metric = keras.metrics.SparseCategoricalAccuracy()
    step = step_of(make_step(model, optimizer, metric))
    state = tuple(
        [v.value for v in group]
        for group in (model.trainable_variables, model.non_trainable_variables, optimizer.variables, metric.variables)
    )
    x, y = data(rows)
    losses = []
    for i in range(steps):
        part = slice(8 * (i % 4), 8 * (i % 4) + 8)
        loss, state = step(state, x[part], y[part])
        losses.append(float(loss))
    for variable, value in zip(model.trainable_variables + model.non_trainable_variables, state[0] + state[1]):
        variable.assign(value)
    return model, losses, float(metric.stateless_result(state[3]))


def test_a_stateless_loop_compiled_and_interpreted():
    compiled, losses, accuracy = run(kgraph.jit)
    eager, eager_losses, eager_accuracy = run(lambda step: step)
    np.testing.assert_allclose(losses, eager_losses, rtol=1e-4)
    np.testing.assert_allclose(accuracy, eager_accuracy, rtol=1e-5)
    for a, b in zip(compiled.get_weights(), eager.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_stateless_loop_is_fit():
    model, losses, _ = run(kgraph.jit, steps=4)
    twin, optimizer = build()
    twin.compile(optimizer, LOSS)
    x, y = data(32)
    ours = [twin.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    np.testing.assert_allclose(losses, ours, rtol=1e-4)
    for a, b in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_loop_on_the_variables_themselves():
    """`optimizer.apply` inside of a compiled function updates the model's variables in place."""
    model, optimizer = build()
    optimizer.build(model.trainable_variables)
    mean = keras.metrics.Mean()

    @kgraph.jit
    def step(x, y):
        def loss_of(weights):
            rest = [v.value for v in model.non_trainable_variables]
            y_pred, rest = model.stateless_call(weights, rest, x, training=True)
            return LOSS(y, y_pred), rest

        weights = model.trainable_variables
        (loss, rest), gradients = kgraph.value_and_grad(loss_of, has_aux=True)([w.value for w in weights])
        optimizer.apply(gradients, weights)
        for variable, value in zip(model.non_trainable_variables, rest):
            variable.assign(value)
        mean.update_state(loss)
        return loss

    x, y = data(32)
    losses = [float(step(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert int(optimizer.iterations) == 8
    np.testing.assert_allclose(float(mean.result()), np.mean(losses), rtol=1e-5)


def test_gradients_of_nested_weights_and_inputs():
    def loss(parameters, x):
        hidden = ops.tanh(ops.matmul(x, parameters["hidden"]["kernel"]) + parameters["hidden"]["bias"])
        return ops.mean(ops.square(ops.matmul(hidden, parameters["out"][0])))

    rng = np.random.default_rng(0)
    parameters = {
        "hidden": {"kernel": rng.normal(size=(4, 5)).astype("float32"), "bias": np.zeros(5, "float32")},
        "out": [rng.normal(size=(5, 1)).astype("float32")],
    }
    x = rng.normal(size=(7, 4)).astype("float32")
    value, (by_parameters, by_x) = kgraph.jit(kgraph.value_and_grad(loss, argnums=(0, 1)))(parameters, x)
    assert set(by_parameters) == {"hidden", "out"}
    assert by_parameters["hidden"]["kernel"].shape == (4, 5)
    assert by_x.shape == x.shape
    step = 1e-2
    moved = {**parameters, "out": [parameters["out"][0] + step * by_parameters["out"][0]]}
    rise = float(loss(moved, x)) - float(value)
    np.testing.assert_allclose(rise, step * np.sum(by_parameters["out"][0] ** 2), rtol=0.1)


def test_unconnected_gradients():
    def loss(a, b):
        return ops.sum(a * a)

    a, b = np.ones(3, "float32"), np.ones(2, "float32")
    for wrap in (lambda f: f, kgraph.jit):
        _, (by_a, by_b) = wrap(kgraph.value_and_grad(loss, (0, 1)))(a, b)
        np.testing.assert_array_equal(by_b, np.zeros(2))
        _, (by_a, by_b) = wrap(kgraph.value_and_grad(loss, (0, 1), unconnected="none"))(a, b)
        assert by_b is None
        np.testing.assert_allclose(by_a, 2 * a)
    with pytest.raises(ValueError, match="unconnected"):
        kgraph.value_and_grad(loss, unconnected="nan")


def test_a_penalty_on_gradients():
    """A gradient in the loss: second derivatives through a model's layers."""
    model, _ = build()

    def penalty(weights, rest, x):
        def score(x):
            return ops.sum(model.stateless_call(weights, rest, x, training=False)[0])

        gradients = kgraph.grad(score)(x)
        return ops.mean(ops.square(ops.sqrt(ops.sum(ops.square(gradients), axis=1) + 1e-8) - 1.0))

    x, _ = data(8)
    state = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    value, gradients = kgraph.jit(kgraph.value_and_grad(penalty))(*state, x)
    eager_value, eager_gradients = kgraph.value_and_grad(penalty)(*state, x)
    np.testing.assert_allclose(value, eager_value, rtol=1e-4)
    for a, b in zip(gradients, eager_gradients):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_stateless_methods_leave_the_variables_alone():
    model = classifier("adam")
    x, _ = data(16)
    model.optimizer.build(model.trainable_variables)
    before = model.get_weights()
    state = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    outputs, rest = model.stateless_call(*state, x, training=True)
    assert outputs.shape == (16, 3)
    assert not np.array_equal(rest[0], model.non_trainable_variables[0])
    slots = [v.value for v in model.optimizer.variables]
    model.optimizer.stateless_apply(slots, [np.ones_like(w) for w in state[0]], state[0])
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 0
