"""Values of Keras variables: whose memory they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from kgraph.frontend.keras_backend import core


@pytest.mark.parametrize("initializer", ["zeros", "glorot_uniform", "orthogonal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_an_initialiser_makes_is_not_copied(initializer, dtype, monkeypatch):
    adopted = []
    adopt = core.adopt_values
    monkeypatch.setattr(
        core, "adopt_values", lambda variables, arrays: adopted.extend(arrays) or adopt(variables, arrays)
    )
    variable = keras.Variable(initializer=initializer, shape=(6, 5), dtype=dtype)
    (array,) = adopted
    assert variable._value is array
    assert type(array) is np.ndarray
    assert not array.flags.writeable
    assert variable.version == 1


@pytest.mark.parametrize(
    "given",
    [
        lambda held: held,
        lambda held: held[:],
        lambda held: held.T.reshape(4, 3).T,
        lambda held: held.astype("float64"),
    ],
    ids=["array", "view", "strided", "dtype"],
)
def test_what_an_initialiser_keeps_stays_its_own(given):
    held = np.ones((3, 4), np.float32)
    variable = keras.Variable(initializer=lambda shape, dtype=None: given(held), shape=(3, 4), dtype="float32")
    held[:] = 7
    value = variable._value
    np.testing.assert_array_equal(value, np.ones((3, 4)))
    assert value.dtype == np.float32
    assert value.flags.c_contiguous
