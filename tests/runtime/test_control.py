"""Branches and loops over compiled bodies against the interpreter: where values lie, sizes, bodies with host steps."""

from __future__ import annotations

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kgraph
from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value, type_of
from kgraph.ir.interpreter import evaluate
from kgraph.ops.region_gradient import record_region
from kgraph.passes.inline_cond import inline_cond
from kgraph.passes.pipeline import TRAINING
from kgraph.report import explain
from kgraph.runtime.control import Branches, Scan, While, is_one_native_call
from kgraph.runtime.steps import HostStep

N, T = Dim.symbol("N"), Dim.symbol("T")
# Conditions stay what they are, however cheap their branches.
PASSES = [p for p in TRAINING if p is not inline_cond]


def f32(*shape):
    return TensorType(shape, "float32")


def normal(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def one_node(name: str, arrays, attrs) -> Graph:
    graph = Graph([Value(type_of(a)) for a in arrays])
    out = graph.add(PRIMITIVES[name], graph.inputs, **attrs)
    graph.outputs = list(out)
    return graph


def function_of(compiled, kind):
    """The function of the one step of control flow."""
    (found,) = [s.function for s in compiled.program.steps if isinstance(getattr(s, "function", None), kind)]
    return found


def check(compiled, graph: Graph, *arrays, tolerance=1e-5):
    given = [a.copy() for a in arrays]
    got = compiled.program(arrays)
    for a, b in zip(arrays, given, strict=True):
        np.testing.assert_array_equal(a, b, "an operand was changed")
    wanted = evaluate(graph, arrays, precision="float64")
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, b.dtype), b, rtol=tolerance, atol=tolerance)


SAMPLES = [(name, s) for name in ("scan", "while_loop", "cond") for s in PRIMITIVES[name].samples()]


@pytest.mark.parametrize(("name", "sample"), SAMPLES, ids=[f"{n}-{s.name}" for n, s in SAMPLES])
def test_samples(name, sample):
    graph = one_node(name, sample.args, sample.attrs)
    compiled = compile_graph(graph, passes=PASSES)
    function_of(compiled, (Scan, While, Branches))
    for _ in range(2):
        check(compiled, graph, *sample.args)


def test_branches_may_give_scalars_that_are_known():
    branches = [
        record_region("known", [f32(3)], lambda x: [np.asarray(2.5, np.float32), x]),
        record_region("computed", [f32(3)], lambda x: [ops.reduce_sum(x, axes=(0,), keepdims=False), x]),
    ]
    attrs = {"branches": tuple(branches)}
    graph = trace(lambda index, x: ops.cond(index, x, **attrs), TensorType((), "int32"), f32(3))
    compiled = compile_graph(graph, passes=PASSES)
    for index in (0, 1):
        check(compiled, graph, np.asarray(index, np.int32), normal(3))


def scanned(build, carries, xs, constants=(), length=None, reverse=False) -> Graph:
    """A graph of one scan over inputs of these types."""
    slices = [TensorType(x.shape[1:], x.dtype) for x in xs]
    body = record_region("body", [*carries, *slices, *constants], build)
    length = xs[0].shape[0] if xs else length
    attrs = {"body": body, "num_carry": len(carries), "num_xs": len(xs), "length": length, "reverse": reverse}
    return trace(lambda *operands: ops.scan(*operands, **attrs), *carries, *xs, *constants)


def cell(h, c, x, w):
    """Results in every relation to the carries and to each other."""
    new = ops.tanh(ops.add(ops.mul(h, w), x))
    other = ops.mul(ops.add(c, new), w)
    flat = ops.reshape(new, shape=(new.shape[0] * 3,))
    return [new, other, new, h, c, x, w, flat, other, ops.add(x, x), c, np.full((2, 2), 7, np.float32)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_results_are_stacked_wherever_they_are_written(steps, reverse):
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)], reverse=reverse)
    compiled = compile_graph(graph)
    arrays = [normal(4, 3), normal(4, 3, seed=1), normal(steps, 4, 3, seed=2), normal(3, seed=3)]
    check(compiled, graph, *arrays)
    check(compiled, graph, *(a[..., :2, :] if a.ndim > 1 else a for a in map(np.copy, arrays)))
    (scan,) = [s.function for s in compiled.program.steps if isinstance(getattr(s, "function", None), Scan)]
    assert is_one_native_call(scan.body.bind([(4, 3), (4, 3), (4, 3), (3,), (2, 2)]))


def test_carries_may_rotate_and_rest():
    def build(a, b, c, x):
        return [b, a, c, ops.add(a, x), c]

    graph = scanned(build, [f32(5), f32(5), f32(5)], [f32(T, 5)])
    compiled = compile_graph(graph)
    for steps in (1, 2, 5):
        check(compiled, graph, *(normal(5, seed=i) for i in range(3)), normal(steps, 5))


def product(x, y):
    return ops.dot_general(x, y, lhs_contract=(1,), rhs_contract=(0,))


def behind(a, b, c, d, x):
    """A recurrence over several steps: outputs are carried on until they are read again, and may not be overwritten."""
    new = ops.tanh(ops.add(product(a, b), ops.add(product(c, d), x)))
    return [b, c, d, new]


@pytest.mark.parametrize("stacked", ["nothing", "the result", "what came in"])
def test_carries_may_lie_several_steps_behind(stacked):
    def build(*operands):
        results = behind(*operands)
        return results + {"nothing": [], "the result": results[3:], "what came in": [*operands[3:0:-1]]}[stacked]

    graph = scanned(build, [f32(4, 4)] * 4, [f32(T, 4, 4)])
    compiled = compile_graph(graph)
    for steps in (1, 2, 3, 8):
        check(compiled, graph, *(normal(4, 4, seed=i) for i in range(4)), normal(steps, 4, 4, seed=5))


def test_carries_of_while_loops_may_lie_several_steps_behind():
    def step(n, x, *carries):
        return [ops.add(n, np.int32(1)), x, *behind(*carries, x)]

    types = [TensorType((), "int32"), *[f32(4, 4)] * 5]
    more = record_region("more", types, lambda n, *_: [ops.lt(n, np.int32(8))])
    attrs = {"cond": more, "body": record_region("step", types, step)}
    graph = trace(lambda *operands: ops.while_loop(*operands, **attrs), *types)
    check(compile_graph(graph), graph, np.array(0, np.int32), *(normal(4, 4, seed=i) for i in range(5)))


def test_scalars_and_integers_are_carried():
    def build(i, total, x):
        new = ops.add(total, ops.mul(x, ops.convert(i, dtype="float32")))
        return [ops.add(i, np.int32(2)), new, i, new, ops.gt(x, np.float32(0))]

    graph = scanned(build, [TensorType((), "int32"), f32()], [f32(9)])
    check(compile_graph(graph), graph, np.array(1, np.int32), np.array(0.5, np.float32), normal(9))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_body_with_a_host_step(steps):
    def build(h, x, w):
        lower = ops.cholesky(ops.add(ops.mul(x, x), w))
        return [ops.add(h, lower), h, lower]

    graph = scanned(build, [f32(3, 3)], [f32(T, 3, 3)], [f32(3, 3)])
    compiled = compile_graph(graph)
    check(compiled, graph, normal(3, 3), np.ones((steps, 3, 3), np.float32), 4 * np.eye(3, dtype=np.float32))
    assert "cholesky" in str(explain("model", compiled))


def test_loops_within_loops():
    inner_types = [TensorType((), "int32"), f32(N)]
    condition = record_region("more", inner_types, lambda i, x: [ops.lt(i, np.int32(3))])
    inner = record_region("inner", inner_types, lambda i, x: [ops.add(i, np.int32(1)), ops.sin(x)])

    def build(h, x):
        _, new = ops.while_loop(np.int32(0), ops.add(h, x), cond=condition, body=inner)
        return [new, new]

    graph = scanned(build, [f32(N)], [f32(T, N)])
    compiled = compile_graph(graph)
    for rows, steps in ((3, 4), (8, 1)):
        check(compiled, graph, normal(rows), normal(steps, rows))


def test_sizes_that_no_operand_gives():
    """The body needs the batch size as a number, and as a size of what it makes."""

    def build(h):
        rows = ops.dim_value(dim=N, dtype="float32")
        return [ops.add(h, rows), ops.full(shape=(N, 2), value=1.5, dtype="float32")]

    def function(x, h):
        body = record_region("body", [f32()], build)
        out = ops.scan(h, body=body, num_carry=1, num_xs=0, length=N, reverse=False)
        return [ops.add(x, out[0]), out[1]]

    graph = trace(function, f32(N), f32())
    compiled = compile_graph(graph)
    function_of(compiled, Scan)
    for rows in (3, 5):
        check(compiled, graph, normal(rows), np.array(1, np.float32))


def doubling_until(limit):
    def more(x, n, w):
        return [ops.lt(ops.reduce_sum(x, axes=(0,)), np.float32(limit))]

    def body(x, n, w):
        return [ops.add(ops.mul(x, w), np.float32(1)), ops.add(n, np.int32(1)), w]

    types = [f32(N), TensorType((), "int32"), f32(N)]
    graphs = {"cond": record_region("more", types, more), "body": record_region("step", types, body)}
    return trace(lambda *operands: ops.while_loop(*operands, **graphs), *types)


@pytest.mark.parametrize("limit", [-1, 5, 1000])
def test_while_loops_run_until_their_condition_fails(limit):
    graph = doubling_until(limit)
    compiled = compile_graph(graph)
    for rows in (1, 6):
        check(compiled, graph, np.ones(rows, np.float32), np.array(0, np.int32), np.full(rows, 2, np.float32))


def carried_on(kind, *, reads_operand: bool) -> Graph:
    """A loop over what a kernel has made of an input."""
    types = [f32(N, 3), TensorType((), "int32")]
    if kind == "while":
        more = record_region("more", types, lambda x, n: [ops.lt(n, np.int32(4))])
        step = record_region(
            "step", types, lambda x, n: [ops.add(ops.mul(x, x), np.float32(0.1)), ops.add(n, np.int32(1))]
        )
        loop = lambda x, n: ops.while_loop(x, n, cond=more, body=step)[0]
    else:
        step = record_region("step", types[:1], lambda x: [ops.add(ops.mul(x, x), np.float32(0.1))])
        loop = lambda x, n: ops.scan(x, body=step, num_carry=1, num_xs=0, length=4, reverse=False)[0]

    def function(x, n):
        made = ops.tanh(x)
        last = ops.exp(loop(made, n))
        return ops.add(last, made) if reads_operand else last

    return trace(function, *types)


@pytest.mark.parametrize("start", [0, 4])  # 4: the while loop does not begin
@pytest.mark.parametrize("reads_operand", [False, True])
@pytest.mark.parametrize("kind", ["while", "scan"])
def test_a_loop_overwrites_what_nobody_else_reads(kind, reads_operand, start):
    graph = carried_on(kind, reads_operand=reads_operand)
    compiled = compile_graph(graph)
    (step,) = [s for s in compiled.program.steps if isinstance(s, HostStep)]
    assert step.outputs == 1  # the counter is not read
    binding = compiled.program.bind({"N": 5})
    source, target = step.operands[0], step.operands[-1]
    in_place = binding.storage.places[source] == binding.storage.places[target]
    assert in_place != reads_operand
    assert binding._overwritten(step) == (frozenset() if reads_operand else {0})
    for rows in (1, 5):
        check(compiled, graph, normal(rows, 3), np.array(start, np.int32))


@pytest.mark.parametrize("kind", ["while", "scan"])
def test_loops_that_python_counts_overwrite_it_too(kind, monkeypatch):
    monkeypatch.setattr("kgraph.runtime.control.is_one_native_call", lambda binding: False)
    for reads_operand in (False, True):
        graph = carried_on(kind, reads_operand=reads_operand)
        check(compile_graph(graph), graph, normal(5, 3), np.array(0, np.int32))


def test_a_loop_leaves_the_arrays_of_a_call_alone():
    """What it is given are the caller's arrays, and what it gives are the program's outputs."""
    graph = doubling_until(100)
    compiled = compile_graph(graph)
    (step,) = [s for s in compiled.program.steps if isinstance(s, HostStep)]
    assert step.inplace
    check(compiled, graph, np.ones(3, np.float32), np.array(0, np.int32), np.full(3, 2, np.float32))


def test_derivatives_of_a_scan():
    def function(h, x, w):
        body = record_region(
            "body", [f32(4), f32(4), f32(4)], lambda h, x, w: [(y := ops.tanh(ops.add(ops.mul(h, w), x))), y]
        )
        last, ys = ops.scan(h, x, w, body=body, num_carry=1, num_xs=1, length=T, reverse=False)
        return ops.add(ops.reduce_sum(last, axes=(0,)), ops.reduce_sum(ops.mul(ys, ys), axes=(0, 1)))

    graph = trace(kgraph.grad(function, argnums=(0, 1, 2)), f32(4), f32(T, 4), f32(4))
    compiled = compile_graph(graph, passes=TRAINING)
    for steps in (1, 6):
        check(compiled, graph, normal(4), normal(steps, 4), normal(4, seed=1))


def test_long_loops_return_to_python_now_and_then(monkeypatch):
    monkeypatch.setattr("kgraph.runtime.control._TURNS", 3)
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)], reverse=True)
    compiled = compile_graph(graph)
    for steps in (3, 4, 5, 8):
        check(compiled, graph, normal(2, 3), normal(2, 3, seed=1), normal(steps, 2, 3, seed=2), normal(3, seed=3))
    graph = doubling_until(1000)
    check(compile_graph(graph), graph, np.ones(2, np.float32), np.array(0, np.int32), np.full(2, 2, np.float32))


def test_calls_at_once_do_not_disturb_each_other():
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)])
    compiled = compile_graph(graph)
    cases = [(rows, steps) for rows, steps in itertools.product((2, 5), (3, 20))] * 4

    def call(case):
        rows, steps = case
        arrays = [normal(rows, 3), normal(rows, 3, seed=1), normal(steps, rows, 3, seed=2), normal(3, seed=3)]
        for _ in range(5):
            check(compiled, graph, *arrays)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, cases))


def test_a_program_with_a_loop_can_be_pickled():
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)])
    compiled = compile_graph(graph)
    arrays = [normal(2, 3), normal(2, 3, seed=1), normal(5, 2, 3, seed=2), normal(3, seed=3)]
    copy = pickle.loads(pickle.dumps(compiled.program))
    for a, b in zip(copy(arrays), compiled.program(arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bodies_go_through_the_passes_of_the_graph_around(monkeypatch):
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)])
    arrays = [normal(2, 3), normal(2, 3, seed=1), normal(5, 2, 3, seed=2), normal(3, seed=3)]
    for name in ("layout", "merge_scans", "fuse"):
        monkeypatch.setenv("KGRAPH_STOP_AFTER", name)
        check(compile_graph(graph), graph, *arrays)


def test_explain_says_what_runs_in_the_loop():
    graph = scanned(cell, [f32(N, 3), f32(N, 3)], [f32(T, N, 3)], [f32(3)])
    (row,) = explain("model", compile_graph(graph)).host_steps
    assert row.label == "scan"
    assert "its body is compiled" in row.reason
    assert "native code counts the iterations" in row.reason
