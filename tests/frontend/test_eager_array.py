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
