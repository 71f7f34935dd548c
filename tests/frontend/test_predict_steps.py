"""predict with optional inputs that are absent, and with steps of the user's own."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from kgraph.errors import InputError

X = np.linspace(-1, 1, 14, dtype="float32").reshape(7, 2)


def with_optional_input():
    class Sum(keras.Layer):
        def call(self, x, other=None):
            return x if other is None else x + other

    x, other = keras.Input((2,), name="x"), keras.Input((2,), name="other", optional=True)
    return keras.Model({"x": x, "other": other}, layers.Dense(3)(Sum()(x, other)))


def test_an_optional_input_may_be_absent_or_given():
    model = with_optional_input()
    model.compile("sgd", "mse")
    for other in (None, 2 * X, None):
        expected = model({"x": X, "other": other})
        np.testing.assert_allclose(
            model.predict({"x": X, "other": other}, batch_size=3, verbose=0), expected, rtol=1e-5
        )


@pytest.mark.parametrize("eager", [False, True])
def test_an_overridden_predict_step_is_traced_once(eager):
    calls = []

    class Doubled(keras.Model):
        def predict_step(self, data):
            calls.append(1)
            return keras.ops.softmax(2 * super().predict_step(data))

    inputs = keras.Input((2,))
    model = Doubled(inputs, layers.Dense(3)(inputs))
    model.compile("sgd", "mse", run_eagerly=eager)
    expected = keras.ops.softmax(2 * model(X))
    np.testing.assert_allclose(model.predict(X, batch_size=2, verbose=0), expected, rtol=1e-5)
    assert len(calls) == (4 if eager else 1)


def test_a_predict_step_that_cannot_be_traced_runs_eagerly_and_says_so():
    class Positive(keras.Model):
        def predict_step(self, data):
            y = super().predict_step(data)
            return np.abs(np.array(y))

    inputs = keras.Input((2,))
    model = Positive(inputs, layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    with pytest.warns(RuntimeWarning, match="predict step .* runs eagerly"):
        y = model.predict(X, batch_size=4, verbose=0)
    np.testing.assert_allclose(y, np.abs(model(X)), rtol=1e-5)


def test_a_declared_batch_size_does_not_bind_predict():
    inputs = keras.Input(batch_shape=(5, 2))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    np.testing.assert_allclose(model.predict(X, batch_size=3, verbose=0), model(X), rtol=1e-5)


def test_a_sequential_model_takes_other_sizes_than_it_was_built_with():
    model = keras.Sequential([layers.Conv1D(3, 2), layers.GlobalAveragePooling1D()])
    model.compile("sgd", "mse")
    for length in (6, 4, 9):
        x = np.linspace(-1, 1, 10 * length, dtype="float32").reshape(5, length, 2)
        np.testing.assert_allclose(model.predict(x, batch_size=2, verbose=0), model(x), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="expected axis -1"):
        model.predict(x[..., :1], verbose=0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("rows", [1, 7])
def test_one_batch_predicts_as_several_do(dtype, rows):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3), layers.Dropout(0.5)])
    x = (3 * X[:rows]).astype(dtype)
    one = model.predict(x, verbose=0)
    assert one.dtype == "float32"
    np.testing.assert_allclose(one, model(x.astype("float32")), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one, model.predict(x, batch_size=2, verbose=0), rtol=1e-5, atol=1e-6)


def test_a_batch_of_predict_without_rows_is_refused():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    with pytest.raises(InputError, match="no rows"):
        model.predict(X[:0], verbose=0)
