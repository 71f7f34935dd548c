"""Attention and its gradient on tensor cores, in the simulator: lengths that fill no tile, masks, parts of values,
several warps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph.codegen.compiler import render
from kgraph.codegen.cuda import attention, attention_gradient, families
from kgraph.codegen.cuda.attention_tiles import Tile
from kgraph.codegen.cuda.mma import INSTRUCTIONS
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.codegen.cuda.tensor_cores import GAP
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.attention import ATTENTION
from kgraph.ops.attention_gradient import ATTENTION_GRADIENT
from tests.codegen.contractions import filled
from tests.cuda.driver import ON_GPU, run_node
from tests.cuda.test_attention import check
from tests.cuda.test_tensor_cores import instructions, rounded

N = Dim.symbol("N")
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3}
HALF = pytest.mark.parametrize("dtype", TOLERANCES)
pytestmark = pytest.mark.skipif(ON_GPU, reason="tiles are the simulator's")


def agree(dtype, q, k, depth, primitive=ATTENTION, **options):
    return check(primitive, q, k, depth, dtype=dtype, tolerance=TOLERANCES[dtype], **options)


def node_of(dtype, *shapes, is_causal=False, primitive=ATTENTION):
    attrs = {"scale": 0.4, "is_causal": is_causal, "has_mask": False, "has_bias": False}
    return make_node(primitive, [Value(TensorType(s, dtype)) for s in shapes], attrs)


# In the simulator a tile has 16 queries, 16 keys and 16 columns of values, and panels are 16 deep.
@HALF
@pytest.mark.parametrize(
    ("q", "k", "depth"),
    [((1, 16, 1, 16), (1, 16, 1, 16), 16), ((1, 1, 1, 1), (1, 17, 1, 1), 1), ((2, 19, 2, 5), (2, 33, 1, 5), 18)],
)
def test_lengths_that_fill_no_tile_and_parts_of_values(dtype, q, k, depth):
    assert instructions(node_of(dtype, q, k, (*k[:3], depth))) == [f"mma_{dtype}"]
    agree(dtype, q, k, depth)


@HALF
def test_masks_and_a_bias(dtype):
    mask = np.random.default_rng(0).random((1, 2, 17, 21)) < 0.5
    mask[0, 0, 3] = False  # a row that weighs all keys alike
    for is_causal in (False, True):
        agree(dtype, (1, 17, 2, 3), (1, 21, 2, 3), 4, mask=mask, bias=(2, 1, 21), is_causal=is_causal)
    agree(dtype, (1, 21, 1, 3), (1, 17, 1, 3), 4, is_causal=True)


def test_unknown_lengths_and_the_grid():
    shapes = (1, N, 2, 7), (1, N, 1, 7), 7
    for size in (1, 20):
        once, more = (
            agree("float16", *shapes, is_causal=True, sizes={"N": size}, most_blocks=blocks)[0] for blocks in (1, 3)
        )
        np.testing.assert_array_equal(once, more)


def test_empty_batches_and_no_keys():
    agree("float16", (0, 3, 2, 4), (0, 5, 2, 4), 4)
    shapes = (1, 2, 1, 2), (1, 0, 1, 2), (1, 0, 1, 2)
    (result,) = run_node(node_of("float16", *shapes), [filled(s, "float16") for s in shapes])
    assert not result.any()


def test_large_logits_do_not_overflow():
    (result,) = agree("bfloat16", (1, 3, 1, 2), (1, 20, 1, 2), 2, bias=(1, 1, 20))
    assert np.isfinite(result).all()
    q, k, v = (np.full((1, n, 1, 2), x, "float16") for n, x in ((3, 240), (20, 240), (20, 2)))
    (result,) = run_node(node_of("float16", q.shape, k.shape, v.shape), [q, k, v])  # products beyond float16
    np.testing.assert_array_equal(result, np.full((1, 3, 1, 2), 2))


@HALF
@pytest.mark.parametrize("tile", [Tile(64, 32, 16, 32, GAP), Tile(32, 16, 16, 32, GAP)])
def test_tiles_of_several_warps_and_of_several_chunks(monkeypatch, tile, dtype):
    """Two warps side by side with weights of two chunks, and one with twice as many columns."""
    monkeypatch.setattr(attention, "choose_tile", lambda *_, **__: tile)
    agree(dtype, (1, 33, 1, 18), (1, 41, 1, 18), 18, is_causal=True)


@HALF
@pytest.mark.parametrize(("q", "k", "depth"), [((1, 16, 1, 16), (1, 16, 1, 16), 16), ((1, 1, 1, 1), (1, 17, 1, 1), 1)])
def test_gradients_of_lengths_that_fill_no_tile(dtype, q, k, depth):
    shapes = q, k, (*k[:3], depth), (*q[:3], depth)
    assert instructions(node_of(dtype, *shapes, primitive=ATTENTION_GRADIENT)) == [f"mma_{dtype}"] * 3
    agree(dtype, q, k, depth, ATTENTION_GRADIENT)


def test_gradients_of_grouped_heads_in_parts():
    once, more = (
        agree("float16", (1, 17, 2, 5), (1, 18, 1, 5), 18, ATTENTION_GRADIENT, is_causal=True, most_blocks=blocks)
        for blocks in (1, 3)
    )
    for first, second in zip(once, more, strict=True):
        np.testing.assert_array_equal(first, second)


def test_gradients_with_a_mask_and_a_bias():
    mask = np.random.default_rng(0).random((1, 1, 17, 21)) < 0.5
    mask[0, 0, 3] = False
    agree("bfloat16", (1, 17, 1, 5), (1, 21, 1, 5), 4, ATTENTION_GRADIENT, mask=mask, bias=(1, 17, 21))


def test_gradients_of_empty_batches():
    agree("float16", (0, 3, 2, 4), (0, 5, 2, 4), 4, ATTENTION_GRADIENT)


def test_gradients_by_several_warps(monkeypatch):
    monkeypatch.setattr(attention_gradient, "choose_tile", lambda *_, **__: Tile(64, 32, 16, 32, GAP))
    agree("float16", (1, 33, 1, 18), (1, 9, 1, 18), 3, ATTENTION_GRADIENT)


def test_turing_multiplies_float16_eight_deep():
    turing = replace(simulator_target(), capability=(7, 5))
    shapes = (1, 17, 1, 5), (1, 18, 1, 5), (1, 18, 1, 3)
    assert instructions(node_of("float16", *shapes), turing) == ["mma_float16_short"]
    agree("float16", *shapes[:2], 3, target=turing)
    assert instructions(node_of("bfloat16", *shapes), turing) == []


def test_float32_is_rounded_where_that_is_allowed():
    shapes = (1, 19, 2, 9), (1, 21, 2, 9), (1, 21, 2, 5)
    node, target = node_of("float32", *shapes, is_causal=True), replace(simulator_target(), tf32=True)
    assert instructions(node) == []
    assert instructions(node, target) == ["mma_tfloat32"]
    arrays = [filled(s, "float32", n) for n, s in enumerate(shapes)]
    (result,) = run_node(node, arrays, target=target)
    expected = ATTENTION.reference(*map(rounded, arrays), **node.attrs)
    scale = np.abs(expected).max()
    assert np.abs(result - expected).max() < 5e-4 * scale  # weights are rounded too
    exact = ATTENTION.reference(*(a.astype(np.float64) for a in arrays), **node.attrs)
    assert np.abs(result - exact).max() > 2e-5 * scale


def test_gradients_of_float32_are_rounded_where_that_is_allowed():
    shapes = (1, 17, 1, 5), (1, 3, 1, 5), (1, 3, 1, 4), (1, 17, 1, 4)
    node, target = node_of("float32", *shapes, primitive=ATTENTION_GRADIENT), replace(simulator_target(), tf32=True)
    assert instructions(node) == []
    assert instructions(node, target) == ["mma_tfloat32"] * 3
    check(ATTENTION_GRADIENT, *shapes[:2], 4, tolerance=2e-3, target=target)


@pytest.mark.parametrize("depth", [32, 64, 80, 256, N])
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_tiles_of_a_gpu_are_made_of_products(instruction, depth):
    """Rendering checks them."""
    turing, tf32 = instruction == "mma_float16_short", instruction == "mma_tfloat32"
    target = replace(make_target((7, 5) if turing else (9, 0)), tf32=tf32)
    dtype, shape = "float32" if tf32 else instruction.split("_")[1], (1, N, 2, depth)
    nodes = [node_of(dtype, *[shape] * 3), node_of(dtype, *[shape] * 4, primitive=ATTENTION_GRADIENT)]
    calls = [call for node in nodes if families.accepts(node) is None for call in families.lower(node, target)]
    assert len(calls) == (1 if depth == N else 4)
    for call in calls:
        assert instruction in render(call.spec, target)
