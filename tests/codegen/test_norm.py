"""Normalisation kernels against NumPy in float64: axes, lengths, residual prologues, epilogues, accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import norm
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node, type_of
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample
from tests.codegen.test_loop import fused, normal

EPSILON = 1e-5


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_primitive(name):
    for sample in PRIMITIVES[name].samples():
        check_sample(norm, PRIMITIVES[name], sample, parts=2)


def reference(x, gamma, beta, axes):
    x = x.astype(np.float64)
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + EPSILON) * gamma + beta


def run(name, *arrays, parts=3, sizes=None, **attrs):
    node = make_node(PRIMITIVES[name], [Value(type_of(a)) for a in arrays], {**attrs, "epsilon": EPSILON})
    assert norm.accepts(node) is None
    return run_node(norm.lower, node, list(arrays), sizes, parts=parts)[0]


@pytest.mark.parametrize(
    ("shape", "axes", "parameters"),
    [
        ((5, 1), (1,), (1,)),
        ((33, 7), (1,), (7,)),
        ((6, 256), (1,), (256,)),
        ((6, 257), (1,), (257,)),
        ((3, 3000), (1,), (3000,)),
        ((4, 9, 33), (1, 2), (9, 33)),
        ((4, 9, 33), (1,), (9, 1)),
        ((4, 9, 33), (0, 2), (33,)),
        ((4, 9, 33), (0,), (9, 33)),
        ((4, 9, 3), (1,), (3,)),
    ],
)
def test_layer_norm(shape, axes, parameters):
    x, gamma, beta = normal(*shape), normal(*parameters, seed=1), normal(*parameters, seed=2)
    result = run("layer_norm", x, gamma, beta, axes=axes)
    np.testing.assert_allclose(result, reference(x, gamma, beta, axes), atol=3e-6)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axes, keepdims=True) + EPSILON) * gamma
    np.testing.assert_allclose(run("rms_norm", x, gamma, axes=axes), wanted, atol=3e-6)


def test_large_means_do_not_cancel():
    x = normal(4, 1000) + np.float32(1000)
    result = run("layer_norm", x, np.ones(1000, np.float32), np.zeros(1000, np.float32), axes=(1,))
    np.testing.assert_allclose(result, reference(x, 1, 0, (1,)), atol=3e-6)


@pytest.mark.parametrize("groups", [12, 3])
@pytest.mark.parametrize("spread", [1e-3, 0.0])
def test_small_deviations_from_a_common_value(groups, spread):
    """Such as of an image of one colour behind convolutions: long sums are rounded by more than what differs."""
    x = np.float32(1.3) + np.float32(spread) * normal(2, 90, 90, 12)
    result = run("group_norm", x, np.ones(12, np.float32), np.zeros(12, np.float32), groups=groups)
    split = x.reshape(2, 90, 90, groups, -1)
    wanted = reference(split, 1, 0, (1, 2, 4)).reshape(x.shape)
    np.testing.assert_allclose(result, wanted, atol=3e-6)


@pytest.mark.parametrize("channels", [40, 600])
def test_residual_before_activation_after(channels):
    x, y = normal(7, 5, channels), normal(7, 5, channels, seed=1)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)

    def block(x, y, gamma, beta):
        total = ops.add(x, y)
        return [total, ops.relu(ops.add(ops.layer_norm(total, gamma, beta, axes=(2,), epsilon=EPSILON), y))]

    node = fused(block, x, y, gamma, beta, kind="norm")
    assert norm.accepts(node) is None
    total, result = run_node(norm.lower, node, [x, y, gamma, beta], parts=2)
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_allclose(result, np.maximum(reference(x + y, gamma, beta, (2,)) + y, 0), atol=3e-6)


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 32), 4), ((3, 50, 6), 3), ((2, 4, 24), 24), ((2, 9, 40), 1)])
def test_group_norm(shape, groups):
    x, gamma, beta = normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    split = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    wanted = reference(split, 1, 0, (1, 3)).reshape(shape) * gamma + beta
    np.testing.assert_allclose(run("group_norm", x, gamma, beta, groups=groups), wanted, atol=3e-6)


def test_symbolic_sizes():
    n = Dim.symbol("N")
    types = [TensorType(s, "float32") for s in [(n, n + 3, 20), (20,), (20,)]]
    gamma, beta = normal(20, seed=1), normal(20, seed=2)
    for name, attrs in [("layer_norm", {"axes": (2,)}), ("layer_norm", {"axes": (1,)}), ("group_norm", {"groups": 5})]:
        node = make_node(PRIMITIVES[name], [Value(t) for t in types], {**attrs, "epsilon": EPSILON})
        for size in (0, 1, 9):
            x = normal(size, size + 3, 20)
            (result,) = run_node(norm.lower, node, [x, gamma, beta], {"N": size}, parts=2)
            if name == "layer_norm":
                wanted = reference(x, gamma, beta, attrs["axes"])
            else:
                split = x.reshape(size, size + 3, 5, 4)
                wanted = reference(split, 1, 0, (1, 3)).reshape(x.shape) * gamma + beta
            np.testing.assert_allclose(result, wanted, atol=3e-6)
