"""The device and its programs on a driver that is played by Python: calls, argument blocks, graphs, errors."""

from __future__ import annotations

import ctypes
import functools
import gc

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda.target import make_target
from kgraph.codegen.lower import lower
from kgraph.disk_cache import DiskCache
from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value
from kgraph.runtime.cuda import device as device_module
from kgraph.runtime.cuda import driver as driver_module
from kgraph.runtime.cuda.device_array import DeviceArray
from kgraph.runtime.cuda.gpu import Gpu
from kgraph.runtime.cuda.program import CudaProgram
from tests.cuda.fake_driver import CUBIN, FakeDriver, Launched

N = Dim.symbol("N")
PTX = b"// ptx of "


def loaded(fake: FakeDriver) -> list[bytes]:
    """The images of all modules."""
    return [call[1] for call in fake.calls if call[0] == "cuModuleLoadDataEx"]


def program_of(fake: FakeDriver, graph: Graph, **fields) -> CudaProgram:
    """The program of a graph on the fake driver, whose kernels are nothing but their keys."""
    lowered = lower(graph, make_target((9, 0)), [])
    objects = {key: PTX + key.encode() for key in lowered.specs}
    for step in lowered.steps:
        if hasattr(step, "kernel"):
            fake.parameters[objects[step.kernel]] = len(step.operands) + len(step.sizes)
    return lowered.program("model", objects, functools.partial(CudaProgram, device=Gpu(library=fake)), **fields)


def chain(*names: str, dtype: str = "float32") -> Graph:
    """x -> name(name(... x)), with x of shape [N, 3]."""
    graph = Graph([Value(TensorType((N, 3), dtype), name="x")], name="chain")
    value = graph.inputs[0]
    for name in names:
        value = graph.add(PRIMITIVES[name], [value])
    graph.outputs = [value]
    return graph


def floats(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def negate(launched: Launched) -> None:
    """What the kernel of `neg` does: out[i] = -x[i]."""
    x, out, count = launched.arguments
    floats(out, count)[:] = -floats(x, count)


# -- kernels ----------------------------------------------------------------------------------------------------------
def test_what_the_driver_makes_of_kernels_is_kept(tmp_path):
    """By the PTX, the device's architecture and the driver's version; without a cache the PTX itself is loaded."""
    cache = DiskCache(tmp_path, 1 << 20)
    first = FakeDriver()
    Gpu(library=first, cache=cache).load({"a": b"ptx a", "b": b"ptx b"})
    assert loaded(first) == [CUBIN + b"ptx a\0", CUBIN + b"ptx b\0"]
    assert first.names().count("cuLinkCreate_v2") == first.names().count("cuLinkDestroy") == 2
    for fake, links in ((FakeDriver(), 0), (FakeDriver(version=12090), 1)):
        Gpu(library=fake, cache=cache).load({"another name": b"ptx a"})
        assert loaded(fake) == [CUBIN + b"ptx a\0"]
        assert fake.names().count("cuLinkCreate_v2") == links
    plain = FakeDriver()
    Gpu(library=plain).load({"a": b"ptx a"})
    assert loaded(plain) == [b"ptx a"]


@pytest.mark.parametrize("function", ["cuLinkCreate_v2", "cuLinkAddData_v2", "cuLinkComplete"])
def test_kernels_that_the_driver_refuses_are_not_kept(tmp_path, function):
    fake = FakeDriver()
    fake.failures[function] = [218]
    gpu = Gpu(library=fake, cache=DiskCache(tmp_path, 1 << 20))
    with pytest.raises(DeviceError, match=f"kernel k: {function} failed"):
        gpu.load({"k": b"ptx"})
    assert not list(tmp_path.glob("??/*"))
    gpu.load({"k": b"ptx"})
    assert loaded(fake) == [CUBIN + b"ptx\0"]


# -- the device -------------------------------------------------------------------------------------------------------
def test_a_device_describes_itself():
    gpu = Gpu(library=FakeDriver())
    assert (gpu.name, gpu.capability, gpu.num_sms) == ("Fake GPU", (9, 0), 132)


def test_an_old_driver_is_refused():
    with pytest.raises(DeviceError, match=r"one of CUDA 11\.8: .* CUDA 12 or later"):
        Gpu(library=FakeDriver(version=11080))


def test_without_a_driver_the_error_says_what_is_missing(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver_module.ctypes, "CDLL", no_library)
    monkeypatch.setattr(device_module, "_devices", {})
    with pytest.raises(DeviceError, match=r"no NVIDIA driver .*libcuda.*kgraph\[cuda\]"):
        device_module.set_device("cuda")
    assert device_module.get_device() == "cpu"


def test_without_a_gpu_the_error_says_so():
    fake = FakeDriver()
    fake.failures["cuInit"] = [100]
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_NO_DEVICE.*the driver sees no GPU"):
        Gpu(library=fake)


def test_names_of_devices():
    with pytest.raises(ValueError, match="there is no device 'tpu'"):
        device_module.set_device("tpu")


def test_memory_that_is_released_is_given_out_again():
    fake = FakeDriver()
    gpu = Gpu(library=fake)
    first = gpu.allocate(1000)
    gpu.release(first)
    assert gpu.allocate(700) == first  # both are rounded up to 1024 bytes
    assert fake.names().count("cuMemAlloc_v2") == 1
    assert gpu.allocate(700) != first


def test_memory_that_is_kept_is_given_back_where_it_lacks():
    fake = FakeDriver(total=4096)
    gpu = Gpu(library=fake)
    gpu.release(gpu.allocate(3000))
    gpu.allocate(4096)
    assert "cuMemFree_v2" in fake.names()


def test_out_of_memory_says_how_much_and_is_no_end():
    gpu = Gpu(library=FakeDriver(total=4096))
    with pytest.raises(DeviceMemoryError, match=r"Fake GPU: 8192 bytes were asked for, 4096 of 4096 are free"):
        gpu.allocate(8192)
    assert gpu.allocate(4096)
    assert not gpu.is_lost


def test_a_lost_device_refuses_all_further_calls():
    fake = FakeDriver()
    gpu = Gpu(library=fake)
    fake.failures["cuStreamSynchronize"] = [700]
    with pytest.raises(DeviceError, match=r"the GPU was lost: cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        gpu.synchronize()
    count = len(fake.calls)
    with pytest.raises(DeviceError, match="the GPU was lost"):
        gpu.allocate(16)
    assert gpu.is_lost
    assert len(fake.calls) == count


def test_a_kernel_that_the_driver_refuses_shows_its_log():
    fake = FakeDriver()
    gpu = Gpu(library=fake)

    def load(out, image, count, options, values):
        assert (options[0], options[1]) == (5, 6)
        ctypes.memmove(values[0], b"ptxas: line 3\0", 14)
        return 218

    fake.cuModuleLoadDataEx = load
    with pytest.raises(DeviceError, match=r"(?s)kernel add: .*CUDA_ERROR_218.*ptxas: line 3"):
        gpu.load({"add": b"..."})


def test_a_forked_child_is_told_so():
    gpu = Gpu(library=FakeDriver())
    gpu._process += 1
    with pytest.raises(DeviceError, match="forked"):
        gpu.allocate(16)


# -- programs ---------------------------------------------------------------------------------------------------------
def test_a_call_copies_launches_and_copies_back():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (out,) = program([x])
    np.testing.assert_array_equal(out, -x)
    (launched,) = [call[1] for call in fake.calls if call[0] == "cuLaunchKernel"]
    assert (launched.grid, launched.block, launched.shared_bytes) == (1, 256, 0)
    # Two pointers, then the number of elements.
    assert launched.arguments[2] == 6
    assert all(any(a <= p < a + m.nbytes for a, m in fake.memory.items()) for p in launched.arguments[:2])


def test_the_second_call_captures_and_later_ones_replay():
    fake = FakeDriver()
    program = program_of(fake, chain("neg", "neg"))
    fake.run = negate
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = [
        ["cuLaunchKernel"] * 2,
        [
            *("cuStreamBeginCapture_v2", "cuLaunchKernel", "cuLaunchKernel", "cuStreamEndCapture"),
            *("cuGraphInstantiateWithFlags", "cuGraphDestroy", "cuGraphLaunch"),
        ],
        ["cuGraphLaunch"],
        ["cuGraphLaunch"],
    ]
    for wanted in expected:
        fake.calls.clear()
        x = x + 1
        np.testing.assert_array_equal(program([x])[0], x)
        assert [name for name in fake.names() if "Graph" in name or "Launch" in name or "Capture" in name] == wanted
    assert program.stats()["graphs"] == 1


def test_a_host_step_cuts_the_plan():
    graph = Graph([Value(TensorType((N, 3, 3), "float32"), name="x")], name="inverse")
    host = graph.add(PRIMITIVES["inv"], [graph.add(PRIMITIVES["neg"], [graph.inputs[0]])])
    graph.outputs = [graph.add(PRIMITIVES["neg"], [host])]
    fake = FakeDriver()
    program = program_of(fake, graph)
    fake.run = negate
    x = np.array([np.diag([1, 2, 4])], np.float32)
    for call in range(3):
        fake.calls.clear()
        np.testing.assert_array_equal(program([x])[0], np.linalg.inv(x))
        names = [name for name in fake.names() if name in ("cuLaunchKernel", "cuGraphLaunch", "cuMemcpyDtoHAsync_v2")]
        # What runs before the host step, its operand's way out, what runs after it, the result's way out.
        run = [["cuLaunchKernel"], ["cuLaunchKernel", "cuGraphLaunch"], ["cuGraphLaunch"]][call]
        assert names == [*run, "cuMemcpyDtoHAsync_v2"] * 2
    assert program.stats()["graphs"] == 2


def test_a_failed_launch_leaves_the_capture():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    x = np.ones((2, 3), np.float32)
    program([x])
    fake.failures["cuLaunchKernel"] = [701]
    with pytest.raises(DeviceError, match="CUDA_ERROR_701"):
        program([x])
    assert fake.names()[-1] != "cuStreamBeginCapture_v2"
    np.testing.assert_array_equal(program([x])[0], -x)


def test_idle_programs_give_their_memory_to_others():
    fake = FakeDriver(total=40960)
    program = program_of(fake, chain("neg"))
    fake.run = negate
    program([np.ones((400, 3), np.float32)])
    assert program.stats()["device_bytes"]
    program.device.allocate(36864)
    assert program.stats()["device_bytes"] == 0
    with pytest.raises(DeviceMemoryError):
        program([np.ones((400, 3), np.float32)])


def test_arrays_on_the_device_are_taken_and_given_without_copies():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    x = DeviceArray.copy_of(program.device, np.arange(60000, dtype=np.float32).reshape(20000, 3))
    fake.calls.clear()
    (out,) = program([x])
    assert isinstance(out, DeviceArray)
    assert not [name for name in fake.names() if "Memcpy" in name or "StreamSynchronize" in name]
    np.testing.assert_array_equal(out, -x.numpy())


def test_small_results_do_not_change_the_addresses_of_graphs():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    x = DeviceArray.copy_of(program.device, np.ones((2, 3), np.float32))
    kept = [program([x])[0] for _ in range(5)]
    assert program.stats()["graphs"] == 1
    assert len({out.address for out in kept}) == 5
    for out in kept:
        np.testing.assert_array_equal(out, -np.ones((2, 3)))


def test_large_inputs_travel_ahead_of_their_turn():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    x = np.ones((100_000, 3), np.float32)
    for call in range(6):
        fake.calls.clear()
        np.testing.assert_array_equal(program([x * call])[0], -x * call)
        waits = [c for c in fake.calls if c[0] == "cuStreamWaitEvent"]
        # The copies wait for who read the room before; the kernels wait for the copies.
        assert [c[1].value for c in waits] == [program.device._copies.value, program.device.stream.value]
    # Two rooms, two sets of addresses.
    assert program.stats()["graphs"] == 2


def test_donated_state_is_overwritten_in_place():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"), donations=[(0, 0)])
    fake.run = negate
    state = DeviceArray.copy_of(program.device, np.ones((2, 3), np.float32))
    for sign in (-1, 1, -1):
        (result,) = program([state])
        assert result is state
        np.testing.assert_array_equal(state.numpy(), np.full((2, 3), sign, np.float32))
    assert program.stats()["graphs"] == 1


def test_parameters_are_uploaded_when_they_change():
    graph = Graph([Value(TensorType((N, 3), "float32"))], [Value(TensorType((3,), "float32"), name="w")])
    graph.outputs = [graph.add(PRIMITIVES["add"], [graph.inputs[0], graph.params[0]])]
    fake = FakeDriver()
    program = program_of(fake, graph)
    program.set_param(0, np.ones(3, np.float32))
    x = np.ones((2, 3), np.float32)
    uploads = []
    for change in (False, False, True, False):
        fake.calls.clear()
        if change:
            program.set_param(0, np.zeros(3, np.float32))
        program([x])
        uploads.append([call[1] for call in fake.calls if call[0] == "cuMemcpyHtoDAsync_v2"].count(12))
    assert uploads == [1, 0, 1, 0]


def test_a_lost_device_reaches_whoever_waits():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.failures["cuStreamSynchronize"] = [700]
    x = np.ones((2, 3), np.float32)
    for _ in range(2):
        with pytest.raises(DeviceError, match="the GPU was lost"):
            program([x])
    np.testing.assert_array_equal(x, np.ones((2, 3), np.float32))


# -- exchange with other libraries ------------------------------------------------------------------------------------
class Foreign:
    """Another library's array, known by what it exports."""

    def __init__(self, array: DeviceArray, device: tuple = (2, 0)):
        self._array, self._device = array, device

    def __dlpack__(self, *, stream=None):
        self.stream = stream
        return self._array.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self._device


def test_dlpack_goes_out_and_comes_in_without_a_copy():
    fake = FakeDriver()
    program = program_of(fake, chain("neg"))
    fake.run = negate
    own = DeviceArray.copy_of(program.device, np.arange(6, dtype=np.float32).reshape(2, 3))
    foreign = Foreign(own)
    fake.calls.clear()
    (out,) = program([_shaped(foreign, (2, 3))])
    assert "cuMemcpyHtoDAsync_v2" not in fake.names()
    np.testing.assert_array_equal(out, -own.numpy())
    assert foreign.stream == program.device.stream_number


def _shaped(foreign: Foreign, shape: tuple) -> Foreign:
    foreign.shape = shape
    return foreign


def test_dlpack_releases_what_it_was_given():
    from kgraph.runtime.cuda import device_array

    gpu = Gpu(library=FakeDriver())
    own = DeviceArray.copy_of(gpu, np.ones(3, np.float32))
    own.__dlpack__()  # a capsule that nobody takes
    gc.collect()
    assert not device_array._exported
    taken = device_array.from_foreign(Foreign(own), gpu, "x")
    assert len(device_array._exported) == 1
    assert taken.address == own.address
    del taken
    gc.collect()
    assert not device_array._exported


def test_cuda_array_interface_comes_in_without_a_copy():
    from kgraph.runtime.cuda.device_array import from_foreign

    gpu = Gpu(library=FakeDriver())
    own = DeviceArray.copy_of(gpu, np.ones((2, 3), np.float32))

    class Array:
        __cuda_array_interface__ = own.__cuda_array_interface__

    taken = from_foreign(Array(), gpu, "x")
    assert (taken.address, taken.shape, taken.dtype) == (own.address, (2, 3), np.float32)
    strided = {**own.__cuda_array_interface__, "strides": (4, 8)}
    Array.__cuda_array_interface__ = strided
    with pytest.raises(Exception, match="not contiguous"):
        from_foreign(Array(), gpu, "x")


def test_an_array_on_another_gpu_is_refused():
    gpu = Gpu(library=FakeDriver())
    own = DeviceArray.copy_of(gpu, np.ones(3, np.float32))
    from kgraph.runtime.cuda.device_array import from_foreign

    with pytest.raises(DeviceError, match="lies on GPU 1"):
        from_foreign(Foreign(own, (2, 1)), gpu, "x")


assert ops  # the primitives are registered by importing them
