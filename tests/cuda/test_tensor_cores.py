"""Products on tensor cores: fragments of warps against the tables of the PTX ISA, tiles of several warps, TF32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph.codegen.cuda import conv_filter, families, gemm, mma, tiles
from kgraph.codegen.cuda.mma import INSTRUCTIONS, instruction_for
from kgraph.codegen.cuda.target import CudaTarget, simulator_target
from kgraph.codegen.cuda.tiles import Tile
from kgraph.errors import CompileError
from kgraph.ir import Dim
from tests.codegen.contractions import filled, verify
from tests.cuda.driver import ON_GPU, run_node
from tests.cuda.test_conv import convolution, filter_gradient
from tests.cuda.test_gemm import PLAIN, product_node

N = Dim.symbol("N")
DTYPES = ("float16", "bfloat16")
pytestmark = pytest.mark.skipif(ON_GPU, reason="tiles are the simulator's")


def check(node, sizes=None, target=None):
    """Runs a node and compares with float64; gives the results."""
    sizes = sizes or {}
    shapes = [[n.evaluate(sizes) if isinstance(n, Dim) else n for n in v.shape] for v in node.inputs]
    arrays = [filled(shape, v.dtype, seed) for seed, (shape, v) in enumerate(zip(shapes, node.inputs))]
    results = run_node(node, arrays, sizes, target)
    verify(node, arrays, results, sizes)
    return results


def instructions(node, target=None) -> list[str]:
    """The instructions of the calls of a node."""
    calls = families.lower(node, target or simulator_target())
    return [p for call in calls for p in call.spec.params if isinstance(p, str) and p in INSTRUCTIONS]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_lanes_multiply_the_matrices_that_they_hold(name):
    """Words as kernels put them into registers, against a product of whole matrices."""
    instruction, rng = INSTRUCTIONS[name], np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (16, instruction.depth)), rng.integers(-9, 9, (instruction.depth, 8))
    c = rng.integers(-9, 9, (16, 8)).astype(np.float32)
    bits = {
        "mma_bfloat16": lambda x: (np.float32(x).view(np.uint32) >> 16).astype(np.uint16),
        "mma_tfloat32": lambda x: np.float32(x).view(np.uint32),
    }.get(name, lambda x: np.float16(x).view(np.uint16))
    count = len(instruction.a) + len(instruction.b)
    words = np.zeros(2 * 32 * count, np.uint32)  # of two warps
    for lane in range(32):
        group, member = divmod(lane, 4)
        own = member * instruction.packed
        parts = [a[group + r, own + d : own + d + instruction.packed] for r, d in instruction.a]
        parts += [b[own + d : own + d + instruction.packed, group] for d in instruction.b]
        packed = np.concatenate([bits(part) for part in parts]).view(np.uint32)
        words[(32 + lane) * count :][:count] = packed
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        places = [(group + r, 2 * member + n) for r in (0, 8) for n in (0, 1)]
        sums = mma.multiply_lanes(name, words, 32 + lane, tuple(c[p] for p in places))
        for place, value in zip(places, sums, strict=True):
            result[place] = value
    np.testing.assert_array_equal(result, a @ b + c)


def test_devices_have_what_their_capability_says():
    names = lambda *capability: [instruction_for(d, "float32", CudaTarget(capability)) for d in (*DTYPES, "float32")]
    assert names(7, 5) == ["mma_float16_short", "", ""]
    assert names(8, 0) == names(9, 0) == ["mma_float16", "mma_bfloat16", ""]
    rounded = CudaTarget((8, 0), tf32=True)
    assert instruction_for("float32", "float32", rounded) == "mma_tfloat32"
    assert instruction_for("float32", "float64", rounded) == ""
    assert instruction_for("float64", "float64", rounded) == instruction_for("int8", "int32", rounded) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lhs_contract", [0, 1])
@pytest.mark.parametrize("rhs_contract", [0, 1])
def test_both_orders_of_both_operands(dtype, lhs_contract, rhs_contract):
    attrs = {**PLAIN, "lhs_contract": (lhs_contract,), "rhs_contract": (rhs_contract,)}
    shapes = ((19, 17), (17, 19))[lhs_contract], ((19, 18), (18, 19))[rhs_contract]
    node = product_node(*shapes, attrs, dtype)
    assert instructions(node) == [f"mma_{dtype}"]
    check(node)


@pytest.mark.parametrize("tile", [Tile(32, 16, 16, 2, 4), Tile(16, 32, 16, 2, 4), Tile(32, 16, 32, 4, 2)])
def test_tiles_of_several_warps_and_of_several_products(monkeypatch, tile):
    """Two warps below each other, two side by side, and one with two rows of products, twice along the depth."""
    monkeypatch.setattr(gemm, "SIMULATED_TENSOR_TILE", tile)
    check(product_node((33, 40), (40, 17), dtype="float16"))
    check(product_node((20, N), (N, 40), dtype="bfloat16"), {"N": 7})


def test_long_sums_in_pieces_and_a_batch():
    node = product_node((3, 70), (70, 4), dtype="float16")
    assert [c.spec.name for c in gemm.lower(node, simulator_target())] == ["gemm_partial", "reduce_sum"]
    check(node)
    attrs = {"lhs_contract": (2,), "rhs_contract": (1,), "lhs_batch": (0,), "rhs_batch": (0,)}
    check(product_node((3, 5, 7), (3, 7, 6), attrs, "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions(dtype):
    for node in (
        convolution((1, 5, 4, 17), (3, 3, 17, 18), dtype, padding=1),
        convolution((2, 5, 5, 3), (3, 3, 3, 4), dtype, strides=2, padding=1),
        convolution((1, 3, 3, 4), (3, 3, 2, 6), dtype, lhs_dilation=2, padding=1, feature_groups=2),
    ):
        assert instructions(node) == [f"mma_{dtype}"]
        check(node)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cotangents_of_weights(dtype):
    node = filter_gradient((2, 5, 5, 3), 5, (3, 3), dtype, padding=1)
    assert instructions(node) == [f"mma_{dtype}"]
    check(node)


def test_turing_multiplies_float16_eight_deep():
    turing = replace(simulator_target(), capability=(7, 5))
    node = product_node((17, 19), (19, 18), dtype="float16")
    assert instructions(node, turing) == ["mma_float16_short"]
    check(node, target=turing)
    check(filter_gradient((1, 4, 4, 3), 5, (2, 2), "float16"), target=turing)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 with ten bits of mantissa, ties away from zero."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.trunc(mantissa * 2**11 + np.copysign(0.5, mantissa)) / 2**11, exponent)


@pytest.mark.parametrize(
    ("left", "right", "axes"), [((17, 19), (19, 18), ((1,), (0,))), ((19, 17), (18, 19), ((0,), (1,)))]
)
def test_float32_is_rounded_where_that_is_allowed(left, right, axes):
    node = product_node(left, right, {**PLAIN, "lhs_contract": axes[0], "rhs_contract": axes[1]})
    target = replace(simulator_target(), tf32=True)
    assert instructions(node) == []
    assert instructions(node, target) == ["mma_tfloat32"]
    a, b = filled(left, "float32"), filled(right, "float32", 1)
    (result,) = run_node(node, [a, b], target=target)
    expected = np.tensordot(rounded(a), rounded(b), axes)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    exact = np.tensordot(a.astype(np.float64), b, axes)
    assert np.abs(result - exact).max() > 1e-4


def test_rounding_to_tf32_keeps_what_is_not_finite():
    to_tfloat32 = mma.simulated_functions()["to_tfloat32"]
    values = np.float32([1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, np.finfo(np.float32).max, np.inf, -np.inf, np.nan])
    found = np.array([to_tfloat32(x) for x in values], np.uint32).view(np.float32)
    np.testing.assert_array_equal(found, np.float32([1, 1 + 2**-10, -1 - 2**-10, 1, np.inf, np.inf, -np.inf, np.nan]))


def test_tiles_that_are_not_made_of_products_are_refused(monkeypatch):
    monkeypatch.setattr(tiles, "SIMULATED_TENSOR_TILE", Tile(16, 12, 16, 2, 4))
    node = filter_gradient((1, 4, 4, 3), 5, (2, 2), "float16")
    with pytest.raises(CompileError, match="not made of products"):
        check(node)
    assert conv_filter.accepts(node) is None
