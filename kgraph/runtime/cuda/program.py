"""Programs that run on a device: buffers, launches, and host steps on copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import InputError, KGraphError
from kgraph.runtime import threads
from kgraph.runtime.cuda.device import Argument, Device
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import HostStep, LaunchStep
from kgraph.runtime.storage import Place, place_buffers

if TYPE_CHECKING:
    pass

_ALIGNMENT = 256
# Elements that the 32-bit indices of kernels reach.
_MOST_ELEMENTS = 1 << 31


class CudaProgram(Program):
    """A program whose kernels run on `device`; called on NumPy arrays like any other."""

    def __init__(self, *args, device: Device, **fields):
        self.device = device
        self.params_memory = _Resident(device)
        super().__init__(*args, **fields)
        self.constants_memory = _Resident(device)

    def _load(self) -> None:
        self.functions: dict[str, Any] = self.device.load(self.kernels)

    def _new_binding(self, sizes: dict[str, int]) -> Any:
        return CudaBinding(self, sizes)

    def stats(self) -> dict[str, int]:
        """Counts and bytes of what this program holds."""
        bindings: list[Any] = list(self._bindings.values())
        launches = sum(isinstance(s, LaunchStep) for s in self.steps)
        return {
            "bindings": len(bindings),
            "arena_bytes": sum(b.storage.arena_bytes for b in bindings),
            "device_bytes": sum(b.nbytes for b in bindings),
            "arena_bound": max([b.storage.arena_bound for b in bindings], default=0),
            "in_place_outputs": max([sum(d >= 0 for d in b.storage.donors) for b in bindings], default=0),
            "native_steps": launches,
            "host_steps": len(self.steps) - launches,
            "kernels": len(self.kernels),
            "code_bytes": sum(map(len, self.kernels.values())),
        }


class _Resident:
    """Arrays that stay on the device: each has memory of its own, filled again when another array takes its place."""

    def __init__(self, device: Device):
        self._device = device
        self._held: dict[int, tuple[np.ndarray, int]] = {}

    def address(self, key: int, array: np.ndarray) -> int:
        """Where the content of `array` lies, which is known by `key`."""
        held = self._held.get(key)
        if held is not None and held[0] is array:
            return held[1]
        if held is not None and held[0].nbytes == array.nbytes:
            address = held[1]
        else:
            address = self._device.allocate(max(array.nbytes, 1))
        self._device.copy_in(address, array)
        self._held[key] = array, address
        return address

    def __del__(self):
        for _, address in self._held.values():
            self._device.release(address)


class CudaBinding:
    """A program for concrete sizes, with device memory of its own. Calls take turns."""

    def __init__(self, program: CudaProgram, sizes: dict[str, int]):
        self.program, self.device, self.sizes = program, program.device, sizes
        self.generation = threads.generation
        self.used = True
        self._lock = threading.Lock()
        memo: dict[Dim, int] = {}

        def value(size) -> int:
            if not isinstance(size, Dim):
                return int(size)
            if size not in memo:
                memo[size] = evaluate(size, sizes)
            return memo[size]

        self._value: Callable[[Any], int] = value
        self.storage = storage = place_buffers(program, value)
        self._check_sizes()
        self.input_dtypes = [program.dtypes[b] for b in program.inputs]
        self._outputs = [(storage.shapes[b], program.dtypes[b]) for b in program.outputs]
        # One allocation holds the arena, then the inputs, then the outputs.
        self._offsets: dict[tuple[str, int], int] = {("arena", 0): 0}
        end = _aligned(storage.arena_bytes)
        for kind, buffers in (("input", program.inputs), ("output", program.outputs)):
            for number, b in enumerate(buffers):
                self._offsets[kind, number] = end
                end = _aligned(end + storage.nbytes[b])
        self.nbytes = max(end, 1)
        self._memory = self.device.allocate(self.nbytes)
        self.constants: dict[int, np.ndarray] = dict(program.constants)
        for b, buffer in enumerate(program.buffers):
            if buffer.kind == "dim":
                self.constants[b] = np.array(value(buffer.value), dtype=program.dtypes[b])
        self._dims = _Resident(self.device)

    def __del__(self):
        if hasattr(self, "_memory"):
            self.device.release(self._memory)

    def _check_sizes(self) -> None:
        for b, (nbytes, itemsize) in enumerate(zip(self.storage.nbytes, self.program.itemsizes)):
            symbolic = any(isinstance(s, Dim) for s in self.program.buffers[b].shape)
            if symbolic and nbytes // itemsize >= _MOST_ELEMENTS:
                shape = list(self.storage.shapes[b])
                raise InputError(
                    f"{self.program.name}: a tensor of shape {shape} has 2**31 elements or more, which kernels for "
                    "unknown sizes do not reach; use smaller batches, or declare the model for these sizes"
                )

    # -- memory -------------------------------------------------------------------------------------------------------
    def _address(self, place: Place) -> int:
        if place.space == "param":
            array = self.program.values[place.index]
            if array is None:
                raise KGraphError(f"{self.program.name}: parameter {place.index} has no value")
            return self.program.params_memory.address(place.index, array) + place.offset
        if place.space == "constant":
            known = place.index in self.program.constants
            memory = self.program.constants_memory if known else self._dims
            return memory.address(place.index, self.constants[place.index]) + place.offset
        return self._memory + self._offsets[place.space, place.index] + place.offset

    def _read(self, b: int) -> np.ndarray:
        """The content of a buffer, copied from the device."""
        array = np.empty(self.storage.shapes[b], self.program.dtypes[b])
        self.device.copy_out(array, self._address(self.storage.places[b]))
        return array

    # -- calls --------------------------------------------------------------------------------------------------------
    def run(self, arrays: Sequence[np.ndarray]) -> tuple:
        return self(arrays)

    def __call__(self, arrays: Sequence[np.ndarray], out: Sequence[np.ndarray | None] | None = None) -> tuple:
        """Run on `arrays`, which have this binding's shapes; gives fresh arrays, or those of `out`."""
        self.used = True
        arrays = self._dense_inputs(arrays)
        targets = [None] * len(self._outputs) if out is None else self._check_out(out)
        with self._lock:
            self._copy_inputs(arrays)
            for step in self.program.steps:
                if isinstance(step, HostStep):
                    self._run_host(step)
                elif isinstance(step, LaunchStep):
                    self._launch(step)
            results = [np.empty(shape, dtype) for shape, dtype in self._outputs]
            for result, b, number in zip(results, self.program.outputs, range(len(results))):
                direct = self.storage.direct[number] >= 0
                place = Place("output", number, 0) if direct else self.storage.places[b]
                self.device.copy_out(result, self._address(place))
        for target, result in zip(targets, results):
            if target is not None:
                np.copyto(target, result)
        return tuple([r if t is None else t for t, r in zip(targets, results)])

    def _copy_inputs(self, arrays: Sequence[np.ndarray]) -> None:
        donors = self.storage.donors
        for number, array in enumerate(arrays):
            # A donated input is read where the output that replaces it lies.
            place = Place("output", donors.index(number), 0) if number in donors else Place("input", number, 0)
            self.device.copy_in(self._address(place), array)

    def _launch(self, step: LaunchStep) -> None:
        blocks = self._value(step.extent)
        if blocks <= 0:
            return
        storage, program = self.storage, self.program
        buffers = [
            Argument(self._address(storage.places[b]), storage.nbytes[b], program.buffers[b].dtype)
            for b in step.operands
        ]
        self.device.launch(
            program.functions[step.kernel],
            min(blocks, self.device.most_blocks),
            step.block,
            self._value(step.shared_bytes),
            buffers,
            [self._value(s) for s in step.sizes],
        )

    def _run_host(self, step: HostStep) -> None:
        split = len(step.operands) - step.outputs
        answers = step.function([self._read(b) for b in step.operands[:split]], self.sizes)
        targets = step.operands[split:]
        where = f"{self.program.name}: host step {step.label}"
        if len(answers) != len(targets):
            raise KGraphError(f"{where} gave {len(answers)} arrays, expected {len(targets)}")
        for b, answer in zip(targets, answers):
            array = np.ascontiguousarray(answer, self.program.dtypes[b])
            if np.shape(answer) != self.storage.shapes[b]:
                raise KGraphError(f"{where} gave shape {np.shape(answer)}, expected {self.storage.shapes[b]}")
            self.device.copy_in(self._address(self.storage.places[b]), array)

    def _dense_inputs(self, arrays: Sequence) -> list[np.ndarray]:
        """The arrays as contiguous ones. Raises InputError for a wrong number or dtype."""
        program = self.program
        if len(arrays) != len(self.input_dtypes):
            raise InputError(f"{program.name} takes {len(self.input_dtypes)} arrays, {len(arrays)} were given")
        out = []
        for number, (array, dtype) in enumerate(zip(arrays, self.input_dtypes)):
            array = np.asarray(array)
            if array.dtype != dtype:
                raise InputError(f"{program.name}: {program.input_names[number]} is {array.dtype}, expected {dtype}")
            out.append(np.ascontiguousarray(array).reshape(array.shape))
        return out

    def _check_out(self, out: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        name = self.program.name
        if len(out) != len(self._outputs):
            raise InputError(f"{name} has {len(self._outputs)} outputs, out= has {len(out)}")
        for number, (given, (shape, dtype)) in enumerate(zip(out, self._outputs)):
            if given is None:
                continue
            if not isinstance(given, np.ndarray) or given.dtype != dtype or given.shape != shape:
                what = f"{given.dtype}{list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
                raise InputError(f"{name}: out[{number}] is {what}, expected {dtype}{list(shape)}")
            if not given.flags.writeable:
                raise InputError(f"{name}: out[{number}] is read-only")
        return list(out)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
