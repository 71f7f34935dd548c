"""Elementwise kernels against the references, over shapes, broadcasts and dtypes."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kgraph import ops
from kgraph.codegen.cpu import loop
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value, make_node, type_of
from kgraph.ops.region_gradient import record_region
from tests.codegen.driver import Bound, aligned_empty, host_target, render, run_node
from tests.codegen.samples import check_sample

ELEMENTWISE = sorted(n for n, p in PRIMITIVES.items() if "elementwise" in p.traits or n in ("iota", "full"))


def _is_complex(array) -> bool:
    return array.dtype.kind == "c"


def samples(name: str) -> list:
    """A primitive's samples that a native kernel is meant for: no complex numbers, no change of the element count."""
    primitive = PRIMITIVES[name]
    out = []
    for sample in primitive.samples():
        types = [type_of(a) for a in sample.args]
        result = primitive.infer(*types, **sample.attrs)
        complex_result = result.dtype.startswith("complex") or "complex" in str(sample.attrs.get("dtype"))
        if complex_result or any(map(_is_complex, sample.args)):
            continue
        if name == "bitcast_convert" and types[0].itemsize != result.itemsize:
            continue
        out.append(sample)
    return out


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_primitive(name):
    for sample in samples(name):
        check_sample(loop, PRIMITIVES[name], sample, parts=2)


def fused(build, *arrays, kind="loop"):
    """A fused node over operands of the arrays' types."""
    body = record_region(kind, [type_of(a) for a in arrays], build)
    return make_node(PRIMITIVES["fusion"], [Value(type_of(a)) for a in arrays], {"kind": kind, "body": body})


def normal(*shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


SHAPES = [
    ((3, 5), (5,)),
    ((1000, 24), (24,)),
    ((50, 3), (3,)),
    ((700, 16), (16,)),
    ((5, 7, 9), (5, 1, 9)),
    ((5, 7, 9), (7, 1)),
    ((4, 1, 6), (3, 1)),
    ((2, 9000), (2, 1)),
    ((3, 10000), (10000,)),
    ((0, 3), (3,)),
    ((), ()),
    ((7, 1, 2), (1, 33, 1)),
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_broadcasting(a, b, parts):
    x, y = normal(*a), normal(*b, seed=1)
    node = fused(lambda x, y: [s := ops.add(x, y), ops.mul(s, x)], x, y)
    for result, wanted in zip(run_node(loop.lower, node, [x, y], parts=parts), (x + y, (x + y) * x)):
        np.testing.assert_array_equal(result, wanted)
        assert result.shape == wanted.shape


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_broadcast(data):
    rank = data.draw(st.integers(0, 4))
    shape = data.draw(st.lists(st.integers(0, 9), min_size=rank, max_size=rank))
    operands = []
    for seed in range(3):
        mine = [data.draw(st.sampled_from([1, s])) for s in shape]
        operands.append(normal(*mine[data.draw(st.integers(0, rank)) :], seed=seed))
    x, y, z = operands
    node = fused(lambda x, y, z: [ops.mul(ops.add(x, y), z)], x, y, z)
    (result,) = run_node(loop.lower, node, operands, parts=data.draw(st.integers(1, 4)))
    np.testing.assert_array_equal(result, (x + y) * z)


def test_coordinates_masks_and_conversions():
    x = normal(6, 5, 40)
    value = Value(type_of(x))
    body = Graph([value])
    add = lambda name, *inputs, **attrs: body.add(PRIMITIVES[name], inputs, **attrs)
    row = add("iota", shape=(5, 40), dtype="int32", axis=0)
    column = add("iota", shape=(40,), dtype="int32", axis=0)
    low = add("broadcast_to", add("full", shape=(), value=-1e9, dtype="float32"), shape=(6, 5, 40))
    zero = add("full", shape=(1,), value=0.0, dtype="float32")
    masked = add("select", add("ge", row, column), value, low)
    body.outputs = [masked, add("convert", add("gt", value, zero), dtype="int8")]
    node = make_node(PRIMITIVES["fusion"], [Value(type_of(x))], {"kind": "loop", "body": body})
    masked, positive = run_node(loop.lower, node, [x], parts=2)
    np.testing.assert_array_equal(masked, np.where(np.arange(5)[:, None] >= np.arange(40), x, np.float32(-1e9)))
    np.testing.assert_array_equal(positive, (x > 0).astype(np.int8))


def test_symbolic_sizes_share_one_kernel():
    n = Dim.symbol("N")
    x, y = (Value(TensorType(s, "float32")) for s in [(n, 2 * n, 5), (2 * n, 1)])
    node = make_node(PRIMITIVES["add"], [x, y], {})
    for size in (1, 3, 8):
        a, b = normal(size, 2 * size, 5), normal(2 * size, 1, seed=1)
        (result,) = run_node(loop.lower, node, [a, b], {"N": size})
        np.testing.assert_array_equal(result, a + b)
    (call,) = loop.lower(node, host_target())
    other = make_node(PRIMITIVES["add"], [Value(TensorType(s, "float32")) for s in [(n, 7, 5), (7, 1)]], {})
    assert loop.lower(other, host_target())[0].spec == call.spec


def test_scalar_constants_move_into_the_code():
    x = Value(TensorType((7,), "float32"))
    two = make_node(PRIMITIVES["constant"], [], {"value": np.float32(2)}).output
    (call,) = loop.lower(make_node(PRIMITIVES["pow"], [x, two], {}), host_target())
    assert len(call.operands) == 2
    data = normal(7)
    bound = Bound([call], {x: data})
    bound.run()
    np.testing.assert_array_equal(bound.buffers[call.operands[-1]], data * data)


def test_negative_zero_is_no_zero():
    x = np.full(5, -0.0, np.float32)
    build = lambda x: [ops.add(x, np.float32(0.0)), ops.add(x, np.float32(-0.0)), ops.maximum(x, np.float32(np.nan))]
    plus, minus, nan = run_node(loop.lower, fused(build, x), [x])
    assert not np.signbit(plus).any()
    assert np.signbit(minus).all()
    assert np.isnan(nan).all()


def test_output_may_overwrite_an_operand():
    x, y = normal(33, 65), normal(65, seed=1)
    node = fused(lambda x, y: [ops.exp(ops.add(x, y))], x, y)
    (call,) = loop.lower(node, host_target())
    ((out, operand),) = call.notes["inplace"]
    assert call.operands[out] is node.outputs[0]
    assert call.operands[operand] is node.inputs[0]
    (wanted,) = run_node(loop.lower, node, [x, y])
    bound = Bound([call], {node.inputs[0]: x, node.inputs[1]: y})
    _, pointers, *_ = bound.steps[0]
    target = x.copy()
    pointers[operand] = pointers[out] = target.ctypes.data
    bound.run(parts=3)
    np.testing.assert_array_equal(target, wanted)


def test_each_output_may_overwrite_an_operand_of_the_other():
    x, y = normal(9, 70), normal(9, 70, seed=1)
    node = fused(lambda x, y: [ops.add(y, np.float32(1)), ops.mul(x, np.float32(2))], x, y)
    (call,) = loop.lower(node, host_target())
    assert set(call.notes["inplace"]) == {(2, 0), (2, 1), (3, 0), (3, 1)}
    bound = Bound([call], {node.inputs[0]: x, node.inputs[1]: y})
    _, pointers, *_ = bound.steps[0]
    a, b = x.copy(), y.copy()
    # The first output lies over x, which only the second one reads, and the other way round.
    pointers[:] = [a.ctypes.data, b.ctypes.data, a.ctypes.data, b.ctypes.data]
    bound.run(parts=2)
    np.testing.assert_array_equal(a, y + 1)
    np.testing.assert_array_equal(b, x * 2)


def test_refusals_name_the_reason():
    x = normal(3, 4)
    node = fused(lambda x: [ops.add(ops.transpose(x, permutation=(1, 0)), np.float32(1))], x)
    assert "transpose" in loop.accepts(node)
    node = make_node(PRIMITIVES["neg"], [Value(TensorType((3,), "complex64"))], {})
    assert "complex64" in loop.accepts(node)


STREAMED = [
    ((4001,), (4001,)),
    ((90, 24), (24,)),
    ((7, 90, 96), (96,)),
    ((40, 11, 160), (11, 1)),
    ((5, 8192), (5, 1)),
]


@pytest.mark.parametrize(("shape", "other"), STREAMED)
@pytest.mark.parametrize("offset", [0, 4])
def test_results_written_past_the_caches(shape, other, offset):
    target = dataclasses.replace(host_target(), l3_bytes=4096)
    x, y = normal(*shape), normal(*other, seed=1)
    node = fused(lambda x, y: [ops.add(ops.mul(x, y), y), ops.gt(x, y)], x, y)
    (call,) = loop.lower(node, target)
    assert call.spec.template.endswith("_streaming")
    assert "!nontemporal" in render(call.spec, target)
    bound = Bound([call], dict(zip(node.inputs, (x, y), strict=True)), target=target)
    out = node.outputs[0]
    placed = aligned_empty(bound.buffers[out].nbytes, offset).view(np.float32).reshape(shape)
    _, pointers, *_ = bound.steps[0]
    pointers[2] = placed.ctypes.data
    bound.run(3)
    np.testing.assert_allclose(placed, x * y + y, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(bound.buffers[node.outputs[1]], x > y)
    bound.run(1)
    again = placed.copy()
    pointers[2] = pointers[0]  # over the operand
    bound.run(2)
    np.testing.assert_array_equal(x, again)


def test_small_results_go_through_the_caches():
    target = dataclasses.replace(host_target(), l3_bytes=1 << 20)
    rows = Dim.symbol("N")
    kinds = []
    for shape in ((1000, 100), (1000, 1000), (rows, 3), (rows, 64, 64)):
        node = make_node(PRIMITIVES["relu"], [Value(TensorType(shape, "float32"))], {})
        kinds.append(loop.lower(node, target)[0].spec.template.rpartition(":")[2])
    assert kinds == ["render_flat", "render_flat_streaming", "render_flat", "render_flat_streaming"]
