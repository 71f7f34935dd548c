"""Mean and variance for CUDA in the simulator: axes, one and two kernels, values far from zero, infinities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import moments, reduce
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node, type_of
from tests.codegen.test_loop import fused, normal
from tests.cuda.driver import run_node

N = Dim.symbol("N")


def node(type, axes):
    return make_node(PRIMITIVES["moments"], [Value(type)], {"axes": axes})


def check(result, x, axes, rtol=2e-6):
    mean, variance = result
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(axes), rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(variance, wide.var(axes), rtol=rtol)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks so short that the simulator gets through several of them."""
    monkeypatch.setattr(reduce, "CHUNK", 32)


CASES = [((6, 7, 5), (1,)), ((40, 3), (0,)), ((3, 50), (1,)), ((90,), (0,)), ((3, 4, 5, 2), (0, 2)), ((1, 7), (0,))]


@pytest.mark.parametrize("shift", [0, 1e4])
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_mean_and_variance(shape, axes, shift):
    x = normal(*shape) + np.float32(shift)
    check(run_node(node(type_of(x), axes), [x]), x, axes)


@pytest.mark.parametrize("shift", [0, 1e4])
@pytest.mark.parametrize(
    ("shape", "axes"), [((130,), (0,)), ((70, 3), (0,)), ((2, 90), (1,)), ((9, 5, 4, 2), (0, 1, 2))]
)
def test_chunks_in_a_second_kernel(shape, axes, shift, short_chunks):
    x = normal(*shape) + np.float32(shift)
    target = replace(simulator_target(), num_sms=4)
    made = node(type_of(x), axes)
    assert len(moments.lower(made, target)) == 2
    one, two = (run_node(made, [x], target=target, most_blocks=b) for b in (1, 2))
    check(one, x, axes)
    for result, again in zip(one, two, strict=True):
        np.testing.assert_array_equal(result, again)


@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_symbolic_batch(rows, short_chunks):
    x = normal(rows, 3, 2)
    made = node(TensorType((N, 3, 2), "float32"), (0, 1))
    assert len(moments.lower(made, simulator_target())) == 2
    result = run_node(made, [x], {"N": rows})
    if rows:
        check(result, x, (0, 1))
    else:
        assert np.isnan(result).all()


def test_prologue_in_another_dtype():
    x = normal(40, 3).astype(np.float16)
    made = fused(lambda x: list(ops.moments(ops.convert(x, dtype="float32"), axes=(0,))), x, kind="moments")
    check(run_node(made, [x]), x, (0,))


@pytest.mark.parametrize("place", [0, 5, 38])
def test_not_finite(place):
    x = normal(39, 5)
    x[place, 0], x[3, 1], x[20, 2], x[place, 3], x[7, 3] = np.inf, np.nan, -np.inf, np.inf, -np.inf
    mean, variance = run_node(node(type_of(x), (0,)), [x])
    np.testing.assert_array_equal(mean[:4], [np.inf, np.nan, -np.inf, np.nan])
    assert np.isnan(variance[:4]).all()
    assert np.isfinite([mean[4], variance[4]]).all()


def test_a_first_row_far_from_the_others():
    x = normal(200, 2) * np.float32(1e-3)
    x[0] = 1e3
    check(run_node(node(type_of(x), (0,)), [x]), x, (0,))


def test_statistics_of_a_batch_fill_the_device():
    first, second = moments.lower(node(TensorType((256, 56, 56, 64), "float32"), (0, 1, 2)), make_target((9, 0)))
    assert first.extent == 2 * 132
    assert second.spec.name == "combine_moments"
