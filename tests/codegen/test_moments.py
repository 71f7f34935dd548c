"""Kernels of mean and variance against NumPy in float64: axes, chunks, partitions, values far from zero."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import moments
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node, type_of
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample
from tests.codegen.test_loop import fused, normal


def test_primitive():
    for sample in PRIMITIVES["moments"].samples():
        check_sample(moments, PRIMITIVES["moments"], sample, parts=2)


def run(x, axes, parts=3, sizes=None, type=None, target=None):
    node = make_node(PRIMITIVES["moments"], [Value(type or type_of(x))], {"axes": axes})
    assert moments.accepts(node) is None
    return run_node(moments.lower, node, [x], sizes, parts=parts, target=target)


CASES = [
    ((7, 49, 100), (1,)),
    ((3, 1000, 5), (1,)),
    ((300_001,), (0,)),
    ((5000, 64), (0,)),
    ((20, 30, 40, 17), (0, 1, 2)),
    ((20, 30, 40, 17), (0, 1, 3)),
    ((2, 300, 400, 3), (0, 1, 2)),
    ((6, 5, 4, 3), (0, 2)),
    ((200, 333), (0, 1)),
    ((1, 5, 1), (1,)),
    ((1, 7), (0,)),
    ((70_000, 3), (0,)),
    ((8, 12, 300, 77), (0, 2)),
    ((9, 3, 40, 41), (0, 2, 3)),
]


@pytest.mark.parametrize("shift", [0, 1e4])
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_mean_and_variance(shape, axes, shift):
    x = normal(*shape) + np.float32(shift)
    mean, variance = run(x, axes)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(axes), rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(variance, wide.var(axes), rtol=1e-6, atol=1e-12)
    for parts in (1, 5):
        for result, again in zip((mean, variance), run(x, axes, parts)):
            np.testing.assert_array_equal(result, again)


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_symbolic_batch(rows):
    x = normal(rows, 11, 10, 24)
    mean, variance = run(x, (0, 1, 2), sizes={"N": rows}, type=TensorType((Dim.symbol("N"), 11, 10, 24), "float32"))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), atol=2e-7)
    np.testing.assert_allclose(variance, wide.var((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("vector_bytes", [16, 32])
def test_narrow_vectors(vector_bytes):
    x = normal(9000, 13)
    mean, variance = run(x, (0,), target=host_target(vector_bytes))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), atol=2e-7)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-6)


def test_prologue_in_another_dtype():
    x = normal(4000, 33).astype(np.float16)
    node = fused(lambda x: list(ops.moments(ops.convert(x, dtype="float32"), axes=(0,))), x, kind="moments")
    assert moments.accepts(node) is None
    mean, variance = run_node(moments.lower, node, [x], parts=2)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), atol=2e-7)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-6)


def test_not_finite():
    x = normal(90_000, 3)
    x[70_000, 0], x[3, 1] = np.inf, np.nan
    mean, variance = run(x, (0,))
    np.testing.assert_array_equal(mean[:2], [np.inf, np.nan])
    assert np.isnan(variance[:2]).all()
    assert np.isfinite([mean[2], variance[2]]).all()
