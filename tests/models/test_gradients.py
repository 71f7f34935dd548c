"""`kgraph.grad` and `kgraph.value_and_grad`: of functions in keras.ops, and of losses of Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import DTypeError, GradientError, ShapeError
from kgraph.frontend.capture import capture_function
from kgraph.ir.interpreter import evaluate

STEP = 1e-5


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


X = np.linspace(0.1, 1.0, 5).astype("float32")


# -- functions --------------------------------------------------------------------------------------------------------
def test_grad_and_value_on_arrays():
    value, gradient = kgraph.value_and_grad(lambda x: ops.sum(ops.sin(x) * x))(X)
    np.testing.assert_allclose(value, np.sum(np.sin(X) * X), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.cos(X) * X + np.sin(X), rtol=1e-6)
    assert gradient.dtype == np.float32
    assert kgraph.grad(lambda x: x * x)(3.0) == 6.0


def test_argnums_and_keywords():
    function = lambda x, y, scale=1.0: ops.sum(x * x * y) * scale
    np.testing.assert_allclose(kgraph.grad(function, argnums=1)(X, X, scale=2.0), 2 * X * X, rtol=1e-6)
    by_y, by_x = kgraph.grad(function, argnums=(-1, 0))(X, X)
    np.testing.assert_allclose(by_y, X * X, rtol=1e-6)
    np.testing.assert_allclose(by_x, 2 * X * X, rtol=1e-6)
    with pytest.raises(TypeError, match="argument 2"):
        kgraph.grad(function, argnums=2)(X, X)


def test_nested_arguments_and_aux():
    def function(params, x):
        out = x * params["w"][0] + params["b"]
        return ops.sum(out), {"out": out, "count": 3}

    (value, aux), gradients = kgraph.value_and_grad(function, has_aux=True)({"w": [X], "b": X[0]}, X)
    assert aux["count"] == 3
    np.testing.assert_allclose(value, aux["out"].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradients["w"][0], X, rtol=1e-6)
    np.testing.assert_allclose(gradients["b"], 5.0, rtol=1e-6)
    gradients, aux = kgraph.jit(kgraph.grad(function, has_aux=True))({"w": [X], "b": X[0]}, X)
    np.testing.assert_allclose(gradients["w"][0], X, rtol=1e-6)


def test_gradients_of_gradients_and_of_compiled_functions():
    function = lambda x: ops.sum(ops.sin(x) * x)
    inner = lambda x: ops.sum(kgraph.grad(function)(x))
    wanted = 2 * np.cos(X) - np.sin(X) * X
    np.testing.assert_allclose(kgraph.grad(inner)(X), wanted, rtol=1e-5)
    np.testing.assert_allclose(kgraph.jit(kgraph.grad(inner))(X), wanted, rtol=1e-5)
    np.testing.assert_allclose(kgraph.grad(kgraph.jit(function))(X), np.cos(X) * X + np.sin(X), rtol=1e-5)


def test_what_the_function_closes_over_is_constant():
    def outer(x):
        return ops.sum(kgraph.grad(lambda y: ops.sum(x * y * y))(x))

    x_is_constant = lambda x: ops.sum(2 * x * x)
    np.testing.assert_allclose(kgraph.jit(outer)(X), np.sum(2 * X * X), rtol=1e-6)
    np.testing.assert_allclose(kgraph.grad(outer)(X), kgraph.grad(x_is_constant)(X), rtol=1e-6)


def test_unused_arguments_have_zero_gradients():
    np.testing.assert_array_equal(kgraph.grad(lambda x, y: ops.sum(y))(X, X), np.zeros(5))


def test_a_gradient_in_the_body_of_a_loop():
    """Gradient descent inside of a scan, compiled, and differentiated by its start."""

    def descend(start):
        step = lambda x, _: (x - 0.1 * kgraph.grad(lambda y: ops.sum(y**4))(x), None)
        return ops.scan(step, start, length=3)[0]

    def wanted(x):
        for _ in range(3):
            x = x - 0.4 * x**3
        return x

    x = X.astype("float64")
    np.testing.assert_allclose(kgraph.jit(descend)(X), wanted(x), rtol=1e-5)
    by_start = (wanted(x + STEP) - wanted(x - STEP)) / (2 * STEP)
    np.testing.assert_allclose(kgraph.grad(lambda s: ops.sum(descend(s)))(X), by_start, rtol=1e-4)
    np.testing.assert_allclose(kgraph.jit(kgraph.grad(lambda s: ops.sum(descend(s))))(X), by_start, rtol=1e-4)


def test_branches():
    function = lambda x: ops.cond(ops.sum(x) > 0, lambda: ops.sum(x * x), lambda: ops.sum(x))
    for x in (X, -X):
        wanted = 2 * x if x.sum() > 0 else np.ones(5)
        np.testing.assert_allclose(kgraph.grad(function)(x), wanted, rtol=1e-6)
        np.testing.assert_allclose(kgraph.jit(kgraph.grad(function))(x), wanted, rtol=1e-6)


def test_variables_that_the_function_assigns():
    counter = keras.Variable(0.0)

    def function(x):
        counter.assign(counter + 1.0)
        return ops.sum(x) * counter

    for number, gradient in enumerate((kgraph.grad(function), kgraph.jit(kgraph.grad(function))), start=1):
        np.testing.assert_allclose(gradient(X), np.full(5, number), rtol=1e-6)
        assert float(counter.value) == number


def test_a_gradient_that_the_function_declares():
    @ops.custom_gradient
    def softplus(x, scale):
        e = ops.exp(x)

        def gradient(upstream):
            return upstream * scale * (1 - 1 / (1 + e)), None

        return scale * ops.log(1 + e), gradient

    function = lambda x: ops.sum(softplus(x, ops.sum(x) * 0 + 2.0))
    wanted = 2 / (1 + np.exp(-X))
    for gradients_of in (kgraph.grad(function), kgraph.jit(kgraph.grad(function))):
        np.testing.assert_allclose(gradients_of(X), wanted, rtol=1e-5)
    np.testing.assert_allclose(kgraph.jit(function)(X), np.sum(2 * np.log(1 + np.exp(X))), rtol=1e-5)
    second = kgraph.grad(lambda x: ops.sum(kgraph.grad(function)(x)))(X)
    np.testing.assert_allclose(second, wanted * (1 - wanted / 2), rtol=1e-5)


def test_errors_say_what_and_where():
    with pytest.raises(ShapeError, match=r"shape \(5,\)"):
        kgraph.grad(lambda x: x)(X)
    with pytest.raises(ShapeError, match="has_aux"):
        kgraph.grad(lambda x: (ops.sum(x), x))(X)
    with pytest.raises(DTypeError, match="int32"):
        kgraph.grad(lambda x: ops.sum(x))(np.arange(3, dtype="int32"))
    with pytest.raises(DTypeError, match="bool"):
        kgraph.grad(lambda x: ops.any(x > 0))(X)
    with pytest.raises(TypeError):
        kgraph.grad(3)
    loop = lambda x: ops.sum(ops.while_loop(lambda y: ops.sum(y) < 9, lambda y: y * 2, (x,))[0])
    with pytest.raises(GradientError, match=r"while_loop.*use scan"):
        kgraph.grad(loop)(X)


# -- models -----------------------------------------------------------------------------------------------------------
def dense_model():
    return keras.Sequential([keras.Input((6,)), layers.Dense(16, "gelu"), layers.Dropout(0.3), layers.Dense(3)])


def convolution_model():
    inputs = keras.Input((10, 9, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    y = layers.SeparableConv2D(8, 3, padding="same", activation="swish")(x)
    x = layers.MaxPooling2D(2)(layers.Add()([x, y]))
    x = layers.Conv2D(4, 1)(layers.AveragePooling2D(2, padding="same")(x))
    x = layers.Conv2DTranspose(3, 3, strides=2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def transformer_model():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 8)(inputs)
    y = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, y]))
    x = layers.Add()([x, layers.Dense(8)(layers.Dense(16, "gelu")(x))])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def recurrent_model():
    inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.GRU(5, return_sequences=True))(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(4)(x)))


def channels_first_model():
    inputs = keras.Input((3, 8, 8))
    x = layers.Conv2D(4, 3, data_format="channels_first", activation="relu")(inputs)
    x = layers.GroupNormalization(2, axis=1)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D(data_format="channels_first")(x)))


MODELS = {
    "dense": dense_model,
    "convolution": convolution_model,
    "transformer": transformer_model,
    "recurrent": recurrent_model,
    "channels_first": channels_first_model,
}


def loss_of(model):
    cost = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, non_trainable, x, y):
        logits, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return cost(y, logits), non_trainable

    return loss


def batch_for(model, size=5):
    shape, dtype = model.inputs[0].shape[1:], model.inputs[0].dtype
    rng = np.random.default_rng(0)
    if dtype == "int32":
        x = rng.integers(0, 11, (size, *shape)).astype("int32")
    else:
        x = rng.normal(size=(size, *shape)).astype("float32")
    return x, rng.integers(0, 3, size).astype("int32")


def state_of(model):
    return [np.asarray(v.value) for v in model.trainable_variables], [
        np.asarray(v.value) for v in model.non_trainable_variables
    ]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_model_losses(name):
    """The compiled step against the interpreter in float64, and that against central differences."""
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    gradients_of = kgraph.value_and_grad(loss_of(model), has_aux=True)
    state, batch = state_of(model), batch_for(model)

    captured = capture_function(gradients_of, *state, *batch)
    assert not captured.variables, "everything enters by the arguments"
    leaves = captured.inputs.flatten_call((*state, *batch), {})
    wanted = evaluate(captured.graph, leaves, precision="float64")
    (value, aux), gradients = kgraph.jit(gradients_of)(*state, *batch)
    for a, b in zip(wanted, captured.outputs.flatten(((value, aux), gradients)), strict=True):
        scale = np.max(np.abs(a), initial=1e-3)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * scale)

    count = len(state[0])
    rng = np.random.default_rng(2)
    directions = [rng.standard_normal(a.shape) for a in state[0]]
    ends = []
    for sign in (1, -1):
        moved = [a.astype("float64") + sign * STEP * d for a, d in zip(state[0], directions)]
        ends.append(evaluate(captured.graph, [*moved, *leaves[count:]], precision="float64")[0])
    slope = sum(np.sum(g * d) for g, d in zip(wanted[-count:], directions))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * STEP), rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_hand_written_training_loop_falls():
    keras.utils.set_random_seed(0)
    model = convolution_model()
    step = kgraph.jit(kgraph.value_and_grad(loss_of(model), has_aux=True))
    trainable, non_trainable = state_of(model)
    x, y = batch_for(model, 32)
    losses = []
    for _ in range(60):
        (loss, non_trainable), gradients = step(trainable, non_trainable, x, y)
        trainable = [w - 0.3 * g for w, g in zip(trainable, gradients)]
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert step.stats()["compiles"] == 1


def test_an_optimizer_in_the_compiled_step():
    keras.utils.set_random_seed(3)
    model = dense_model()
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    gradients_of = kgraph.value_and_grad(loss_of(model), has_aux=True)

    @kgraph.jit
    def step(trainable, non_trainable, slots, x, y):
        (loss, non_trainable), gradients = gradients_of(trainable, non_trainable, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return loss, trainable, non_trainable, slots

    state = [*state_of(model), [np.asarray(v.value) for v in optimizer.variables]]
    x, y = batch_for(model, 64)
    losses = []
    for _ in range(40):
        loss, *state = step(*state, x, y)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state[2][0]) == 40, "the optimizer's iterations"
