"""The arguments of `compile`, `fit` and their relatives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.models.training_runs import assert_equal_weights, classifier, data


def batch_sizes(model):
    """A callback's record of the rows that the model is trained and tested with."""
    seen = {"train": [], "test": []}

    def recording(name, step):
        def run(batch):
            seen[name].append(len(batch[0]))
            return step(batch)

        return run

    model.make_train_function()
    model.make_test_function()
    model._compiled_train_step = recording("train", model._compiled_train_step)
    model._compiled_test_step = recording("test", model._compiled_test_step)
    return seen


def test_validation_arguments():
    x, y = data(50)
    model = classifier()
    seen = batch_sizes(model)
    history = model.fit(
        x, y, batch_size=16, epochs=5, validation_split=0.4, validation_freq=2, validation_batch_size=15, verbose=0
    ).history
    assert seen["train"] == [16, 14] * 5
    assert seen["test"] == [15, 5] * 2
    assert len(history["loss"]) == 5
    assert len(history["val_loss"]) == 2
    seen["test"].clear()
    model.fit(x, y, epochs=4, validation_data=(x, y, np.ones(50)), validation_freq=[2, 3], verbose=0)
    assert seen["test"] == [32, 18] * 2
    held_out = classifier()
    held_out.fit(x[:30], y[:30], batch_size=16, shuffle=False, verbose=0)
    split = classifier()
    history = split.fit(x, y, batch_size=16, validation_split=0.4, shuffle=False, verbose=0).history
    assert_equal_weights(split, held_out)
    np.testing.assert_allclose(history["val_loss"][0], held_out.evaluate(x[30:], y[30:], verbose=0)[0], rtol=1e-5)


def test_steps_per_epoch_go_on_where_the_last_epoch_ended():
    x, y = data(40)
    model, whole = classifier(), classifier()
    seen = batch_sizes(model)
    model.fit(x, y, batch_size=10, steps_per_epoch=2, epochs=2, shuffle=False, verbose=0)
    assert seen["train"] == [10] * 4
    whole.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    assert_equal_weights(model, whole)
    again = classifier()
    again.fit(x, y, initial_epoch=3, epochs=5, verbose=0)
    assert again.history.epoch == [3, 4]


def test_shuffling_follows_the_seed():
    x, y = data(40)

    def weights(seed, shuffle):
        model = classifier(seed=0)
        keras.utils.set_random_seed(seed)
        model.fit(x, y, batch_size=8, shuffle=shuffle, verbose=0)
        return model.get_weights()[0]

    np.testing.assert_array_equal(weights(1, True), weights(1, True))
    np.testing.assert_array_equal(weights(1, False), weights(2, False))
    assert not np.array_equal(weights(1, True), weights(2, True))
    assert not np.array_equal(weights(1, True), weights(1, False))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
def test_weighted_metrics_and_weights_in_the_data(options):
    x, y = data(20)
    weights = np.linspace(0, 2, 20)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"], weighted_metrics=["accuracy"], **options)
    logs = model.evaluate(x, y, sample_weight=weights, return_dict=True, verbose=0)
    right = model(x).argmax(-1) == y
    np.testing.assert_allclose(logs["accuracy"], right.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["weighted_accuracy"], (right * weights).sum() / weights.sum(), rtol=1e-5)
    per_row = np.asarray(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
    np.testing.assert_allclose(logs["loss"], (per_row * weights).mean(), rtol=1e-5)
    np.testing.assert_allclose(model.test_on_batch(x, y, weights)[0], logs["loss"], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
def test_weights_and_targets_per_step_of_a_sequence(options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5, 3)).astype("float32"), rng.integers(0, 4, (12, 5))
    weights = (rng.random((12, 5)) > 0.4).astype("float32")
    model = keras.Sequential([keras.Input((5, 3)), layers.Dense(4, kernel_initializer="ones")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, weighted_metrics=["accuracy"], **options)
    history = model.fit(x, y, sample_weight=weights, batch_size=12, verbose=0).history
    np.testing.assert_allclose(history["loss"][0], np.log(4) * weights.mean(), rtol=1e-5)
    right = (y == 0) * weights
    np.testing.assert_allclose(history["accuracy"][0], right.sum() / weights.sum(), rtol=1e-5)


def test_eager_compiled_and_several_steps_per_execution_agree():
    x, y = data(50)
    runs = []
    for options in ({}, {"run_eagerly": True}, {"jit_compile": False}, {"steps_per_execution": 3}):
        model = classifier("adam", dropout=0.2, **options)
        history = model.fit(x, y, batch_size=8, epochs=2, validation_split=0.2, shuffle=False, verbose=0).history
        runs.append((model, history))
    for model, history in runs[1:]:
        assert_equal_weights(runs[0][0], model, rtol=2e-4, atol=2e-5)
        for name, values in history.items():
            np.testing.assert_allclose(values, runs[0][1][name], rtol=1e-4)
    assert_equal_weights(runs[0][0], runs[3][0])
    model = runs[3][0]
    np.testing.assert_allclose(model.predict(x, batch_size=8, verbose=0), model(x), rtol=1e-4, atol=1e-5)


def test_methods_for_single_batches():
    x, y = data(20)
    model, twin = classifier(), classifier()
    first = model.train_on_batch(x, y, return_dict=True)
    history = twin.fit(x, y, batch_size=20, shuffle=False, verbose=0).history
    assert_equal_weights(model, twin)
    for name, value in first.items():
        assert value == history[name][0]
    listed = model.test_on_batch(x, y)
    assert listed == list(model.test_on_batch(x, y, return_dict=True).values())[: len(listed)] or set(listed) == set(
        model.test_on_batch(x, y, return_dict=True).values()
    )
    # The metrics are of the batch, not of all batches so far.
    model.train_on_batch(x[:4], y[:4])
    np.testing.assert_allclose(model.test_on_batch(x, y), model.evaluate(x, y, verbose=0), rtol=1e-5)
    assert isinstance(model.predict_on_batch(x), np.ndarray)
    outputs = model.predict_on_batch(x)
    outputs[:] = 0
    assert model.predict_on_batch(x).any()


def test_history_object_and_progress_bar(capsys):
    x, y = data(40)
    model = classifier()
    history = model.fit(x, y, batch_size=10, epochs=2, validation_data=(x, y), verbose=2)
    assert model.history is history
    assert history.params == {"verbose": 2, "epochs": 2, "steps": 4}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Epoch 1/2"
    assert "4/4" in lines[1]
    assert "val_accuracy" in lines[1]
    model.fit(x, y, batch_size=10, verbose=1)
    bar = capsys.readouterr().out
    assert "4/4" in bar
    assert "accuracy:" in bar
    assert "loss:" in bar
    model.evaluate(x, y, batch_size=10, verbose=2)
    assert "4/4" in capsys.readouterr().out
    model.predict(x, batch_size=10, verbose=1)
    assert "4/4" in capsys.readouterr().out
    model.fit(x, y, verbose=0)
    assert capsys.readouterr().out == ""


def test_limits_for_debugging_runs():
    x, y = data(40)
    model = classifier()
    seen = batch_sizes(model)
    keras.config.set_max_epochs(1)
    keras.config.set_max_steps_per_epoch(2)
    try:
        with pytest.warns(UserWarning, match="Limiting"):
            model.fit(x, y, batch_size=8, epochs=4, verbose=0)
    finally:
        keras.config.set_max_epochs(None)
        keras.config.set_max_steps_per_epoch(None)
    assert seen["train"] == [8, 8]


def test_compile_again_changes_loss_optimizer_and_metrics():
    x, y = data(20)
    model = classifier()
    model.fit(x, y, verbose=0)
    model.compile("adam", lambda y, p: ops.mean(ops.square(p), axis=-1), metrics=[])
    history = model.fit(x, y, verbose=0).history
    assert set(history) == {"loss"}
    assert int(model.optimizer.iterations) == 1
