"""Graphs that the fuzzers found at fault once, reduced and written by hand."""

from __future__ import annotations

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from tests.fuzz.graphs import Case, check

N = Dim.symbol("N")


@pytest.fixture(autouse=True)
def _verified(monkeypatch):
    monkeypatch.setenv("KGRAPH_VERIFY", "1")


def run(function, *types: TensorType, params: int = 0, batches=(1, 3, 8)):
    """Compile a function of operands of these types (the last `params` are parameters) and compare with the oracle."""
    graph = trace(function, *types)
    count = len(types) - params
    graph.inputs, graph.params = graph.inputs[:count], graph.inputs[count:]
    case = Case(0, graph)
    operands = {n: (case.arrays(graph.inputs, n), case.arrays(graph.params, n)) for n in batches}
    check(case, graph, operands)


def f32(*shape):
    return TensorType(shape, "float32")


def dot(x, y, lhs_contract, rhs_contract, **batch):
    return ops.dot_general(x, y, lhs_contract=lhs_contract, rhs_contract=rhs_contract, **batch)


@pytest.mark.parametrize("scale", [1, 7])
def test_product_contracted_over_the_batch(scale):
    run(lambda x, y: dot(x, y, (0,), (0,)), f32(scale * N, 5), f32(scale * N, 6))
    run(lambda x, y: dot(x, y, (0,), (0,), lhs_batch=(1,), rhs_batch=(1,)), f32(scale * N, 1), f32(scale * N, 1))


def test_epilogue_along_the_last_axis_of_a_matrix_times_vector():
    """The last axis of the result is one of rows there, not of columns."""
    run(lambda x, v, b: ops.add(dot(x, v, (1,), (0,)), b), f32(N, 4, 6, 5), f32(4), f32(5))
    run(lambda x, v, b: ops.add(dot(x, v, (1,), (0,)), b), f32(N, 4, 6), f32(4), f32(N, 1))


def test_epilogue_along_one_of_several_column_axes():
    product = lambda x, y: dot(x, y, (1,), (2,))
    run(lambda x, y, b: ops.add(product(x, y), b), f32(N, 4), f32(3, 5, 4), f32(5))
    run(lambda x, y, b: ops.add(product(x, y), b), f32(N, 4), f32(3, 5, 4), f32(3, 5))
    run(lambda x, y, b: ops.add(product(x, y), b), f32(N, 4), f32(3, 5, 4), f32(N, 3, 1))
    run(lambda x, y, b: ops.add(product(x, y), b), f32(N, 4), f32(3, 5, 4), f32(N, 1, 1))


def test_product_with_a_weight_that_is_contracted_whole():
    run(lambda x, w: dot(x, w, (0, 1), (1, 0)), f32(2, 3), f32(3, 2), params=1)
    run(lambda x, w: dot(x, w, (1, 2), (1, 0)), f32(N, 2, 3), f32(3, 2), params=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_narrow_results_of_one_column_more_than_a_vector(dtype):
    """`check` looks at the bytes beside the results."""
    for columns in (1, 2, 17, 33):
        if dtype in ("bfloat16", "float16"):
            type_ = TensorType((N, 4), dtype), TensorType((4, columns), dtype)
            run(lambda x, w: ops.mul(dot(x, w, (1,), (0,)), np.asarray(0.5, x.dtype)), *type_)
        run(lambda x: ops.convert(ops.round_nearest_even(x), dtype=dtype), f32(N, columns))
        run(lambda x: ops.convert(ops.round_nearest_even(x), dtype=dtype), f32(columns))


@pytest.mark.parametrize("own", [((0, 0), (0, 0)), ((0, 1), (0, 1)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("window", [2, 3])
def test_zero_padding_before_a_maximum_that_pads_too(own, window):
    """A window that holds nothing but padding gives the zero, not the identity of the maximum."""

    def function(x):
        padded = ops.pad(ops.relu(x), np.float32(0), low=(0, 1, 1, 0), high=(0, 1, 1, 0))
        window_ = (1, window, window, 1)
        return ops.reduce_window(padded, kind="max", window=window_, padding=((0, 0), *own, (0, 0)))

    run(function, f32(N, 4, 5, 3))


def test_zero_padding_before_a_maximum_over_a_dilated_window():
    def function(x):
        padded = ops.pad(ops.relu(x), np.float32(0), low=(0, 1, 0), high=(0, 1, 0))
        return ops.reduce_window(padded, kind="max", window=(1, 2, 1), window_dilation=(1, 2, 1))

    run(function, f32(N, 1, 3))


def test_division_by_a_power_of_two_whose_reciprocal_overflows():
    type_ = TensorType((N, 3), "float16")
    run(lambda x: ops.div(ops.mul(x, np.float16(2**-10)), np.float16(2.0**-17)), type_)
