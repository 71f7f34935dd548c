"""Keras' callbacks, and callbacks of the user's own, around a compiled step."""

from __future__ import annotations

import importlib.util
import json
import time

import keras
import numpy as np
import pytest
from keras import callbacks, layers

from tests.models.training_runs import assert_equal_weights, classifier, data

OPTIONS = {"batch_size": 16, "shuffle": False, "verbose": 0}


class Interrupted(Exception):
    pass


class Interrupt(callbacks.Callback):
    """Breaks a training off in an epoch, before a batch."""

    def __init__(self, epoch: int, batch: int):
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise Interrupted


# -- stopping and going on --------------------------------------------------------------------------------------------
def test_early_stopping_restores_the_best_weights():
    x, y = data(40)
    model = classifier(keras.optimizers.SGD(0.1))
    weights, losses = [], []

    class Worse(callbacks.Callback):
        """After three epochs the training goes wrong."""

        def on_epoch_end(self, epoch, logs=None):
            weights.append(self.model.get_weights())
            losses.append(logs["val_loss"])
            if epoch == 2:
                self.model.optimizer.learning_rate = 100.0

    stopping = callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    history = model.fit(x, y, epochs=20, validation_data=(x, y), callbacks=[Worse(), stopping], **OPTIONS)
    best = int(np.argmin(losses))
    assert stopping.best_epoch == best
    assert len(history.epoch) == best + 3
    for ours, kept in zip(model.get_weights(), weights[best]):
        np.testing.assert_array_equal(ours, kept)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], losses[best], rtol=1e-6)


def test_backup_and_restore_after_a_break_in_an_epoch(tmp_path):
    x, y = data(64)
    whole = classifier("adam")
    whole.fit(x, y, epochs=4, **OPTIONS)

    def backup():
        return callbacks.BackupAndRestore(str(tmp_path / "backup"))

    with pytest.raises(Interrupted):
        classifier("adam").fit(x, y, epochs=4, callbacks=[backup(), Interrupt(2, 2)], **OPTIONS)
    resumed = classifier("adam", seed=1)
    history = resumed.fit(x, y, epochs=4, callbacks=[backup()], **OPTIONS)
    assert history.epoch == [2, 3]
    assert_equal_weights(whole, resumed)
    assert int(resumed.optimizer.iterations) == 16
    assert not (tmp_path / "backup").exists()


def test_backups_within_an_epoch(tmp_path):
    x, y = data(64)
    model = classifier("adam")
    backup = callbacks.BackupAndRestore(str(tmp_path / "backup"), save_freq=2, double_checkpoint=True)
    with pytest.raises(Interrupted):
        model.fit(x, y, epochs=4, callbacks=[backup, Interrupt(1, 3)], **OPTIONS)
    assert json.loads((tmp_path / "backup" / "training_metadata.json").read_text())["epoch"] == 1
    resumed = classifier("adam", seed=1)
    backup = callbacks.BackupAndRestore(str(tmp_path / "backup"))
    first = []
    look = callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: first.append((epoch, int(resumed.optimizer.iterations)))
    )
    resumed.fit(x, y, epochs=3, callbacks=[backup, look], **OPTIONS)
    assert first == [(1, 6), (2, 10)]


def test_a_broken_off_training_leaves_a_model_that_works():
    x, y = data(64)
    model, twin = classifier("adam"), classifier("adam")

    class ControlC(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, epochs=4, callbacks=[ControlC()], **OPTIONS)
    twin.fit(x[:32], y[:32], **OPTIONS)
    assert_equal_weights(model, twin)
    model.fit(x, y, epochs=1, **OPTIONS)
    twin.fit(x, y, epochs=1, **OPTIONS)
    assert_equal_weights(model, twin)
    assert model._compiled_train_step.stats()["compiles"] == 1


def test_a_real_interrupt_signal_during_the_step():
    signal = pytest.importorskip("signal")
    x, y = data(64)
    model = classifier("adam")
    model.fit(x, y, **OPTIONS)

    def handler(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        # Again every second: Python drops an exception that a signal raises inside of a finaliser.
        signal.setitimer(signal.ITIMER_REAL, 0.05, 1.0)
        with pytest.raises(KeyboardInterrupt):
            model.fit(x, y, epochs=10**6, **OPTIONS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    steps = int(model.optimizer.iterations)
    model.fit(x, y, **OPTIONS)
    assert int(model.optimizer.iterations) == steps + 4
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()


def test_terminate_on_nan(capsys):
    x, y = data(40)
    x[20] = np.nan
    model = classifier()
    history = model.fit(x, y, epochs=5, callbacks=[callbacks.TerminateOnNaN()], **OPTIONS)
    assert history.epoch == [0]
    assert np.isnan(history.history["loss"][0])
    assert "Invalid loss" in capsys.readouterr().out
    assert int(model.optimizer.iterations) == 2


# -- writing ----------------------------------------------------------------------------------------------------------
def test_model_checkpoints(tmp_path):
    x, y = data(40)
    model = classifier("adam")
    losses = []
    history = model.fit(
        x,
        y,
        epochs=3,
        validation_data=(x, y),
        callbacks=[
            callbacks.ModelCheckpoint(str(tmp_path / "all-{epoch:02d}-{val_loss:.2f}.keras")),
            callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), monitor="val_loss", save_best_only=True),
            callbacks.ModelCheckpoint(str(tmp_path / "some.weights.h5"), save_weights_only=True),
            callbacks.ModelCheckpoint(
                str(tmp_path / "batch-{batch:02d}.weights.h5"), save_weights_only=True, save_freq=2
            ),
            callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(logs["val_loss"])),
        ],
        **OPTIONS,
    )
    assert len(list(tmp_path.glob("all-*.keras"))) == 3
    assert len(list(tmp_path.glob("batch-*.weights.h5"))) >= 2
    best = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_allclose(best.evaluate(x, y, verbose=0)[0], min(losses), rtol=1e-6)
    other = classifier("adam", seed=4)
    other.load_weights(tmp_path / "some.weights.h5")
    assert_equal_weights(model, other)
    assert history.history["val_loss"] == losses


def test_csv_logs_append(tmp_path):
    x, y = data(20)
    path = tmp_path / "log.csv"
    model = classifier()
    model.fit(x, y, epochs=2, callbacks=[callbacks.CSVLogger(str(path), separator=";")], **OPTIONS)
    model.fit(x, y, epochs=1, callbacks=[callbacks.CSVLogger(str(path), separator=";", append=True)], **OPTIONS)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("epoch;accuracy;loss")
    assert [line.split(";")[0] for line in lines[1:]] == ["0", "1", "0"]
    assert all(np.isfinite(float(field)) for line in lines[1:] for field in line.split(";")[:3])


def test_tensorboard_needs_tensorflow_as_on_every_backend(tmp_path):
    names = ("tensorflow", "tensorboard")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    writing = callbacks.TensorBoard(str(tmp_path), histogram_freq=1, update_freq=1)
    model = classifier()
    if missing:
        with pytest.raises(ImportError, match="(?i)" + missing[0]):
            model.fit(*data(8), callbacks=[writing], **OPTIONS)
    else:
        model.fit(*data(8), callbacks=[writing], **OPTIONS)
        assert list(tmp_path.rglob("events*"))


# -- learning rates ---------------------------------------------------------------------------------------------------
def test_learning_rates_from_callbacks_and_schedules():
    x, y = data(32)
    steps = 2

    def rates(learning_rate, *extra):
        seen = []
        model = classifier(keras.optimizers.SGD(learning_rate))
        recording = callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(float(model.optimizer.learning_rate))
        )
        model.fit(x, y, epochs=4, callbacks=[*extra, recording], **OPTIONS)
        assert model._compiled_train_step.stats()["compiles"] == 1
        return seen[::steps], model

    scheduled, by_callback = rates(0.1, callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)))
    np.testing.assert_allclose(scheduled, [0.1, 0.05, 0.1 / 3, 0.025], rtol=1e-6)
    boundaries = [steps - 1, 2 * steps - 1, 3 * steps - 1]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, [0.1, 0.05, 0.1 / 3, 0.025])
    _, by_schedule = rates(schedule)
    assert_equal_weights(by_callback, by_schedule, rtol=1e-6)
    reduced, _ = rates(0.1, callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=9.0, min_lr=0.04))
    np.testing.assert_allclose(reduced, [0.1, 0.1, 0.05, 0.04], rtol=1e-6)


# -- averages of weights ----------------------------------------------------------------------------------------------
def test_swap_ema_weights(tmp_path):
    x, y = data(32)
    ema = {"use_ema": True, "ema_momentum": 0.5}
    model = classifier(keras.optimizers.SGD(0.1, **ema))
    expected, checked = [], []

    class Track(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            values = self.model.get_layer("head").get_weights()
            # The average starts at the weights after the first step.
            before = expected or values
            expected[:] = [0.5 * average + 0.5 * value for average, value in zip(before, values)]

        def on_test_end(self, logs=None):
            checked.append([w.copy() for w in self.model.get_layer("head").get_weights()])

    # Listed first, so that it sees the weights that the evaluation ran on.
    model.fit(x, y, epochs=2, validation_data=(x, y), callbacks=[Track(), callbacks.SwapEMAWeights()], **OPTIONS)
    for average, seen in zip(expected, checked[-1]):
        np.testing.assert_allclose(seen, average, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use_ema"):
        classifier().fit(x, y, validation_data=(x, y), callbacks=[callbacks.SwapEMAWeights()], **OPTIONS)


# -- callbacks of the user's own --------------------------------------------------------------------------------------
def test_what_a_callback_sees_and_changes():
    x, y = data(64)
    iterations, logged, rates, weights = [], [], [], []

    class Own(callbacks.Callback):
        def on_train_begin(self, logs=None):
            assert self.params["epochs"] == 3
            assert self.params["steps"] == 4

        def on_train_batch_end(self, batch, logs=None):
            iterations.append(int(self.model.optimizer.iterations))
            logged.append({name: float(value) for name, value in logs.items()})
            self.model.optimizer.learning_rate = 0.1 / (batch + 1)
            rates.append(float(self.model.optimizer.learning_rate))
            weights.append(np.array(self.model.layers[0].kernel))

        def on_epoch_end(self, epoch, logs=None):
            logs["twice"] = 2 * logs["loss"]
            if epoch == 1:
                self.model.stop_training = True

    history = classifier().fit(x, y, epochs=3, callbacks=[Own()], **OPTIONS)
    assert iterations == list(range(1, 9))
    assert history.epoch == [0, 1]
    np.testing.assert_allclose(history.history["loss"], [logged[3]["loss"], logged[7]["loss"]], rtol=1e-7)
    np.testing.assert_allclose(history.history["twice"], 2 * np.array(history.history["loss"]))
    np.testing.assert_allclose(rates[:4], [0.1, 0.05, 0.1 / 3, 0.025], rtol=1e-6)
    # What was read stays what it was, though training went on.
    assert len({w.tobytes() for w in weights}) == 8


def test_stopping_in_the_middle_of_an_epoch_and_of_evaluations():
    x, y = data(64)

    class Stop(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

        def on_test_batch_end(self, batch, logs=None):
            self.model.stop_evaluating = batch == 1

        def on_predict_batch_end(self, batch, logs=None):
            self.model.stop_predicting = batch == 1

    model = classifier()
    history = model.fit(x, y, epochs=3, callbacks=[Stop()], **OPTIONS)
    assert history.epoch == [0]
    assert int(model.optimizer.iterations) == 2
    part = model.evaluate(x, y, batch_size=16, callbacks=[Stop()], verbose=0)
    np.testing.assert_allclose(part, model.evaluate(x[:32], y[:32], verbose=0), rtol=1e-5)
    assert model.predict(x, batch_size=16, callbacks=[Stop()], verbose=0).shape == (32, 3)


def test_a_callback_that_evaluates_and_predicts_during_training():
    x, y = data(32)
    seen = []

    class Look(callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            outputs = self.model.predict(x, verbose=0)
            seen.append((outputs, self.model(x), self.model.evaluate(x, y, verbose=0, return_dict=True)))

    model, twin = classifier("adam"), classifier("adam")
    model.fit(x, y, epochs=3, callbacks=[Look()], **OPTIONS)
    twin.fit(x, y, epochs=3, **OPTIONS)
    assert_equal_weights(model, twin)
    for outputs, called, logs in seen:
        np.testing.assert_allclose(outputs, called, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logs["accuracy"], (outputs.argmax(-1) == y).mean(), rtol=1e-6)
    assert not np.array_equal(seen[0][0], seen[2][0])


def test_a_callback_list_made_by_hand_and_lambda_callbacks():
    x, y = data(32)
    seen = []
    model = classifier()
    log = callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append("begin"),
        on_epoch_end=lambda epoch, logs: seen.append((epoch, sorted(logs))),
        on_train_end=lambda logs: seen.append(sorted(logs)),
    )
    by_hand = callbacks.CallbackList([log], add_history=True, model=model, epochs=1, steps=2)
    history = model.fit(x, y, callbacks=by_hand, **OPTIONS)
    assert seen == ["begin", (0, ["accuracy", "loss"]), ["accuracy", "loss"]]
    assert history is model.history


def test_steps_do_not_wait_for_slow_callbacks_of_other_batches():
    """A callback that keeps the logs keeps values: later steps do not write into them."""
    x, y = data(64)
    kept = []
    start = time.perf_counter()
    keeper = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: kept.append(dict(logs)))
    classifier("adam").fit(x, y, epochs=2, callbacks=[keeper], **OPTIONS)
    values = [float(logs["loss"]) for logs in kept]
    assert len(set(values)) == len(values)
    assert time.perf_counter() - start < 60


def test_layers_that_callbacks_change():
    """Weights set, layers' rates of dropout read at trace time: the former count at once."""
    x, y = data(32)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    class Zero(callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.set_weights([np.zeros_like(w) for w in self.model.get_weights()])

    history = model.fit(x, y, callbacks=[Zero()], **OPTIONS)
    np.testing.assert_allclose(history.history["loss"][0], np.log(3), rtol=1e-6)
