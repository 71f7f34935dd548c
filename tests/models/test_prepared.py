"""Compiled forms of a model share what they make of its weights."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import copy
import gc
import threading
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from kgraph import prepared
from kgraph.frontend.keras_backend import core
from kgraph.prepared import Source

SIZE = 300


@pytest.fixture
def dense():
    return keras.Sequential([keras.Input((SIZE,)), keras.layers.Dense(SIZE), keras.layers.Dense(5)])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def weights_of(fast: kgraph.CompiledModel, nbytes: int) -> list[np.ndarray]:
    """The prepared weights of so many bytes at least."""
    (variant,) = fast._variants.values()
    return [a for a in variant.program.values if a.nbytes >= nbytes]


def of(function, rows: int):
    """The form of a jitted function for inputs of so many rows."""
    return function._for((np.zeros((rows, SIZE), "float32"),), {})


def test_forms_for_other_shapes_share_their_weights(dense):
    function = kgraph.jit(lambda x: dense(x))
    for rows in (3, 4):
        x = normal(rows, SIZE)
        np.testing.assert_allclose(function(x), dense(x), rtol=1e-4, atol=1e-4)
    one, other = (weights_of(of(function, rows), 4 * SIZE * SIZE) for rows in (3, 4))
    assert len(one) == 1
    assert all(a is b for a, b in zip(one, other, strict=True))
    (other_model,) = weights_of(kgraph.compile(dense), 4 * SIZE * SIZE)
    assert other_model is one[0]


def test_a_changed_weight_is_prepared_once(dense):
    function = kgraph.jit(lambda x: dense(x))
    inputs = [normal(rows, SIZE) for rows in (3, 4)]
    for x in inputs:
        function(x)
    (before,) = weights_of(of(function, 3), 4 * SIZE * SIZE)
    dense.layers[0].kernel.assign(normal(SIZE, SIZE, seed=1))
    np.testing.assert_allclose(function(inputs[0]), dense(inputs[0]), rtol=1e-4, atol=1e-3)
    (changed,), (old,) = (weights_of(of(function, rows), 4 * SIZE * SIZE) for rows in (3, 4))
    assert changed is not before
    assert old is before
    np.testing.assert_allclose(function(inputs[1]), dense(inputs[1]), rtol=1e-4, atol=1e-3)
    assert weights_of(of(function, 4), 4 * SIZE * SIZE)[0] is changed


def test_training_changes_all_forms(dense):
    """Steps of `fit` write new weights over the old ones."""
    dense.compile("sgd", "mse")
    function = kgraph.jit(lambda x: dense(x))
    inputs = [normal(rows, SIZE) for rows in (3, 4)]
    for _ in range(2):
        for x in inputs:
            np.testing.assert_allclose(function(x), dense(x), rtol=1e-4, atol=1e-3)
        dense.fit(normal(32, SIZE), normal(32, 5), epochs=1, verbose=0)
    for x in inputs:
        np.testing.assert_allclose(function(x), dense(x), rtol=1e-4, atol=1e-3)


def test_frozen_models_share_with_each_other(dense):
    one, other = (kgraph.compile(dense, freeze=True) for _ in range(2))
    x = normal(3, SIZE)
    wanted = one(x)
    assert weights_of(one, 4 * SIZE * SIZE)[0] is weights_of(other, 4 * SIZE * SIZE)[0]
    dense.layers[0].kernel.assign(normal(SIZE, SIZE, seed=1))
    np.testing.assert_array_equal(other(x), wanted)
    third = kgraph.compile(dense, freeze=True)
    np.testing.assert_allclose(third(x), dense(x), rtol=1e-4, atol=1e-3)


def test_what_is_made_in_another_way_is_not_shared(dense):
    """The same variables, once as they are and once transposed."""
    kernel = dense.layers[0].kernel
    plain, turned = (
        kgraph.jit(f)
        for f in (
            lambda x: keras.ops.matmul(x, kernel),
            lambda x: keras.ops.matmul(x, keras.ops.transpose(kernel)),
        )
    )
    x = normal(3, SIZE)
    np.testing.assert_allclose(plain(x), x @ np.asarray(kernel), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(turned(x), x @ np.asarray(kernel).T, rtol=1e-4, atol=1e-4)


def test_what_nobody_uses_is_freed(dense):
    fast = kgraph.compile(dense)
    assert prepared.is_any_prepared(dense.variables)
    del fast
    gc.collect()
    assert not prepared.is_any_prepared(dense.variables)


def test_another_owner_at_the_same_place_is_another_source():
    class Owner:
        pass

    owner, array = Owner(), np.zeros(3)
    kept = prepared.keep(b"digest", [Source(owner, 1)], array)
    assert prepared.find(b"digest", [Source(owner, 1)]) is kept
    assert prepared.find(b"digest", [Source(owner, 2)]) is None
    assert prepared.find(b"other", [Source(owner, 1)]) is None
    kept._owners = [lambda: None]  # the owner has died, and its place is taken
    assert prepared.find(b"digest", [Source(owner, 1)]) is None


# -- values that are kept as kernels read them ------------------------------------------------------------------------
def away(model) -> list:
    """The variables that have let go of their values."""
    return [v for v in model.variables if v._is_behind]


def attention_model():
    x = keras.Input((None, 256))
    y = keras.layers.MultiHeadAttention(4, 64)(x, x)
    y = keras.layers.Dense(300, activation="gelu")(y)
    return keras.Model(x, keras.layers.Conv1D(256, 1)(y))


def test_values_come_back_as_they_were():
    """Kernels of dense layers, of attention (reshaped) and of pointwise convolutions."""
    model = attention_model()
    before = [np.array(v._value) for v in model.variables]
    wanted = model(normal(2, 5, 256))
    np.testing.assert_allclose(kgraph.compile(model)(normal(2, 5, 256)), wanted, rtol=1e-3, atol=1e-3)
    assert [v.name for v in away(model)] == ["kernel"] * 6
    after = model.get_weights()
    assert not away(model)
    for a, b in zip(after, before, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_convolutions_with_a_factor_for_each_filter_keep_their_values():
    """Of batch normalisation, for a window of one and for filters that a Winograd kernel transforms itself."""
    inputs = keras.Input((7, 7, 512))
    x = inputs
    for window in (1, 3):
        x = keras.layers.Conv2D(512, window, padding="same")(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    for v in model.variables:
        if v.name != "kernel":
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    before = [np.array(v._value) for v in model.variables]
    images, wanted = normal(2, 7, 7, 512), model(normal(2, 7, 7, 512))
    fast = kgraph.compile(model)
    np.testing.assert_allclose(fast(images), wanted, rtol=1e-4, atol=1e-4)
    assert [v.name for v in away(model)] == ["kernel"] * 2
    model.layers[2].gamma.assign(2 * model.layers[2].gamma)
    changed = fast(images)
    for value, v in zip(before, model.variables, strict=True):
        if v.name != "gamma":
            np.testing.assert_array_equal(v, value)
    np.testing.assert_allclose(changed, model(images), rtol=1e-4, atol=1e-4)


def test_transposed_and_tied_values():
    """A weight that is read transposed can go; one that is read as it is, too, cannot."""
    table = keras.Variable(normal(400, 300))
    kernel = keras.Variable(normal(300, 400))
    value = np.array(kernel._value)
    ops = keras.ops
    turned = kgraph.jit(lambda x: ops.matmul(x, ops.transpose(kernel)))
    tied = kgraph.jit(lambda n, x: (ops.take(table, n, axis=0), ops.matmul(x, ops.transpose(table))))
    x, numbers = normal(3, 400), np.arange(3, dtype="int32")
    np.testing.assert_allclose(turned(x), x @ value.T, rtol=1e-4, atol=1e-3)
    assert kernel._is_behind
    np.testing.assert_array_equal(kernel.numpy(), value)
    rows, scores = tied(numbers, normal(3, 300))
    assert not table._is_behind
    np.testing.assert_array_equal(rows, table.numpy()[:3])
    np.testing.assert_allclose(scores, normal(3, 300) @ table.numpy().T, rtol=1e-4, atol=1e-3)


def test_what_is_read_once_stays(dense):
    kernel = dense.layers[0].kernel
    fast = kgraph.compile(dense)
    assert kernel._is_behind
    value = kernel.numpy()
    kernel.assign(value + 1)
    x = normal(3, SIZE)
    np.testing.assert_allclose(fast(x), dense(x), rtol=1e-4, atol=1e-3)
    assert not kernel._is_behind


def test_what_somebody_holds_stays(dense):
    held = dense.layers[0].kernel.value
    kgraph.compile(dense)
    assert not dense.layers[0].kernel._is_behind
    assert dense.layers[0].kernel.value is held


def test_what_the_function_assigns_stays(dense):
    kernel = dense.layers[0].kernel

    @kgraph.jit
    def step(x):
        y = dense(x)
        kernel.assign(kernel * 0.5)
        return y

    for _ in range(3):
        x = normal(3, SIZE)
        wanted = np.asarray(dense(x))
        np.testing.assert_allclose(step(x), wanted, rtol=1e-4, atol=1e-3)
        assert not kernel._is_behind


def test_the_value_outlives_the_compiled_model(dense):
    value = np.array(dense.layers[0].kernel._value)
    fast = kgraph.compile(dense)
    assert dense.layers[0].kernel._is_behind
    del fast
    gc.collect()
    np.testing.assert_array_equal(dense.layers[0].kernel.numpy(), value)


def test_copies_have_the_value(dense):
    value = np.array(dense.layers[0].kernel._value)
    kgraph.compile(dense)
    copied = copy.deepcopy(dense.layers[0].kernel)
    dense.layers[0].kernel.assign(value + 1)
    np.testing.assert_array_equal(copied.numpy(), value)


def test_saved_and_trained_after_it_was_put_away(dense, tmp_path):
    dense.compile("sgd", "mse")
    x, y = normal(32, SIZE), normal(32, 5)
    fast = kgraph.compile(dense)
    wanted = fast(x)
    assert away(dense)
    dense.save(tmp_path / "m.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "m.keras")(x), wanted, rtol=1e-4, atol=1e-3)
    twin = keras.models.load_model(tmp_path / "m.keras")
    again = kgraph.compile(twin)
    assert away(twin)
    for model in (dense, twin):
        model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(again(x), fast(x))
    np.testing.assert_allclose(again(x), twin(x), rtol=1e-4, atol=1e-3)


def test_threads_that_read_assign_and_compile(dense):
    """Whoever reads a variable sees a value that it had."""
    kernel = dense.layers[0].kernel
    values = [normal(SIZE, SIZE, seed=seed) for seed in range(4)]
    sums = {float(v.sum(dtype="float64")) for v in values}
    kernel.assign(values[0])
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            kernel._is_read = False  # so that it is put away again and again
            found = float(np.asarray(kernel._value).sum(dtype="float64"))
            if found not in sums:
                wrong.append(found)

    def compile_again():
        while not stop.is_set():
            kgraph.compile(dense)

    workers = [threading.Thread(target=f) for f in (read, read, compile_again)]
    for worker in workers:
        worker.start()
    for turn in range(40):
        kernel.assign(values[turn % 4])
        np.testing.assert_array_equal(kernel._value, values[turn % 4])
        time.sleep(0.02)
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong


def test_scalars_are_shared_too():
    scale = keras.Variable(np.float32(2))
    function = kgraph.jit(lambda x: x * keras.ops.exp(scale))
    for rows in (2, 3):
        np.testing.assert_allclose(function(np.ones(rows, "float32")), np.full(rows, np.exp(2)), rtol=1e-5)


def test_predict_takes_what_a_compiled_model_has(dense, monkeypatch):
    """Without reading values that were put away."""
    x = normal(32, SIZE)
    fast = kgraph.compile(dense)
    wanted = fast(x)
    assert away(dense)
    np.testing.assert_allclose(dense.predict(x, verbose=0), wanted, rtol=1e-4, atol=1e-4)
    assert away(dense)


def test_a_value_on_a_device_takes_the_place_of_one_that_was_put_away(dense):
    kernel = dense.layers[0].kernel
    kgraph.compile(dense)
    assert kernel._is_behind
    value = normal(SIZE, SIZE, seed=5)
    core.adopt_residents([kernel], [SimpleNamespace(numpy=lambda: value)])
    np.testing.assert_array_equal(kernel.numpy(), value)
