"""The threads of simulated kernels: turns, barriers, memory, faults."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.errors import DeviceError
from kgraph.runtime.cuda import simulated_threads
from tests.cuda.driver import ON_GPU

if ON_GPU:
    pytest.skip("kernels run on a GPU here", allow_module_level=True)

HEAD = """from numba import cuda
from numpy import float32, uint32

def kernel(out: "uint32*"):
    shared = cuda.shared.array(4, uint32)
    t = uint32(cuda.threadIdx.x)
    at = uint32(uint32(cuda.blockIdx.x) * uint32(4) + t)
"""


def run(*lines: str, grid: int = 2, block: int = 4, shared_bytes: int = 0) -> np.ndarray:
    """What a kernel of these lines writes, four numbers a block."""
    out = np.zeros(4 * grid, np.uint32)
    function = simulated_threads.load("test", HEAD + "".join(f"    {line}\n" for line in lines))
    simulated_threads.run(function, grid, block, shared_bytes, [out])
    return out


def test_threads_exchange_what_they_write_before_a_barrier():
    result = run("shared[t] = t", "cuda.syncthreads()", "out[at] = shared[uint32(3) - t]")
    assert list(result) == [3, 2, 1, 0] * 2


@pytest.mark.parametrize(
    "other", ["uint32(uint32(t + uint32(1)) % uint32(4))", "uint32(uint32(t + uint32(3)) % uint32(4))"]
)
def test_what_lacks_a_barrier_is_wrong_in_one_of_two_blocks(other):
    first, second = run("shared[t] = t", f"out[at] = shared[{other}]").reshape(2, 4)
    assert list(first) != list(second)


def test_memory_of_a_block_holds_garbage_at_first():
    assert set(run("out[at] = shared[t]", "shared[t] = uint32(5)")) == {0xA5A5A5A5}


def test_shared_memory_of_the_launch():
    lines = ["whole = cuda.shared.array(0, uint32)", "out[at] = uint32(len(whole))"]
    assert set(run(*lines, shared_bytes=24)) == {6}


@pytest.mark.parametrize(
    "lines",
    [
        ["if t > uint32(1):", "    cuda.syncthreads()"],
        ["if t > uint32(1):", "    cuda.syncthreads()", "else:", "    cuda.syncthreads()"],
    ],
    ids=["some threads end", "two barriers"],
)
def test_all_threads_of_a_block_meet_at_one_barrier(lines):
    with pytest.raises(DeviceError, match="wait at barriers"):
        run(*lines)


def test_faults_name_their_thread():
    with pytest.raises(IndexError) as caught:
        run("out[uint32(at + uint32(uint32(90) * uint32(t == uint32(2))))] = t")
    assert caught.value.__notes__ == ["thread 2 of block 0"]
