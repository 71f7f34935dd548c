"""Attention and its gradient on CUDA beyond the records' samples: tiles, parts of values, symbolic sizes, grids."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.attention import ATTENTION
from kgraph.ops.attention_gradient import ATTENTION_GRADIENT
from tests.codegen.contractions import filled
from tests.cuda.driver import run_node

N = Dim.symbol("N")


def check(primitive, q, k, depth, *, dtype="float32", mask=None, bias=None, is_causal=False, tolerance=2e-5, **options):
    """Runs a node on operands of shapes q and k (values have `depth` columns) and compares it with its reference."""
    sizes = options.get("sizes") or {}
    shapes = [q, k, (*k[:3], depth), *([] if bias is None else [bias])]
    if primitive is ATTENTION_GRADIENT:
        shapes.append((*q[:3], depth))
    types = [TensorType(tuple(s), dtype) for s in shapes]
    concrete = lambda shape: [n.evaluate(sizes) if isinstance(n, Dim) else n for n in shape]
    arrays = [filled(concrete(s), dtype, n) for n, s in enumerate(shapes)]
    if mask is not None:
        types.insert(3, TensorType(mask.shape, "bool"))
        arrays.insert(3, mask)
    attrs = {"scale": 0.4, "is_causal": is_causal, "has_mask": mask is not None, "has_bias": bias is not None}
    results = run_node(make_node(primitive, [Value(t) for t in types], attrs), arrays, **options)
    wide = [a if a.dtype == bool else a.astype(np.float64) for a in arrays]
    wanted = primitive.reference(*wide, **attrs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for result, expected in zip(results, wanted, strict=True):
        assert result.shape == expected.shape
        scale = np.abs(expected).max(initial=1e-30)
        assert np.abs(result.astype(np.float64) - expected).max(initial=0) <= tolerance * scale
    return results


# In the simulator a tile has four queries, four keys and four columns of values.
@pytest.mark.parametrize(("queries", "keys", "depth"), [(4, 4, 4), (5, 9, 3), (1, 6, 6), (6, 1, 9)])
def test_tiles_and_parts_of_them(queries, keys, depth):
    check(ATTENTION, (1, queries, 1, 3), (1, keys, 1, 3), depth)


@pytest.mark.parametrize("size", [1, 6])
def test_symbolic_sizes(size):
    check(ATTENTION, (1, N, 1, 2), (1, N, 1, 2), 2, is_causal=True, sizes={"N": size})


def test_no_keys_give_zeros():
    (result,) = run_node(
        make_node(
            ATTENTION,
            [Value(TensorType(s, "float32")) for s in ((1, 2, 1, 2), (1, 0, 1, 2), (1, 0, 1, 2))],
            {"scale": 1.0, "is_causal": False, "has_mask": False, "has_bias": False},
        ),
        [filled(s, "float32") for s in ((1, 2, 1, 2), (1, 0, 1, 2), (1, 0, 1, 2))],
    )
    assert not result.any()


def test_large_logits_do_not_overflow():
    (result,) = check(ATTENTION, (1, 3, 1, 2), (1, 6, 1, 2), 2, bias=(1, 1, 6))
    assert np.isfinite(result).all()


def test_causal_masks_keep_rows_without_keys():
    mask = np.array([True, False, False, False, True, True])
    mask[0] = False
    check(ATTENTION, (1, 6, 1, 2), (1, 6, 1, 2), 2, mask=mask, is_causal=True)


@pytest.mark.parametrize("primitive", [ATTENTION, ATTENTION_GRADIENT], ids=lambda p: p.name)
def test_float64_and_the_grid(primitive):
    shapes = (1, 5, 2, 2), (1, 5, 1, 2), 2
    once = check(primitive, *shapes, dtype="float64", is_causal=True, tolerance=1e-12, most_blocks=1)
    more = check(primitive, *shapes, dtype="float64", is_causal=True, tolerance=1e-12, most_blocks=3)
    for first, second in zip(once, more, strict=True):
        np.testing.assert_array_equal(first, second)


def test_gradients_of_deep_values_come_in_parts():
    check(ATTENTION_GRADIENT, (1, 5, 1, 5), (1, 3, 1, 5), 2)


def test_gradients_of_a_bias_cover_every_logit():
    mask = np.array([[True, False, True, True, False, True]])
    check(ATTENTION_GRADIENT, (1, 3, 1, 2), (1, 6, 1, 2), 2, mask=mask, bias=(3, 6), is_causal=True)
