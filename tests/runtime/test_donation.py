"""Outputs that are written over a donated input."""

import numpy as np
import pytest

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
