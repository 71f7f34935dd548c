"""Conditions that become selections: structure, values, derivatives, and what stays a branch."""

from __future__ import annotations

import numpy as np
import pytest

import kgraph
from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.region_gradient import record_region
from kgraph.passes.inline_cond import inline_cond
from kgraph.passes.manager import PassContext
from kgraph.passes.pipeline import TRAINING

N = Dim.symbol("N")
F32 = TensorType((N, 3), "float32")
BOOL, INT = TensorType((), "bool"), TensorType((), "int32")


def f32(*shape):
    return TensorType(shape, "float32")


def region(build, *types):
    return record_region("branch", types, build)


def inlined(function, *types) -> tuple[Graph, Graph, PassContext]:
    graph, context = trace(function, *types), PassContext()
    after = inline_cond(graph, context)
    verify(after, after="inline_cond")
    return graph, after, context


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.name != "constant"]


def check_same(before: Graph, after: Graph, *arrays):
    for a, b in zip(evaluate(before, arrays), evaluate(after, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def x_of(rows: int = 4):
    return np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)


def test_a_bool_selects():
    branches = region(lambda x: [ops.neg(x), x], F32), region(lambda x: [ops.exp(x), x], F32)
    before, after, _ = inlined(lambda p, x: ops.cond(p, x, branches=branches), BOOL, F32)
    assert names(after) == ["neg", "exp", "select"], "what both branches pass on needs no selection"
    for p in (True, False):
        check_same(before, after, np.array(p), x_of())


def test_an_index_selects_and_is_clamped():
    branches = tuple(region(lambda x, i=i: [ops.mul(x, np.float32(i + 1))], F32) for i in range(3))
    before, after, _ = inlined(lambda i, x: ops.cond(i, x, branches=branches), INT, F32)
    assert names(after).count("select") == 2
    for i in (-3, 0, 1, 2, 9):
        check_same(before, after, np.array(i, np.int32), x_of())


def test_conditions_within_branches_go_first():
    inner = region(lambda x: [ops.sin(x)], F32), region(lambda x: [ops.cos(x)], F32)

    def outer(p, x):
        return ops.cond(ops.logical_not(p), x, branches=inner)

    branches = region(outer, BOOL, F32), region(lambda p, x: [ops.exp(x)], BOOL, F32)
    before, after, _ = inlined(lambda p, x: ops.cond(p, p, x, branches=branches), BOOL, F32)
    assert "cond" not in names(after)
    for p in (True, False):
        check_same(before, after, np.array(p), x_of())


def product_chain(x):
    return [ops.dot_general(x, x, lhs_contract=(1,), rhs_contract=(0,), lhs_batch=(), rhs_batch=())]


COSTLY = {
    "dot_general may be costly": (product_chain, lambda x: [x]),
    "elements": (lambda x: [ops.reduce_sum(ops.exp(x), axes=(0, 1))], lambda x: [ops.reduce_max(x, axes=(0, 1))]),
}


@pytest.mark.parametrize("reason", COSTLY)
def test_costly_branches_stay(reason):
    square = f32(500, 500)
    branches = tuple(region(build, square) for build in COSTLY[reason])
    _, after, context = inlined(lambda p, x: ops.cond(p, x, branches=branches), BOOL, square)
    assert names(after) == ["cond"]
    (decision,) = context.decisions
    assert reason in decision.reason


def test_many_branches_stay():
    branches = tuple(region(lambda x, i=i: [ops.mul(x, np.float32(i))], F32) for i in range(5))
    _, after, _ = inlined(lambda i, x: ops.cond(i, x, branches=branches), INT, F32)
    assert names(after) == ["cond"]


def test_a_branch_that_has_no_kernel_stays():
    graph = trace(
        lambda p, x: ops.cond(p, x, branches=(region(lambda x: [ops.neg(x)], F32), region(lambda x: [x], F32))),
        BOOL,
        F32,
    )
    context = PassContext(accepts=lambda node: "no kernel" if node.name == "neg" else None)
    assert names(inline_cond(graph, context)) == ["cond"]


def test_derivatives_of_the_branch_not_taken_do_no_harm():
    """The derivative of log at 0 is infinite, that of sqrt below 0 is NaN; zeros times these must not come out."""

    def function(x):
        safe = region(lambda x: [ops.mul(x, x)], f32(3))
        risky = region(lambda x: [ops.mul(ops.log(x), ops.sqrt(x))], f32(3))
        (out,) = ops.cond(ops.gt(ops.reduce_min(x, axes=(0,)), np.float32(0)), x, branches=(safe, risky))
        return ops.reduce_sum(out, axes=(0,))

    compiled = compile_graph(trace(kgraph.grad(function), f32(3)), passes=TRAINING)
    assert compiled.program.stats()["host_steps"] == 0
    x = np.array([0.0, -1.0, 2.0], np.float32)
    np.testing.assert_array_equal(compiled.program([x])[0], 2 * x)
    x = np.array([0.5, 1.0, 2.0], np.float32)
    np.testing.assert_allclose(compiled.program([x])[0], 1 / np.sqrt(x) + np.log(x) / (2 * np.sqrt(x)), rtol=1e-6)


def test_programs_need_no_host_step_for_any_size():
    branches = region(lambda x: [ops.neg(x)], F32), region(lambda x: [ops.exp(x)], F32)
    compiled = compile_graph(trace(lambda p, x: ops.cond(p, x, branches=branches), BOOL, F32))
    assert compiled.program.stats()["host_steps"] == 0
    for rows in (1, 5):
        x = x_of(rows)
        np.testing.assert_array_equal(compiled.program([np.array(False), x])[0], -x)
        np.testing.assert_allclose(compiled.program([np.array(True), x])[0], np.exp(x), rtol=1e-6)
