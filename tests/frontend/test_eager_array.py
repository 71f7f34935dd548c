"""Arrays with values keep to the rules of Keras' tensors: dtypes of operators, traced indices."""

from __future__ import annotations

import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.frontend.eager_array import presented, underlying
from kgraph.frontend.tracer import trace
from kgraph.ir import np_dtype

BFLOAT16 = np_dtype("bfloat16")


class Scales(layers.Layer):
    """Applies operators to what other layers, functions and the caller give it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, dtype=self.dtype_policy)

    def call(self, x):
        y = -self.dense(x * 0.5) * 0.5 / 3.0
        return y, 2.0 * ops.ones_like(x) + 0.5, x[:, :1] ** 2 - 1.5, y > 0.25


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16", "float32"])
def test_operators_on_eager_arrays_have_the_dtypes_of_traced_ones(dtype):
    layer, x = Scales(dtype=dtype), np.arange(6.0).reshape(2, 3).astype("float32")
    eager = layer(x)
    compiled = kgraph.compile(layer, example=x)(x)
    assert [y.dtype for y in eager] == [y.dtype for y in compiled]
    assert eager[0].dtype == np_dtype(layer.compute_dtype)
    for y, z in zip(eager, compiled):
        np.testing.assert_allclose(y.astype("float32"), z.astype("float32"), rtol=2e-2, atol=2e-2)


def test_float32_results_are_plain_arrays():
    assert type(ops.add([1.0], 2)) is np.ndarray
    assert type(layers.Dense(2)(np.ones((1, 3)))) is np.ndarray


def test_in_place_operators_on_bfloat16_make_new_arrays():
    x = ops.ones(3, "bfloat16")
    y = x
    y += 0.5
    assert (x.dtype, y.dtype) == (BFLOAT16, BFLOAT16)
    assert x.tolist() == [1.0] * 3
    assert y.tolist() == [1.5] * 3


class Aliases(layers.Layer):
    """Adds to values that it has under a second name, itself and in a method of another layer."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def increased(self, x):
        x += 1.0
        return x

    def call(self, x):
        y = ops.relu(x)
        z = y * 2.0
        bigger = (self.inner or self).increased(y), (self.inner or self).increased(z)
        return x, y, z, *bigger


@pytest.mark.parametrize("inner", [None, Aliases()])
def test_in_place_operators_within_a_layer_make_new_arrays(inner):
    layer, x = Aliases(inner), np.array([-1.0, 3.0], "float32")
    eager = layer(x)
    assert [type(y) for y in eager] == [np.ndarray] * 5
    assert [y.tolist() for y in eager] == [[-1, 3], [0, 3], [0, 6], [1, 4], [1, 7]]
    for y, wanted in zip(kgraph.compile(layer, example=x)(x), eager, strict=True):
        np.testing.assert_array_equal(y, wanted)


def test_a_layer_that_fails_leaves_nothing_behind():
    with pytest.raises(ValueError, match="ndim"):
        layers.Dense(2)(np.ones(3, "float32"))
    assert type(ops.add([1.0], 2)) is np.ndarray


def test_augmentations_that_select_among_their_results():
    images = np.random.default_rng(0).uniform(0, 255, (2, 12, 12, 3)).astype("float32")
    eager, compiled = (layers.RandAugment(seed=4) for _ in range(2))
    augment = kgraph.jit(lambda x: compiled(x, training=True))
    for _ in range(3):
        np.testing.assert_allclose(augment(images), eager(images, training=True), atol=1e-3)


def test_the_plain_array_underlies_its_view():
    plain = np.arange(4.0).reshape(2, 2).astype(BFLOAT16)
    for x in (plain, plain.T, plain[:1]):
        assert underlying(presented(x)) is x
    for x in (presented(plain)[:1], presented(plain).T, [1.0]):
        assert underlying(x) is x


@pytest.mark.parametrize("table", [lambda: ops.cumsum(ops.arange(5)), lambda: ops.convert_to_tensor([0, 1, 3, 6, 10])])
def test_known_tables_are_read_at_traced_indices(table):
    def read(i, x):
        known = table()
        return known[i], known[i + 1] - known[i], known[..., i], (known + 1)[: x.shape[0]]

    i, x = np.array([2, 0, -1], "int32"), np.zeros(4)
    compiled = kgraph.jit(read)
    for index in (i, np.int32(3)):
        expected = read(np.minimum(index, 3), x)
        for y, wanted in zip(compiled(np.minimum(index, 3), x), expected):
            np.testing.assert_array_equal(y, wanted)


def test_a_table_that_is_converted_twice_is_one_constant():
    table = np.arange(5.0, dtype="float32")
    graph = trace(lambda i: [ops.convert_to_tensor(table)[i], ops.convert_to_tensor(table)[-i]], np.int32(1))
    assert [node.attrs["value"].size for node in graph.nodes if node.name == "constant"].count(5) == 1


def test_known_tables_are_read_in_loops():
    def total(x):
        offsets = ops.cumsum(ops.arange(5))
        return ops.fori_loop(0, 5, lambda i, carry: carry + x[i] * offsets[i], 0.0)

    x = np.arange(5, dtype="float32")
    assert kgraph.jit(total)(x) == total(x) == 65
