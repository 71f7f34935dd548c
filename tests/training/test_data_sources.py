"""What `fit`, `evaluate` and `predict` take as data."""

from __future__ import annotations

import sys
import types

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.models.training_runs import assert_equal_weights, classifier, data

ROWS, BATCH = 40, 16


class Rows(keras.utils.PyDataset):
    """Batches of x and y in order; at module level so that worker processes can import it."""

    def __init__(self, x, y, **options):
        super().__init__(**options)
        self.x, self.y, self.epochs = x, y, 0

    def __len__(self):
        return -(-len(self.x) // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        self.epochs += 1


def endless(x, y):
    while True:
        for i in range(0, len(x), BATCH):
            yield x[i : i + BATCH], y[i : i + BATCH]


@pytest.fixture
def expected():
    """A model trained for two epochs on arrays."""
    model = classifier("adam")
    model.fit(*data(ROWS), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return model


def same_as(expected, *args, built=False, **options):
    """A model trained like `expected` on other data. built: ahead of time; else Keras takes a batch for that."""
    model = classifier("adam")
    if built:
        model.test_on_batch(*data(3))
    model.fit(*args, epochs=2, verbose=0, **{"shuffle": False, **options})
    assert_equal_weights(model, expected)
    assert model._compiled_train_step.stats()["compiles"] == 1
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"workers": 2}, {"workers": 2, "use_multiprocessing": True, "max_queue_size": 3}],
    ids=["plain", "threads", "processes"],
)
def test_py_datasets(expected, options):
    x, y = data(ROWS)
    rows = Rows(x, y, **options)
    model = same_as(expected, rows, built=True)
    assert rows.epochs >= 2
    np.testing.assert_allclose(model.evaluate(rows, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(model.predict(rows, verbose=0), model(x), rtol=1e-5, atol=1e-6)


def test_generators(expected):
    x, y = data(ROWS)
    model = same_as(expected, endless(x, y), steps_per_epoch=3)
    logs = model.evaluate(endless(x, y), steps=3, verbose=0)
    np.testing.assert_allclose(logs, model.evaluate(x, y, verbose=0), rtol=1e-5)
    outputs = model.predict(((x[i : i + 7],) for i in range(0, 21, 7)), verbose=0)
    np.testing.assert_allclose(outputs, model(x[:21]), rtol=1e-5, atol=1e-6)
    history = classifier().fit(
        endless(x, y), steps_per_epoch=2, validation_data=endless(x, y), validation_steps=1, verbose=0
    )
    assert set(history.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}


def test_data_frames(expected):
    pandas = pytest.importorskip("pandas")
    x, y = data(ROWS)
    frame = pandas.DataFrame(x, columns=list("abcdef"))
    model = same_as(expected, frame, pandas.Series(y), batch_size=BATCH)
    np.testing.assert_allclose(model.predict(frame, verbose=0), model(x), rtol=1e-5, atol=1e-6)
    columns = {name: keras.Input((1,), name=name) for name in frame}
    table = keras.Model(columns, layers.Dense(1)(layers.Concatenate()(list(columns.values()))))
    table.compile("sgd", "mse")
    table.fit(dict(frame), pandas.DataFrame({"y": y}), verbose=0)
    assert table.predict(dict(frame), verbose=0).shape == (ROWS, 1)


def test_arrays_that_are_not_contiguous_read_only_or_of_other_dtypes(expected):
    x, y = data(ROWS)
    frozen = x.copy()
    frozen.setflags(write=False)
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], frozen, x.astype("float64")):
        same_as(expected, other, y.astype("int64") if other is frozen else y, batch_size=BATCH)
    sparse = pytest.importorskip("scipy.sparse")
    same_as(expected, sparse.csr_matrix(x), y, batch_size=BATCH)
    same_as(expected, ops.convert_to_tensor(x), ops.convert_to_tensor(y), batch_size=BATCH)


# -- DataLoaders ------------------------------------------------------------------------------------------------------
class Tensor:
    """As much of a PyTorch tensor as Keras asks for."""

    def __init__(self, array):
        self.array = array

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype=dtype)


@pytest.fixture
def loader_class(monkeypatch):
    """PyTorch's DataLoader, or where there is none a stand-in under the name by which Keras knows it."""
    try:
        from torch.utils.data import DataLoader, TensorDataset

        def make(x, y):
            import torch

            return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=BATCH)

        return make
    except ImportError:
        pass

    class DataLoader:
        def __init__(self, x, y):
            self.dataset, self.batch_size, self.x, self.y = x, BATCH, x, y

        def __len__(self):
            return -(-len(self.x) // BATCH)

        def __iter__(self):
            for i in range(0, len(self.x), BATCH):
                yield [Tensor(self.x[i : i + BATCH]), Tensor(self.y[i : i + BATCH])]

    DataLoader.__module__ = "torch.utils.data.dataloader"
    utils = types.SimpleNamespace(data=types.SimpleNamespace(DataLoader=DataLoader))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(utils=utils))
    return DataLoader


def test_torch_data_loaders(expected, loader_class):
    x, y = data(ROWS)
    loader = loader_class(x, y)
    model = same_as(expected, loader)
    np.testing.assert_allclose(model.evaluate(loader, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(model.predict(loader, verbose=0), model(x), rtol=1e-5, atol=1e-6)


# -- structures -------------------------------------------------------------------------------------------------------
def test_nested_inputs_and_outputs():
    def build():
        keras.utils.set_random_seed(0)
        inputs = {"left": keras.Input((3,), name="left"), "rest": [keras.Input((2,)), keras.Input((1,), dtype="int32")]}
        number = layers.Embedding(5, 2)(inputs["rest"][1])
        joined = layers.Concatenate()([inputs["left"], inputs["rest"][0], layers.Flatten()(number)])
        outputs = {"kind": layers.Dense(3, name="kind")(joined), "more": (layers.Dense(1, name="size")(joined), joined)}
        return keras.Model(inputs, outputs)

    rng = np.random.default_rng(0)
    x = {
        "left": rng.normal(size=(ROWS, 3)),
        "rest": [rng.normal(size=(ROWS, 2)), rng.integers(0, 5, (ROWS, 1))],
    }
    y = {"kind": rng.integers(0, 3, ROWS), "more": (rng.normal(size=(ROWS, 1)), np.zeros((ROWS, 7)))}
    losses = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "more": ("mse", None)}
    models = []
    for eager in (False, True):
        model = build()
        model.compile("sgd", losses, metrics={"kind": ["accuracy"], "more": (["mae"], None)}, run_eagerly=eager)
        model.history = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        models.append(model)
    assert_equal_weights(*models, rtol=1e-4, atol=1e-6)
    for name, values in models[0].history.history.items():
        np.testing.assert_allclose(values, models[1].history.history[name], rtol=1e-4)
    outputs = models[0].predict(x, batch_size=BATCH, verbose=0)
    assert outputs["kind"].shape == (ROWS, 3)
    assert outputs["more"][1].shape == (ROWS, 7)


def test_losses_in_lists_weights_and_none():
    inputs = keras.Input((6,))
    first, second = layers.Dense(1, name="first")(inputs), layers.Dense(1, name="second")(inputs)
    x, y = data(ROWS)
    y = y[:, None].astype("float32")
    model = keras.Model(inputs, [first, second])
    model.compile("sgd", [None, "mse"], loss_weights=[1.0, 0.5], metrics=[["mae"], ["mse"]])
    before = model.get_layer("first").get_weights()[0]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables.*first"):
        history = model.fit(x, [y, y], verbose=0).history
    np.testing.assert_array_equal(model.get_layer("first").get_weights()[0], before)
    assert "first_mae" in history
    np.testing.assert_allclose(history["loss"][0], 0.5 * history["second_mse"][0], rtol=1e-4)
