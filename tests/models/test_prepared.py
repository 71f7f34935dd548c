"""Compiled forms of a model share what they make of its weights."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import gc

import keras
import numpy as np
import pytest

from kgraph import prepared

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
    kept = prepared.keep(b"digest", [(owner, 1)], array)
    assert prepared.find(b"digest", [(owner, 1)]) is kept
    assert prepared.find(b"digest", [(owner, 2)]) is None
    assert prepared.find(b"other", [(owner, 1)]) is None
    kept._owners = [lambda: None]  # the owner has died, and its place is taken
    assert prepared.find(b"digest", [(owner, 1)]) is None
