"""Normalisation kernels for CUDA in the simulator: axes, groups, rows read again, means far from zero, fused nodes."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import norm
from kgraph.codegen.cuda.target import simulator_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.test_loop import fused, normal
from tests.codegen.test_norm import EPSILON, reference
from tests.cuda.driver import run_node

N = Dim.symbol("N")


def run(name, *arrays, declared=None, sizes=None, most_blocks=2, **attrs):
    """declared: the shape of the first operand, where it is symbolic."""
    shapes = [declared or arrays[0].shape, *(a.shape for a in arrays[1:])]
    node = make_node(PRIMITIVES[name], [Value(TensorType(s, "float32")) for s in shapes], {**attrs, "epsilon": EPSILON})
    return run_node(node, list(arrays), sizes, most_blocks=most_blocks)[0]


@pytest.mark.parametrize(
    ("shape", "axes", "parameters"),
    [
        ((5, 1), (1,), (1,)),
        ((5, 7), (1,), (7,)),
        ((3, 33), (1,), (33,)),
        ((2, 300), (1,), (300,)),
        ((2, 5, 6), (1, 2), (5, 6)),
        ((2, 5, 6), (0, 2), (6,)),
        ((4, 5, 3), (0,), (5, 3)),
        ((2, 5, 3), (1,), (5, 1)),
    ],
)
def test_layer_and_rms_norm(shape, axes, parameters):
    x, gamma, beta = normal(*shape), normal(*parameters, seed=1), normal(*parameters, seed=2)
    result = run("layer_norm", x, gamma, beta, axes=axes)
    np.testing.assert_allclose(result, reference(x, gamma, beta, axes), atol=3e-6)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axes, keepdims=True) + EPSILON) * gamma
    np.testing.assert_allclose(run("rms_norm", x, gamma, axes=axes), wanted, atol=3e-6)


@pytest.mark.parametrize("length", [100, N])
def test_large_means_do_not_cancel(length):
    x = normal(2, 100) + np.float32(1000)
    ones, zeros = np.ones(1, np.float32), np.zeros(1, np.float32)
    result = run("layer_norm", x, ones, zeros, declared=(2, length), sizes={"N": 100}, axes=(1,))
    np.testing.assert_allclose(result, reference(x, 1, 0, (1,)), atol=2e-4)


@pytest.mark.parametrize("channels", [10, 270])
def test_residual_before_activation_after(channels):
    x, y = normal(3, 2, channels), normal(3, 2, channels, seed=1)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)

    def block(x, y, gamma, beta):
        total = ops.add(x, y)
        return [total, ops.relu(ops.add(ops.layer_norm(total, gamma, beta, axes=(2,), epsilon=EPSILON), y))]

    node = fused(block, x, y, gamma, beta, kind="norm")
    total, result = run_node(node, [x, y, gamma, beta])
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_allclose(result, np.maximum(reference(x + y, gamma, beta, (2,)) + y, 0), atol=3e-6)


@pytest.mark.parametrize("batch", [2, N])
@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 8), 4), ((2, 7, 6), 3), ((2, 4, 3), 3), ((2, 5, 8), 1)])
def test_group_norm(shape, groups, batch):
    x, gamma, beta = normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    split = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    wanted = reference(split, 1, 0, (1, 3)).reshape(shape) * gamma + beta
    declared = (batch, *shape[1:])
    result = run("group_norm", x, gamma, beta, declared=declared, sizes={"N": 2}, groups=groups)
    np.testing.assert_allclose(result, wanted, atol=3e-6)


@pytest.mark.parametrize("axes", [(1,), (2,)])
def test_symbolic_sizes(axes):
    for size in (0, 1, 5):
        x, gamma, beta = normal(2, size, size + 3), normal(1, seed=1), normal(1, seed=2)
        for most_blocks in (1, 2):
            result = run(
                "layer_norm",
                x,
                gamma,
                beta,
                declared=(2, N, N + 3),
                sizes={"N": size},
                most_blocks=most_blocks,
                axes=axes,
            )
            wanted = reference(x, gamma, beta, axes) if size else x
            np.testing.assert_allclose(result, wanted, atol=3e-6)


def test_batch_norm_is_two_elementwise_kernels():
    values = [Value(TensorType(s, "float32")) for s in [(N, 5, 3), (3,), (3,), (3,), (3,)]]
    node = make_node(PRIMITIVES["batch_norm"], values, {"axis": 2, "epsilon": EPSILON})
    calls = norm.lower(node, simulator_target())
    assert [c.spec.template for c in calls] == ["kgraph.codegen.cuda.loop:render"] * 2
