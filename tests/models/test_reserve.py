"""Memory that is asked for while a model is traced."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import kgraph
from kgraph import compiled as compiled_module
from kgraph.codegen.kernel import Temporary
from kgraph.ir import TensorType
from kgraph.preparation import _room
from kgraph.reserve import LEAST_BYTES, LINE, Reserve, aligned_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for memory")
threads = pytest.mark.skipif(kgraph.get_num_threads() < 2, reason="one core")


@threads
@pytest.mark.parametrize("nbytes", [0, 1, LEAST_BYTES // 2 + 5, LEAST_BYTES + 12345, 3 * LEAST_BYTES])
def test_the_block_is_no_larger_than_asked_for(nbytes):
    block = Reserve(LEAST_BYTES + 12345).take(nbytes)
    assert block.nbytes == min(nbytes, LEAST_BYTES + 12345)
    assert block.nbytes == 0 or block.ctypes.data % LINE == 0
    block.fill(7)
    assert np.all(block == 7)


def test_small_ones_and_single_threads_get_none():
    assert Reserve(LEAST_BYTES - 1).take(LEAST_BYTES).nbytes == 0
    before = kgraph.get_num_threads()
    kgraph.set_num_threads(1)
    try:
        assert Reserve(LEAST_BYTES).take(LEAST_BYTES).nbytes == 0
    finally:
        kgraph.set_num_threads(before)


def test_a_block_is_taken_once():
    reserve = Reserve(LEAST_BYTES)
    reserve.take(LEAST_BYTES)
    assert reserve.take(LEAST_BYTES).nbytes == 0


@threads
def test_weights_lie_in_the_reserve_as_far_as_it_goes(monkeypatch):
    blocks = []

    class Recorded(Reserve):
        def take(self, nbytes):
            blocks.append(super().take(nbytes))
            return blocks[-1]

    monkeypatch.setattr(compiled_module, "Reserve", Recorded)
    conv = keras.layers.Conv2D(752, 2, padding="same")
    model = keras.Sequential([keras.Input((1, 1, 752)), conv, keras.layers.Conv2D(64, 1), keras.layers.Dense(33)])
    fast = kgraph.compile(model)
    x = np.random.default_rng(0).standard_normal((3, 1, 1, 752)).astype("float32")
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-5, atol=1e-5)
    (block,) = blocks
    assert block.nbytes == conv.kernel.value.nbytes  # a window of one takes the place of its variable's value
    inside = [a for a in fast._variants[()].program.values if np.shares_memory(a, block)]
    assert sum(a.nbytes for a in inside) >= block.nbytes
    model.layers[0].set_weights([np.zeros((2, 2, 752, 752)), np.zeros(752)])
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-5, atol=1e-5)


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@linux
@pytest.mark.parametrize("number", [1, 2])
def test_freed_memory_goes_back_to_the_system(number):
    before = kgraph.get_num_threads()
    kgraph.set_num_threads(number)
    try:
        blocks = [np.ones(48 << 10, np.uint8) for _ in range(2000)]
        last = blocks[-1]  # above the others, so that freeing them alone gives nothing back
        full = _resident_bytes()
        blocks.clear()
        Reserve(LEAST_BYTES).take(0)
        assert full - _resident_bytes() > 60 << 20
        assert np.all(last == 1)
    finally:
        kgraph.set_num_threads(before)


def test_small_weights_take_what_large_ones_leave_of_the_reserve():
    unit = 1 << 10
    sizes = [3 * unit, 6 * unit, 5 * unit + 4, 4 * unit]
    calls = {n: SimpleNamespace(operands=[Temporary(TensorType((s // 4,), "float32"))]) for n, s in enumerate(sizes)}
    block = aligned_bytes(10 * unit)
    room = _room(calls, SimpleNamespace(take=lambda nbytes: block[:nbytes]))
    assert {n for n, array in room.items() if np.shares_memory(array, block)} == {1, 3}
    for n, array in room.items():
        assert array.nbytes == sizes[n]
        assert array.ctypes.data % LINE == 0
        array.fill(n)
    assert all(np.all(array == n) for n, array in room.items())
