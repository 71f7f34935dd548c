"""Elementwise kernels that read columns of larger matrices where they lie, without a copy of them."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import kgraph
from kgraph import ops
from kgraph.codegen.cpu import loop
from kgraph.ir import PRIMITIVES, TensorType, Value, make_node, type_of
from tests.codegen.driver import Bound, host_target
from tests.codegen.test_loop import fused, normal


def columns(x: Value, first: int, count: int) -> Value:
    """x[..., first : first + count]"""
    start = (*[0] * (x.type.rank - 1), first)
    attrs = {"start": start, "limit": (*x.shape[:-1], first + count), "stride": (1,) * x.type.rank}
    return make_node(PRIMITIVES["slice"], [x], attrs).output


def run(node, arrays: dict[Value, np.ndarray], parts: int = 3):
    """What the kernel of a node makes of the operands that it reads."""
    (call,) = loop.lower(node, host_target())
    bound = Bound([call], {operand: arrays[operand] for operand in call.operands[: -call.outputs]})
    bound.run(parts)
    return [bound.buffers[out] for out in node.outputs]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_columns(data):
    rows = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    count = data.draw(st.sampled_from([64, 65, 100, 5000]))
    pitches = [count + data.draw(st.integers(0, 40)) for _ in range(2)]
    dtype = data.draw(st.sampled_from(["float32", "float64", "bfloat16", "int8"]))
    arrays = [normal(*rows, n, seed=n).astype(type_of(np.zeros(0)).np_dtype) for n in pitches]
    arrays = [(8 * a).astype(TensorType((), dtype).np_dtype) for a in arrays]
    firsts = [data.draw(st.integers(0, n - count)) for n in pitches]
    other = arrays[0][..., :count][tuple(slice(0, 1) if data.draw(st.booleans()) else slice(None) for _ in rows)]
    cut = [a[..., i : i + count] for a, i in zip(arrays, firsts, strict=True)]
    node = fused(lambda x, y, z: [ops.add(ops.mul(x, y), z), ops.gt(x, z)], *cut, np.ascontiguousarray(other))
    sources = [Value(type_of(a)) for a in arrays]
    slices = [columns(x, i, count) for x, i in zip(sources, firsts, strict=True)]
    viewed = make_node(node.primitive, [*slices, node.inputs[2]], node.attrs)
    given = dict(zip([*sources, *slices, node.inputs[2]], [*arrays, *map(np.ascontiguousarray, cut), other]))
    dense = {**dict(zip(node.inputs, [*map(np.ascontiguousarray, cut), np.ascontiguousarray(other)], strict=True))}
    for got, wanted in zip(run(viewed, given), run(node, dense, parts=1), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert loop.views(viewed) == tuple(slices)


def test_what_is_no_view():
    x = Value(TensorType((4, 6, 200), "float32"))
    narrow = columns(x, 3, 20)  # a row is hardly a vector
    every_second = make_node(
        PRIMITIVES["slice"], [x], {"start": (0, 0, 0), "limit": (4, 6, 200), "stride": (1, 1, 2)}
    ).output
    some_rows = make_node(
        PRIMITIVES["slice"], [x], {"start": (0, 1, 0), "limit": (4, 5, 100), "stride": (1, 1, 1)}
    ).output
    for value in (narrow, every_second, some_rows):
        assert loop.views(make_node(PRIMITIVES["neg"], [value], {})) == ()
    wide = columns(x, 3, 100)
    assert loop.views(make_node(PRIMITIVES["neg"], [wide], {})) == (wide,)
    # A view is broadcast nowhere, and nothing is written over what it is cut from.
    (call,) = loop.lower(make_node(PRIMITIVES["neg"], [wide], {}), host_target())
    assert call.notes["inplace"] == ()
    assert call.bytes == 2 * wide.type.nbytes


@pytest.mark.parametrize("batch", [1, 3, 0])
def test_slices_that_only_kernels_with_views_read_are_not_made(batch):
    def halves(x):
        a, b = x[:, :100], x[:, 100:]
        return np.tanh(a) * b

    function = kgraph.jit(lambda x: ops.mul(ops.tanh(x[:, :100]), x[:, 100:]))
    x = normal(batch, 200)
    np.testing.assert_allclose(function(x), halves(x), rtol=1e-5, atol=1e-6)
    assert [row.label for row in function.explain(x).kernels] == ["tanh_mul"]


def test_results_written_past_the_caches():
    """The kernel is there twice, for results of either size."""
    target = dataclasses.replace(host_target(), l3_bytes=4096)
    x = normal(9, 11, 200)
    source = Value(type_of(x))
    node = make_node(PRIMITIVES["neg"], [columns(source, 40, 128)], {})
    (call,) = loop.lower(node, target)
    assert call.spec.template.endswith("_streaming")
    bound = Bound([call], {source: x}, target=target)
    bound.run(3)
    np.testing.assert_array_equal(bound.buffers[node.output], -x[..., 40:168])
