"""Cumulative kernels for CUDA in the simulator: axes, tiles, chunks, directions, dtypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import cumulative
from kgraph.codegen.cuda.target import simulator_target
from kgraph.codegen.scans import COMBINE
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.samples import compare
from tests.cuda.driver import run_node

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops


def operand(shape, dtype):
    x = np.random.default_rng(0).integers(0, 4, shape).astype(dtype)
    return x / x.dtype.type(4) + x.dtype.type(0.25) if dtype.startswith("float") else x


def node(name, shape, dtype, axis, reverse):
    return make_node(PRIMITIVES[name], [Value(TensorType(tuple(shape), dtype))], {"axis": axis, "reverse": reverse})


def check(name, result, x, axis, reverse):
    compare(result, PRIMITIVES[name].reference(x, axis=axis, reverse=reverse), 1e-6)


CASES = [
    ((2, 37), 1, False, "float32"),
    ((3, 5), 1, True, "float64"),
    ((19, 3), 0, True, "float32"),
    ((2, 9, 5), 1, False, "float16"),
    ((21,), 0, True, "uint8"),
    ((2, 21), 1, False, "int64"),
]


@pytest.mark.parametrize(("name", "dynamic"), [(name, k % 2 == 0) for k, name in enumerate(COMBINE)])
@pytest.mark.parametrize(("shape", "axis", "reverse", "dtype"), CASES)
def test_rows(name, shape, axis, reverse, dtype, dynamic):
    if name == "cumlogsumexp" and not dtype.startswith("float"):
        pytest.skip("floats only")
    x = operand(shape, dtype)
    declared = (N, *shape[1:-1], *((L,) if len(shape) > 1 else ())) if dynamic else shape
    (result,) = run_node(node(name, declared, dtype, axis, reverse), [x], {"N": shape[0], "L": shape[-1]})
    check(name, result, x, axis, reverse)


@pytest.mark.parametrize(
    ("name", "shape", "axis", "reverse"),
    [("cumsum", (131,), 0, False), ("cummax", (2, 130), 1, True), ("cumlogsumexp", (67, 2), 0, False)],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_long_rows_in_chunks(name, shape, axis, reverse, symbolic):
    x = operand(shape, "float32")
    declared = tuple(N if a == axis and symbolic else n for a, n in enumerate(shape))
    made = node(name, declared, "float32", axis, reverse)
    target = replace(simulator_target(), num_sms=4)
    assert len(cumulative.lower(made, target)) == 3
    sizes = {"N": shape[axis]}
    one, two = (run_node(made, [x], sizes, target=target, most_blocks=b)[0] for b in (1, 2))
    check(name, one, x, axis, reverse)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("place", [0, 30])
def test_not_finite_in_chunks(place):
    x = operand((105,), "float32")
    x[place] = np.nan
    target = replace(simulator_target(), num_sms=4)
    for name in ("cumsum", "cummin"):
        (result,) = run_node(node(name, (105,), "float32", 0, False), [x], target=target)
        np.testing.assert_array_equal(np.isnan(result), np.arange(105) >= place)


def test_negative_zero_stays():
    x = np.full(3, -0.0, np.float32)
    (result,) = run_node(node("cumsum", (3,), "float32", 0, False), [x])
    assert np.signbit(result).all()
