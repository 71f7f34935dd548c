"""softmax kernels against NumPy in float64: axes, lengths, prologues, epilogues, infinities."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import softmax
from kgraph.codegen.normalisations import EXPONENTIAL
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample
from tests.codegen.test_loop import fused, normal


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_primitive(name):
    for sample in PRIMITIVES[name].samples():
        check_sample(softmax, PRIMITIVES[name], sample, parts=2)


def reference(x, axis):
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((3, 1), 1),
        ((9, 2), 1),
        ((33, 10), 1),
        ((5, 128), 1),
        ((3, 129), 1),
        ((2, 5000), 1),
        ((4, 7, 40), 1),
        ((4, 300, 5), 1),
        ((50, 3), 0),
        ((3, 4, 5, 6), (1, 2)),
        ((3, 4, 5, 6), (1, 3)),
        ((3, 4, 5, 6), (0, 2)),
        ((30, 17), (0, 1)),
        ((0, 5), 1),
    ],
)
def test_shapes(shape, axis):
    x = normal(*shape) * 5
    for name, wanted in [("softmax", reference(x, axis)), ("log_softmax", np.log(reference(x, axis)))]:
        node = make_node(PRIMITIVES[name], [Value(TensorType(x.shape, "float32"))], {"axis": axis})
        assert softmax.accepts(node) is None
        (result,) = run_node(softmax.lower, node, [x], parts=3)
        np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 1), ((6, 400), 1), ((40, 6), 0)])
def test_masks_around_it(shape, axis):
    x, mask = normal(*shape), normal(*shape, seed=1) > 0
    low = np.float32(-1e9)

    def attention(x, mask):
        logits = ops.select(mask, ops.mul(x, np.float32(0.125)), low)
        weights = ops.softmax(logits, axis=axis)
        return [weights, ops.convert(ops.mul(weights, x), dtype="bfloat16")]

    node = fused(attention, x, mask, kind="softmax")
    assert softmax.accepts(node) is None
    weights, product = run_node(softmax.lower, node, [x, mask], parts=2)
    wanted = reference(np.where(mask, x * 0.125, low), axis)
    np.testing.assert_allclose(weights, wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(product.astype(np.float64), wanted * x, rtol=8e-3, atol=1e-6)


def test_infinities():
    x = normal(4, 21)
    x[0, 3], x[1, :], x[2, 5], x[3, 6] = -np.inf, -np.inf, np.inf, np.nan
    node = make_node(PRIMITIVES["softmax"], [Value(TensorType(x.shape, "float32"))], {"axis": 1})
    (result,) = run_node(softmax.lower, node, [x])
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result, reference(x, 1), rtol=2e-6, atol=1e-7)
    node = make_node(
        PRIMITIVES["logsumexp"], [Value(TensorType(x.shape, "float32"))], {"axes": (1,), "keepdims": False}
    )
    (result,) = run_node(softmax.lower, node, [x])
    np.testing.assert_array_equal(result[1:], [-np.inf, np.inf, np.nan])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_symbolic_sizes(axis):
    n = Dim.symbol("N")
    node = make_node(PRIMITIVES["softmax"], [Value(TensorType((n, 3, n + 1), "float32"))], {"axis": axis})
    for size in (1, 5, 70):
        x = normal(size, 3, size + 1)
        (result,) = run_node(softmax.lower, node, [x], {"N": size}, parts=2)
        np.testing.assert_allclose(result, reference(x, axis), rtol=2e-6, atol=1e-7)


def test_short_rows_stay_in_registers():
    def scratch(length):
        node = make_node(PRIMITIVES["softmax"], [Value(TensorType((8, length), "float32"))], {"axis": 1})
        return softmax.lower(node, host_target())[0].scratch_bytes

    in_registers = host_target().num_vector_registers // 4
    assert scratch(in_registers * host_target().lanes("float32")) == 0
    assert scratch(4096) == 4 * 4096


def test_partitions_give_the_same_bits():
    x = normal(37, 19, 45)
    for axis in range(3):
        node = make_node(PRIMITIVES["softmax"], [Value(TensorType(x.shape, "float32"))], {"axis": axis})
        results = [run_node(softmax.lower, node, [x], parts=p)[0] for p in (1, 2, 7)]
        assert all(np.array_equal(results[0], r) for r in results[1:])
