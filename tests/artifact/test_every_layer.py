"""Every layer class of keras.layers: saved and loaded against compiled, and the code for AVX2 against both."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import warnings

import keras
import numpy as np
import pytest

from kgraph.runtime.artifact import LevelError
from tests.artifact.conftest import assert_same
from tests.models.layer_table import CASES
from tests.models.test_every_layer import make_model

V3 = "x86-64-v3"


@pytest.mark.parametrize("name", CASES)
def test_layer(name, tmp_path):
    model, example = make_model(name)
    compiled = kgraph.compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of steps on NumPy
        compiled.save(tmp_path / "m.kgraph", levels=["native", V3], rebuildable=False)
    loaded = kgraph.load(tmp_path / "m.kgraph")
    for batch in (None, 1, 0):
        x = keras.tree.map_structure(lambda a, n=batch: a[:n], example)
        assert_same(loaded(x), compiled(x))
    try:
        loaded = kgraph.load(tmp_path / "m.kgraph", level=V3)
    except LevelError as error:
        pytest.skip(str(error))
    for got, wanted in zip(keras.tree.flatten(loaded(example)), keras.tree.flatten(compiled(example)), strict=True):
        scale = np.abs(wanted).max(initial=1)
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5 * scale)
