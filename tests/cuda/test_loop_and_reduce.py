"""What the samples of records do not reach: unknown sizes, fused nodes, draws, long reductions, any grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.compiler import render
from kgraph.codegen.cuda import families, reduce
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.errors import CompileError
from kgraph.frontend.tracer import trace
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from kgraph.ops import philox
from kgraph.passes.fuse import fuse
from kgraph.passes.manager import PassContext
from tests.cuda.driver import run_node

N = Dim.symbol("N")


def fused(function, *types):
    """The one node that a function of arrays of these types becomes."""
    graph = fuse(trace(function, *types), PassContext(accepts=families.accepts))
    (node,) = [n for n in graph.nodes if n.name != "constant"]
    return node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 41])
@pytest.mark.parametrize("most_blocks", [1, 2, 7])
def test_fused_loops_of_any_length_on_any_grid(rows, most_blocks):
    node = fused(
        lambda x, y, b: (total := ops.add(ops.mul(x, y), b), ops.sub(total, y)),
        TensorType((N, 5), "float32"),
        TensorType((N, 1), "float32"),
        TensorType((5,), "float32"),
    )
    x, y, b = normal(rows, 5), normal(rows, 1, seed=1), normal(5, seed=2)
    first, second = run_node(node, [x, y, b], {"N": rows}, most_blocks=most_blocks)
    np.testing.assert_allclose(first, x * y + b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(second, x * y + b - y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stream", [0, 5])
@pytest.mark.parametrize("count", [1, 63, 64, 150])
def test_draws_are_those_of_the_definition(stream, count):
    seed = Value(TensorType((2,), "uint32"))
    node = make_node(PRIMITIVES["random_words"], [seed], {"shape": (N,), "stream": stream})
    key = (12345, 4000000000)
    (out,) = run_node(node, [np.array(key, np.uint32)], {"N": count})
    np.testing.assert_array_equal(out, philox.words_by_numpy(key, count, stream))


def reduction(name: str, shape: tuple, axes: tuple, dtype: str = "float32"):
    attrs = {"axis": axes[0], "dtype": "int32"} if name.startswith("arg") else {"axes": axes, "keepdims": False}
    return make_node(PRIMITIVES[name], [Value(TensorType(shape, dtype))], attrs)


@pytest.mark.parametrize("most_blocks", [1, 5])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 2), (1, 2)])
def test_reductions_do_not_depend_on_the_grid(axes, most_blocks):
    x = normal(7, 3, 5)
    node = reduction("reduce_sum", (N, 3, 5), axes)
    (out,) = run_node(node, [x], {"N": 7}, most_blocks=most_blocks)
    (reference,) = run_node(node, [x], {"N": 7})
    np.testing.assert_array_equal(out, reference)
    np.testing.assert_allclose(out, x.sum(axis=axes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [N, 700])
def test_long_reductions_go_in_two_kernels(size, monkeypatch):
    monkeypatch.setattr(reduce, "CHUNK", 64)
    node, target = reduction("reduce_sum", (size, 3), (0,)), replace(simulator_target(), num_sms=4)
    assert len(families.lower(node, target)) == 2
    x = np.full((700, 3), 0.1, np.float32)
    (out,) = run_node(node, [x], {"N": 700}, target=target)
    np.testing.assert_allclose(out, x.astype(np.float64).sum(0), rtol=1e-7)


def test_long_sums_keep_their_digits():
    x = np.full((1, 800), 0.1, np.float32)
    x[0, 0] = 1e6
    (out,) = run_node(reduction("reduce_sum", (1, N), (1,)), [x], {"N": 800}, most_blocks=1)
    wanted = x.astype(np.float64).sum()
    assert abs(out[0] - wanted) <= np.spacing(np.float32(wanted))
    assert abs(np.cumsum(x)[-1] - wanted) > 5 * np.spacing(np.float32(wanted))  # what plain additions give


def test_infinite_sums_stay_infinite():
    x = np.full((1, 600), np.inf, np.float32)
    np.testing.assert_array_equal(run_node(reduction("reduce_sum", (1, N), (1,)), [x], {"N": 600})[0], [np.inf])


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_positions_of_ties_and_nan(name):
    x = np.array([[2, 1, 2, 1, 2, 1], [1, np.nan, 3, np.nan, 0, 0], [-np.inf] * 6, [np.inf] * 6], np.float32)
    (out,) = run_node(reduction(name, (N, 6), (1,)), [x], {"N": 4})
    np.testing.assert_array_equal(out, getattr(np, name)(x, axis=1))


def test_a_reduction_takes_its_prologue_and_epilogue():
    node = fused(
        lambda x, b: ops.tanh(ops.add(ops.reduce_sum(ops.mul(x, x), axes=1), b)),
        TensorType((N, 9), "float32"),
        TensorType((N,), "float32"),
    )
    x, b = normal(5, 9), normal(5, seed=1)
    (out,) = run_node(node, [x, b], {"N": 5})
    np.testing.assert_allclose(out, np.tanh((x * x).sum(1) + b), rtol=1e-6)


def test_large_tensors_have_wide_indices():
    small, large = (
        make_node(PRIMITIVES["neg"], [Value(TensorType((n,), "int8"))], {}) for n in ((1 << 31) - 1, 1 << 31)
    )
    sources = [render(families.lower(n, make_target((9, 0)))[0].spec, make_target((9, 0))) for n in (small, large)]
    assert "int64(cuda.blockIdx.x)" not in sources[0]
    assert "uint32(cuda.blockIdx.x)" not in sources[1]


def test_old_gpus_are_refused_and_new_ones_get_what_is_known():
    with pytest.raises(CompileError, match=r"7\.5"):
        make_target((7, 0))
    assert make_target((10, 3)).arch == "sm_100"
    assert make_target((9, 0), 4).num_sms == 4
