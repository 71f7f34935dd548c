"""Rows that are rescaled by a statistic of their own, on CUDA: rows in registers and rows read again."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import families, rescale
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import Dim, TensorType, type_of
from tests.codegen.test_rescale import node_of, normal, normalise, quantise, two_statistics
from tests.cuda.driver import DEVICE, run_node
from tests.models import test_quantised

N = Dim.symbol("N")


def kept(call) -> int:
    """Elements of a row that a thread holds in registers."""
    return call.spec.params[5][1].kept


def check(build, *arrays, types=(), exact=False, **options):
    node = node_of(build, *(types or map(type_of, arrays)))
    results = run_node(node, list(arrays), **options)
    for result, expected in zip(results, build(*arrays), strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        if exact:
            np.testing.assert_array_equal(result, expected)
        else:
            np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 7), (1,)), ((5, 64), (1,)), ((2, 3, 100), (2,)), ((2, 3, 4, 33), (2, 3)), ((4, 2), (1,))]
)
def test_quantised_rows_are_those_of_the_reference_bit_for_bit(shape, axes):
    check(quantise(axes), normal(*shape), exact=True)


def test_rows_of_zeros_and_of_extreme_values():
    x = np.zeros((4, 50), "float32")
    x[1], x[2, 3], x[3] = 3e38, -1e-30, np.linspace(-1, 1, 50)
    with np.errstate(over="ignore"):
        check(quantise((1,)), x, exact=True)


@pytest.mark.parametrize("most_blocks", [1, 2])
def test_sizes_that_are_not_known(most_blocks):
    check(quantise((1,)), normal(5, 21), types=[TensorType((N, 21), "float32")], sizes={"N": 5}, exact=True)
    types = [TensorType((5, N), "float32")]
    (call,) = rescale.lower(node_of(quantise((1,)), *types), simulator_target())
    assert kept(call) == 0
    check(quantise((1,)), normal(5, 21), types=types, sizes={"N": 21}, exact=True, most_blocks=most_blocks)


@pytest.mark.parametrize("length", [5, 64, N])
def test_unit_norm_with_a_factor_for_each_column(length):
    types = [TensorType((3, length), "float32"), TensorType((length,), "float32")]
    check(
        normalise,
        normal(3, 64)[:, : length if length != N else 64],
        normal(64 if length == N else length),
        types=types,
        sizes={"N": 64},
    )


def rescaled_by(reduction):
    def build(x):
        return [ops.add(x, reduction(x, axes=(1,), keepdims=True))]

    return build


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("length", [5, 37])
@pytest.mark.parametrize("reduction", [ops.reduce_sum, ops.reduce_prod, ops.reduce_max, ops.reduce_min])
def test_lanes_without_an_element_change_no_statistic(reduction, length, dtype):
    """Values below 0 and above 1, of which neither 0 nor 1 is the least, the greatest or without effect."""
    for sign in (-1, 1):
        x = (sign * np.linspace(1.5, 3, 3 * length).reshape(3, length)).astype(dtype)
        check(rescaled_by(reduction), x)


def test_several_statistics_of_which_one_is_stored():
    check(two_statistics, normal(7, 30), normal(7, 1))
    types = [TensorType((7, n), "float32") for n in (30, 1)]
    (call,) = rescale.lower(node_of(two_statistics, *types), simulator_target())
    assert call.notes["inplace"] == ((2, 0),)


def test_long_rows_of_known_length_stay_in_registers():
    (call,) = rescale.lower(node_of(quantise((1,)), TensorType((1 << 16, 4096), "float32")), make_target((9, 0)))
    assert kept(call) == 8
    assert call.launch.block == 512


def test_what_is_refused():
    node = node_of(lambda x: [ops.reduce_max(x, axes=(1,), keepdims=True)], TensorType((3, 5), "float32"))
    assert "the outputs need the shape" in families.accepts(node)


@pytest.mark.parametrize("build", [test_quantised.dense, test_quantised.wide_as_its_inputs])
def test_quantised_layers_are_two_kernels(build):
    compiled, x, _, reference = test_quantised.quantised(build, "int8", target=DEVICE)
    np.testing.assert_array_equal(compiled(x), reference)
    labels = [kernel.label for kernel in compiled.explain().kernels]
    assert len(labels) == 2 * sum("gemm" in label for label in labels)
    assert compiled.stats()["host_steps"] == 0
