"""Matrix products on CUDA: layouts, dtypes, symbolic sizes, epilogues, long sums in pieces."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.codegen.cuda import families, gemm
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.contraction import DOT_GENERAL
from tests.codegen.contractions import add, filled, fused, verify
from tests.cuda.driver import run_node

N = Dim.symbol("N")
PLAIN = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}


def product_node(lhs, rhs, attrs=PLAIN, dtype="float32", extras=(), epilogue=None):
    node = make_node(DOT_GENERAL, [Value(TensorType(lhs, dtype)), Value(TensorType(rhs, dtype))], attrs)
    return node if epilogue is None else fused(node, list(extras), epilogue, "dot")


def check(node, sizes=None, most_blocks=2):
    """Runs a node on made-up operands and compares with float64; gives the results."""
    sizes = sizes or {}
    shapes = [[n.evaluate(sizes) if isinstance(n, Dim) else n for n in v.shape] for v in node.inputs]
    arrays = [filled(shape, v.dtype, seed) for seed, (shape, v) in enumerate(zip(shapes, node.inputs))]
    results = run_node(node, arrays, sizes, most_blocks=most_blocks)
    verify(node, arrays, results, sizes)
    return results


@pytest.mark.parametrize("lhs_contract", [0, 1])
@pytest.mark.parametrize("rhs_contract", [0, 1])
def test_both_orders_of_both_operands(lhs_contract, rhs_contract):
    attrs = {**PLAIN, "lhs_contract": (lhs_contract,), "rhs_contract": (rhs_contract,)}
    check(product_node(((5, 7), (7, 5))[lhs_contract], ((5, 6), (6, 5))[rhs_contract], attrs))


def test_axes_that_do_not_collapse():
    attrs = {"lhs_contract": (3, 1), "rhs_contract": (0, 2), "lhs_batch": (0,), "rhs_batch": (3,)}
    check(product_node((2, 3, 2, 4), (4, 3, 3, 2), attrs))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64", "uint32", "int8"])
def test_dtypes(dtype):
    check(product_node((5, 6), (6, 5), dtype=dtype))


@pytest.mark.parametrize("into", ["int32", "float32"])
def test_narrow_integers_are_summed_widely(into):
    check(product_node((3, 40), (40, 3), {**PLAIN, "preferred_dtype": into}, "int8"))


@pytest.mark.parametrize("sizes", [{"N": 1}, {"N": 6}])
def test_symbolic_sizes_serve_every_size(sizes):
    check(product_node((N, 5), (5, 3)), sizes)
    check(product_node((3, N), (N, 5)), sizes)


def test_nothing_to_sum_and_nothing_to_store():
    (result,) = check(product_node((3, 0), (0, 5)))
    assert not result.any()
    check(product_node((0, 4), (4, 5)))


def dense(graph, result, bias, residual):
    """Two results, with all kinds of operands but rows."""
    shifted = add(graph, "add", result, bias)
    return [add(graph, "add", add(graph, "gelu", shifted, approximate=True), residual), shifted]


@pytest.mark.parametrize("depth", [3, 40])
def test_an_epilogue_of_several_outputs(depth):
    extras = [TensorType((6,), "float32"), TensorType((5, 6), "float32")]
    check(product_node((5, depth), (depth, 6), extras=extras, epilogue=dense))


@pytest.mark.parametrize("shape", [(2, 3, 1), (), (4,), (2, 3, 4)])
@pytest.mark.parametrize("depth", [3, 24])
def test_every_kind_of_epilogue_operand(shape, depth):
    attrs = {"lhs_contract": (2,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    scale = lambda graph, result, x: [add(graph, "mul", result, x)]
    check(product_node((2, 3, depth), (depth, 4), attrs, extras=[TensorType(shape, "float32")], epilogue=scale))


def test_long_sums_are_cut_into_pieces():
    node = product_node((3, 37), (37, 4))
    calls = gemm.lower(node, simulator_target())
    assert [c.spec.name for c in calls] == ["gemm_partial", "reduce_sum"]
    once, twice = check(node, most_blocks=1), check(node, most_blocks=2)
    np.testing.assert_array_equal(once[0], twice[0])


def test_pieces_that_a_short_symbolic_sum_leaves_empty():
    for size in (1, 9, 30):
        check(product_node((3, N), (N, 4)), {"N": size})


def test_results_do_not_depend_on_the_grid():
    node = product_node((9, 5), (5, 9))
    np.testing.assert_array_equal(check(node, most_blocks=1)[0], check(node, most_blocks=7)[0])


def test_tiles_follow_the_shape():
    target = make_target((9, 0))

    def tile(lhs, rhs):
        parts = gemm.take_apart(product_node(lhs, rhs), "dot_general")
        return gemm.choose_tile(gemm.product_of(parts), "float32", target)

    assert tile((4096, 512), (512, 4096)) == gemm.LARGE
    assert tile((N, 512), (512, 1024)) == gemm.LARGE
    assert tile((256, 512), (512, 256)) == gemm.MIDDLE
    assert tile((1, 512), (512, 4096)) == gemm.FLAT
    assert tile((N, 512), (512, 10)) == gemm.TALL


def test_packed_weights_are_refused():
    node = product_node((3, 4), (4, 5), epilogue=lambda graph, result: [result])
    node.attrs["packed"] = ((1, "panels"),)
    assert "packed" in families.accepts(node)
