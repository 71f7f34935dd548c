"""Rows that are rescaled by a statistic of their own: values of kernels against their references."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import rescale
from kgraph.ir import Dim, Node, TensorType, Value, type_of
from kgraph.ops.fusion import FUSION
from kgraph.ops.region_gradient import record_region
from tests.codegen.driver import host_target, run_node

N = Dim.symbol("N")


def quantise(axes):
    """What Keras does with activations ahead of an int8 product."""

    def build(x):
        largest = ops.reduce_max(ops.abs(x), axes=axes, keepdims=True)
        scale = ops.div(ops.full(shape=(), value=127.0, dtype="float32"), ops.add(largest, np.float32(1e-7)))
        rounded = ops.round_nearest_even(ops.mul(x, scale))
        clipped = ops.minimum(ops.maximum(rounded, np.float32(-127)), np.float32(127))
        return [ops.convert(clipped, dtype="int8"), scale]

    return build


def normalise(x, gamma):
    total = ops.reduce_sum(ops.mul(x, x), axes=(1,), keepdims=True)
    return [ops.mul(ops.mul(x, ops.rsqrt(total)), gamma)]


def node_of(build, *types) -> Node:
    body = record_region("rescale", types, build)
    return Node(FUSION, [Value(t) for t in types], {"kind": "rescale", "body": body}, [v.type for v in body.outputs])


def check(build, *arrays, types=(), exact=False, **options):
    node = node_of(build, *(types or map(type_of, arrays)))
    assert rescale.accepts(node) is None
    results = run_node(rescale.lower, node, list(arrays), **options)
    wanted = build(*arrays)
    for result, expected in zip(results, wanted, strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        if exact:
            np.testing.assert_array_equal(result, expected)
        else:
            np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 7), (1,)), ((5, 64), (1,)), ((2, 3, 1000), (2,)), ((2, 3, 4, 33), (2, 3)), ((4, 2), (1,))]
)
@pytest.mark.parametrize("vector_bytes", [None, 16])
def test_quantised_rows_are_those_of_the_reference_bit_for_bit(shape, axes, vector_bytes):
    check(quantise(axes), normal(*shape), exact=True, parts=2, target=host_target(vector_bytes))


def test_rows_of_zeros_and_of_extreme_values():
    x = np.zeros((4, 50), "float32")
    x[1], x[2, 3], x[3] = 3e38, -1e-30, np.linspace(-1, 1, 50)
    with np.errstate(over="ignore"):
        check(quantise((1,)), x, exact=True)


def test_an_unknown_number_of_rows():
    check(quantise((1,)), normal(6, 77), types=[TensorType((N, 77), "float32")], sizes={"N": 6}, exact=True, parts=3)


@pytest.mark.parametrize("length", [5, 64, 300])
def test_unit_norm_with_a_factor_for_each_column(length):
    check(normalise, normal(7, length), normal(length), parts=2)


def two_statistics(x, rows):
    total = ops.reduce_sum(ops.mul(x, x), axes=(1,), keepdims=True)
    one, other = ops.rsqrt(total), ops.add(total, np.float32(1))
    return [ops.add(ops.mul(ops.mul(x, one), rows), other), other]


def test_several_statistics_of_which_one_is_stored():
    check(two_statistics, normal(7, 30), normal(7, 1), parts=2)


def test_a_statistic_does_not_overwrite_an_operand():
    types = [TensorType((7, n), "float32") for n in (30, 1)]
    (call,) = rescale.lower(node_of(two_statistics, *types), host_target())
    assert call.notes["inplace"] == ((2, 0),)


def test_a_row_may_be_overwritten():
    node = node_of(normalise, TensorType((7, 30), "float32"), TensorType((30,), "float32"))
    (call,) = rescale.lower(node, host_target())
    assert call.notes["inplace"] == ((2, 0),)


def maximum(x):
    return ops.reduce_max(x, axes=(1,), keepdims=True)


def widened(x):
    wide = ops.convert(x, dtype="float32")
    return [ops.mul(wide, maximum(wide))]


@pytest.mark.parametrize(
    ("build", "dtype", "reason"),
    [
        (lambda x: [ops.mul(ops.add(x, maximum(x)), maximum(ops.neg(x)))], "float32", "exactly one reduction"),
        (lambda x: [maximum(x)], "float32", "the outputs need the shape"),
        (widened, "int8", "changes the dtype"),
    ],
)
def test_what_is_refused(build, dtype, reason):
    assert reason in rescale.accepts(node_of(build, TensorType((3, 5), dtype)))
