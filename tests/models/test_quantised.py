"""Models quantised by Keras: two kernels for each dense layer, and the numbers of the interpreter."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import kgraph
from benchmarks import models
from kgraph.codegen.target import host_target
from kgraph.ir.interpreter import evaluate

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype("float32")


def dense():
    stack = [layers.Dense(50, activation="relu"), layers.Dense(33, activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((71,)), *stack]), floats(5, 71)


def wide_as_its_inputs():
    return keras.Sequential([keras.Input((24,)), layers.Dense(24), layers.Dense(24)]), floats(3, 24)


def einsum():
    stack = [layers.EinsumDense("abc,cde->abde", (None, 4, 6), bias_axes="de")]
    stack += [layers.EinsumDense("abde,dec->abc", (None, 9), bias_axes="c")]
    return keras.Sequential([keras.Input((7, 12)), *stack]), floats(3, 7, 12)


def attention():
    inputs = keras.Input((9, 16))
    y = layers.MultiHeadAttention(2, 8)(inputs, inputs)
    y = layers.LayerNormalization()(y + inputs)
    return keras.Model(inputs, layers.Dense(16, activation="gelu")(y)), floats(3, 9, 16)


def embedding():
    inputs = keras.Input((9,), dtype="int32")
    return keras.Model(inputs, layers.Dense(8)(layers.Embedding(50, 16)(inputs))), RNG.integers(0, 50, (3, 9), "int32")


def reversible_embedding():
    table = layers.ReversibleEmbedding(50, 16)
    inputs = keras.Input((9,), dtype="int32")
    outputs = table(layers.Dense(16)(table(inputs)), reverse=True)
    return keras.Model(inputs, outputs), RNG.integers(0, 50, (3, 9), "int32")


MODELS = (dense, wide_as_its_inputs, einsum, attention, embedding, reversible_embedding)


def quantised(build, mode: str, **options):
    """The compiled model, its input, what Keras gives without quantisation, and what NumPy makes of the graph.

    options: of `compile`."""
    model, x = build()
    models.fill_weights(model)
    exact = np.asarray(model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without weights have nothing to quantise
        model.quantize(mode)
    compiled = kgraph.compile(model, **options)
    (reference,) = evaluate(compiled.captured_graph, [x], compiled._some_variant().weights())
    return compiled, x, exact, reference


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(("mode", "error"), [("int8", 0.03), ("int4", 0.25)])
def test_numbers(build, mode, error):
    compiled, x, exact, reference = quantised(build, mode)
    result = compiled(x)
    assert compiled.stats()["host_steps"] == 0
    # Without products and sums of floats on the way, all that is computed is exact or one operation per number.
    if mode == "int8" and build is not attention:
        np.testing.assert_array_equal(result, reference)
    np.testing.assert_allclose(result, reference, rtol=1e-5, atol=2e-6)
    assert np.sqrt(np.mean((result - exact) ** 2)) < error * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (dense, 6),  # each layer: rows quantised, product
        (wide_as_its_inputs, 4),
        (einsum, 4),
        (attention, 10),  # query, key and value share their rows
        (reversible_embedding, 7),
    ],
)
def test_kernels(build, steps):
    compiled, *_ = quantised(build, "int8")
    labels = [kernel.label for kernel in compiled.explain().kernels]
    assert len(labels) == steps
    assert all("int8" in label for label in labels if label.startswith("gemm"))


def test_weights_take_a_byte_each():
    compiled, *_ = quantised(dense, "int8")
    packed = [p.type for p in compiled.graph.params if p.type.dtype == "int8"]
    assert len(packed) == 3
    # Panels are whole vectors of sums wide, K is filled up to a multiple of 4, and some ways to multiply need the
    # columns' sums.
    lanes = host_target().lanes("int32")
    padded = [(-(-k // 4) * 4 + 4) * -(-n // lanes) * lanes for k, n in ((71, 50), (50, 33), (33, 10))]
    assert sum(t.nbytes for t in packed) <= sum(padded)


def test_a_model_quantised_again_has_the_new_weights():
    compiled, x, *_ = quantised(dense, "int8")
    before = compiled(x)
    kernel = compiled._some_variant().captured.variables[1]
    kernel.assign(-np.asarray(kernel.value))
    (reference,) = evaluate(compiled.captured_graph, [x], compiled._some_variant().weights())
    after = compiled(x)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, reference)
