"""Batches whose sizes differ: how many programs are made, and that they compute the same as eager steps."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from kgraph import train_step
from kgraph.batch_shapes import BatchShapes, symbols_of
from tests.models.training_runs import assert_equal_weights, classifier, data


# -- patterns ---------------------------------------------------------------------------------------------------------
def test_axes_become_symbols_when_they_differ():
    shapes = BatchShapes()
    assert shapes.pattern_for("k", [(8, 10), (8,)]) == (("N", 10), ("N",))
    assert shapes.pattern_for("k", [(5, 10), (5,)]) == (("N", 10), ("N",))
    general = (("N", "L1"), ("N",))
    assert shapes.pattern_for("k", [(8, 12), (8,)]) == general
    assert shapes.pattern_for("k", [(3, 14), (3,)]) == general
    assert shapes.pattern_for("k", [(3, 10), (3,)]) == (("N", 10), ("N",))
    assert shapes.pattern_for("other", [(8, 12), (8,)]) == (("N", 12), ("N",))


def test_axes_that_change_together_are_one_symbol_until_they_do_not():
    shapes = BatchShapes()
    shapes.pattern_for("k", [(8, 10, 3), (8, 10)])
    assert shapes.pattern_for("k", [(8, 11, 3), (8, 11)]) == (("N", "L1", 3), ("N", "L1"))
    assert shapes.pattern_for("k", [(8, 12, 3), (8, 9)]) == (("N", "L1", 3), ("N", "L1_2"))
    assert shapes.pattern_for("k", [(8, 12, 4), (8, 9)]) == (("N", "L1", "L2"), ("N", "L1_2"))
    # Different first axes: what they have in common is found out too.
    assert shapes.pattern_for("j", [(8, 3), (4, 3)]) == ((8, 3), (4, 3))
    assert shapes.pattern_for("j", [(6, 3), (7, 3)]) == (("L0", 3), ("L0_2", 3))


def test_sizes_that_broadcast_or_are_empty_stay_apart():
    shapes = BatchShapes()
    assert shapes.pattern_for("k", [(8, 1)]) == (("N", 1),)
    assert shapes.pattern_for("k", [(8, 5)]) == (("N", 5),)
    assert shapes.pattern_for("k", [(8, 6)]) == (("N", "L1"),)
    assert shapes.pattern_for("k", [(8, 0)]) == (("N", 0),)
    assert shapes.pattern_for("k", [(1, 7)]) == (("N", "L1"),)
    assert shapes.pattern_for("k", [()]) == ((),)


def test_pinned_axes_stay_numbers():
    shapes = BatchShapes()
    shapes.pattern_for("k", [(8, 10, 5)])
    assert symbols_of(shapes.pattern_for("k", [(8, 12, 6)])) == {"L1", "L2"}
    shapes.pin("k", [(8, 12, 6)], {"L1"})
    assert shapes.pattern_for("k", [(8, 12, 6)]) == (("N", 12, "L2"),)
    assert shapes.pattern_for("k", [(4, 12, 7)]) == (("N", 12, "L2"),)
    assert shapes.pattern_for("k", [(4, 13, 7)]) == (("N", 13, "L2"),)
    fixed = BatchShapes(symbolic_batch=False)
    assert fixed.pattern_for("k", [(8, 10)]) == ((8, 10),)
    assert fixed.pattern_for("k", [(7, 10)]) == ((7, 10),)


# -- training ---------------------------------------------------------------------------------------------------------
def batches(lengths, rows=6, width=None, labels_per_step=False):
    rng = np.random.default_rng(0)
    for i, length in enumerate(lengths):
        n = rows + i % 2
        x = rng.normal(size=(n, length, width)).astype("float32") if width else rng.integers(1, 20, (n, length))
        yield x, rng.integers(0, 3, (n, length) if labels_per_step else n)


def recurrent():
    return [layers.Embedding(20, 8, mask_zero=True), layers.LSTM(8), layers.Dense(3)]


def tagger():
    return [layers.Embedding(20, 8), layers.Bidirectional(layers.GRU(6, return_sequences=True)), layers.Dense(3)]


def attention():
    class Attend(layers.Layer):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = layers.MultiHeadAttention(2, 4), layers.LayerNormalization()

        def call(self, x):
            return self.norm(x + self.attention(x, x, use_causal_mask=True))

    return [layers.Embedding(20, 8), Attend(), layers.GlobalAveragePooling1D(), layers.Dense(3)]


def convolution():
    return [
        layers.Conv1D(8, 3, padding="same", activation="relu"),
        layers.BatchNormalization(),
        layers.MaxPooling1D(2),
        layers.GlobalMaxPooling1D(),
        layers.Dense(3),
    ]


CASES = {
    "recurrent": (recurrent, {}),
    "tagger": (tagger, {"labels_per_step": True}),
    "attention": (attention, {}),
    "convolution": (convolution, {"width": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_any_length_take_two_programs(name):
    build, options = CASES[name]
    lengths = [9, 9, 12, 7, 15, 9, 30, 2]
    models = []
    for eager in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 4)) if "width" in options else keras.Input((None,), dtype="int32")
        model = keras.Sequential([inputs, *build()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"], run_eagerly=eager)
        model.history = model.fit(batches(lengths, **options), verbose=0)
        models.append(model)
    stats = models[0]._compiled_train_step.stats()
    assert stats["compiles"] == 2
    assert stats["specialised"] is None
    assert stats["host_steps"] == 0
    assert_equal_weights(*models, rtol=1e-3, atol=2e-5)
    for key, values in models[0].history.history.items():
        np.testing.assert_allclose(values, models[1].history.history[key], rtol=1e-3)
    for x, y in batches([11, 13], **options):
        np.testing.assert_allclose(models[0].test_on_batch(x, y), models[1].test_on_batch(x, y), rtol=1e-3)
        np.testing.assert_allclose(models[0].predict_on_batch(x), models[1].predict_on_batch(x), rtol=1e-3, atol=1e-5)


class ByStep(layers.Layer):
    """Python code that needs the length."""

    def call(self, x):
        total = x[:, 0]
        for i in range(1, int(x.shape[1])):
            total = total + x[:, i] * float(i)
        return total

    def compute_output_shape(self, shape):
        return (shape[0], shape[2])


def by_step():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.Dense(3)(ByStep()(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def train(model, lengths):
    for x, y in batches(lengths, width=4):
        model.train_on_batch(x, y)


def test_a_length_that_the_code_needs_makes_a_program_each_and_leaves_the_batch_symbolic():
    model = by_step()
    for x, y in batches([5, 7, 5, 7, 6, 5], width=4):
        model.train_on_batch(x, y)
    stats = model._compiled_train_step.stats()
    assert stats["compiles"] == 3
    assert stats["programs"] == 3
    assert "L1" in stats["specialised"]


def test_many_programs_are_warned_of_and_bounded(monkeypatch):
    monkeypatch.setattr(train_step, "MOST_PROGRAMS", 4)
    monkeypatch.setattr(train_step, "MANY_COMPILES", 6)
    model = by_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, range(3, 8))
    with pytest.warns(RuntimeWarning, match="compiled 6 times.*L1.*Pad the batches") as caught:
        train(model, range(8, 11))
    assert len(caught) == 1
    stats = model._compiled_train_step.stats()
    assert (stats["compiles"], stats["programs"]) == (8, 4)
    train(model, [10, 9])
    assert model._compiled_train_step.stats()["compiles"] == 8
    train(model, [3])
    assert model._compiled_train_step.stats()["compiles"] == 9


def test_images_of_several_sizes():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.AveragePooling2D(2)(x)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.1), "mse")
    twin.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    for size in [(16, 16), (16, 16), (24, 20), (12, 32), (17, 19)]:
        image, target = rng.normal(size=(4, *size, 3)).astype("float32"), rng.normal(size=(4, 1)).astype("float32")
        ours, theirs = (m.train_on_batch(image, target) for m in (model, twin))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert model._compiled_train_step.stats()["compiles"] == 2
    assert_equal_weights(model, twin, rtol=1e-3, atol=1e-5)


def test_a_wrong_size_is_reported_for_the_batch_at_hand():
    model = classifier()
    x, y = data(8)
    model.train_on_batch(x, y)
    with pytest.raises(ValueError, match=r"axis -1 of input shape to have value 6, .* shape \(None, 5\)"):
        model.train_on_batch(x[:, :5], y)
    model.train_on_batch(x, y)
    assert model._compiled_train_step.stats()["compiles"] == 1


def test_a_wrong_batch_does_not_fix_the_sizes_of_others():
    model = keras.Sequential([keras.Input((None, 4)), *convolution()])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    (x, y), *others = batches([9, 12, 15], width=4)
    model.train_on_batch(x, y)
    for _ in range(2):
        with pytest.raises(ValueError, match="shape"):
            model.train_on_batch(x[:, :5], np.zeros((len(x), 2)))
    for x, y in others:
        model.train_on_batch(x, y)
    assert model._compiled_train_step.stats()["compiles"] == 2


def test_code_that_takes_a_length_for_another_one():
    class Positions(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(128, shape[-1]), name="table")

        def call(self, x):
            return x + self.table[: x.shape[1]]

    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(Positions()(inputs))))
    model.compile("sgd", "mse")
    for x, y in batches([5, 7, 6, 5, 16], width=4):
        model.train_on_batch(x, y.astype("float32"))
    assert model._compiled_train_step.stats()["compiles"] <= 4


def test_a_subclassed_model_predicts_and_evaluates_sequences_of_any_length():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.gru, self.head = layers.Embedding(20, 4), layers.GRU(3), layers.Dense(1)

        def call(self, x):
            return self.head(self.gru(self.embedding(x)))

    model = Net()
    model.compile("sgd", "mse")
    for x, _ in batches([5, 6, 7, 9, 8]):
        np.testing.assert_allclose(model.predict_on_batch(x), model(x), rtol=1e-4, atol=1e-5)
        model.test_on_batch(x, np.zeros(len(x)))
        model.train_on_batch(x, np.zeros(len(x)))
    for step in (model._compiled_predict_step, model._compiled_test_step, model._compiled_train_step):
        assert step.stats()["compiles"] == 2
