"""Windows of one array that are changed and put together again: structure, values, what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.region_gradient import record_region
from kgraph.passes.dead_code import dead_code
from kgraph.passes.window_updates import window_updates
from kgraph.runtime.control import While
from kgraph.runtime.steps import HostStep

LAYERS, LENGTH, WIDTH = 3, 5, 4


def f32(*shape):
    return TensorType(shape, "float32")


ROW, INDEX = f32(1, 1, WIDTH), TensorType((), "int32")


def cache_type(batch=1):
    return f32(batch, LAYERS, 2, LENGTH, WIDTH)


def part(cache, layer: int, which: int, batch=1):
    """cache[:, layer, which], in the two steps in which layers take it."""
    whole = (batch, LAYERS, 2, LENGTH, WIDTH)
    start, limit = (0, layer, 0, 0, 0), (batch, layer + 1, *whole[2:])
    own = ops.reshape(ops.slice(cache, start=start, limit=limit, stride=(1,) * 5), shape=(batch, *whole[2:]))
    start, limit = (0, which, 0, 0), (batch, which + 1, LENGTH, WIDTH)
    return ops.reshape(ops.slice(own, start=start, limit=limit, stride=(1,) * 4), shape=(batch, LENGTH, WIDTH))


def stacked(values, axis: int):
    shape = values[0].shape
    wide = (*shape[:axis], 1, *shape[axis:])
    return ops.concatenate(*[ops.reshape(v, shape=wide) for v in values], axis=axis)


def written(x, row, index):
    zero = np.int32(0)
    return ops.dynamic_update_slice(x, row, zero, index, zero)


def decoding(cache, row, index, batch=1):
    """A row for every layer, made of the one before and what the layer keeps."""
    layers = []
    for layer in range(LAYERS):
        keys = written(part(cache, layer, 0, batch), row, index)
        values = written(part(cache, layer, 1, batch), ops.neg(row), index)
        layers.append(stacked([keys, values], 1))
        row = ops.tanh(ops.add(row, ops.reduce_sum(ops.mul(keys, values), axes=(1,), keepdims=True)))
    return row, stacked(layers, 1)


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.name not in ("constant", "reshape")]


def check_same(before: Graph, after: Graph, *arrays):
    verify(after, after="window_updates")
    wanted = evaluate(before, arrays, precision="float64")
    for a, b in zip(evaluate(after, arrays, precision="float64"), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def operands(graph: Graph, index: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        np.array(index, np.int32) if v.dtype == "int32" else rng.normal(size=v.shape).astype(np.float32)
        for v in graph.inputs
    ]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("index", [0, 3, 9, -2])
def test_layers_update_the_cache_itself(batch, index):
    row = f32(batch, 1, WIDTH)
    graph = trace(lambda c, r, i: decoding(c, r, i, batch), cache_type(batch), row, INDEX)
    after = dead_code(window_updates(graph))
    assert names(graph).count("concatenate") == LAYERS + 1
    assert "concatenate" not in names(after)
    assert names(after).count("dynamic_update_slice") == 2 * LAYERS
    assert all(n.output.shape == graph.inputs[0].shape for n in after.nodes if n.name == "dynamic_update_slice")
    check_same(graph, after, *operands(graph, index))


def test_a_step_of_a_loop_writes_rows_alone():
    """Nothing copies the cache: every update lies where the carry lies, and the attention reads it there."""
    types = [INDEX, cache_type(), ROW]

    def build(cache, row):
        def body(i, cache, row):
            row, cache = decoding(cache, row, i)
            return [ops.add(i, np.int32(1)), cache, row]

        graphs = {"body": record_region("body", types, body)}
        graphs["cond"] = record_region("cond", types, lambda i, cache, row: [ops.lt(i, np.int32(4))])
        return ops.while_loop(np.int32(1), cache, row, **graphs)[1:]

    graph = trace(build, *types[1:])
    compiled = compile_graph(graph)
    (loop,) = [s.function for s in compiled.program.steps if isinstance(s, HostStep)]
    assert isinstance(loop, While)
    body = loop.body
    binding = body.bind([(), *(t.shape for t in types[1:])])
    labels = [s.label for s in body.program.steps]
    assert labels.count("dynamic_update_slice") == 2 * LAYERS
    assert not {"concatenate", "slice"} & set(labels)
    carry = next(i for i, v in enumerate(body.program.inputs) if len(body.program.buffers[v].shape) == 5)
    assert carry in binding.storage.donors
    assert binding.arena_bytes < np.prod(cache_type().shape) * 4

    arrays = operands(graph, 0)
    given = [a.copy() for a in arrays]
    for a, b in zip(compiled.program(arrays), evaluate(graph, arrays, precision="float64"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(arrays, given):
        np.testing.assert_array_equal(a, b)


def reading_the_cache_later(cache, row, index):
    _, new = decoding(cache, row, index)
    return new, ops.reduce_sum(cache, axes=(3,))


def reading_a_part_later(cache, row, index):
    row, new = decoding(cache, row, index)
    return new, ops.mul(part(cache, 1, 0), row)


def updating_twice(cache, row, index):
    parts = []
    for layer in range(LAYERS):
        keys = written(written(part(cache, layer, 0), row, index), ops.neg(row), np.int32(1))
        parts.append(stacked([keys, part(cache, layer, 1)], 1))
    return (stacked(parts, 1),)


def in_another_order(cache, row, index):
    keys = [stacked([written(part(cache, n, 0), row, index), part(cache, n, 1)], 1) for n in (1, 0, 2)]
    return (stacked(keys, 1),)


def along_another_axis(cache, row, index):
    layers = [stacked([written(part(cache, n, 0), row, index), part(cache, n, 1)], 1) for n in range(LAYERS)]
    return (stacked(layers, 2),)


def giving_a_part(cache, row, index):
    keys = written(part(cache, 0, 0), row, index)
    first = stacked([keys, part(cache, 0, 1)], 1)
    rest = [stacked([part(cache, n, 0), part(cache, n, 1)], 1) for n in (1, 2)]
    return keys, stacked([first, *rest], 1)


@pytest.mark.parametrize(
    "build",
    [
        reading_the_cache_later,
        reading_a_part_later,
        updating_twice,
        in_another_order,
        along_another_axis,
        giving_a_part,
    ],
)
def test_what_is_needed_as_it_was_is_left_alone(build):
    graph = trace(build, cache_type(), ROW, INDEX)
    after = window_updates(graph)
    assert after is graph
    compiled = compile_graph(graph)
    arrays = operands(graph, 2)
    for a, b in zip(compiled.program(arrays), evaluate(graph, arrays, precision="float64"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_cuts_along_any_axis(data):
    """An array is cut along one axis, some of the pieces are updated and read, and it is put together."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(shape[axis] - 1, 1)), max_size=3)) - {shape[axis]})
    bounds = list(zip([0, *cuts], [*cuts, shape[axis]]))
    updated = [data.draw(st.booleans()) for _ in bounds]
    at = tuple(data.draw(st.integers(-1, 3)) for _ in shape)
    small = tuple(n if k == axis else data.draw(st.integers(1, n)) for k, n in enumerate(shape))

    def build(x):
        pieces, sums = [], []
        for (a, b), change in zip(bounds, updated):
            start = tuple(a if k == axis else 0 for k in range(len(shape)))
            limit = tuple(b if k == axis else n for k, n in enumerate(shape))
            piece = ops.slice(x, start=start, limit=limit, stride=(1,) * len(shape))
            if change:
                own = tuple(b - a if k == axis else n for k, n in enumerate(small))
                update = ops.full(shape=own, value=float(a + 1), dtype="float32")
                piece = ops.dynamic_update_slice(piece, update, *map(np.int32, at))
                sums.append(ops.reduce_sum(piece, axes=tuple(range(len(shape))), keepdims=False))
            pieces.append(piece)
        return [ops.concatenate(*pieces, axis=axis), *sums]

    graph = trace(build, f32(*shape))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    after = dead_code(window_updates(graph))
    check_same(graph, after, x)
    if any(updated) and len(bounds) > 1:
        assert "concatenate" not in names(after)
