"""How compiled models and functions take their arguments: what Keras accepts is accepted, the rest is named."""

from __future__ import annotations

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import InputError
from kgraph.frontend.signatures import Arguments


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def dense_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,), name="features"), layers.Dense(2)])


def difference(declared=list):
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    inputs = [left, right] if declared is list else {name: {"left": left, "right": right}[name] for name in declared}
    return keras.Model(inputs, left - right)


# -- structure --------------------------------------------------------------------------------------------------------
def test_a_dict_serves_a_list_of_inputs_by_name():
    compiled, x, y = kgraph.compile(difference()), rows(2, 4), rows(2, 4, seed=1)
    np.testing.assert_array_equal(compiled({"right": y, "left": x}), x - y)
    np.testing.assert_array_equal(compiled({"right": y, "left": x, "unused": x}), x - y)


@pytest.mark.parametrize("declared", [list, ("left", "right")])
def test_keys_that_are_no_inputs_are_refused(declared):
    compiled, x = kgraph.compile(difference(declared)), rows(2, 4)
    with pytest.raises(InputError, match="right"):
        compiled({"left": x, "middle": x})


def test_a_list_for_a_dict_is_taken_only_where_the_order_is_clear():
    x, y = rows(2, 4), rows(2, 4, seed=1)
    np.testing.assert_array_equal(kgraph.compile(difference(("left", "right")))([x, y]), x - y)
    with pytest.raises(InputError, match="left"):
        kgraph.compile(difference(("right", "left")))([y, x])


def test_outputs_keep_the_order_of_their_keys():
    inputs = keras.Input((3,))
    compiled = kgraph.compile(keras.Model(inputs, {"second": inputs * 2, "first": inputs}))
    assert list(compiled(rows(1, 3))) == ["second", "first"]


def test_messages_name_the_inputs():
    compiled, x = kgraph.compile(difference()), rows(2, 4)
    for wrong in ((x,), ([x],), ([x, x, x],)):
        with pytest.raises(InputError, match=r"'left', 'right'"):
            compiled(*wrong)
    with pytest.raises(InputError, match="foo"):
        kgraph.compile(dense_model())(rows(2, 3), foo=1)


def test_keyword_arguments_of_subclassed_models():
    class Model(keras.Model):
        def call(self, x, y=None, mask=None):
            return {"sum": ops.where(mask[:, None], x + y, x), "nothing": None}

    x, mask = rows(3, 2), np.array([True, False, True])
    compiled = kgraph.compile(Model(), example=Arguments(x, y=x, mask=mask))
    result = compiled(x, y=2 * x, mask=mask)
    np.testing.assert_allclose(result["sum"], np.where(mask[:, None], 3 * x, x))
    assert result["nothing"] is None
    with pytest.raises(InputError, match="mask"):
        compiled(x, y=x)


def test_training_may_be_false():
    compiled, x = kgraph.compile(dense_model()), rows(2, 3)
    np.testing.assert_array_equal(compiled(x, training=False), compiled(x))
    with pytest.raises(InputError, match="inference"):
        compiled(x, training=True)


@pytest.mark.parametrize("wrong", [None, 3, np.zeros(3), keras.Model, lambda x: x])
def test_what_is_no_model_is_named(wrong):
    with pytest.raises(TypeError, match="Keras model"):
        kgraph.compile(wrong)


# -- arrays -----------------------------------------------------------------------------------------------------------
def test_a_last_axis_of_one_may_be_missing_or_in_excess():
    """As in Keras' functional models."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, inputs * 2)
    compiled = kgraph.compile(model)
    for x in (rows(5), rows(5, 1), [1.0, 2.0]):
        np.testing.assert_array_equal(compiled(x), model(np.asarray(x, "float32")))
    model = dense_model()
    np.testing.assert_allclose(kgraph.compile(model)(rows(2, 3, 1)), model(rows(2, 3, 1)), rtol=1e-6)


def test_any_memory_layout():
    model = keras.Sequential([keras.Input((6, 5)), layers.Dense(3, "relu"), layers.Flatten()])
    compiled, x = kgraph.compile(model), rows(4, 6, 5)
    wanted = compiled(x)
    read_only = x.copy()
    read_only.setflags(write=False)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), "float32", offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned
    backwards = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    for array in (np.asfortranarray(x), backwards, read_only, unaligned, x.astype(">f4"), memoryview(x), x.tolist()):
        np.testing.assert_array_equal(compiled(array), wanted)
    np.testing.assert_array_equal(compiled(np.broadcast_to(x[:1], x.shape)), compiled(np.repeat(x[:1], 4, 0)))


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [3, 4], "c": [True, False]})
    model = dense_model()
    compiled = kgraph.compile(model)
    np.testing.assert_allclose(compiled(frame), model(np.array([[1, 3, 1], [2, 4, 0]], "float32")), rtol=1e-6)
    assert compiled.predict(frame, batch_size=1).shape == (2, 2)
    with pytest.raises(InputError, match="features"):
        compiled(frame.assign(c=["x", "y"]))


@pytest.mark.parametrize("wrong", [[[1, 2, 3], [4, 5]], "text", [[object()] * 3], [[None] * 3]])
def test_what_is_no_array_of_numbers_is_refused(wrong):
    with pytest.raises(InputError, match="features"):
        kgraph.compile(dense_model())(wrong)


def test_results_are_the_callers_own():
    """Neither an input that is handed through, nor a constant or a weight, shares memory with what is returned."""

    class Constants(layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x):
            return x, ops.convert_to_tensor(np.arange(3.0)), self.weight + 0.0

    inputs = keras.Input((3,))
    compiled = kgraph.compile(keras.Model(inputs, Constants()(inputs)))
    x = rows(2, 3)
    for result in compiled(x):
        result[...] = 9
    assert np.abs(x).max() < 9
    np.testing.assert_array_equal(compiled(x)[1], np.arange(3.0))
    np.testing.assert_array_equal(compiled(x)[2], 1)


# -- sizes and weights ------------------------------------------------------------------------------------------------
class ByLength(layers.Layer):
    """Asks for the length as a number, so that the model is specialised on it."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return x * self.factor * (2 if int(x.shape[1]) > 4 else 1)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def test_frozen_weights_are_those_of_the_compile_in_later_forms_too():
    inputs = keras.Input((None,))
    model = keras.Model(inputs, ByLength()(inputs))
    compiled = kgraph.compile(model, freeze=True)
    model.set_weights([np.float32(5)])
    np.testing.assert_array_equal(compiled(np.ones((1, 3), "float32")), 1)
    np.testing.assert_array_equal(compiled(np.ones((1, 6), "float32")), 2)


def test_specialised_sizes_of_two_inputs_that_must_agree():
    a, b = keras.Input((None, None)), keras.Input((None, None))
    model = keras.Model([a, b], ByLength()(a * b) - b)
    compiled = kgraph.compile(model)
    for shape in ((2, 3, 5), (1, 6, 2), (3, 3, 5)):
        x, y = rows(*shape), rows(*shape, seed=1)
        np.testing.assert_allclose(compiled([x, y]), model([x, y]), rtol=1e-6)


class Placed(layers.Layer):
    """Writes each of `count` rows of values over a place of a sequence, as models do with the tokens of images."""

    def call(self, sequence, values, places):
        rows_of_all = ops.reshape(values, (-1, values.shape[-1]))
        flat = ops.reshape(sequence, (-1, sequence.shape[-1]))
        starts = ops.expand_dims(ops.arange(ops.shape(places)[0]) * ops.shape(sequence)[1], -1)
        flat = ops.scatter_update(flat, ops.reshape(places + starts, (-1, 1)), rows_of_all)
        return ops.reshape(flat, ops.shape(sequence))

    def compute_output_shape(self, sequence_shape, values_shape, places_shape):
        return sequence_shape


def test_sizes_of_the_same_axis_of_which_one_is_a_multiple():
    sequence, values = keras.Input((None, 3)), keras.Input((None, 2, 3))
    places = keras.Input((None,), dtype="int32")
    compiled = kgraph.compile(model := keras.Model([sequence, values, places], Placed()(sequence, values, places)))
    for batch, count in ((2, 1), (3, 1), (2, 4)):
        places = np.argsort(rows(batch, 9), axis=1)[:, : 2 * count].astype("int32")
        x = [rows(batch, 9, 3), rows(batch, count, 2, 3, seed=1), places]
        np.testing.assert_array_equal(compiled(x), model(x))
    assert compiled.stats()["compiles"] == 2  # one for each number of values, for all batches


def test_sizes_of_which_keras_asks_that_they_are_equal():
    scores, mask = keras.Input((2, None)), keras.Input((1, None), dtype="bool")
    compiled = kgraph.compile(model := keras.Model([scores, mask], layers.Softmax()(scores, mask=mask)))
    assert compiled.stats()["specialised"] is None
    for length in (3, 5):
        x = [rows(4, 2, length), rows(4, 1, length, seed=1) > -1]
        np.testing.assert_allclose(compiled(x), model(x), rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="L2"):
        compiled([rows(4, 2, 3), np.ones((4, 1, 5), bool)])


class Given(layers.Layer):
    """The sum of what is given of a second input, or zeros where that has no entries, as for prompts without a mask."""

    def call(self, x, given):
        return ops.cond(
            ops.equal(ops.shape(given)[1], 0),
            lambda: ops.zeros_like(x),
            lambda: ops.reshape(given, (ops.shape(x)[0] * ops.shape(given)[1], -1)),
        )

    def compute_output_shape(self, x_shape, given_shape):
        return x_shape


def test_branches_by_a_size_that_give_other_shapes():
    inputs = keras.Input((4,)), keras.Input((None, 4))
    compiled = kgraph.compile(model := keras.Model(inputs, Given()(*inputs)))
    for batch, count in ((2, 0), (3, 0), (2, 1)):
        x = [rows(batch, 4), rows(batch, count, 4, seed=1)]
        np.testing.assert_array_equal(compiled(x), model(x))
    assert compiled.stats()["compiles"] == 2  # with and without, for all batches


# -- functions --------------------------------------------------------------------------------------------------------
def test_jit_of_a_method():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @kgraph.jit
        def __call__(self, x):
            return x * self.factor

        @kgraph.jit
        def plus(self, x, y=1.0):
            return x + self.factor * y

    x = rows(2, 3)
    for factor in (3.0, 4.0):
        np.testing.assert_allclose(Scale(factor)(x), x * factor, rtol=1e-6)
        np.testing.assert_allclose(Scale(factor).plus(x, y=2.0), x + 2 * factor, rtol=1e-6)


def test_jit_keeps_no_arguments_alive():
    class Array(np.ndarray):
        """One that can be referred to weakly."""

    function = kgraph.jit(lambda x: x + 1)
    x = rows(2, 3).view(Array)
    reference = weakref.ref(x)
    function(x)
    del x
    gc.collect()
    assert reference() is None


def test_jit_scalars_closures_and_keywords():
    offset = rows(3)

    @kgraph.jit
    def function(x, k, *, scale=1.0, mode="a"):
        return x * k * scale if mode == "a" else x - k + offset

    x = rows(2, 3)
    np.testing.assert_allclose(function(x, 2), x * 2)
    np.testing.assert_allclose(function(x, 2.5, scale=3.0), x * 7.5, rtol=1e-6)
    np.testing.assert_allclose(function(x, k=2, mode="b"), x - 2 + offset, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(function(x, np.float32(2)), x * 2)
    assert function.stats()["compiles"] == 4
    function(x, 2)
    assert function.stats()["compiles"] == 4


def test_jit_in_place_operator_on_an_array():
    def function(x):
        total = np.asarray(0.0, "float32")
        total += ops.sum(x)
        return total

    np.testing.assert_allclose(kgraph.jit(function)(np.ones((2, 3), "float32")), 6)
