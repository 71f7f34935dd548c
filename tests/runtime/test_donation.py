"""Outputs that are written over a donated input."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import TensorType
from kgraph.runtime import threads
from kgraph.runtime.plan import Buffer, HostStep, NativeStep
from tests.runtime.kernels import HEAVY, N, program

SHAPE = (N,)


def array(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def buffers(inputs: int, temporaries: int) -> list[Buffer]:
    return [Buffer("input", SHAPE, "float32")] * inputs + [Buffer("temporary", SHAPE, "float32")] * temporaries


def add_one(source: int, target: int, flops: int = 0, inplace: bool = True) -> NativeStep:
    return NativeStep("add_one", (source, target), 1, N, flops=flops, inplace=((1, 0),) if inplace else ())


def test_an_output_overwrites_the_donated_input():
    p = program(buffers(1, 1), [add_one(0, 1)], (0,), (1,), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    (y,) = p([x])
    assert y is x
    np.testing.assert_array_equal(x, before + 1)
    assert p.stats()["in_place_outputs"] == 1
    assert p.bind({"N": 10}).storage.arena_bytes == 0


def test_a_step_that_cannot_work_in_place_keeps_the_input():
    p = program(buffers(1, 1), [add_one(0, 1, inplace=False)], (0,), (1,), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    (y,) = p([x])
    assert y is not x
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(y, before + 1)


def test_a_later_reader_keeps_the_input():
    # new = state + 1 comes first, and only then another output reads the old state.
    steps = [add_one(0, 1), NativeStep("multiply_add", (0, 1, 2), 1, N, sizes=(0,))]
    p = program(buffers(1, 2), steps, (0,), (1, 2), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    new, product = p([x])
    assert new is not x
    np.testing.assert_array_equal(new, before + 1)
    np.testing.assert_allclose(product, before * (before + 1), rtol=1e-6)


@pytest.mark.parametrize("flops", [0, HEAVY])
def test_an_earlier_reader_is_waited_for(flops):
    # total reads the whole old state; the step that overwrites it must come after all threads have read it.
    steps = [NativeStep("total", (0, 1), 1, N, sizes=(N,), flops=flops), add_one(0, 2, flops)]
    p = program(buffers(1, 2), steps, (0,), (1, 2), donations=[(0, 1)])
    n = 2000
    for round_ in range(20):
        x = array(n, round_)
        before = x.copy()
        total, new = p([x])
        assert new is x
        np.testing.assert_array_equal(new, before + 1)
        assert (total == total[0]).all()
        np.testing.assert_allclose(total[0], np.float32(before.astype(np.float64).sum()), atol=1e-3)
    if flops and threads.get_num_threads() > 1:
        assert p.bind({"N": n}).num_barriers == 1


def test_a_chain_of_updates_ends_in_the_input():
    # The last step reads a temporary, and the old state was read before.
    steps = [add_one(0, 1), add_one(1, 2), NativeStep("total", (2, 3), 1, N, sizes=(N,))]
    p = program(buffers(1, 3), steps, (0,), (3,), donations=[(0, 0)])
    x = array(8)
    before = x.copy()
    (y,) = p([x])
    assert y is x
    np.testing.assert_allclose(y, np.full(8, (before + 2).sum()), rtol=1e-5)


def test_steps_in_a_row_change_the_input_where_it_lies():
    p = program(buffers(1, 3), [add_one(0, 1), add_one(1, 2), add_one(2, 3)], (0,), (3,), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    (y,) = p([x])
    assert y is x
    np.testing.assert_allclose(x, before + 3, rtol=1e-6)
    assert p.bind({"N": 10}).storage.arena_bytes == 0
    assert p.bind({"N": 10}).storage.num_in_place == 2  # besides the output itself


def test_steps_in_a_row_leave_what_is_read_in_between():
    # The second reader comes after the step that would overwrite what it reads.
    steps = [add_one(0, 1), add_one(1, 2), NativeStep("multiply_add", (1, 2, 3), 1, N, sizes=(0,))]
    p = program(buffers(1, 3), steps, (0,), (2, 3), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    new, product = p([x])
    assert new is x
    np.testing.assert_allclose(new, before + 2, rtol=1e-6)
    np.testing.assert_allclose(product, (before + 1) * (before + 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((7,), (3,)),
        ((40, 60, 50), (3, 60, 50)),
        ((40, 60, 50), (2, 7, 11)),
        ((3, 90_001), (2, 70_000)),
        ((5, 4, 0), (1, 2, 0)),
        ((1, 200_000), (1, 9)),
    ],
)
def test_windows_are_written_where_a_donated_array_lies(shape, rows):
    """By several threads where the array is large, with long rows cut into chunks; twice in a row."""
    types = [TensorType(shape, "float32"), TensorType(rows, "float32"), *[TensorType((), "int32")] * len(shape)]

    def build(x, update, *starts):
        return ops.dynamic_update_slice(
            ops.dynamic_update_slice(x, update, *starts), ops.neg(update), *[np.int32(0)] * len(shape)
        )

    compiled = compile_graph(trace(build, *types), donations=[(0, 0)])
    rng = np.random.default_rng(0)
    update = rng.normal(size=rows).astype(np.float32)
    for _ in range(5):
        starts = [int(rng.integers(-2, n + 2)) for n in shape]
        x = rng.normal(size=shape).astype(np.float32)
        wanted = x.copy()
        clamped = [min(max(s, 0), n - m) for s, n, m in zip(starts, shape, rows)]
        wanted[tuple(slice(s, s + m) for s, m in zip(clamped, rows))] = update
        wanted[tuple(slice(0, m) for m in rows)] = -update
        (y,) = compiled.program([x, update, *(np.array(s, np.int32) for s in starts)])
        assert y is x or not x.size
        np.testing.assert_array_equal(x, wanted)


def test_state_passed_through_and_read_by_another_output():
    # Output 0 is the input itself, so output 1 must not be written over it.
    p = program(buffers(1, 1), [add_one(0, 1)], (0,), (0, 1), donations=[(0, 1)])
    x = array(5)
    before = x.copy()
    same, new = p([x])
    np.testing.assert_array_equal(same, before)
    np.testing.assert_array_equal(new, before + 1)


def test_nothing_is_overwritten_before_the_last_host_step():
    def fail(arrays, sizes):
        raise ZeroDivisionError

    steps = [add_one(0, 1), HostStep(fail, (1, 2), 1)]
    p = program(buffers(1, 2), steps, (0,), (1, 2), donations=[(0, 0)])
    x = array(6)
    before = x.copy()
    with pytest.raises(ZeroDivisionError):
        p([x])
    np.testing.assert_array_equal(x, before)


def test_out_and_profile_leave_the_input_as_it_is():
    p = program(buffers(1, 1), [add_one(0, 1)], (0,), (1,), donations=[(0, 0)])
    x = array(10)
    before = x.copy()
    y = np.empty_like(x)
    p([x], out=[y])
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(y, before + 1)
    (z,), _ = p.profile([x])
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(z, before + 1)


def test_donations_of_other_types_or_twice_are_refused():
    other = [Buffer("input", SHAPE, "float32"), Buffer("temporary", (N, 1), "float32", alias=0)]
    with pytest.raises(ValueError, match="another type"):
        program(other, [], (0,), (1,), donations=[(0, 0)])
    with pytest.raises(ValueError, match="donated twice"):
        program(buffers(1, 2), [add_one(0, 1), add_one(0, 2)], (0,), (1, 2), donations=[(0, 0), (0, 1)])
