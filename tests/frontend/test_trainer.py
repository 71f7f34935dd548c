"""evaluate and predict through Keras' own interface, compiled where the model allows it."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops as K


def data(rows=37):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 6)).astype("float32"), rng.integers(0, 3, (rows,))


def classifier(**options):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"], **options)
    return model


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str)
def test_predict_and_evaluate(options):
    model = classifier(**options)
    x, y = data()
    expected = model(x)
    np.testing.assert_allclose(model.predict(x, batch_size=8, verbose=0), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict_on_batch(x), expected, rtol=1e-5, atol=1e-6)
    logs = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    log_probabilities = K.log_softmax(expected)
    np.testing.assert_allclose(logs["loss"], -log_probabilities[np.arange(len(y)), y].mean(), rtol=1e-4)
    np.testing.assert_allclose(logs["accuracy"], (expected.argmax(-1) == y).mean(), rtol=1e-6)
    on_batch = model.test_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(on_batch["accuracy"], logs["accuracy"], rtol=1e-6)
    (compiled,) = model._compiled_forward.values()
    assert (compiled is None) == bool(options.get("run_eagerly"))


def test_predict_follows_new_weights():
    model = classifier()
    x, _ = data()
    model.predict(x, verbose=0)
    for variable in model.trainable_variables:
        variable.assign(K.ones_like(variable) * 0.3)
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-5, atol=1e-6)


def test_structures_and_callbacks():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, {"sum": layers.Dense(1)(a) + layers.Dense(1)(b), "a": a})
    x = {"a": np.ones((5, 2), "float32"), "b": np.ones((5, 3), "float32")}
    seen = []
    callback = keras.callbacks.LambdaCallback(on_predict_batch_end=lambda batch, logs: seen.append(batch))
    outputs = model.predict(x, batch_size=2, verbose=0, callbacks=[callback])
    assert outputs["sum"].shape == (5, 1)
    np.testing.assert_array_equal(outputs["a"], x["a"])
    assert seen == [0, 1, 2]


def test_a_subclassed_model_is_built_by_the_first_batch():
    class Double(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x) * 2

    model = Double()
    x, _ = data()
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-5, atol=1e-6)


def test_added_losses_count_in_evaluate():
    inputs = keras.Input((6,))
    outputs = layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1))(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(loss="mse")
    x, _ = data(8)
    target = np.zeros((8, 3), "float32")
    y = model(x)
    expected = np.mean(np.square(y)) + 0.1 * np.sum(np.square(y)) / 8
    np.testing.assert_allclose(model.evaluate(x, target, verbose=0), expected, rtol=1e-4)


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_says_so():
    class Branches(layers.Layer):
        def call(self, x):
            return x if K.sum(x) > 0 else -x

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape)

    inputs = keras.Input((6,))
    model = keras.Model(inputs, Branches(name="branches")(inputs))
    x = -np.ones((3, 6), "float32")
    with pytest.warns(RuntimeWarning, match="branches"):
        np.testing.assert_array_equal(model.predict(x, verbose=0), -x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(x, verbose=0)
