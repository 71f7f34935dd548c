"""Calls with many rows, run in parts: the same bits, with the memory of a part."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import layers

import kgraph
from kgraph.errors import ArtifactError
from kgraph.runtime import parts
from kgraph.runtime.parts import PartedBinding


def convnet():
    x = keras.Input((12, 12, 3))
    y = layers.Conv2D(16, 3, activation="relu")(x)
    y = layers.BatchNormalization()(y)
    y = layers.MaxPooling2D()(y)
    return keras.Model(x, layers.Dense(5, activation="softmax")(layers.Flatten()(y)))


def two_ways():
    """Two inputs and two outputs; rows of one are several neighbours on the first axis of values in between."""
    tokens, scale = keras.Input((9,), dtype="int32"), keras.Input((1,))
    x = layers.Embedding(11, 8)(tokens)
    x = x + layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    return keras.Model([tokens, scale], [layers.Dense(3)(x) * keras.ops.expand_dims(scale, 1), x[:, 0]])


def inputs_of(model, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    return [
        rng.integers(0, 11, (rows, *v.shape[1:]), dtype="int32")
        if v.dtype == "int32"
        else rng.standard_normal((rows, *v.shape[1:])).astype("float32")
        for v in model.inputs
    ]


@pytest.fixture(autouse=True)
def _many_weights(monkeypatch):
    monkeypatch.setattr(parts, "MOST_WEIGHTS", 1e9)


def both(model):
    """The model compiled to run in the smallest parts, and as a whole."""
    parted, whole = kgraph.compile(model), kgraph.compile(model)
    program = parted._variants[()].program
    assert program.rows == "N"
    assert program.part_bytes > 1 << 20
    program.part_bytes = 1
    whole._variants[()].program.rows = ""
    return parted, whole


@pytest.mark.parametrize("build", [convnet, two_ways])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 32])
def test_the_same_bits(build, rows):
    model = build()
    parted, whole = both(model)
    given = inputs_of(model, rows)
    arguments = [given] if len(given) > 1 else given
    for a, b in zip(leaves(parted(*arguments)), leaves(whole(*arguments)), strict=True):
        np.testing.assert_array_equal(a, b)
    if rows > kgraph.get_num_threads():
        assert parted.stats()["parts"] >= rows / kgraph.get_num_threads()
    if rows == 32:
        assert parted.stats()["arena_bytes"] < whole.stats()["arena_bytes"] / 2


def leaves(result) -> list:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def test_calls_of_every_kind():
    model = convnet()
    parted, whole = both(model)
    (x,) = inputs_of(model, 21)
    wanted = whole(x)
    out = np.empty_like(wanted)
    assert parted(x, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    strided = np.empty((21, 10), "float32")[:, ::2]
    parted(x, out=strided)
    np.testing.assert_array_equal(strided, wanted)
    np.testing.assert_array_equal(parted(np.asfortranarray(x)), wanted)
    np.testing.assert_array_equal(parted.predict(x, batch_size=8), wanted)
    flops = [sum(k.flops for k in f.profile(x, repeats=1).kernels) for f in (parted, whole)]
    assert flops[0] == flops[1]
    before = kgraph.get_num_threads()
    try:
        for number in (1, 2, before):
            kgraph.set_num_threads(number)
            np.testing.assert_array_equal(parted(x), wanted)
    finally:
        kgraph.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(parted, [x] * 16):
            np.testing.assert_array_equal(y, wanted)
    model.set_weights([w * 0.5 for w in model.get_weights()])
    np.testing.assert_array_equal(parted(x), whole(x))


def test_saved_models_run_in_parts(tmp_path):
    model = convnet()
    fast, whole = both(model)
    fast.save(tmp_path / "m.kgraph", levels=["native"])
    loaded = kgraph.load(tmp_path / "m.kgraph")
    (x,) = inputs_of(model, 9)
    np.testing.assert_array_equal(loaded(x), whole(x))
    assert any(isinstance(b, PartedBinding) for b in loaded.forms[0].program._bindings.values())


def test_a_plan_that_names_other_rows_is_refused():
    """Memory is not written beyond what the claimed rows have."""
    x = keras.Input((None, 4))
    model = keras.Model(x, layers.Dense(3)(layers.Dense(300, activation="relu")(x)))
    program = kgraph.compile(model)._variants[()].program
    given = np.zeros((3, 6, 4), "float32")
    (length,) = set(program.resolve([given.shape])) - {"N"}
    program.rows, program.part_bytes = length, 1
    with pytest.raises(ArtifactError, match="rows"):
        program([given])


def test_weights_are_not_read_too_often(monkeypatch):
    monkeypatch.setattr(parts, "MOST_WEIGHTS", 0.6)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(2048), layers.Dense(64)])
    fast = kgraph.compile(model)
    program = fast._variants[()].program
    program.part_bytes = 1
    fast(np.zeros((32, 64), "float32"))
    assert fast.stats()["parts"] == 1
    monkeypatch.setattr(parts, "LARGE_BYTES", 1)
    fast(np.zeros((160, 64), "float32"))
    assert 1 < fast.stats()["parts"] < 10


def test_models_that_mix_rows_run_as_a_whole():
    x = keras.Input((4,))
    model = keras.Model(x, x - keras.ops.mean(x, axis=0, keepdims=True))
    fast = kgraph.compile(model)
    assert fast._variants[()].program.rows == ""
    fast._variants[()].program.part_bytes = 1
    given = inputs_of(model, 50)[0]
    np.testing.assert_allclose(fast(given), model(given), atol=1e-6)
    assert fast.stats()["parts"] == 1
