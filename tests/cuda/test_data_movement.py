"""Copies between layouts on CUDA: tiles, odd sizes, several axes, every width of elements, symbolic sizes."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import simulator_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node, type_of
from tests.cuda.driver import run_node


def node_of(name: str, arrays, shapes=None, **attrs):
    """A node on values of the arrays' types; shapes: symbolic ones of them."""
    types = [type_of(np.asarray(a)) for a in arrays]
    if shapes:
        types = [TensorType(shape, t.dtype) for shape, t in zip(shapes, types, strict=True)]
    return make_node(PRIMITIVES[name], [Value(t) for t in types], attrs)


def numbers(shape, dtype="float32"):
    return np.arange(np.prod(shape), dtype="int64").reshape(shape).astype(dtype)


def templates(node) -> list[str]:
    return [call.spec.template.rpartition(".")[2] for call in families.lower(node, simulator_target())]


TILED = [
    ((9, 10), (1, 0)),
    ((2, 11, 9), (0, 2, 1)),
    ((9, 3, 12), (2, 1, 0)),
    ((3, 2, 9, 10), (1, 3, 0, 2)),
    ((9, 2, 12), (2, 0, 1)),
]


@pytest.mark.parametrize(("shape", "permutation"), TILED)
def test_transposes_of_long_axes_go_through_tiles(shape, permutation):
    x = numbers(shape)
    node = node_of("transpose", [x], permutation=permutation)
    assert templates(node) == ["transpose:render"]
    np.testing.assert_array_equal(run_node(node, [x])[0], x.transpose(permutation))


@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "float64"])
def test_tiles_hold_elements_of_any_width(dtype):
    x = (numbers((10, 13)) % 2 if dtype == "bool" else numbers((10, 13))).astype(dtype)
    (out,) = run_node(node_of("transpose", [x], permutation=(1, 0)), [x])
    np.testing.assert_array_equal(out, x.T)


def test_transposes_of_short_axes_are_copied_without_tiles():
    x = numbers((2, 10, 3))
    node = node_of("transpose", [x], permutation=(0, 2, 1))
    assert templates(node) == ["data_movement:render"]
    np.testing.assert_array_equal(run_node(node, [x])[0], x.transpose(0, 2, 1))


def test_tiles_of_symbolic_sizes():
    n, x = Dim.symbol("n"), numbers((5, 10))
    node = node_of("transpose", [x], [(n, 10)], permutation=(1, 0))
    assert templates(node) == ["transpose:render"]
    np.testing.assert_array_equal(run_node(node, [x], {"n": 5})[0], x.T)


@pytest.mark.parametrize("most_blocks", [1, 3])
def test_grids_of_any_size_make_the_same_transpose(most_blocks):
    x = numbers((3, 9, 10))
    (out,) = run_node(node_of("transpose", [x], permutation=(2, 1, 0)), [x], most_blocks=most_blocks)
    np.testing.assert_array_equal(out, x.T)


def test_nan_payloads_survive_a_copy():
    bits = np.array([[0x7FC01234, 0xFF800001], [0x80000000, 1]], "uint32")
    (out,) = run_node(node_of("rev", [bits.view("float32")], axes=(1,)), [bits.view("float32")])
    np.testing.assert_array_equal(out.view("uint32"), bits[:, ::-1])


def test_symbolic_slices_and_reversals():
    n, x = Dim.symbol("n"), numbers((6, 4))
    node = node_of("slice", [x], [(n, 4)], start=(1, 0), limit=(n, 4), stride=(1, 2))
    np.testing.assert_array_equal(run_node(node, [x], {"n": 6})[0], x[1:, ::2])
    node = node_of("rev", [x], [(n, 4)], axes=(0,))
    np.testing.assert_array_equal(run_node(node, [x], {"n": 6})[0], x[::-1])


def test_concatenates_of_symbolic_and_empty_pieces():
    n, xs = Dim.symbol("n"), [numbers((2, k, 3)) + 100 * k for k in (4, 0, 2)]
    node = node_of("concatenate", xs, [(2, n, 3), (2, 0, 3), (2, 2, 3)], axis=1)
    np.testing.assert_array_equal(run_node(node, xs, {"n": 4})[0], np.concatenate(xs, 1))


def test_negative_padding_crops():
    x = numbers((5, 6))
    value = np.array(9, "float32")
    node = node_of("pad", [x, value], low=(-1, 2), high=(2, -3), interior=(0, 0))
    (out,) = run_node(node, [x, value])
    np.testing.assert_array_equal(out, np.pad(x[1:, :3], ((0, 2), (2, 0)), constant_values=9))


def test_an_update_may_overwrite_its_operand():
    x, update, start = numbers((4, 3)), -numbers((2, 3)), np.array(1, "int32")
    node = node_of("dynamic_update_slice", [x, update, start, np.array(0, "int32")])
    (call,) = families.lower(node, simulator_target())
    ((output, operand),) = call.notes["inplace"]
    assert (call.operands[output], call.operands[operand]) == (node.output, node.inputs[0])
