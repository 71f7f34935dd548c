"""What passes and lowering make of a graph, kept between processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import compiler, ops
from kgraph.codegen.target import host_target
from kgraph.disk_cache import DiskCache
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ops.region_gradient import record_region
from kgraph.program_cache import ProgramCache

N = Dim.symbol("N")
HALF = np.float32(0.5)
ZEROS = np.zeros((40, 50), np.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KGRAPH_PROGRAM_CACHE", raising=False)
    monkeypatch.delenv("KGRAPH_VERIFY", raising=False)


def graph_of(function, *shapes, params: int = 1):
    graph = trace(function, *[TensorType(s, "float32") for s in shapes])
    graph.params = graph.inputs[len(graph.inputs) - params :]
    graph.inputs = graph.inputs[: len(graph.inputs) - params]
    return graph


def dense(x, w, slope=HALF, axis=1):
    y = ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,))
    y = ops.add(ops.mul(ops.tanh(y), slope), ops.reduce_sum(ops.exp(y), axes=(axis,), keepdims=True))
    return ops.add(y, ZEROS[:1]), ops.sort(y, axis=1)


def build(function=dense, shapes=((N, 30), (30, 50))):
    return graph_of(function, *shapes)


def run(compiled, *arrays, weights):
    compiled.set_params([weights])
    return compiled.program(list(arrays))


def without_passes(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the passes have run again")

    from kgraph import translation

    monkeypatch.setattr(translation, "optimise", refuse)
    monkeypatch.setattr(translation, "lower", refuse)


def test_an_equal_graph_needs_neither_passes_nor_lowering(monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype("float32") for s in ((7, 30), (30, 50)))
    first = compiler.compile_graph(build())
    without_passes(monkeypatch)
    again = compiler.compile_graph(build())
    for a, b in zip(run(first, x, weights=w), run(again, x, weights=w), strict=True):
        np.testing.assert_array_equal(a, b)
    # In the other order: names do not depend on what is printed first.
    texts = [str(graph) for graph in (first.captured, first.optimised, first.prologue)]
    assert [str(graph) for graph in (again.prologue, again.optimised, again.captured)] == texts[::-1]
    assert [str(n) for n in again.nodes] == [str(n) for n in first.nodes]
    assert {id(n) for n in again.nodes} <= {id(n) for n in again.optimised.nodes}
    assert again.decisions == first.decisions
    assert again.program.steps == first.program.steps


def from_elsewhere(graph):
    """The graph with another origin of its last node."""
    graph.nodes[-1].provenance = frozenset({"elsewhere:add"})
    return graph


@pytest.mark.parametrize(
    "other",
    [
        lambda: (build(lambda x, w: dense(x, w, np.float32(0.25))), "inference", ()),
        lambda: (build(lambda x, w: dense(x, w, axis=0)), "inference", ()),
        lambda: (build(lambda x, w: dense(x, w)[:1]), "inference", ()),
        lambda: (build(shapes=((N, 31), (31, 50))), "inference", ()),
        lambda: (build(shapes=((2 * N, 30), (30, 50))), "inference", ()),
        lambda: (from_elsewhere(build()), "inference", ()),
        lambda: (build(), "training", ()),
        lambda: (build(), "inference", ((0, 0),)),
    ],
    ids=["constant", "attribute", "outputs", "shape", "symbol", "provenance", "passes", "donations"],
)
def test_other_graphs_have_other_keys(other):
    target = host_target()
    assert ProgramCache(*other(), target).key != ProgramCache(build(), "inference", (), target).key
    assert ProgramCache(build(), "inference", (), target).key is not None


def test_the_target_is_part_of_the_key():
    from dataclasses import replace

    target = host_target()
    other = replace(target, l2_bytes=target.l2_bytes + 1)
    assert ProgramCache(build(), "inference", (), target).key != ProgramCache(build(), "inference", (), other).key


def entry_path(cache: ProgramCache):
    """The file of an entry."""
    assert cache.cache is not None
    assert cache.key is not None
    return cache.cache._path(cache.key)


def test_off_switch(monkeypatch):
    monkeypatch.setenv("KGRAPH_PROGRAM_CACHE", "0")
    compiler.compile_graph(build())
    monkeypatch.delenv("KGRAPH_PROGRAM_CACHE")
    cache = ProgramCache(build(), "inference", (), host_target())
    assert cache.key is not None
    assert cache.load() is None


def test_compiles_leave_the_captured_graph_as_it_was():
    graph = build(lambda x, w: (*dense(x, w), ops.sort(x, axis=1)))
    before = [(node, node.provenance, node.inputs) for node in graph.nodes]
    compiled = compiler.compile_graph(graph)
    assert [(node, node.provenance, node.inputs) for node in graph.nodes] == before
    assert not {*graph.nodes} & {*compiled.optimised.nodes, *compiled.prologue.nodes}
    assert [v.name for node in graph.nodes for v in node.outputs] == [""] * len(graph.nodes)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""],
    ids=["truncated", "changed", "empty"],
)
def test_damaged_entries_are_compiled_and_replaced(damage):
    first = compiler.compile_graph(build())
    cache = ProgramCache(build(), "inference", (), host_target())
    path = entry_path(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cache.load() is None
    assert str(compiler.compile_graph(build()).optimised) == str(first.optimised)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "payload", [b"", b"no pickle", pickle.dumps(None), pickle.dumps((1, 2, 3, 4)), b"cmissing\nname\n."]
)
def test_whole_entries_of_something_else_are_compiled_and_replaced(payload, monkeypatch):
    compiler.compile_graph(build())
    cache = ProgramCache(build(), "inference", (), host_target())
    cache.cache.put(cache.key, payload)
    assert cache.load() is None
    compiler.compile_graph(build())
    assert cache.load() is not None


def test_entries_are_within_the_limit_of_the_cache(tmp_path):
    cache = ProgramCache(build(), "inference", (), host_target())
    compiler.compile_graph(build())
    path = entry_path(cache)
    assert path.is_relative_to(tmp_path)
    assert path.stat().st_size < DiskCache(cache.cache.directory, 1).sweep()
    assert not path.exists()


CACHED = """
import sys
from tests.runtime.test_program_cache import *
compiled = compiler.compile_graph(build())
x, w = np.ones((7, 30), np.float32), np.ones((30, 50), np.float32)
print([float(r.sum()) for r in run(compiled, x, weights=w)])
print(*[name for name in ("llvmlite.binding", "llvmlite.ir", "kgraph.passes.fuse") if name in sys.modules])
"""


def test_a_program_of_the_cache_needs_neither_llvm_nor_passes(tmp_path):
    root = Path(__file__).parents[2]
    # The imports of the test itself must not bring them.
    script = CACHED.replace("from tests.runtime.test_program_cache import *", Path(__file__).read_text())
    script = script.replace("from __future__ import annotations", "")
    command = [sys.executable, "-c", script]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.splitlines()
        for _ in range(2)
    )
    assert first[0] == second[0]
    assert first[1] == "llvmlite.binding llvmlite.ir kgraph.passes.fuse"
    assert second[1] == ""


def test_processes_that_write_at_once(tmp_path):
    script = "from tests.runtime.test_program_cache import *; print(compiler.compile_graph(build()).optimised)"
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[2]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)]
    texts = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert texts[0] == texts[1] == str(compiler.compile_graph(build()).optimised) + "\n"
    assert ProgramCache(build(), "inference", (), host_target()).load() is not None
    assert not list(tmp_path.rglob(".new-*"))


@pytest.mark.parametrize("name", ["KGRAPH_DUMP", "KGRAPH_STOP_AFTER", "KGRAPH_VERIFY"])
def test_passes_that_are_watched_run(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert ProgramCache(build(), "inference", (), host_target()).key is None


def looping(x, w):
    """A loop that reads a weight, with a choice inside, and a scan."""
    types = [TensorType(x.shape, "float32"), TensorType(w.shape, "float32")]
    more = record_region("more", types, lambda c, w: [ops.lt(ops.reduce_max(c, axes=(0, 1)), np.float32(9))])
    grown = record_region("grown", types[:1], lambda c: [ops.mul(c, np.float32(1.5))])
    sorted_ = record_region("sorted", types[:1], lambda c: [ops.sort(c, axis=1)])

    def body(c, w):
        y = ops.dot_general(c, w, lhs_contract=(1,), rhs_contract=(0,))
        small = ops.lt(ops.reduce_sum(y, axes=(0, 1)), np.float32(0))
        return [*ops.cond(small, ops.add(ops.abs(y), c), branches=(sorted_, grown)), w]

    last, _ = ops.while_loop(x, w, cond=more, body=record_region("body", types, body))
    row = TensorType(x.shape[1:], "float32")
    total = record_region("total", [row, row], lambda a, r: [(a := ops.tanh(ops.add(a, r))), a])
    attrs = {"body": total, "num_carry": 1, "num_xs": 1, "length": last.shape[0], "reverse": False}
    return ops.scan(ops.reduce_sum(last, axes=(0,)), last, **attrs)


def test_programs_with_loops_and_branches(monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype("float32") for s in ((4, 30), (30, 30)))
    build_loop = lambda: build(looping, ((N, 30), (30, 30)))
    first = compiler.compile_graph(build_loop())
    assert {step.label for step in first.program.steps} >= {"while_loop", "scan"}
    wanted = run(first, x, weights=w)
    for a, b in zip(wanted, evaluate(first.captured, [x], [w]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    without_passes(monkeypatch)
    again = compiler.compile_graph(build_loop())
    for a, b in zip(run(again, x, weights=w), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert str(again.optimised) == str(first.optimised)
    assert again.decisions == first.decisions


def test_what_chooses_between_algorithms_is_part_of_the_key(monkeypatch):
    key = ProgramCache(build(), "inference", (), host_target()).key
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    assert ProgramCache(build(), "inference", (), host_target()).key != key
