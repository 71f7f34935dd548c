"""Every layer class of keras.layers: compiled against eager."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
from keras import layers

import kgraph
from tests.models.layer_table import CASES, LEFT_OUT

# Their state means something: random numbers in its place would make no sense.
KEPT_WEIGHTS = ("Normalization", "Rescaling", "MelSpectrogram", "STFTSpectrogram")


def fill_weights(model, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if not variable.dtype.startswith(("float", "bfloat")):
            continue
        low = 0.5 if "variance" in variable.path else -1.0
        variable.assign(rng.uniform(low, 1.5 if "variance" in variable.path else 1.0, variable.shape))


def make_model(name: str):
    """A functional model around a case's layer, and its example input."""
    make, example = CASES[name]
    keras.utils.set_random_seed(0)
    layer = make()
    inputs = keras.tree.map_structure(lambda a: keras.Input(a.shape[1:], dtype=a.dtype.name), example)
    model = keras.Model(inputs, layer(inputs))
    if not name.startswith(KEPT_WEIGHTS):
        fill_weights(model)
    return model, example


@pytest.mark.parametrize("name", CASES)
def test_layer(name, monkeypatch):
    monkeypatch.setenv("KGRAPH_VERIFY", "1")
    model, example = make_model(name)
    wanted = [np.asarray(w) for w in keras.tree.flatten(model(example, training=False))]
    compiled = kgraph.compile(model)
    for batch in (len(wanted[0]), 1, 0):
        got = keras.tree.flatten(compiled(keras.tree.map_structure(lambda a, n=batch: a[:n], example)))
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == w.dtype
            assert g.shape == (batch, *w.shape[1:])
            scale = np.abs(w).max(initial=1)
            np.testing.assert_allclose(g, w[:batch], rtol=2e-4, atol=2e-5 * scale)
    assert compiled.stats()["specialised"] is None


def test_every_layer_class_is_here():
    def is_layer(x):
        return inspect.isclass(x) and issubclass(x, keras.Layer)

    classes = {name: value for name, value in vars(layers).items() if is_layer(value)}
    tested = {name.split("(")[0] for name in CASES}
    aliases = {name for name, value in classes.items() if any(classes.get(t) is value for t in tested)}
    assert sorted(set(classes) - aliases - set(LEFT_OUT)) == []
    assert tested <= set(classes)
