"""Rows of the batch that do not depend on each other: what is recognised, and that it is true."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.dims import evaluate as value_of
from kgraph.ir.interpreter import evaluate
from kgraph.passes.dead_code import dead_code
from kgraph.passes.independent_rows import RULES, independent_rows
from tests.fuzz.graphs import random_case

N, L = Dim.symbol("N"), Dim.symbol("L")


def f32(*shape):
    return TensorType(shape, "float32")


def constant(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def dot(x, y, contract=((1,), (0,)), batch=((), ())):
    names = ("lhs_contract", "rhs_contract"), ("lhs_batch", "rhs_batch")
    attrs = {name: axes for group, given in zip(names, (contract, batch)) for name, axes in zip(group, given)}
    return ops.dot_general(x, y, **attrs)


def attention(q, mask=None):
    return ops.attention(q, q, q, *([] if mask is None else [mask]), scale=0.5, has_mask=mask is not None)


INDEPENDENT = {
    "elementwise": lambda x: ops.add(x, constant(6)),
    "against a value per row": lambda x: ops.mul(x, ops.reduce_sum(x, axes=(1,), keepdims=True)),
    "product": lambda x: dot(x, constant(6, 5)),
    "product from the left": lambda x: ops.transpose(dot(constant(6, 5), x, ((0,), (1,))), permutation=(1, 0)),
    "product of each row": lambda x: dot(*[ops.reshape(x, shape=(N, 2, 3))] * 2, ((2,), (2,)), ((0,), (0,))),
    "rows joined and parted": lambda x: ops.reshape(
        ops.softmax(dot(ops.reshape(x, shape=(2 * N, 3)), constant(3, 3)), axis=1), shape=(N, 6)
    ),
    "transposed": lambda x: ops.transpose(ops.cumsum(ops.transpose(x, permutation=(1, 0)), axis=0), permutation=(1, 0)),
    "table": lambda x: ops.take(constant(9, 4), ops.convert(x, dtype="int32"), axis=0),
    "columns chosen": lambda x: ops.take(x, np.array([2, 0, 5]), axis=1),
    "largest": lambda x: ops.argmax(x, axis=1, dtype="int32"),
    "beginning": lambda x: ops.slice(x, start=(0, 1), limit=(N, 4), stride=(1, 2)),
    "filled": lambda x: ops.concatenate(x, ops.full(shape=(N, 2), value=1.0, dtype="float32"), axis=1),
    "places": lambda x: ops.add(x, ops.iota(shape=(6,), dtype="float32", axis=0)),
}
DEPENDENT = {
    "sum over rows": lambda x: ops.add(x, ops.reduce_sum(x, axes=(0,), keepdims=True)),
    "product of rows": lambda x: dot(dot(x, x, ((1,), (1,))), x),
    "number of the row": lambda x: ops.add(x, ops.iota(shape=(N, 1), dtype="float32", axis=0)),
    "how many rows": lambda x: ops.div(x, ops.dim_value(dim=N, dtype="float32")),
    "first row": lambda x: ops.slice(x, start=(0, 0), limit=(1, 6), stride=(1, 1)),
    "reversed": lambda x: ops.rev(x, axes=(0,)),
    "mixed by a reshape": lambda x: ops.reshape(ops.transpose(x, permutation=(1, 0)), shape=(N, 6)),
    "softmax over rows": lambda x: ops.softmax(x, axis=0),
    "rows on the second axis": lambda x: ops.transpose(x, permutation=(1, 0)),
    "nothing of the rows": lambda x: (x, ops.full(shape=(3,), value=1.0, dtype="float32")),
    "more rows": lambda x: ops.concatenate(x, x, axis=0),
    "rows appended": lambda x: ops.pad(x, np.float32(0), low=(0, 0), high=(1, 0), interior=(0, 0)),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_recognised(name):
    graph = trace(INDEPENDENT[name], f32(N, 6))
    assert independent_rows(graph) == ("N", "")
    check(graph, [np.abs(constant(7, 6)) * 3])


@pytest.mark.parametrize("name", DEPENDENT)
def test_refused_with_a_reason(name):
    symbol, reason = independent_rows(trace(DEPENDENT[name], f32(N, 6)))
    assert symbol == ""
    assert reason


def test_inputs_of_images_and_sequences():
    graph = trace(
        lambda x, w: ops.conv(x, w, strides=(1, 1), padding=((1, 1), (1, 1))), f32(N, 5, 5, 3), f32(3, 3, 3, 4)
    )
    graph.params, graph.inputs = graph.inputs[1:], graph.inputs[:1]
    assert independent_rows(graph) == ("N", "")
    graph = trace(attention, f32(N, L, 2, 4))
    assert independent_rows(graph) == ("N", "")
    assert independent_rows(trace(attention, f32(N, 5, 2, 4), TensorType((N, 1, 1, 5), "bool")))[0] == "N"
    assert independent_rows(trace(attention, f32(N, 5, 2, 4), TensorType((1, 1, 5, 5), "bool")))[0] == "N"
    assert independent_rows(trace(attention, f32(N, N, 2, 4)))[0] == ""


def test_sizes_that_are_not_known_are_no_obstacle():
    window = {"window": (1, 3, 2, 1), "strides": (1, 2, 1, 1), "window_dilation": (1,) * 4, "base_dilation": (1,) * 4}
    rest = (-L + 2 * ((L + 1) // 2)) + 1
    padding = ((0, 0), (0, rest), (0, 0), (0, 0))
    pool = lambda x: ops.reduce_window(x, kind="max", padding=padding, **window)
    assert independent_rows(trace(pool, f32(N, L, 4, 3)))[0] == "N"
    beginning = lambda x: ops.slice(x, start=(0, 0), limit=(N, (L + 1) // 2), stride=(1, 1))
    assert independent_rows(trace(beginning, f32(N, L)))[0] == "N"


def test_several_inputs_must_have_the_same_rows():
    assert independent_rows(trace(ops.add, f32(N, 6), f32(N, 6)))[0] == "N"
    assert independent_rows(trace(lambda x, y: (x, y), f32(N, 6), f32(L, 6)))[0] == ""
    assert independent_rows(trace(ops.add, f32(N, 6), f32(6)))[0] == "N"
    assert independent_rows(trace(ops.add, f32(3, 6), f32(6)))[0] == ""


def check(graph: Graph, arrays: list, rows: int = 7) -> None:
    """Parts of the inputs give the same parts of the outputs; NumPy's products round as the number of rows wants it."""
    products = {"dot_general", "conv", "attention", "rnn"} & {node.name for node in graph.nodes}
    whole = evaluate(graph, arrays, [])
    for first, last in ((0, 2), (2, 3), (3, rows)):
        part = evaluate(graph, [cut(v, a, first, last) for v, a in zip(graph.inputs, arrays)], [])
        for value, a, b in zip(graph.outputs, whole, part, strict=True):
            if products and value.type.is_float:
                a, b = (np.nan_to_num(np.asarray(y, np.float64), posinf=0, neginf=0) for y in (a, b))
                scale = 1e-5 if value.dtype in ("float32", "float64") else 1e-2
                np.testing.assert_allclose(cut(value, a, first, last), b, scale, scale * np.abs(a).max(initial=1))
            else:
                np.testing.assert_array_equal(cut(value, a, first, last), b)


def cut(value, array, first: int, last: int):
    if "N" not in {s for size in value.shape if isinstance(size, Dim) for s in size.symbols()}:
        return array
    return array[value_of(value.shape[0], {"N": first}) : value_of(value.shape[0], {"N": last})]


def test_random_graphs_that_are_taken_for_independent_are():
    taken: Counter = Counter()
    for seed in range(250):
        case = random_case(seed)
        graph = case.graph
        params = dict(zip(graph.params, case.arrays(graph.params, 7), strict=True))
        for output in graph.outputs:
            alone = dead_code(Graph([*graph.inputs, *graph.params], (), graph.nodes, [output], "alone"))
            arrays = [*case.arrays(graph.inputs, 7), *params.values()]
            if independent_rows(alone)[0]:
                taken.update(node.name for node in alone.nodes)
                check(alone, arrays)
    assert taken.total() > 300
    assert len(taken.keys() & RULES.keys()) > 12, taken
