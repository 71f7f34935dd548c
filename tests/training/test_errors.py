"""Errors and warnings that users of Keras know, and a model that works after them."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.models.training_runs import classifier, data


def softmax_classifier(loss="sparse_categorical_crossentropy", metrics=("accuracy",), **options):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax")])
    model.compile("sgd", loss, metrics=list(metrics), **options)
    return model


@contextlib.contextmanager
def leaves_it_usable(model):
    yield
    x, y = data(8)
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()


def fails(error, match, *args, method="fit", model=None, **options):
    model = softmax_classifier() if model is None else model
    with leaves_it_usable(model), pytest.raises(error, match=match):
        getattr(model, method)(*args, verbose=0, **options)


# -- data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_no_data(method):
    x, y = data(8)
    targets = [] if method == "predict" else [y[:0]]
    fails(ValueError, "empty.*no rows", x[:0], *targets, method=method)
    fails(ValueError, "no data", None, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(ValueError, "at least one batch", (batch for batch in []), method=method)


def test_data_of_the_wrong_kind():
    x, y = data(8)
    fails(ValueError, "Invalid dtype: string", np.array(["a"] * 8), y)
    fails(ValueError, "Invalid dtype: string", x, np.array(["a"] * 8))
    fails(ValueError, "Invalid dtype: object", x.astype(object), y)
    fails(ValueError, "Unrecognized data type", x.tolist(), y.tolist())
    fails(ValueError, "cardinality is ambiguous", x, y[:4])
    fails(ValueError, "cardinality is ambiguous", x, y, sample_weight=np.ones(3))
    fails(ValueError, "only supported for tensors or NumPy arrays", ((x, y) for _ in range(2)), validation_split=0.5)
    fails(ValueError, "not sufficient to split", x, y, validation_split=1.0)
    fails(ValueError, "class_weight. is not supported", ((x, y) for _ in range(2)), class_weight={0: 1.0})


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float64", "float16"])
def test_inputs_of_other_dtypes_are_converted(dtype):
    x, y = data(8)
    x = (np.abs(x) * 3).astype(dtype)
    model = softmax_classifier()
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x.astype("float32")), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), model.test_on_batch(x, y), rtol=1e-5)


def test_a_generator_that_runs_out():
    x, y = data(8)
    model = softmax_classifier()
    with pytest.warns(UserWarning, match="ran out of data"):
        history = model.fit(((x, y) for _ in range(3)), steps_per_epoch=2, epochs=2, verbose=0)
    assert history.epoch == [0, 1]
    assert int(model.optimizer.iterations) == 3
    with pytest.warns(UserWarning, match="ran out of data"):
        model.evaluate(((x, y) for _ in range(2)), steps=5, verbose=0)


# -- shapes -----------------------------------------------------------------------------------------------------------
def test_shapes_that_do_not_fit():
    x, y = data(8)
    fails(ValueError, "axis -1 of input shape to have value 6", x[:, :5], y)
    fails(ValueError, r"Expected shape \(None, 6\)", x[:, 0], y)
    fails(ValueError, "y_true and y_pred have different structures", x, [y, y])
    fails(ValueError, "", x, y, sample_weight=np.ones((8, 3)))
    with pytest.raises(ValueError, match="must have the same shape"):
        softmax_classifier("categorical_crossentropy").fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"2.*3|3.*2"):
        softmax_classifier("mse", ()).fit(x, x[:, :2], verbose=0)
    with pytest.raises(ValueError, match="leading dimension"):
        softmax_classifier(metrics=[keras.metrics.AUC()]).fit(x, y, verbose=0)


def test_batches_without_rows():
    x, y = data(8)
    model = softmax_classifier()
    before = model.get_weights()
    assert np.isfinite(model.train_on_batch(x[:0], y[:0])).all()
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert model.predict_on_batch(x[:0]).shape == (0, 3)
    assert np.isfinite(model.test_on_batch(x[:0], y[:0])).all()


# -- models -----------------------------------------------------------------------------------------------------------
def test_models_that_are_not_ready():
    x, y = data(8)
    bare = keras.Sequential([layers.Dense(3)])
    for method in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
            getattr(bare, method)(x, y)
    assert bare.predict(x, verbose=0).shape == (8, 3)
    with pytest.raises(ValueError, match="Could not interpret loss"):
        softmax_classifier("no_such_loss").fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="Could not interpret metric"):
        softmax_classifier(metrics=["no_such_metric"]).fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"Could not (interpret|deserialize|locate)"):
        bare.compile("no_such_optimizer")
    without = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    without.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="without an optimizer"):
        without.fit(x, x[:, :3], verbose=0)
    assert without.evaluate(x, x[:, :3], verbose=0) > 0


class Unused(keras.Model):
    def __init__(self):
        super().__init__()
        self.used, self.unused = layers.Dense(3, "softmax"), layers.Dense(4, name="unused")

    def call(self, x):
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("eager", [False, True])
def test_weights_that_the_loss_does_not_depend_on(eager):
    x, y = data(8)
    model = Unused()
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "sparse_categorical_crossentropy", run_eagerly=eager)
    model(x)
    before = model.unused.get_weights()[0]
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['unused/unused/kernel'|unused"):
        model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.unused.get_weights()[0], before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not eager:
            model.fit(x, y, epochs=2, verbose=0)


def test_a_loss_that_depends_on_no_weight():
    x, y = data(8)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model.compile("sgd", lambda y, y_pred: ops.mean(ops.cast(y, "float32")))
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        model.fit(x, y, verbose=0)


def test_nan_losses_are_shown():
    x, y = data(8)
    x[0, 0] = np.nan
    model = classifier()
    history = model.fit(x, y, verbose=0).history
    assert np.isnan(history["loss"][0])
    assert np.isnan(model.get_weights()[0]).any()


def test_an_error_in_the_middle_of_an_epoch():
    """The batches before it count, and the model goes on."""
    x, y = data(32)

    def batches():
        yield x[:16], y[:16]
        raise OSError("the disk is gone")

    model = classifier("adam")
    model.fit(x, y, verbose=0)
    steps = int(model.optimizer.iterations)
    with pytest.raises(OSError, match="disk"):
        model.fit(batches(), shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) in (steps, steps + 1)
    with leaves_it_usable(model):
        pass


def test_arguments_that_contradict_each_other():
    x, y = data(8)
    model = softmax_classifier()
    with pytest.raises(ValueError, match="at the same time"):
        model.train_on_batch(x, y, sample_weight=np.ones(8), class_weight={0: 1.0, 1: 1.0, 2: 2.0})
    with pytest.raises(ValueError, match=r"y. should not be passed|y.* argument"):
        model.fit(((x, y) for _ in range(2)), y, verbose=0)
    with pytest.raises(ValueError, match="not recognized"):
        model.evaluate(x, y, no_such_argument=1)


def test_a_wrong_batch_does_not_make_evaluation_slow():
    x, _ = data(8)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model.compile("sgd", "mse")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2.*3|3.*2"):
            model.evaluate(x, x[:, :2], verbose=0)
        model.evaluate(x, x[:, :3], verbose=0)
        assert model._compiled_test_step is not None
