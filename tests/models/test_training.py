"""`fit` and its relatives: what Keras promises of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tests.models.training_runs import assert_equal_weights, classifier, data


# -- fit --------------------------------------------------------------------------------------------------------------
def test_history_validation_and_a_partial_batch_with_one_compile():
    model = classifier("adam")
    x, y = data(50)
    history = model.fit(x, y, batch_size=16, epochs=3, validation_split=0.2, verbose=0)
    assert history.epoch == [0, 1, 2]
    assert set(history.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert all(len(v) == 3 and all(isinstance(f, float) for f in v) for v in history.history.values())
    assert history.history["loss"][-1] < history.history["loss"][0]
    for step in (model._compiled_train_step, model._compiled_test_step):
        assert step.stats()["compiles"] == 1
        assert step.stats()["specialised"] is None
    assert int(model.optimizer.iterations) == 9
    model.fit(x, y, batch_size=10, initial_epoch=3, epochs=4, verbose=0)
    assert model.history.epoch == [3]
    assert model._compiled_train_step.stats()["compiles"] == 1
    logs = model.evaluate(x, y, batch_size=7, verbose=0, return_dict=True)
    predicted = model.predict(x, batch_size=13, verbose=0)
    np.testing.assert_allclose(logs["accuracy"], (predicted.argmax(-1) == y).mean(), rtol=1e-6)
    np.testing.assert_allclose(predicted, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": False}], ids=str)
def test_eager_steps_give_the_same(options):
    compiled, eager = classifier("adam", dropout=0.3), classifier("adam", dropout=0.3, **options)
    x, y = data(40)
    for model in (compiled, eager):
        model.history = model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    assert eager._compiled_train_step is None
    assert_equal_weights(compiled, eager, rtol=2e-4, atol=2e-5)
    for name, values in compiled.history.history.items():
        np.testing.assert_allclose(values, eager.history.history[name], rtol=1e-4)


def test_the_same_seed_gives_the_same_bits():
    x, y = data(40)
    models = []
    for _ in range(2):
        model = classifier("adam", seed=5, dropout=0.4)
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
        models.append(model)
    assert_equal_weights(*models)
    assert not np.array_equal(classifier(seed=5).get_weights()[0], models[0].get_weights()[0])


def test_class_and_sample_weights():
    x, y = data(30)
    weights = {0: 1.0, 1: 0.25, 2: 3.0}
    models = [classifier() for _ in range(3)]
    models[0].fit(x, y, batch_size=16, class_weight=weights, shuffle=False, verbose=0)
    models[1].fit(x, y, batch_size=16, sample_weight=np.array([weights[c] for c in y]), shuffle=False, verbose=0)
    models[2].fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert_equal_weights(models[0], models[1])
    assert not np.array_equal(models[0].get_weights()[0], models[2].get_weights()[0])
    first, second = classifier(), classifier()
    a = first.train_on_batch(x, y, class_weight=weights, return_dict=True)
    b = second.train_on_batch(x, y, sample_weight=np.array([weights[c] for c in y]), return_dict=True)
    assert a == b
    with pytest.raises(ValueError, match="at the same time"):
        first.train_on_batch(x, y, class_weight=weights, sample_weight=np.ones(30))


def test_frozen_layers_stay_and_compile_thaws_them():
    x, y = data()
    model = classifier()
    model.get_layer("hidden").trainable = False
    model.compile("sgd", model.loss)
    before = model.get_layer("hidden").get_weights()
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.get_layer("hidden").get_weights()[0], before[0])
    model.get_layer("hidden").trainable = True
    model.compile("sgd", model.loss)
    model.fit(x, y, verbose=0)
    assert not np.array_equal(model.get_layer("hidden").get_weights()[0], before[0])


def test_weights_set_between_steps_count():
    x, y = data(16)
    model, fresh = classifier(), classifier(seed=3)
    model.train_on_batch(x, y)
    model.set_weights(fresh.get_weights())
    assert model.train_on_batch(x, y) == fresh.train_on_batch(x, y)
    assert_equal_weights(model, fresh)
    assert not model.trainable_variables[0].value.flags.writeable


# -- callbacks --------------------------------------------------------------------------------------------------------
def test_order_of_callbacks():
    seen = []
    names = "train_begin train_end epoch_begin epoch_end train_batch_begin train_batch_end test_begin test_end".split()

    class Recorder(keras.callbacks.Callback):
        pass

    for name in names:
        setattr(Recorder, f"on_{name}", lambda self, *args, name=name, **kwargs: seen.append(name))
    x, y = data(20)
    classifier().fit(x, y, batch_size=10, epochs=1, validation_data=(x, y), callbacks=[Recorder()], verbose=0)
    batch = ["train_batch_begin", "train_batch_end"]
    expected = ["train_begin", "epoch_begin", *batch, *batch, "test_begin", "test_end", "epoch_end", "train_end"]
    assert seen == expected


def test_callbacks_that_act_on_the_training(tmp_path):
    x, y = data()
    model = classifier(keras.optimizers.SGD(0.1))
    rates = []
    history = model.fit(
        x,
        y,
        epochs=6,
        validation_data=(x, y),
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 if epoch < 2 else 0.0),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate))
            ),
            keras.callbacks.EarlyStopping("loss", patience=2, min_delta=10.0, start_from_epoch=2),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        ],
    )
    assert len(history.epoch) == 5
    np.testing.assert_allclose(rates, [0.1, 0.1, 0, 0, 0], atol=1e-9)
    assert model._compiled_train_step.stats()["compiles"] == 1
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,accuracy,learning_rate,loss,val_accuracy,val_loss"
    assert len(lines) == 6

    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)
    model.compile(keras.optimizers.SGD(0.2), model.loss)
    model.fit(x, y, epochs=4, callbacks=[plateau], verbose=0)
    assert float(model.optimizer.learning_rate) < 0.1

    model.compile(keras.optimizers.SGD(1e30), "sparse_categorical_crossentropy")
    history = model.fit(x, y, epochs=50, callbacks=[keras.callbacks.TerminateOnNaN()], verbose=0)
    assert len(history.epoch) < 50


def test_resume_from_a_checkpoint_goes_on_with_the_same_bits(tmp_path):
    x, y = data(40)
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    whole = classifier("adam")
    whole.fit(x, y, epochs=4, **options)
    path = str(tmp_path / "model.keras")
    part = classifier("adam")
    part.fit(x, y, epochs=2, callbacks=[keras.callbacks.ModelCheckpoint(path)], **options)
    resumed = keras.models.load_model(path)
    resumed.fit(x, y, initial_epoch=2, epochs=4, **options)
    assert int(resumed.optimizer.iterations) == 12
    assert_equal_weights(whole, resumed)


def test_several_steps_per_execution():
    x, y = data(50)
    seen = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    model, single = classifier(steps_per_execution=2), classifier()
    model.fit(x, y, batch_size=10, shuffle=False, callbacks=[callback], verbose=0)
    single.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    assert seen == [1, 3, 5]
    assert_equal_weights(model, single)


# -- data -------------------------------------------------------------------------------------------------------------
def test_kinds_of_data():
    x, y = data(48)
    expected = classifier()
    expected.fit(x, y, batch_size=16, shuffle=False, verbose=0)

    def batches():
        while True:
            for i in range(0, 48, 16):
                yield x[i : i + 16], y[i : i + 16]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[index * 16 : index * 16 + 16], y[index * 16 : index * 16 + 16]

    model = classifier()
    model.fit(batches(), steps_per_epoch=3, verbose=0)
    assert_equal_weights(model, expected)
    model = classifier()
    model.fit(Batches(), shuffle=False, validation_data=Batches(), verbose=0)
    assert_equal_weights(model, expected)
    pandas = pytest.importorskip("pandas")
    model = classifier()
    model.fit(pandas.DataFrame(x), pandas.Series(y), batch_size=16, shuffle=False, verbose=0)
    assert_equal_weights(model, expected)


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    hidden = layers.Concatenate()([a, b])
    outputs = {"kind": layers.Dense(2, "softmax", name="kind")(hidden), "size": layers.Dense(1, name="size")(hidden)}
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(
        "adam",
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 0.5, "size": 2.0},
        metrics={"kind": ["accuracy"]},
    )
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(20, 3)), "b": rng.normal(size=(20, 4))}
    y = {"kind": rng.integers(0, 2, 20), "size": rng.normal(size=(20, 1))}
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    assert set(history.history) == {"loss", "kind_loss", "size_loss", "kind_accuracy"}
    logs = {name: values[-1] for name, values in history.history.items()}
    np.testing.assert_allclose(logs["loss"], 0.5 * logs["kind_loss"] + 2 * logs["size_loss"], rtol=1e-4)


def test_a_subclassed_model_is_built_by_fit():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = layers.Dense(5, "tanh"), layers.Dense(1)

        def call(self, x, training=False):
            return self.head(self.hidden(x) * (2.0 if training else 1.0))

    model = Net()
    model.compile("rmsprop", "mse")
    x, y = data(20)
    history = model.fit(x, y.astype("float32"), batch_size=8, epochs=4, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_on_batch_methods_take_lists():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    loss, mae = model.train_on_batch([[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0]])
    assert loss >= 0
    assert mae >= 0
    assert len(model.test_on_batch([[1.0, 2.0]], [[1.0]])) == 2
    assert model.predict_on_batch(np.ones((3, 2))).shape == (3, 1)
