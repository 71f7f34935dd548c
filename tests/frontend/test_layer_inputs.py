"""A layer's call leaves the arrays of its caller as they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kgraph


class InPlace(layers.Layer):
    """Adds to its input, to views of it, and to the results of operations on it."""

    def call(self, x, other=None):
        flat = keras.ops.reshape(x, (-1,))
        flat += 1
        swapped = keras.ops.transpose(x)
        swapped -= 1
        x[0:1].__imul__(5)
        total = x + 1
        total += 1
        x *= 2
        if other is not None:
            other /= 2
        return x, total


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_in_place_operators_do_not_reach_the_caller(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    kept = x.copy()
    layer = InPlace(dtype=dtype)
    for outputs in (layer(x), layer(x, other=x.astype("float32"))):
        np.testing.assert_array_equal(outputs[0], 2 * kept)
        np.testing.assert_array_equal(outputs[1], kept + 2)
        assert [type(y) for y in outputs] == [np.ndarray, np.ndarray]
    np.testing.assert_array_equal(x, kept)


def test_images_stay_as_they_are():
    images = np.full((2, 4, 4, 3), 7)
    layers.RandomBrightness([0.5, 0.6])(images)
    assert (images == 7).all()


def test_masks_go_along():
    masked = layers.Masking()(np.array([[[0.0, 0.0], [1.0, 2.0]]], "float32"))
    for layer in (layers.Dropout(0.5), layers.Identity(), layers.Activation("relu")):
        np.testing.assert_array_equal(keras.src.backend.get_keras_mask(layer(masked)), [[False, True]])


def test_text_has_a_dtype_of_its_own():
    words = np.array(["a", "long word"])
    assert keras.backend.standardize_dtype(words.dtype) == "string"
    assert keras.backend.standardize_dtype(np.dtype("int8")) == "int8"
    np.testing.assert_array_equal(layers.Identity()(words), words)


def test_equalization_is_captured_like_it_runs():
    images = np.random.default_rng(0).integers(0, 200, (2, 6, 5, 3)).astype("float32")
    layer = layers.Equalization(value_range=(0, 255))
    expected = layer(images, training=True)
    compiled = kgraph.jit(lambda x: layer(x, training=True))
    np.testing.assert_allclose(compiled(images), expected, rtol=1e-5)


class Prompts(layers.Layer):
    """As preprocessors of images and text: one argument with both, which Keras leaves as it is."""

    def __init__(self):
        super().__init__()
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True

    def call(self, x, training=None):
        return [f"{text} {image.sum():g} {training}" for text, image in zip(x["text"], x["images"])]


def test_arrays_and_text_in_one_argument():
    given = {"images": np.ones((2, 2, 2, 3)), "text": ["one", "two"]}
    wanted = ["one 12 True", "two 12 True"]
    assert Prompts()(given, training=True) == wanted
    assert Prompts()(x=given, training=True) == wanted
    with pytest.raises(ValueError, match="cannot mix tensors and non-tensors"):
        Prompts()({"images": given["images"], "text": [1, 2]})
