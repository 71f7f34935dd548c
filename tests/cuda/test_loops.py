"""Scans whose iterations are launched without Python in between: values, addresses, launches, graphs."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda.target import make_target
from kgraph.codegen.lower import lower
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.passes.pipeline import TRAINING
from kgraph.report import explain
from kgraph.runtime.cuda import device_plan
from kgraph.runtime.cuda.device_array import DeviceArray
from kgraph.runtime.cuda.gpu import Gpu
from kgraph.runtime.cuda.program import CudaProgram
from kgraph.targets import resolve
from tests.cuda.fake_driver import FakeDriver, Launched
from tests.cuda.test_gpu import PTX, floats

N = Dim.symbol("N")
TARGET = resolve("cuda-simulator")
# Loops stay as they are written.
PASSES = [p for p in TRAINING if p.__name__ not in ("split_scan", "merge_scans")]
SHAPE = (3, 3)
FLOAT = TensorType(SHAPE, "float32")


def values(count: int, *shape: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.uniform(-1, 1, shape).astype(np.float32) for _ in range(count)]


def scan_of(build, num_carry: int, num_xs: int, num_constants: int, length, reverse: bool = False) -> Graph:
    """A graph of one scan over operands of SHAPE, whose body is what `build` records."""
    body = trace(build, *[FLOAT] * (num_carry + num_xs + num_constants), name="body")
    x = TensorType((length, *SHAPE), "float32")
    types = [FLOAT] * num_carry + [x] * num_xs + [FLOAT] * num_constants
    attrs = {"body": body, "num_carry": num_carry, "num_xs": num_xs, "length": length, "reverse": reverse}
    return trace(lambda *operands: ops.scan(*operands, **attrs), *types)


def product(x, y):
    return ops.dot_general(x, y, lhs_contract=(1,), rhs_contract=(0,))


def new_carry(s, x, w):
    new = ops.tanh(ops.add(product(s, w), x))
    return [new, new]


def old_carry(s, x, w):
    return [ops.tanh(ops.add(product(s, w), x)), s]


def old_carry_twice(s, x, w):
    return [ops.tanh(ops.add(product(s, w), x)), s, x, s, w]


def both(s, x, w):
    new = ops.tanh(ops.add(product(s, w), x))
    return [new, new, s, new]


def swapped(a, b, x):
    return [b, a, ops.add(a, x)]


def two_behind(a, b, c, x):
    """The product may not be written where an earlier one still is a carry."""
    return [b, c, ops.tanh(ops.add(product(a, b), ops.add(product(b, c), x)))]


def one_for_two(a, b, x):
    new = ops.tanh(ops.add(product(a, b), x))
    return [new, new, x]


def unchanged(a, b, x, w):
    return [a, ops.add(product(b, a), x), ops.mul(b, w)]


def last_element(s, x, w):
    return [x, product(s, w)]


def constant(s, x):
    return [np.full(SHAPE, 2, np.float32), ops.add(product(s, x), x)]


def in_two_products(s, x, w):
    first = product(s, w)
    return [ops.add(product(first, x), product(w, first)), first]


FORMS = {
    "new carry": (new_carry, 1, 1, 1),
    "old carry": (old_carry, 1, 1, 1),
    "old carry twice": (old_carry_twice, 1, 1, 1),
    "both": (both, 1, 1, 1),
    "swapped": (swapped, 2, 1, 0),
    "two behind": (two_behind, 3, 1, 0),
    "one for two": (one_for_two, 2, 1, 0),
    "unchanged": (unchanged, 2, 1, 1),
    "last element": (last_element, 1, 1, 1),
    "constant": (constant, 1, 1, 0),
    "in two products": (in_two_products, 1, 1, 1),
}


def check(graph: Graph, arrays, on_device: bool = False):
    """Launched, captured, replayed, on other values each time; gives the program."""
    program = compile_graph(graph, passes=PASSES, target=TARGET).program
    there = [DeviceArray.copy_of(program.device, a) for a in arrays]
    for call in range(3):
        given = [a + np.float32(0.1 * call) for a in arrays]
        for array, value in zip(there, given):
            array.fill(value)
        results = program(there if on_device else given)
        for got, wanted in zip(results, evaluate(graph, given), strict=True):
            np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-4, atol=1e-5)
    return program


def segments_of(program) -> list:
    (binding,) = program._bindings.values()
    return binding.plan.segments


@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, length):
    build, *counts = FORMS[form]
    carry, xs, constants = counts
    arrays = [*values(carry, *SHAPE), *values(xs, length, *SHAPE, seed=1), *values(constants, *SHAPE, seed=2)]
    program = check(scan_of(build, *counts, length, reverse=length == 5), arrays)
    assert all(segment.host is None for segment in segments_of(program))
    assert program.stats()["graphs"] == 1


@pytest.mark.parametrize("form", ["both", "two behind"])
def test_arrays_on_the_device(form):
    build, *counts = FORMS[form]
    carry, xs, constants = counts
    arrays = [*values(carry, *SHAPE), *values(xs, 4, *SHAPE, seed=1), *values(constants, *SHAPE, seed=2)]
    check(scan_of(build, *counts, 4), arrays, on_device=True)


def test_lengths_that_calls_give():
    graph = scan_of(both, 1, 1, 1, N)
    program = compile_graph(graph, passes=PASSES, target=TARGET).program
    for length in (4, 1, 4, 0, 4):
        arrays = [*values(1, *SHAPE), *values(1, length, *SHAPE), *values(1, *SHAPE)]
        for got, wanted in zip(program(arrays), evaluate(graph, arrays), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def nested(inner_length: int = 3):
    """A scan over a scan, whose products are those of `both`."""
    body = trace(both, FLOAT, FLOAT, FLOAT, name="inner")

    def build(s, x, w):
        xs = ops.broadcast_to(x, shape=(inner_length, *SHAPE))
        last, new, _, _ = ops.scan(s, xs, w, body=body, num_carry=1, num_xs=1, length=inner_length)
        return [last, ops.reduce_sum(new, axes=(0,), keepdims=False)]

    return build


def test_loops_in_loops():
    arrays = [*values(1, *SHAPE), *values(1, 4, *SHAPE), *values(1, *SHAPE)]
    program = check(scan_of(nested(), 1, 1, 1, 4), arrays)
    assert len(segments_of(program)) == 1


def test_bodies_with_host_steps_are_python_s():
    def build(s, x):
        return [ops.inv(ops.add(s, x)), s]

    arrays = [10 * np.eye(3, dtype=np.float32), *values(1, 4, *SHAPE)]
    graph = scan_of(build, 1, 1, 0, 4)
    program = check(graph, arrays)
    assert [segment.host.label for segment in segments_of(program)] == ["scan"]
    told = explain("loop", compile_graph(graph, passes=PASSES, target=TARGET)).host_steps[0].reason
    assert "Python counts the iterations; host steps in there: inv" in told


def test_what_explain_says_of_them():
    for build, calls in ((both, 1), (nested(), 2)):
        compiled = compile_graph(scan_of(build, 1, 1, 1, 4), passes=PASSES, target=TARGET)
        (row,) = explain("loop", compiled).host_steps
        assert "which is launched for all iterations at once" in row.reason
        assert "host steps in there" not in row.reason
        assert f"({calls} kernel calls)" in row.reason


def test_a_profile_has_the_loop_s_time():
    arrays = [*values(1, *SHAPE), *values(1, 4, *SHAPE), *values(1, *SHAPE)]
    _, times = compile_graph(scan_of(both, 1, 1, 1, 4), passes=PASSES, target=TARGET).program.profile(arrays)
    assert [time.label for time in times] == ["scan"]
    assert times[0].nanoseconds > 0


@pytest.mark.parametrize(("most", "graphs"), [(16, 1), (9, 2), (4, 5), (2, 5)])
def test_graphs_have_so_many_launches(monkeypatch, most, graphs):
    """`both` is a launch and a copy an iteration; a step of the loop is not cut."""
    monkeypatch.setattr(device_plan, "GRAPH_LAUNCHES", most)
    arrays = [*values(1, *SHAPE), *values(1, 5, *SHAPE), *values(1, *SHAPE)]
    for reverse in (False, True):
        program = check(scan_of(both, 1, 1, 1, 5, reverse), arrays)
        assert program.stats()["graphs"] == graphs


def test_loops_that_are_too_long_for_graphs_are_launched(monkeypatch):
    monkeypatch.setattr(device_plan, "LOOP_LAUNCHES", 9)
    graph = scan_of(both, 1, 1, 1, 5)
    compiled = compile_graph(graph, passes=PASSES, target=TARGET)
    arrays = [*values(1, *SHAPE), *values(1, 5, *SHAPE), *values(1, *SHAPE)]
    for _ in range(3):
        for got, wanted in zip(compiled.program(arrays), evaluate(graph, arrays), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert compiled.program.stats()["graphs"] == 0
    assert "scan: Python makes the launches of its iterations in every call, it takes 15" in str(
        explain("loop", compiled)
    )


def test_sequences_of_other_lengths_are_refused():
    from kgraph.errors import KGraphError
    from kgraph.runtime.cuda.loops import Loop

    program = compile_graph(scan_of(both, 1, 1, 1, 5), passes=PASSES, target=TARGET).program
    (step,) = program.steps
    types = [(SHAPE, np.dtype(np.float32)), ((4, *SHAPE), np.dtype(np.float32)), (SHAPE, np.dtype(np.float32))]
    plan = functools.partial(device_plan.DevicePlan, scattered=True)
    with pytest.raises(KGraphError, match="another length than 5"):
        Loop(step.function, types, {}, plan)
    types[1] = (5, *SHAPE), np.dtype(np.int32)
    with pytest.raises(KGraphError, match="operand 1 is int32, expected float32"):
        Loop(step.function, types, {}, plan)


# -- what the driver is asked for -------------------------------------------------------------------------------------
def add_and_keep(s, x):
    new = ops.add(s, x)
    return [new, new]


def add(launched: Launched) -> None:
    """What the kernel of `add` does: out[i] = x[i] + y[i]."""
    x, y, out, count = launched.arguments
    floats(out, count)[:] = floats(x, count) + floats(y, count)


def fake_program(fake: FakeDriver, graph: Graph) -> CudaProgram:
    lowered = lower(graph, make_target((9, 0)), [])
    objects = {key: PTX + key.encode() for key in lowered.all_specs()}
    body = lowered.steps[0].function.bodies[0].lowered
    for step in body.steps:
        fake.parameters[objects[step.kernel]] = len(step.operands) + len(step.sizes)
    return lowered.program("model", objects, functools.partial(CudaProgram, device=Gpu(library=fake)))


def test_the_second_call_captures_all_iterations_and_later_ones_are_one_launch():
    fake = FakeDriver()
    program = fake_program(fake, scan_of(add_and_keep, 1, 1, 0, 50))
    fake.run = add
    state, x = values(1, *SHAPE)[0], values(1, 50, *SHAPE)[0]
    wanted = np.cumsum(np.concatenate([state[None], x]), axis=0, dtype=np.float32)[1:]
    asked = []
    for _ in range(4):
        fake.calls.clear()
        last, stack = program([state, x])
        np.testing.assert_allclose(stack, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(last, stack[-1])
        names = fake.names()
        asked.append((names.count("cuLaunchKernel"), names.count("cuGraphLaunch"), names.count("cuMemcpyDtoDAsync_v2")))
        assert "cuMemAlloc_v2" not in names or len(asked) == 1
    # Sums are written into the stack, where the next iteration reads them; the last one is copied once.
    assert asked == [(50, 0, 1), (50, 1, 1), (0, 1, 0), (0, 1, 0)]


def test_iterations_read_and_write_in_place():
    fake = FakeDriver()
    program = fake_program(fake, scan_of(add_and_keep, 1, 1, 0, 3, reverse=True))
    fake.run = add
    program([*values(1, *SHAPE), *values(1, 3, *SHAPE)])
    (first, x2, y2, _), (y2_again, x1, y1, _), (y1_again, x0, y0, _) = [
        call[1].arguments for call in fake.calls if call[0] == "cuLaunchKernel"
    ]
    assert (y2_again, y1_again) == (y2, y1)
    assert x2 - x1 == x1 - x0 == y2 - y1 == y1 - y0 == 36
    assert first not in (y0, y1, y2)
