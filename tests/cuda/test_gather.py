"""Reads at run-time indices on CUDA: rules for indices out of range, every dtype of indices, symbolic sizes."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.ir import Dim
from kgraph.ops.indexing import TAKE
from tests.cuda.driver import run_node
from tests.cuda.test_data_movement import node_of, numbers


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_indices_of_any_integer_dtype(dtype):
    x, indices = numbers((7, 3)), np.array([6, 0, 3, 3, 9], dtype)
    (out,) = run_node(node_of("take", [x, indices], axis=0, mode="clip"), [x, indices])
    np.testing.assert_array_equal(out, x[[6, 0, 3, 3, 6]])


@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
@pytest.mark.parametrize("dtype", ["bool", "int16", "uint8", "float16", "float64"])
def test_modes_for_indices_out_of_range(mode, dtype):
    x = (numbers((2, 5)) % 3).astype(dtype)
    indices = np.array([[0, 4, -1, -5], [5, -6, 99, -99]], "int64")
    (out,) = run_node(node_of("take", [x, indices], axis=1, mode=mode), [x, indices])
    np.testing.assert_array_equal(out, TAKE.reference(x, indices, axis=1, mode=mode))


def test_symbolic_embedding():
    n, m = Dim.symbol("n"), Dim.symbol("m")
    table, tokens = numbers((9, 4)), np.array([[0, 8, 3], [2, 2, 1]], "int32")
    node = node_of("take", [table, tokens], [(9, 4), (n, m)], axis=0, mode="clip")
    np.testing.assert_array_equal(run_node(node, [table, tokens], {"n": 2, "m": 3})[0], table[tokens])


def test_an_empty_axis_gives_fill_values():
    x, indices = np.zeros((0, 2), "float32"), np.array([0, 1], "int32")
    (out,) = run_node(node_of("take", [x, indices], axis=0, mode="fill"), [x, indices])
    assert out.shape == (2, 2)
    assert np.isnan(out).all()


def test_tuples_are_clamped_one_by_one():
    x, indices = numbers((4, 5, 2)), np.array([[1, -1], [9, -9], [-4, 4]], "int32")
    (out,) = run_node(node_of("gather_nd", [x, indices]), [x, indices])
    np.testing.assert_array_equal(out, x[[1, 3, 0], [4, 0, 4]])
