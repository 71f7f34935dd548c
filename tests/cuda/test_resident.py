"""Weights on a device that several programs read: what is uploaded, where it lies, and when its memory goes."""

from __future__ import annotations

import functools
import gc
import weakref

import keras
import numpy as np
import pytest

import kgraph
from kgraph import ops
from kgraph.codegen.compiler import compile_spec
from kgraph.codegen.cuda.target import make_target
from kgraph.codegen.lower import lower
from kgraph.compiler import compile_graph
from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.runtime.cuda.gpu import Gpu
from kgraph.runtime.cuda.program import CudaProgram
from kgraph.runtime.cuda.resident import Resident
from kgraph.runtime.cuda.simulator import SimulatorDevice
from kgraph.targets import resolve
from tests.cuda.fake_driver import FakeDriver
from tests.cuda.test_gpu import PTX

SIDE = 32
NBYTES = SIDE * SIDE * 4


@pytest.fixture
def device():
    return SimulatorDevice()


@pytest.fixture
def uploads(device, monkeypatch):
    return counted(device, monkeypatch)


def counted(device, monkeypatch) -> list[int]:
    """Gets the bytes of every upload of a weight's size."""
    seen: list[int] = []
    copy_in = device.copy_in

    def copy(address: int, array: np.ndarray) -> None:
        if array.nbytes == NBYTES:
            seen.append(array.nbytes)
        copy_in(address, array)

    monkeypatch.setattr(device, "copy_in", copy)
    return seen


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (SIDE, SIDE)).astype(np.float32)


def content(device, address: int) -> np.ndarray:
    out = np.empty((SIDE, SIDE), np.float32)
    device.copy_out(out, address)
    return out


def used(device) -> int:
    free, total = device.memory()
    return total - free


# -- residents --------------------------------------------------------------------------------------------------------
def test_one_upload_for_all_and_memory_until_the_last_one_goes(device, uploads):
    w = weight()
    residents = [Resident(device) for _ in range(3)]
    addresses = {resident.address("w", w) for resident in residents}
    assert len(addresses) == 1
    assert (len(uploads), used(device)) == (1, NBYTES)
    while residents:
        assert used(device) == NBYTES
        residents.pop()
    assert used(device) == 0
    assert not device.copies


def test_a_new_value_takes_the_old_one_s_place_for_all(device, uploads):
    a, b, old, new = Resident(device), Resident(device), weight(), weight(1)
    address = a.address("w", old)
    b.address("w", old)
    for resident in (a, b, a):
        resident.keep_only([new])
        assert resident.address("w", new) == address
        np.testing.assert_array_equal(content(device, address), new)
    assert (len(uploads), used(device)) == (2, NBYTES)


def test_who_keeps_the_old_value_gets_it_again(device, uploads):
    a, b, old, new = Resident(device), Resident(device), weight(), weight(1)
    a.address("w", old)
    b.address("w", old)
    there = a.address("w", new)
    apart = b.address("w", old)
    assert apart != there
    for _ in range(3):  # from here on both stay where they are
        assert (a.address("w", new), b.address("w", old)) == (there, apart)
    np.testing.assert_array_equal(content(device, there), new)
    np.testing.assert_array_equal(content(device, apart), old)
    assert len(uploads) == 3
    assert b.address("w", new) == there  # they meet again
    assert (len(uploads), used(device)) == (3, NBYTES)


def test_weights_of_one_program_do_not_take_each_other_s_place(device):
    first, second = weight(1), weight(2)
    for later in ([second, first], [first, first], [weight(3), first], [second, weight(4)]):
        resident, tied = Resident(device), weight()
        for before in ([tied, tied], [first, second]):
            for key, array in enumerate(before):
                resident.address(key, array)
            addresses = [resident.address(key, array) for key, array in enumerate(later)]
            for address, array in zip(addresses, later):
                np.testing.assert_array_equal(content(device, address), array)


def test_a_host_array_is_let_go_when_no_program_has_it(device):
    a, b, old, new = Resident(device), Resident(device), weight(), weight(1)
    gone = weakref.ref(old)
    a.address("w", old)
    b.address("w", old)
    del old
    a.keep_only([new])
    assert gone() is not None
    b.keep_only([new])
    assert gone() is None
    assert used(device) == NBYTES  # for what replaces it


def test_what_is_made_of_an_array_is_told_from_the_array(device):
    w, fills = weight(), []

    def fill(address: int) -> None:
        fills.append(address)
        device.copy_in(address, -w)

    a, b = Resident(device), Resident(device)
    plain = a.address("w", w)
    made = [resident.made("key", ("negative",), w, w.nbytes, fill) for resident in (a, b)]
    assert made == [fills[0]] * 2 != [plain] * 2
    assert b.address("w", w) == plain
    np.testing.assert_array_equal(content(device, plain), w)
    np.testing.assert_array_equal(content(device, made[0]), -w)


def test_a_failed_upload_is_made_up_for(device, monkeypatch):
    a, b, old, new = Resident(device), Resident(device), weight(), weight(1)
    a.address("w", old)
    b.address("w", old)
    with monkeypatch.context() as broken:

        def fail(address: int, array: np.ndarray) -> None:
            device._view(address, array.nbytes)[:] = 0
            raise DeviceError("no")

        broken.setattr(device, "copy_in", fail)
        with pytest.raises(DeviceError):
            a.address("w", new)
    for resident, array in ((b, old), (a, new), (b, old)):
        np.testing.assert_array_equal(content(device, resident.address("w", array)), array)


def test_where_memory_lacks_others_keep_theirs(monkeypatch):
    device = SimulatorDevice(limit=NBYTES + 100)
    a, b, w = Resident(device), Resident(device), weight()
    address = a.address("w", w)
    assert b.address("w", w) == address
    with pytest.raises(DeviceMemoryError):
        b.address("other", weight(1))
    for resident in (a, b):
        np.testing.assert_array_equal(content(device, resident.address("w", w)), w)


# -- compiled forms ---------------------------------------------------------------------------------------------------
def model_of() -> keras.Model:
    inputs = keras.Input((SIDE,))
    x = keras.layers.Dense(SIDE, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(SIDE)(x))


def test_forms_of_a_model_share_their_weights(monkeypatch):
    model = model_of()
    forms = [kgraph.compile(model, target="cuda-simulator"), kgraph.compile(model, target="cuda-simulator")]
    forms.append(kgraph.jit(lambda x: model(x) * 2, target="cuda-simulator"))
    x = np.random.default_rng(0).uniform(-1, 1, (2, SIDE)).astype(np.float32)
    device = device_of(forms[0], x)
    uploads = counted(device, monkeypatch)
    gc.collect()
    before = used(device)
    scales = (1, 1, 2)

    def check() -> None:
        for form, scale in zip(forms, scales):
            wanted = np.asarray(model(x)) * scale
            np.testing.assert_allclose(np.asarray(form(x)), wanted, rtol=1e-5, atol=1e-5)

    check()
    first = used(device) - before
    assert not uploads  # the first form had been called
    assert first < 2 * NBYTES
    model.layers[1].kernel.assign(weight(7))
    check()
    check()
    assert len(uploads) == 1
    del forms[:2]
    gc.collect()
    model.layers[2].kernel.assign(weight(8))
    np.testing.assert_allclose(np.asarray(forms[0](x)), np.asarray(model(x)) * 2, rtol=1e-5, atol=1e-5)
    assert len(uploads) == 2


def device_of(form, x):
    form(x)
    variant, _ = form._bind((x,), {})
    return variant.compiled.program.device


def product_graph(rows: Dim | int) -> Graph:
    types = [TensorType((rows, SIDE), "float32"), TensorType((SIDE, SIDE), "float32")]
    graph = trace(lambda x, w: ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,)), *types)
    graph.inputs, graph.params = graph.inputs[:1], graph.inputs[1:]
    return graph


def test_graphs_stay_valid_when_a_shared_weight_changes(monkeypatch):
    target = resolve("cuda-simulator")
    programs = [compile_graph(product_graph(rows), target=target).program for rows in (2, 3)]
    device = programs[0].device
    uploads = counted(device, monkeypatch)
    for seed in (0, 1, 2):
        w = weight(seed)
        for program in programs:
            program.set_params({0: w})
        for _ in range(3):
            for rows, program in zip((2, 3), programs):
                x = np.ones((rows, SIDE), np.float32)
                (y,) = program([x])
                np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
                assert program.stats()["graphs"] <= 1
    assert len(uploads) == 3
    assert programs[0].resident_params.nbytes() == NBYTES


def test_idle_programs_give_up_their_memory_but_not_a_weight_that_others_read():
    graphs = [product_graph(rows) for rows in (2, 30)]
    device = SimulatorDevice()
    target = resolve("cuda-simulator")
    w = weight()

    def programs() -> list[CudaProgram]:
        found = []
        for graph in graphs:
            lowered = lower(graph, target, [])
            objects = {key: compile_spec(spec, target) for key, spec in lowered.all_specs().items()}
            found.append(lowered.program("model", objects, functools.partial(CudaProgram, device=device)))
            found[-1].set_params({0: w})
        return found

    def check(program: CudaProgram, rows: int) -> None:
        x = np.random.default_rng(rows).uniform(-1, 1, (rows, SIDE)).astype(np.float32)
        np.testing.assert_allclose(program([x])[0], x @ w, rtol=1e-5, atol=1e-5)

    small, large = programs()
    check(small, 2)
    both = used(device)
    check(large, 30)
    device._limit = used(device) - 1  # no room for what both hold
    del small, large
    gc.collect()
    assert used(device) == 0
    small, large = programs()
    check(small, 2)
    assert used(device) == both
    check(large, 30)
    assert small.stats()["device_bytes"] == 0
    assert small.resident_params.nbytes() == NBYTES
    del large
    gc.collect()
    check(small, 2)
    assert used(device) == both


# -- the driver -------------------------------------------------------------------------------------------------------
def programs_of(fake: FakeDriver, count: int) -> list[CudaProgram]:
    lowered = lower(product_graph(2), make_target((9, 0)), [])
    objects = {key: PTX + key.encode() for key in lowered.all_specs()}
    for step in lowered.steps:
        fake.parameters[objects[step.kernel]] = len(step.operands) + len(step.sizes)
    gpu = Gpu(library=fake)
    return [lowered.program("model", objects, functools.partial(CudaProgram, device=gpu)) for _ in range(count)]


def uploaded(fake: FakeDriver) -> int:
    return sum(call[1] for call in fake.calls if call[0] == "cuMemcpyHtoDAsync_v2" and call[1] == NBYTES)


def test_a_lost_device_takes_all_copies_along():
    fake = FakeDriver()
    programs = programs_of(fake, 3)
    w, x = weight(), np.ones((2, SIDE), np.float32)
    for program in programs:
        program.set_params({0: w})
        program([x])
    assert uploaded(fake) == NBYTES
    gpu = programs[0].device
    gpu.trim()
    held = fake._used()
    programs.pop()
    gc.collect()
    gpu.trim()
    assert held - fake._used() < NBYTES  # others still read the weight
    fake.failures["cuMemcpyHtoDAsync_v2"] = [700]
    programs[0].set_params({0: weight(1)})
    for program in programs:
        with pytest.raises(DeviceError):
            program([x])
    assert not gpu.copies or all(copy.array is not programs[0].values[0] for copy in gpu.copies.values())
