"""softmax kernels for CUDA in the simulator: axes, rows in registers and rows read again, infinities, fused nodes."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import softmax
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.test_loop import fused, normal
from tests.codegen.test_softmax import reference
from tests.cuda.driver import run_node

N = Dim.symbol("N")


def node(name, shape, **attrs):
    return make_node(PRIMITIVES[name], [Value(TensorType(tuple(shape), "float32"))], attrs)


def kept(call) -> int:
    """Elements of a row that a thread holds in registers."""
    return call.spec.params[5][1].kept


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 2), 1), ((3, 37), 1), ((2, 300), 1), ((2, 7, 5), 1), ((3, 4, 2, 3), (1, 3)), ((2, 150, 2), 1)],
)
def test_shapes(shape, axis):
    x = normal(*shape) * 5
    for name, wanted in [("softmax", reference(x, axis)), ("log_softmax", np.log(reference(x, axis)))]:
        (result,) = run_node(node(name, shape, axis=axis), [x])
        np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_rows_are_read_again(axis):
    declared = node("softmax", (N, N + 4), axis=axis)
    assert kept(softmax.lower(declared, simulator_target())[0]) == 0
    for size in (0, 1, 7, 13):
        x = normal(size, size + 4) * 3
        (result,) = run_node(declared, [x], {"N": size})
        np.testing.assert_allclose(result, reference(x, axis) if size else x, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("length", [21, N])
def test_infinities(length):
    inf = np.inf
    x = normal(6, 21)
    x[0, :5], x[1, :], x[2, 5], x[3, 6], x[4, [2, 17]], x[5, 4], x[5, 9] = -inf, -inf, inf, np.nan, inf, inf, -inf
    (result,) = run_node(node("softmax", (6, length), axis=1), [x], {"N": 21})
    with np.errstate(invalid="ignore"):
        wanted = reference(x, 1)
    assert np.isnan(wanted[1:]).all()
    np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-7)
    (result,) = run_node(node("log_softmax", (6, length), axis=1), [x], {"N": 21})
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(result, np.log(wanted), rtol=2e-6, atol=1e-6)
    (result,) = run_node(node("logsumexp", (6, length), axes=(1,), keepdims=False), [x], {"N": 21})
    np.testing.assert_array_equal(result[1:], [-inf, inf, np.nan, inf, inf])


@pytest.mark.parametrize(("shape", "axis"), [((3, 40), 1), ((20, 3), 0)])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_masks_around_it(shape, axis, half):
    x, mask = normal(*shape), normal(*shape, seed=1) > 0
    low = np.float32(-1e9)

    def attention(x, mask):
        logits = ops.select(mask, ops.mul(x, np.float32(0.125)), low)
        weights = ops.softmax(logits, axis=axis)
        return [weights, ops.convert(ops.mul(weights, x), dtype=half)]

    weights, product = run_node(fused(attention, x, mask, kind="softmax"), [x, mask])
    wanted = reference(np.where(mask, x * 0.125, low), axis)
    np.testing.assert_allclose(weights, wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(product.astype(np.float64), wanted * x, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 19), (5, N)])
def test_the_grid_does_not_change_results(shape):
    x = normal(5, 19)
    one, two = (run_node(node("softmax", shape, axis=1), [x], {"N": 19}, most_blocks=b)[0] for b in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("length", "lanes", "held"), [(1, 1, 1), (8, 1, 8), (10, 16, 1), (128, 32, 4), (1000, 128, 8), (16384, 1024, 16)]
)
def test_rows_of_known_length_stay_in_registers(length, lanes, held):
    (call,) = softmax.lower(node("softmax", (1 << 16, length), axis=1), make_target((9, 0)))
    assert call.spec.params[5][1].block.lanes == lanes
    assert kept(call) == held
    assert call.launch.block == max(256, lanes)


def test_longer_rows_do_not():
    (call,) = softmax.lower(node("softmax", (1 << 16, 16385), axis=1), make_target((9, 0)))
    assert kept(call) == 0
