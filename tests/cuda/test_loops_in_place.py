"""Carries that a loop's body may write over the ones before: what is copied on the device, and where results lie."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ops.region_gradient import record_region
from kgraph.runtime.cuda.loops import Loop
from kgraph.runtime.cuda.simulator import _Pointer
from kgraph.targets import resolve

TARGET = resolve("cuda-simulator")
ROWS, WIDTH = 11, 7
CACHE = TensorType((ROWS, WIDTH), "float32")
ROW = TensorType((1, WIDTH), "float32")
INDEX = TensorType((), "int32")
CACHE_BYTES = ROWS * WIDTH * 4
LENGTH = 5


def values(*types: TensorType, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.asarray(random.uniform(-1, 1, t.shape), t.dtype) for t in types]


class Counts:
    """What the device was asked for. copies: bytes of each copy within it; allocations: bytes of each."""

    def __init__(self, device, monkeypatch):
        self.copies: list[int] = []
        self.allocations: list[int] = []
        copy, allocate = device.copy, device.allocate

        def counted_copy(target: int, source: int, nbytes: int) -> None:
            if device._captured is None:
                self.copies.append(nbytes)
            copy(target, source, nbytes)

        def counted_allocate(nbytes: int) -> int:
            self.allocations.append(nbytes)
            return allocate(nbytes)

        monkeypatch.setattr(device, "copy", counted_copy)
        monkeypatch.setattr(device, "allocate", counted_allocate)

    def clear(self) -> None:
        self.copies.clear()
        self.allocations.clear()

    def of_caches(self) -> list[int]:
        return [nbytes for nbytes in self.copies if nbytes >= CACHE_BYTES]


def generation(kind: str, length: int, made: bool, read_later: bool, on_host: bool = False) -> Graph:
    """A loop that puts a row into a cache in every iteration, from what it reads there.

    made: whether the cache is a result of a kernel, not an input. read_later: whether something reads it after the
    loop. on_host: whether the body has a host step.
    """

    def step(cache, row, at):
        if on_host:
            first = ops.slice(row, start=(0, 0), limit=(1, 1), stride=(1, 1))
            row = ops.mul(row, ops.reshape(ops.inv(ops.add(first, np.float32(3))), shape=()))
        seen = ops.reduce_sum(cache, axes=(0,), keepdims=True)
        new = ops.tanh(ops.add(row, ops.mul(seen, np.float32(0.3))))
        zero = np.int32(0)
        cache = ops.dynamic_update_slice(cache, new, at, zero)
        cache = ops.dynamic_update_slice(cache, ops.neg(new), ops.add(at, np.int32(2)), zero)
        return [cache, new, ops.add(at, np.int32(1))]

    types = [CACHE, ROW, INDEX]
    body = record_region("step", types, step)
    if kind == "scan":
        loop = lambda *carries: ops.scan(*carries, body=body, num_carry=3, num_xs=0, length=length, reverse=False)
    else:
        more = record_region("more", types, lambda cache, row, at: [ops.lt(at, np.int32(length))])
        loop = lambda *carries: ops.while_loop(*carries, cond=more, body=body)

    def function(cache, row, at):
        given = ops.mul(cache, np.float32(2)) if made else cache
        last, row, _ = loop(given, row, at)
        return [ops.add(last, given) if read_later else last, row]

    return trace(function, *types)


def run(graph: Graph, monkeypatch, calls: int = 3):
    """(program, counts of every call)"""
    program = compile_graph(graph, target=TARGET).program
    counts = Counts(program.device, monkeypatch)
    seen = []
    for call in range(calls):
        arrays = [*values(CACHE, ROW, seed=call), np.array(0, np.int32)]
        given = [a.copy() for a in arrays]
        counts.clear()
        results = program(arrays)
        for array, before in zip(arrays, given, strict=True):
            np.testing.assert_array_equal(array, before)
        for got, wanted in zip(results, evaluate(graph, arrays, precision="float64"), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        seen.append((counts.of_caches(), [n for n in counts.allocations if n >= CACHE_BYTES]))
    return program, seen


@pytest.mark.parametrize("length", [0, 1, LENGTH])
@pytest.mark.parametrize("kind", ["scan", "while"])
@pytest.mark.parametrize(
    ("made", "read_later", "copies"),
    [(True, False, 0), (True, True, 1), (False, False, 1)],
    ids=["made", "made and read later", "given"],
)
def test_a_cache_is_copied_once_a_call_or_never(kind, length, made, read_later, copies, monkeypatch):
    program, seen = run(generation(kind, length, made, read_later), monkeypatch)
    for number, (copied, allocated) in enumerate(seen):
        assert copied == [CACHE_BYTES] * copies
        assert number == 0 or not allocated, "memory for another cache"
    (step,) = [s for s in program.steps if hasattr(s, "function")]
    assert step.inplace


def test_host_steps_in_the_body_do_not_hinder(monkeypatch):
    program, seen = run(generation("scan", LENGTH, True, False, on_host=True), monkeypatch)
    assert [copied for copied, _ in seen] == [[]] * 3
    (step,) = [s for s in program.steps if hasattr(s, "function")]
    assert [s.label for s in step.function.body.program.steps if hasattr(s, "function")] == ["inv"]


def test_a_loop_has_no_memory_for_what_it_changes_in_place():
    program = compile_graph(generation("scan", LENGTH, True, False), target=TARGET).program
    (step,) = [s for s in program.steps if hasattr(s, "function")]
    types = [(CACHE.shape, np.dtype(np.float32)), (ROW.shape, np.dtype(np.float32)), ((), np.dtype(np.int32))]
    from kgraph.runtime.cuda.device_plan import DevicePlan

    loop = Loop(step.function, types, {}, lambda *a: DevicePlan(*a, scattered=True))
    (cache,) = [output for output, carry in loop.body.donors.items() if carry == 0]
    assert loop._pools[cache] == []
    iterations = list(loop.steps(1 << 20, [100, 200, 300], [1000, 2000, 3000]))
    assert iterations[0].before == [(1000, 100, CACHE_BYTES), *iterations[0].before[1:]]
    for iteration in iterations[:-1]:
        assert iteration.bases["input", 0] == iteration.bases["output", cache] == 1000
    assert all(not i.before for i in iterations[1:])
    assert not any(to == 1000 for i in iterations for to, _, _ in i.copies)


def test_updates_in_place_touch_the_window_alone(monkeypatch):
    stored = []
    store = _Pointer.__setitem__

    def counted(pointer, index, value):
        stored.append(int(index))
        store(pointer, index, value)

    types = [CACHE, ROW, INDEX]
    graph = trace(lambda x, row, at: ops.dynamic_update_slice(ops.neg(x), row, at, np.int32(0)), *types)
    program = compile_graph(graph, target=TARGET).program
    storage = program.bind({}).plan.storage
    update = program.steps[-1]
    assert storage.places[update.operands[1]] == storage.places[update.operands[-1]]
    arrays = [*values(CACHE, ROW), np.array(4, np.int32)]
    program(arrays)
    monkeypatch.setattr(_Pointer, "__setitem__", counted)
    (got,) = program(arrays)
    monkeypatch.undo()
    np.testing.assert_array_equal(got, evaluate(graph, arrays)[0])
    assert sorted(stored) == sorted([*range(ROWS * WIDTH), *range(4 * WIDTH, 5 * WIDTH)])


def elementwise(a, x):
    return [ops.add(ops.mul(a, a), x)]


def read_until_the_end(a, x):
    """The product reads what it would overwrite."""
    return [ops.dot_general(a, x, lhs_contract=(1,), rhs_contract=(0,))]


def one_reads_the_other(a, b, x):
    """The new `a` is there before `b` has been made of the old one, and so has a place of its own."""
    return [ops.add(a, x), ops.mul(b, a)]


def exchanged(a, b, x):
    return [ops.add(b, x), ops.mul(a, x)]


def stacked_as_well(a, x):
    new = ops.mul(ops.add(a, x), a)
    return [new, new]


def old_one_stacked(a, x):
    return [ops.mul(ops.add(a, x), a), a]


FORMS = {
    "elementwise": (elementwise, 1, 1),
    "read until the end": (read_until_the_end, 1, 0),
    "one reads the other": (one_reads_the_other, 2, 1),
    "exchanged": (exchanged, 2, 1),
    "stacked as well": (stacked_as_well, 1, 0),
    "old one stacked": (old_one_stacked, 1, 0),
}


@pytest.mark.parametrize("twice", [False, True], ids=["", "one operand for all"])
@pytest.mark.parametrize("native", [True, False], ids=["launched", "counted"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, length, native, twice, monkeypatch):
    """in_place: how many of the carries the body overwrites."""
    build, num_carry, in_place = FORMS[form]
    square = TensorType((4, 4), "float32")
    body = record_region("body", [square] * (num_carry + 1), build)
    attrs = {"body": body, "num_carry": num_carry, "num_xs": 0, "length": length, "reverse": False}
    if not native:
        monkeypatch.setattr("kgraph.runtime.cuda.loops.Loop.is_native", False)

    def function(a, b, x):
        a, b = ops.mul(a, x), ops.sub(b, x)
        carries = [a, a if twice else b][:num_carry]
        return [*ops.scan(*carries, x, **attrs), ops.add(a, b)]

    graph = trace(function, *[square] * 3)
    program = compile_graph(graph, target=TARGET).program
    for call in range(3):
        arrays = values(*[square] * 3, seed=call)
        for got, wanted in zip(program(arrays), evaluate(graph, arrays, precision="float64"), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    (step,) = [s for s in program.steps if hasattr(s, "function")]
    binding = step.function.body.program.bind({})
    assert len(binding.plan.donors) == in_place
