"""Loops, branches and fused regions against Python's own, and derivatives through them."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, GradientError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, type_of
from kgraph.ir.interpreter import evaluate
from kgraph.ops.region_gradient import record_region

RNG = np.random.default_rng(0)
N = Dim.symbol("N")
COUNTER = TensorType((), "int32")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# -- while_loop -------------------------------------------------------------------------------------------------------


def halving(limit):
    """Halve x as long as it exceeds the limit; count the steps."""
    types = [COUNTER, TensorType((), "float32")]
    condition = record_region("condition", types, lambda i, x: [ops.gt(x, np.float32(limit))])
    body = record_region("body", types, lambda i, x: [ops.add(i, np.int32(1)), ops.mul(x, np.float32(0.5))])
    return {"cond": condition, "body": body}


def test_while_loop_runs_until_its_condition_fails():
    count, x = ops.while_loop(np.int32(0), np.float32(100), **halving(1))
    assert (count, x) == (7, np.float32(100 / 128))
    count, x = ops.while_loop(np.int32(0), np.float32(0.5), **halving(1))
    assert (count, x) == (0, np.float32(0.5))


def test_while_loop_checks_its_graphs():
    attrs = halving(1)
    with pytest.raises(DTypeError, match=r"while_loop.*got f32\[\]"):
        ops.while_loop(np.float32(0), np.float32(1), **attrs)
    with pytest.raises(ShapeError, match="while_loop"):
        ops.while_loop(np.int32(0), np.ones(3, np.float32), **attrs)
    counter = record_region("condition", [COUNTER, TensorType((), "float32")], lambda i, x: [i])
    with pytest.raises(DTypeError, match="bool scalar"):
        ops.while_loop(np.int32(0), np.float32(1), cond=counter, body=attrs["body"])
    changed = record_region("body", [COUNTER, TensorType((), "float32")], lambda i, x: [x, x])
    with pytest.raises(ShapeError, match="must have one type"):
        ops.while_loop(np.int32(0), np.float32(1), cond=attrs["cond"], body=changed)


# -- cond -------------------------------------------------------------------------------------------------------------


def branches(count, shape=(3,)):
    """Branch i multiplies by i."""
    build = lambda i: record_region(f"b{i}", [TensorType(shape, "float32")], lambda x: [ops.mul(x, np.float32(i))])
    return tuple(map(build, range(count)))


@pytest.mark.parametrize(("index", "taken"), [(0, 0), (1, 1), (2, 2), (-1, 0), (9, 2)])
def test_cond_takes_the_branch_of_the_clamped_index(index, taken):
    x = normal(3)
    (got,) = ops.cond(np.int32(index), x, branches=branches(3))
    np.testing.assert_array_equal(got, x * taken)


def test_a_bool_chooses_between_the_false_and_the_true_branch():
    x = normal(3)
    assert (ops.cond(np.array(False), x, branches=branches(2))[0] == 0).all()
    np.testing.assert_array_equal(ops.cond(np.array(True), x, branches=branches(2))[0], x)


def test_cond_checks_its_branches():
    x = normal(3)
    with pytest.raises(DTypeError, match="bool or int32"):
        ops.cond(np.float32(1), x, branches=branches(2))
    with pytest.raises(ShapeError, match="two branches"):
        ops.cond(np.array(True), x, branches=branches(3))
    other = record_region("other", [type_of(x)], lambda x: [ops.reduce_sum(x, axes=(0,), keepdims=True)])
    with pytest.raises(ShapeError, match="one type"):
        ops.cond(np.int32(0), x, branches=(*branches(1), other))


def test_the_gradient_goes_through_the_taken_branch():
    x = np.array([0.5, -2.0, 3.0])
    square = record_region("square", [type_of(x)], lambda x: [ops.mul(x, x)])
    cube = record_region("cube", [type_of(x)], lambda x: [ops.mul(x, ops.mul(x, x))])
    for index, expected in enumerate((2 * x, 3 * x * x)):
        attrs = {"branches": (square, cube)}
        results = ops.cond(np.int32(index), x, **attrs)
        gradient = PRIMITIVES["cond"].gradient((np.ones(3),), (np.int32(index), x), results, **attrs)
        assert gradient[0] is None
        np.testing.assert_allclose(gradient[1], expected)


# -- scan -------------------------------------------------------------------------------------------------------------


def linear_recurrence(reverse=False, length=4):
    """state = state * decay + x; the results are the states."""
    types = [TensorType((3,), "float64")] * 3

    def build(state, x, decay):
        new = ops.add(ops.mul(state, decay), x)
        return [new, new]

    body = record_region("body", types, build)
    return {"body": body, "num_carry": 1, "num_xs": 1, "length": length, "reverse": reverse}


def summing_body():
    return record_region("body", [TensorType((3,), "float64")] * 3, lambda a, b, c: [a, ops.reduce_sum(b, axes=(0,))])


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_carries_state_along_a_sequence(reverse):
    state, xs, decay = RNG.standard_normal(3), RNG.standard_normal((4, 3)), RNG.standard_normal(3)
    final, stacked = ops.scan(state, xs, decay, **linear_recurrence(reverse))
    for t in range(4)[:: -1 if reverse else 1]:
        state = state * decay + xs[t]
        np.testing.assert_allclose(stacked[t], state)
    np.testing.assert_allclose(final, state)


def test_the_gradient_of_a_scan_sums_over_its_constants():
    state, xs, decay = RNG.standard_normal(3), RNG.standard_normal((4, 3)), RNG.standard_normal(3)
    attrs = linear_recurrence()
    results = ops.scan(state, xs, decay, **attrs)
    cotangents = np.ones(3), np.zeros((4, 3))
    to_state, to_xs, to_decay = PRIMITIVES["scan"].gradient(cotangents, (state, xs, decay), results, **attrs)
    np.testing.assert_allclose(to_state, decay**4)
    np.testing.assert_allclose(to_xs, decay ** np.arange(3, -1, -1)[:, None])
    before = [state, *results[1][:3]]
    np.testing.assert_allclose(to_decay, sum(decay ** (3 - t) * s for t, s in enumerate(before)))


def test_scan_checks_its_body():
    attrs = linear_recurrence()
    with pytest.raises(ShapeError, match="first axis of 4"):
        ops.scan(np.ones(3), np.ones((5, 3)), np.ones(3), **attrs)
    with pytest.raises(ShapeError, match="scan"):
        ops.scan(np.ones(3), np.ones((4, 2)), np.ones(3), **attrs)
    two_carries = {**attrs, "num_carry": 2, "num_xs": 0}
    with pytest.raises(ShapeError, match="the carries and the first results of the body must have one type"):
        ops.scan(np.ones(3), np.ones(3), np.ones(3), **{**two_carries, "body": summing_body()})


def test_scan_over_symbolic_sizes():
    types = [TensorType((N, 3), "float32"), TensorType((N, 3), "float32")]
    body = record_region("body", types, lambda s, x: [ops.add(s, x), ops.reduce_sum(x, axes=(0,), keepdims=False)])
    length = Dim.symbol("T")
    attrs = {"body": body, "num_carry": 1, "num_xs": 1, "length": length, "reverse": False}
    xs = TensorType((length, N, 3), "float32")
    final, sums = PRIMITIVES["scan"].infer(types[0], xs, **attrs)
    assert final.shape == (N, 3)
    assert sums.shape == (length, 3)
    graph = record_region("graph", [types[0], xs], lambda s, x: ops.scan(s, x, **attrs))
    state, x = normal(2, 3), normal(5, 2, 3)
    got = evaluate(graph, [state, x])
    np.testing.assert_allclose(got[0], state + x.sum(0), rtol=1e-6)
    np.testing.assert_allclose(got[1], x.sum(1), rtol=1e-6)
    assert evaluate(graph, [state, x], precision="float64")[0].dtype == np.float64


def test_a_primitive_without_gradient_inside_of_a_body_is_named():
    types = [TensorType((3,), "float32")]
    condition = record_region("condition", types, lambda x: [ops.lt(ops.reduce_sum(x, axes=(0,)), np.float32(9))])
    double = record_region("double", types, lambda x: [ops.add(x, x)])
    body = record_region("body", types, lambda x: ops.while_loop(x, cond=condition, body=double))
    attrs = {"body": body, "num_carry": 1, "num_xs": 0, "length": 2, "reverse": False}
    x = np.ones(3, np.float32)
    with pytest.raises(GradientError, match=r"while_loop, which has none: .*use scan"):
        PRIMITIVES["scan"].gradient((x,), (x,), ops.scan(x, **attrs), **attrs)


# -- fusion -----------------------------------------------------------------------------------------------------------


def test_fusion_takes_the_sizes_of_its_operands():
    types = [TensorType((N, 2 * N), "float32"), TensorType((2 * N,), "float32")]
    body = record_region("body", types, lambda x, y: [ops.add(x, y), ops.reduce_sum(x, axes=(1,))])
    full, summed = ops.fusion(normal(3, 6), normal(6), kind="loop", body=body)
    assert full.shape == (3, 6)
    assert summed.shape == (3,)
    m = Dim.symbol("M")
    inferred = PRIMITIVES["fusion"].infer(
        TensorType((m + 1, 2 * m + 2), "float32"), TensorType((2 * m + 2,), "float32"), kind="loop", body=body
    )
    assert [t.shape for t in inferred] == [(m + 1, 2 * m + 2), (m + 1,)]
    with pytest.raises(ShapeError, match="fusion"):
        ops.fusion(normal(3, 5), normal(5), kind="loop", body=body)
    with pytest.raises(DTypeError, match="fusion"):
        ops.fusion(np.ones((3, 6), np.int32), normal(6), kind="loop", body=body)


def test_sizes_that_only_occur_in_sums_are_solved_for():
    types = [TensorType((2 * N + 1,), "float32")]
    body = record_region("body", types, lambda x: [ops.slice(x, start=(0,), limit=(N,), stride=(1,))])
    assert isinstance(body, Graph)
    (got,) = ops.fusion(normal(9), kind="loop", body=body)
    assert got.shape == (4,)
