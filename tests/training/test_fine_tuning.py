"""Frozen layers, transfer learning, and what `trainable` does with and without `compile`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tests.models.training_runs import assert_equal_weights, classifier, data


def test_trainable_counts_from_the_next_compile_on():
    x, y = data(20)
    model = classifier()
    model.fit(x, y, verbose=0)
    hidden = model.get_layer("hidden")
    before = hidden.get_weights()[0]
    hidden.trainable = False
    # The step that is compiled goes on as it is, as in Keras.
    model.fit(x, y, verbose=0)
    assert model._compiled_train_step.stats()["compiles"] == 1
    during = hidden.get_weights()[0]
    assert not np.array_equal(before, during)
    model.compile("sgd", model.loss)
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(hidden.get_weights()[0], during)
    hidden.trainable = True
    model.compile("sgd", model.loss)
    model.fit(x, y, verbose=0)
    assert not np.array_equal(hidden.get_weights()[0], during)


def test_frozen_batch_normalization_is_inference():
    x, y = data(20)
    model = classifier()
    norm = model.layers[1]
    norm.trainable = False
    model.compile("sgd", model.loss)
    before = norm.get_weights()
    model.fit(x, y, verbose=0)
    for a, b in zip(before, norm.get_weights()):
        np.testing.assert_array_equal(a, b)
    norm.trainable = True
    model.compile("sgd", model.loss)
    model.fit(x, y, verbose=0)
    assert not np.array_equal(before[2], norm.get_weights()[2])


def base():
    """A small convolutional base with batch normalisation, as `keras.applications` has them."""
    inputs = keras.Input((16, 16, 3))
    x = inputs
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="base")


def transfer(part, shape, eager=False):
    """A classifier on a frozen base, called as Keras' guide does, with training=False."""
    part.trainable = False
    inputs = keras.Input(shape)
    x = part(inputs, training=False)
    model = keras.Model(inputs, layers.Dense(4, name="top")(layers.Dropout(0.1, seed=1)(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], run_eagerly=eager)
    return model


def images(rows=12, size=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, size, size, 3)).astype("float32"), rng.integers(0, 4, rows)


def test_transfer_learning_then_fine_tuning():
    x, y = images()
    models = []
    for eager in (False, True):
        keras.utils.set_random_seed(0)
        part = base()
        model = transfer(part, (16, 16, 3), eager)
        before = part.get_weights()
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        for a, b in zip(before, part.get_weights()):
            np.testing.assert_array_equal(a, b)
        part.trainable = True
        model.compile(keras.optimizers.SGD(0.01), model.loss, run_eagerly=eager)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        assert not np.array_equal(before[0], part.get_weights()[0])
        models.append(model)
    assert_equal_weights(*models, rtol=1e-3, atol=2e-5)


def test_what_is_frozen_is_prepared_once():
    """Batch normalisation of the frozen base is folded into its convolutions, whose weights are packed ahead."""
    x, y = images()
    keras.utils.set_random_seed(0)
    part = base()
    model = transfer(part, (16, 16, 3))
    model.train_on_batch(x, y)
    graph = model._compiled_train_step.graph
    names = [node.name for node in graph.nodes]
    assert "batch_norm" not in names
    # Frozen weights can still be set.
    part.set_weights([w * 0.5 for w in part.get_weights()])
    twin = transfer(base(), (16, 16, 3), eager=True)
    twin.set_weights(model.get_weights())
    np.testing.assert_allclose(
        model.test_on_batch(x, y, return_dict=True)["loss"],
        twin.test_on_batch(x, y, return_dict=True)["loss"],
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["MobileNetV2"])
def test_transfer_from_an_application(name):
    x, y = images(4, 32)
    keras.utils.set_random_seed(0)
    part = getattr(keras.applications, name)(input_shape=(32, 32, 3), weights=None, include_top=False, pooling="avg")
    model = transfer(part, (32, 32, 3))
    before = part.get_weights()
    features = part.predict(x, verbose=0)
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    for a, b in zip(before, part.get_weights()):
        np.testing.assert_array_equal(a, b)
    stats = model._compiled_train_step.stats()
    assert stats["host_steps"] == 0
    top = model.get_layer("top")
    np.testing.assert_allclose(model.predict(x, verbose=0), top(features), rtol=1e-3, atol=1e-4)
