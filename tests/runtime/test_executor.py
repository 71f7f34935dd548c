import ctypes
import itertools
import platform
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.codegen.cpu.executor import executor_object
from kgraph.errors import ArtifactError
from kgraph.runtime import layout, threads
from kgraph.runtime.loader import Library
from kgraph.runtime.plan import Buffer, HostStep, NativeStep, Program
from kgraph.runtime.schedule import StepCost, choose_chunks, choose_threads, place_barriers
from tests.runtime import kernels
from tests.runtime.kernels import HEAVY, N, chain, program, totals


def in_order(x):
    """The float32 sum as the kernel `total` forms it."""
    return np.cumsum(x, dtype=np.float32)[-1]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 40_000])
def test_every_element_is_computed_once(num_threads, count, size):
    num_threads(count)
    p = chain(5, flops=HEAVY, inplace=False)
    x = np.arange(size, dtype=np.float32)
    for _ in range(10):
        np.testing.assert_array_equal(p([x])[0], x + 5)
    steps = p.bind({"N": size}).steps
    assert all(s.threads == min(count, size) for s in steps)


@pytest.mark.parametrize("count", [2, 4])
def test_steps_wait_for_what_they_read(num_threads, count):
    num_threads(count)
    p = totals(8)
    x = np.zeros(500, np.float32)
    expected = x
    for i in range(8):
        expected = np.full(500, in_order(expected)) if i % 2 else expected + 1
    for _ in range(300):
        np.testing.assert_array_equal(p([x])[0], expected)
    assert p.bind({"N": 500}).num_barriers == 7


def test_serial_and_parallel_steps_mix(num_threads):
    num_threads(2)
    buffers = [Buffer("input", (N,), "float32")] + [Buffer("temporary", (N,), "float32") for _ in range(12)]
    steps = []
    for i in range(12):
        kernel = "total" if i % 4 == 3 else "add_one"
        steps.append(NativeStep(kernel, (i, i + 1), 1, N, sizes=(N,), flops=HEAVY if i % 3 else 0))
    p = program(buffers, steps, (0,), (12,))
    x = np.zeros(200, np.float32)
    expected = x
    for i in range(12):
        expected = np.full(200, in_order(expected)) if i % 4 == 3 else expected + 1
    assert {s.threads for s in p.bind({"N": 200}).steps} == {1, 2}
    for _ in range(300):
        np.testing.assert_array_equal(p([x])[0], expected)


def test_host_steps_between_parallel_steps(num_threads):
    num_threads(2)
    buffers = [Buffer("input", (N,), "float32")] + [Buffer("temporary", (N,), "float32") for _ in range(9)]
    steps = []
    for i in range(9):
        if i % 3 == 2:
            steps.append(HostStep(lambda arrays, sizes: [arrays[0] * 2], (i, i + 1), 1))
        else:
            steps.append(NativeStep("add_one", (i, i + 1), 1, N, flops=HEAVY))
    p = program(buffers, steps, (0,), (9,))
    x = np.arange(1000, dtype=np.float32)
    expected = (((x + 2) * 2 + 2) * 2 + 2) * 2
    for _ in range(200):
        np.testing.assert_array_equal(p([x])[0], expected)
    assert p.bind({"N": 1000}).threads == 2
    np.testing.assert_array_equal(p.profile([x])[0][0], expected)


def test_more_threads_than_cores_make_progress(num_threads):
    num_threads(16)
    p = totals(20)
    x = np.zeros(64, np.float32)
    (first,) = p([x])
    for _ in range(20):
        np.testing.assert_array_equal(p([x])[0], first)


def test_scratch_is_private_to_a_thread(num_threads):
    num_threads(4)
    size = 1 << 16
    buffers = [Buffer("input", (N,), "uint8"), Buffer("temporary", (N,), "uint8")]
    p = program(buffers, [NativeStep("copy", (0, 1), 1, N, scratch_bytes=N, flops=HEAVY, label="copy")], (0,), (1,))
    x = np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8)
    for _ in range(50):
        np.testing.assert_array_equal(p([x])[0], x)
    assert p.bind({"N": size}).scratch_bytes == size


def test_many_threads_call_one_program(num_threads):
    num_threads(2)
    p = chain(6, flops=HEAVY)
    faults = []

    def work(seed):
        try:
            for i in range(60):
                x = np.full(seed * 10 + 1, seed + i, np.float32)
                if not (p([x])[0] == x + 6).all():
                    faults.append(seed)
        except Exception as error:
            faults.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(30)
    assert not faults
    assert not any(w.is_alive() for w in workers)
    assert 1 <= p.bind({"N": 11}).num_contexts() <= 16


def test_parameters_swapped_while_others_call(num_threads):
    num_threads(2)
    size = 20_000
    buffers = [
        Buffer("input", (N,), "float32"),
        Buffer("param", (size,), "float32"),
        Buffer("temporary", (N,), "float32"),
    ]
    p = program(buffers, [NativeStep("multiply_add", (0, 1, 2), 1, N, sizes=(0,), flops=HEAVY)], (0,), (2,), (1,))
    p.set_param(0, np.zeros(size, np.float32))
    x = np.ones(size, np.float32)
    stop, faults = threading.Event(), []

    def call():
        while not stop.is_set():
            (y,) = p([x])
            if not (y == y[0]).all():
                faults.append(y)

    workers = [threading.Thread(target=call) for _ in range(4)]
    for w in workers:
        w.start()
    for i in range(300):
        p.set_param(0, np.full(size, i % 7, np.float32))
    stop.set()
    for w in workers:
        w.join(30)
    assert not faults


def test_the_gil_is_released():
    text = f"""
declare i32 @usleep(i32)
{kernels.HEADER}
  %r = call i32 @usleep(i32 200000)
  ret void
}}"""
    p = Program(
        "sleep",
        [Buffer("input", (1,), "float32"), Buffer("temporary", (1,), "float32")],
        [NativeStep("k", (0, 1), 1, 1)],
        (0,),
        (1,),
        kernels={"k": compile_ir(text)},
        executor=executor_object(),
    )
    x = np.zeros(1, np.float32)

    def five_calls() -> float:
        workers = [threading.Thread(target=p, args=([x],)) for _ in range(5)]
        start = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        return time.perf_counter() - start

    # One after the other they take a second; a busy machine may delay one attempt.
    assert any(five_calls() < 0.8 for _ in range(4))


def test_late_workers_do_not_delay_a_call(num_threads):
    # A worker that sleeps in one chunk of one step is waited for; those that never came in are not.
    num_threads(4)
    p = chain(3, flops=HEAVY)
    x = np.zeros(100, np.float32)
    p([x])
    time.sleep(0.01)  # all workers are parked now

    def five_calls() -> float:
        start = time.perf_counter()
        for _ in range(5):
            p([x])
            time.sleep(0.002)
        return time.perf_counter() - start

    assert any(five_calls() < 1.0 for _ in range(4))


def test_float_state_of_the_caller_does_not_matter(num_threads):
    """Denormals are kept even if the calling thread flushes them, and the caller's setting is put back."""
    text = """
declare void @llvm.x86.sse.ldmxcsr(ptr)
declare void @llvm.x86.sse.stmxcsr(ptr)
define void @set(ptr %p) {
  call void @llvm.x86.sse.ldmxcsr(ptr %p)
  ret void
}
define void @get(ptr %p) {
  call void @llvm.x86.sse.stmxcsr(ptr %p)
  ret void
}"""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 machine")
    library = Library({"state": compile_ir(text)})
    set_, get = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(library.address("state", s)) for s in ("set", "get"))
    num_threads(2)
    buffers = [Buffer("input", (N,), "float32"), Buffer("input", (N,), "float32"), Buffer("temporary", (N,), "float32")]
    p = program(buffers, [NativeStep("multiply_add", (0, 1, 2), 1, N, sizes=(0,), flops=HEAVY)], (0, 1), (2,))
    x, y = np.full(100, 1e-20, np.float32), np.full(100, 1e-19, np.float32)
    (expected,) = p([x, y])
    assert (expected > 0).all()
    state = ctypes.c_uint32(0x1F80 | 0x8040)  # flush to zero, denormals are zero
    set_(ctypes.byref(state))
    try:
        for _ in range(20):
            out = p([x, y])[0].tobytes()
            now = ctypes.c_uint32()
            get(ctypes.byref(now))
            assert now.value & ~0x3F == 0x1F80 | 0x8040
            assert out == expected.tobytes()
    finally:
        state.value = 0x1F80
        set_(ctypes.byref(state))


def test_set_num_threads_takes_effect_on_existing_programs(num_threads):
    p = chain(3, flops=HEAVY)
    x = np.zeros(100, np.float32)
    for count in (1, 3, 2, 1):
        num_threads(count)
        np.testing.assert_array_equal(p([x])[0], 3)
        assert p._bind(((100,),)).threads == count
    num_threads(2)
    b = p.bind({"N": 100})
    num_threads(3)
    np.testing.assert_array_equal(b([x])[0], 3)  # a stale binding is replaced


def test_workers_are_started_when_needed_only(num_threads):
    num_threads(2)
    p = chain(3, flops=10)
    p([np.zeros(100, np.float32)])
    assert p.bind({"N": 100}).threads == 1


# -- the schedule ----------------------------------------------------------------------------------------------------
def test_small_steps_are_serial():
    assert choose_threads([StepCost(1e3, 1e3, 64)] * 5, 8) == [1] * 5
    assert choose_threads([StepCost(1e7, 1e6, 64)], 8) == [8]
    assert choose_threads([StepCost(1e7, 1e6, 3)], 8) == [3]
    # One step that would gain, but not enough to pay for the fork.
    assert choose_threads([StepCost(1.8e5, 0, 64)], 2) == [1]
    # More threads than a step is worth only meet more slowly.
    (few,) = choose_threads([StepCost(4e6, 0, 1000)], 256)
    (many,) = choose_threads([StepCost(4e9, 0, 1000)], 256)
    assert few < 30
    assert many == 256


def test_chunks_end_where_units_stop_sharing_work():
    assert choose_chunks(StepCost(1e9, 0, 8, grain=2), 2) == (2, 2)
    assert choose_chunks(StepCost(1e9, 0, 800, grain=2), 3) == (4, 2)
    # Five grains for two threads: whole ones would leave one of the threads with half as much again.
    assert choose_chunks(StepCost(1e9, 0, 10, grain=2), 2) == (1, 1)
    assert choose_chunks(StepCost(1e9, 0, 8, grain=8), 2) == (1, 1)


@given(st.integers(1, 10**6), st.floats(0, 1e12), st.integers(2, 64), st.integers(0, 100))
def test_chunks_are_never_empty(extent, flops, count, shared):
    count = min(count, extent)
    chunks, grain = choose_chunks(StepCost(flops, 0, extent, shared), count)
    total, grains = chunks * count, extent // grain
    bounds = [grains * c // total * grain for c in range(total)] + [extent]
    assert all(a < b for a, b in itertools.pairwise(bounds))


ranges = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3)).map(lambda r: (r[0], r[0] + r[1])), max_size=2)
steps = st.lists(st.tuples(st.sampled_from([1, 2]), ranges, ranges), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_conflicting_steps_have_a_barrier_between_them(items):
    barriers = place_barriers(*map(list, zip(*items)))

    def overlap(a, b):
        return any(x < v and u < y for x, y in a for u, v in b)

    for later, (n, read, write) in enumerate(items):
        needed = False
        for earlier in range(later):
            m, r, w = items[earlier]
            conflict = overlap(write, r + w) or overlap(read, w)
            if conflict and not n == m == 1:
                assert any(barriers[earlier + 1 : later + 1])
                needed = True
        assert needed or not barriers[later]


def test_executor_of_another_version_is_refused(monkeypatch):
    old = executor_object()
    monkeypatch.setattr(layout, "STEP_EXTENT", layout.STEP_EXTENT + 8)
    with pytest.raises(ArtifactError, match="another version"):
        threads.Executor(old)


def test_pool_is_shared_by_programs(num_threads):
    num_threads(2)
    a, b = chain(3, flops=HEAVY), chain(4, flops=HEAVY)
    x = np.zeros(50, np.float32)
    for _ in range(50):
        assert (a([x])[0] == 3).all()
        assert (b([x])[0] == 4).all()
    assert threads.pool(a.executor) is threads.pool(b.executor)
