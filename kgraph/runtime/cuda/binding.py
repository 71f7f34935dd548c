"""A program on a device prepared for concrete sizes, and calls of it.

The steps up to a host step make a segment. A segment that is called again on the same addresses is captured as a graph,
and from then on one call of the driver replays it. Addresses are the same from call to call where arrays come from the
host: they are copied into memory of the binding's own.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import DeviceError, InputError, KGraphError
from kgraph.runtime import threads
from kgraph.runtime.binding import StepTime
from kgraph.runtime.cuda import control
from kgraph.runtime.cuda.device import Argument
from kgraph.runtime.cuda.device_array import Allocation, DeviceArray, from_foreign
from kgraph.runtime.cuda.libraries import LibraryPlan
from kgraph.runtime.cuda.staging import ALIGNMENT, MOST_PINNED, HostInputs, aligned
from kgraph.runtime.steps import HostStep, LaunchStep
from kgraph.runtime.storage import Place, place_buffers

if TYPE_CHECKING:
    from kgraph.runtime.cuda.program import CudaProgram

# Elements that the 32-bit indices of kernels reach.
_MOST_ELEMENTS = 1 << 31
# Results up to this many bytes are copied out of the binding's memory: fresh arrays would be new addresses for graphs.
_SMALL = 64 << 10
_MOST_GRAPHS = 8
_MOST_BORROWED = 2  # calls whose foreign arrays are kept without waiting


@dataclass
class _Launch:
    """A kernel call at concrete sizes. buffers: place, bytes and dtype of each operand. step: number in the program."""

    function: Any
    grid: int
    block: int
    shared_bytes: int
    buffers: list[tuple[Place, int, str]]
    sizes: list[int]
    step: int


@dataclass
class _LibraryCall:
    """Work of the device's library. buffers, step: as in `_Launch`."""

    plan: LibraryPlan
    buffers: list[tuple[Place, int, str]]
    step: int


_Work = _Launch | _LibraryCall


class _Preparation(NamedTuple):
    """A launch that makes what the library reads of a parameter or constant. key: equal ones make the same."""

    launch: _Launch
    key: tuple


class _Copy(NamedTuple):
    """Bytes that move within the device."""

    target: Place
    source: Place
    nbytes: int


@dataclass
class _Segment:
    """Work that is handed over at once, or a host step and its number in the program."""

    work: list[_Work | _Copy]
    host: HostStep | None = None
    step: int = -1


class _Call(NamedTuple):
    """The memory of a call: addresses of the spaces of `Place`, by (space, number)."""

    bases: dict[tuple[str, int], int]
    key: tuple[int, ...]


class CudaBinding:
    """A program for concrete sizes, callable from any number of threads: calls take turns.

    used: set by every call, for the program to see which bindings are in use. input_dtypes: one per input.
    refusals: why the device's library does not take a step, by the number of the step.
    """

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

        self.storage = place_buffers(program, value)
        self._check_sizes()
        self.input_dtypes = [program.dtypes[b] for b in program.inputs]
        self._outputs = [(self.storage.shapes[b], program.dtypes[b]) for b in program.outputs]
        self.constants: dict[int, np.ndarray] = dict(program.constants)
        for b, buffer in enumerate(program.buffers):
            if buffer.kind == "dim":
                self.constants[b] = np.array(value(buffer.value), dtype=program.dtypes[b])
        from kgraph.runtime.cuda.program import Resident

        self._dims = Resident(self.device)
        self._donors = {output: number for number, output in program.donations}
        self._place_own_memory()
        self.refusals: dict[int, str] = {}  # why the library does not take a step, by its number
        self._preparations: list[_Preparation] = []
        self._segments = self._cut(value)
        self._params = sorted({p.index for p in self._places() if p.space == "param"})
        self._constants = sorted({p.index for p in self._places() if p.space == "constant"})
        self._memory: Allocation | None = None
        self._host_inputs = HostInputs(self.device)
        self._pinned_out: np.ndarray | None = None
        self._graphs: dict[tuple, Any] = {}
        self._seen: deque[tuple[int, ...]] = deque(maxlen=_MOST_GRAPHS)  # addresses of the last calls
        self._borrowed: deque[tuple[Any, list]] = deque()  # arrays of other libraries that calls may still read
        self.device.add_holder(self)

    def _place_own_memory(self) -> None:
        """One allocation holds the arena, then room for the outputs."""
        self._offsets: dict[tuple[str, int], int] = {("arena", 0): 0}
        end = aligned(self.storage.arena_bytes)
        for number, b in enumerate(self.program.outputs):
            if self.storage.donors[number] < 0:  # others lie where their donors lie
                self._offsets["output", number] = end
                end = aligned(end + self.storage.nbytes[b])
        self._nbytes = end

    def _check_sizes(self) -> None:
        for b, (nbytes, itemsize) in enumerate(zip(self.storage.nbytes, self.program.itemsizes)):
            symbolic = any(isinstance(s, Dim) for s in self.program.buffers[b].shape)
            if symbolic and nbytes // itemsize >= _MOST_ELEMENTS:
                shape = list(self.storage.shapes[b])
                raise InputError(
                    f"{self.program.name}: a tensor of shape {shape} has 2**31 elements or more, which kernels for "
                    "unknown sizes do not reach; use smaller batches, or declare the model for these sizes"
                )

    # -- what is run --------------------------------------------------------------------------------------------------
    def _cut(self, value: Callable[[Any], int]) -> list[_Segment]:
        """The program's steps as segments, with the copies to outputs at the end."""
        program = self.program
        segments = [_Segment([])]
        done = False  # whether a library did what the next step may continue
        for number, step in enumerate(program.steps):
            if isinstance(step, HostStep):
                segments += [_Segment([], step, number), _Segment([])]
                continue
            assert isinstance(step, LaunchStep)
            if step.continues and done:
                continue
            work = self._library_work(step, number, value)
            done = work is not None
            segments[-1].work += self._launch(step, number, value) if work is None else work
        segments[-1].work += self._final_copies()
        return [s for s in segments if s.work or s.host is not None]

    def _library_work(self, step: LaunchStep, number: int, value: Callable[[Any], int]) -> list[_Work | _Copy] | None:
        """A step as a call of the device's library, where there is one that takes it."""
        call = step.library
        if call is None or value(step.extent) <= 0:
            return None
        buffers = [self._buffer(b) for b in call.operands]
        alignments = [self._alignment(place) for place, _, _ in buffers]
        with self.device.lock:  # libraries are not for several threads at once
            self.device.make_current()
            library = self.device.library(type(call.task))
            plan = library if isinstance(library, str) else library.plan(call.task, value, alignments)
        if isinstance(plan, str):
            self.refusals[number] = plan
            return None
        work: list[_Work | _Copy] = []
        for before in call.before:
            launches = self._launch(before, number, value)
            if self.storage.places[before.operands[-1]].space == "prepared":
                source = self.storage.places[before.operands[0]]
                key = (before.kernel, source.space, source.index, source.offset)
                self._preparations += [_Preparation(launch, (*key, *launch.sizes)) for launch in launches]
            else:
                work += launches
        after = [launch for step in call.after for launch in self._launch(step, number, value)]
        return [*work, _LibraryCall(plan, buffers, number), *after]

    def _launch(self, step: LaunchStep, number: int, value: Callable[[Any], int]) -> list[_Launch]:
        """A step as a launch; none where there is nothing to do."""
        extent = value(step.extent)
        if extent <= 0:
            return []
        buffers = [self._buffer(b) for b in step.operands]
        blocks = min(extent, self.device.most_blocks)
        sizes = [value(s) for s in step.sizes]
        function = self.program.functions[step.kernel]
        return [_Launch(function, blocks, step.block, value(step.shared_bytes), buffers, sizes, number)]

    def _alignment(self, place: Place) -> int:
        """Bytes to which a place is aligned in every call. Inputs may be arrays of other libraries, which lie anywhere,
        and outputs may lie where inputs lie."""
        foreign = place.space in ("input", "donor")
        foreign |= place.space == "output" and self.storage.donors[place.index] >= 0
        return math.gcd(1 if foreign else ALIGNMENT, place.offset)

    def _buffer(self, b: int) -> tuple[Place, int, str]:
        """Place, bytes and dtype of a buffer."""
        return self.storage.places[b], self.storage.nbytes[b], self.program.buffers[b].dtype

    def _final_copies(self) -> list[_Work | _Copy]:
        """What brings outputs to their places after the last step: views, inputs, and those with a donor that is read
        until the end. A donated input that is an output too is copied aside before it is overwritten."""
        program, storage = self.program, self.storage
        aside: list[_Work | _Copy] = []
        out: list[_Work | _Copy] = []
        for number, b in enumerate(program.outputs):
            place, nbytes = storage.places[b], storage.nbytes[b]
            if storage.donors[number] >= 0:
                continue
            target = Place("donor" if number in self._donors else "output", number, 0)
            if place == target:
                continue
            if place.space == "input" and place.index in self._donors.values():
                self._offsets["aside", number] = self._nbytes
                self._nbytes += aligned(nbytes)
                room = Place("aside", number, 0)
                aside.append(_Copy(room, place, nbytes))
                place = room
            out.append(_Copy(target, place, nbytes))
        return aside + out

    def _places(self) -> list[Place]:
        """Every place that launches, copies and host steps name."""
        out = []
        for segment in self._segments:
            if segment.host is not None:
                out += [self.storage.places[b] for b in segment.host.operands]
            for work in segment.work:
                out += [work.source, work.target] if isinstance(work, _Copy) else [p for p, _, _ in work.buffers]
        return out

    # -- memory -------------------------------------------------------------------------------------------------------
    def held_bytes(self) -> int:
        """Memory on the device that calls of this binding share."""
        return (self._nbytes if self._memory is not None else 0) + self._host_inputs.held_bytes()

    def num_library_calls(self) -> int:
        return sum(isinstance(work, _LibraryCall) for segment in self._segments for work in segment.work)

    def num_graphs(self) -> int:
        return len(self._graphs)

    def release_idle(self) -> None:
        """Give the memory back unless a call is being handed over."""
        if self._lock.acquire(blocking=False):
            try:
                self._memory = None
                self._host_inputs.release()
                self._graphs.clear()
            finally:
                self._lock.release()

    def _prepare(self, inputs: Sequence[DeviceArray | np.ndarray], results: Sequence[DeviceArray | None]) -> _Call:
        """The addresses of a call."""
        if self._memory is None:
            self._memory = Allocation(self.device, self._nbytes)
        bases = {space: self._memory.address + offset for space, offset in self._offsets.items()}
        room = self._host_inputs.place({n: a for n, a in enumerate(inputs) if isinstance(a, np.ndarray)})
        for number, array in enumerate(inputs):
            bases["input", number] = array.address if isinstance(array, DeviceArray) else room[number]
        for number, result in enumerate(results):
            donor = self._donors.get(number)
            # An output that may not be written where its donor lies as long as that is read is copied there at the end.
            space = "donor" if donor is not None and self.storage.donors[number] < 0 else "output"
            if result is not None:
                bases[space, number] = result.address
            elif donor is not None:
                bases[space, number] = bases["input", donor]
        program = self.program
        for index in self._params:
            bases["param", index] = program.resident_params.address(index, self._param(index))
        for index in self._constants:
            resident = program.resident_constants if index in program.constants else self._dims
            bases["constant", index] = resident.address(index, self.constants[index])
        for preparation in self._preparations:
            target, _, _ = preparation.launch.buffers[-1]
            bases[target.space, target.index] = self._prepared(preparation)
        return _Call(bases, tuple(bases.values()))

    def _param(self, index: int) -> np.ndarray:
        value = self.program.values[index]
        if value is None:
            raise KGraphError(f"{self.program.name}: parameter {index} has no value")
        return value

    def _prepared(self, preparation: _Preparation) -> int:
        """Where what the library reads of a parameter or constant lies; it is made unless it is there."""
        work = preparation.launch
        (source, given, given_dtype), (_, nbytes, dtype) = work.buffers
        array = self._param(source.index) if source.space == "param" else self.constants[source.index]

        def fill(address: int) -> None:
            room = Allocation(self.device, array.nbytes)  # nothing else reads it there
            self.device.copy_in(room.address, array)
            buffers = [Argument(room.address + source.offset, given, given_dtype), Argument(address, nbytes, dtype)]
            self.device.launch(work.function, work.grid, work.block, work.shared_bytes, buffers, work.sizes)

        return self.program.prepared.made(preparation.key, array, nbytes, fill)

    def _address(self, place: Place, call: _Call) -> int:
        return call.bases[place.space, place.index] + place.offset

    def release_old_params(self) -> None:
        """Parameters are the program's: there is nothing to let go of."""

    # -- calls --------------------------------------------------------------------------------------------------------
    def __call__(self, arrays: Sequence, out: Sequence[np.ndarray | None] | None = None) -> tuple:
        """Run on `arrays`, which have this binding's shapes; see `CudaProgram` for what it gives.

        out: host arrays for some of the results. Raises InputError for arrays that do not fit, DeviceError for faults
        of the device (then the donated inputs hold anything if they are lost, and what they held before if not).
        """
        self.used = True
        inputs = self._inputs(arrays)
        on_device = any(isinstance(a, DeviceArray) for a in inputs)
        targets = [None] * len(self._outputs) if out is None else self._check_out(out)
        with self._lock, self.device.lock:
            results = [self._result(number, inputs, on_device) for number in range(len(self._outputs))]
            # Small results that no donor takes are copied to their arrays at the end.
            late = {
                n: r for n, r in enumerate(results) if r is not None and n not in self._donors and r.nbytes <= _SMALL
            }
            call = self._prepare(inputs, [None if n in late else r for n, r in enumerate(results)])
            self._copy_inputs(inputs, call)
            for number in range(len(self._segments)):
                self._run_segment(number, call)
            self._seen.append(call.key)
            self._host_inputs.done()
            for n, result in late.items():
                self.device.copy(result.address, self._end(n, call), result.nbytes)
            self._keep_borrowed(inputs)
            values: list[Any] = list(results) if on_device else self._copy_outputs(call)
        for target, result in zip(targets, values):
            if target is not None:
                np.copyto(target, result)
        return tuple([r if t is None else t for t, r in zip(targets, values)])

    def _result(self, number: int, inputs: Sequence, on_device: bool) -> DeviceArray | None:
        """The array that an output is written to, if that is not memory of the binding's."""
        if not on_device:
            return None
        donor = self._donors.get(number)
        if donor is not None and isinstance(inputs[donor], DeviceArray):
            return inputs[donor]
        return DeviceArray.empty(self.device, *self._outputs[number])

    def _keep_borrowed(self, inputs: Sequence) -> None:
        """Keep other libraries' arrays until they have been read: their memory is not reused in our stream's order."""
        others = [a for a in inputs if isinstance(a, DeviceArray) and not a.is_own]
        if others:
            self._borrowed.append((self.device.mark(), others))
        while len(self._borrowed) > _MOST_BORROWED:
            self.device.wait(self._borrowed.popleft()[0])

    def _copy_inputs(self, inputs: Sequence, call: _Call) -> None:
        """Bring host arrays to the device."""
        donors = self.storage.donors
        # What is overwritten lies where it will be.
        place = lambda n: call.bases[("output", donors.index(n)) if n in donors else ("input", n)]
        self._host_inputs.send([(place(n), a) for n, a in enumerate(inputs) if isinstance(a, np.ndarray) and a.nbytes])

    def _copy_outputs(self, call: _Call) -> list[np.ndarray]:
        """The outputs as fresh host arrays."""
        results = [np.empty(shape, dtype) for shape, dtype in self._outputs]
        total = sum(aligned(r.nbytes) for r in results)
        pinned = 0 < total <= MOST_PINNED
        if pinned and (self._pinned_out is None or self._pinned_out.nbytes < total):
            self._pinned_out = self.device.pinned(total)
        pieces, start = [], 0
        for number, result in enumerate(results):
            if pinned and self._pinned_out is not None:
                pieces.append(self._pinned_out[start : start + result.nbytes])
                start += aligned(result.nbytes)
            else:
                pieces.append(result)
            self.device.copy_out_later(pieces[-1], self._end(number, call))
        self.device.synchronize()
        if pinned:
            for result, piece in zip(results, pieces):
                result.reshape(-1).view(np.uint8)[:] = piece
        return results

    def _end(self, number: int, call: _Call) -> int:
        """Where an output is at the end of a call."""
        place = "donor" if ("donor", number) in call.bases else "output"
        return call.bases[place, number]

    # -- segments -----------------------------------------------------------------------------------------------------
    def _run_segment(self, number: int, call: _Call) -> None:
        segment = self._segments[number]
        if segment.host is not None:
            self._run_host(segment.host, call)
            return
        graph = self._graphs.get((number, call.key))
        if graph is None and call.key in self._seen:
            graph = self._capture(segment, call)
            while len(self._graphs) >= _MOST_GRAPHS * len(self._segments):
                del self._graphs[next(iter(self._graphs))]
            self._graphs[number, call.key] = graph
        if graph is not None:
            self.device.replay(graph)
            return
        for work in segment.work:
            self._run_work(work, call)

    def _capture(self, segment: _Segment, call: _Call) -> Any:
        self.device.begin_capture()
        try:
            for work in segment.work:
                self._run_work(work, call)
        except BaseException:
            with contextlib.suppress(DeviceError):  # the stream leaves the capture; what it holds is of no use
                self.device.end_capture()
            raise
        return self.device.end_capture()

    def _run_work(self, work: _Work | _Copy, call: _Call) -> None:
        if isinstance(work, _Copy):
            self.device.copy(self._address(work.target, call), self._address(work.source, call), work.nbytes)
            return
        if isinstance(work, _LibraryCall):
            self.device.make_current()
            work.plan.run([self._address(place, call) for place, _, _ in work.buffers])
            return
        buffers = [Argument(self._address(place, call), nbytes, dtype) for place, nbytes, dtype in work.buffers]
        self.device.launch(work.function, work.grid, work.block, work.shared_bytes, buffers, work.sizes)

    def _view(self, b: int, call: _Call) -> DeviceArray:
        """A buffer during a call; its memory is the call's."""
        address = self._address(self.storage.places[b], call)
        return DeviceArray(self.device, address, self.storage.shapes[b], self.program.dtypes[b], self._memory)

    def _run_host(self, step: HostStep, call: _Call) -> None:
        """Copy the operands out, run, copy the results in; branches and loops run on the device."""
        split = len(step.operands) - step.outputs
        run = control.on_device(step.function)
        if run is not None:
            views = [self._view(b, call) for b in step.operands]
            for view, result in zip(views[split:], run(views[:split], self.sizes, self.device)):
                if result.nbytes != view.nbytes:
                    raise KGraphError(f"{self.program.name}: {step.label} gave {result!r}, expected {view!r}")
                self.device.copy(view.address, result.address, view.nbytes)
            return
        given = []
        for b in step.operands[:split]:
            array = np.empty(self.storage.shapes[b], self.program.dtypes[b])
            self.device.copy_out(array, self._address(self.storage.places[b], call))
            given.append(array)
        answers = step.function(given, self.sizes)
        targets = step.operands[split:]
        where = f"{self.program.name}: host step {step.label}"
        if len(answers) != len(targets):
            raise KGraphError(f"{where} gave {len(answers)} arrays, expected {len(targets)}")
        for b, answer in zip(targets, answers):
            shape = self.storage.shapes[b]
            if np.shape(answer) != shape:
                raise KGraphError(f"{where} gave shape {np.shape(answer)}, expected {shape}")
            array = np.ascontiguousarray(np.asarray(answer).astype(self.program.dtypes[b], copy=False)).reshape(shape)
            self.device.copy_in(self._address(self.storage.places[b], call), array)

    # -- arguments ----------------------------------------------------------------------------------------------------
    def _inputs(self, arrays: Sequence) -> list[np.ndarray | DeviceArray]:
        """The arrays as contiguous ones of the host, or as arrays on the device. Raises InputError for other dtypes."""
        program = self.program
        if len(arrays) != len(self.input_dtypes):
            raise InputError(f"{program.name} takes {len(self.input_dtypes)} arrays, {len(arrays)} were given")
        out: list[np.ndarray | DeviceArray] = []
        for array, dtype, name in zip(arrays, self.input_dtypes, program.input_names):
            there = from_foreign(array, self.device, f"{program.name}: {name}")
            given: Any = np.asarray(array) if there is None else there
            if given.dtype != dtype:
                raise InputError(f"{program.name}: {name} is {given.dtype}, expected {dtype}")
            out.append(np.ascontiguousarray(given).reshape(given.shape) if there is None else there)
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

    # -- profiles -----------------------------------------------------------------------------------------------------
    def profile(self, arrays: Sequence, repeats: int = 5) -> tuple[tuple, list[StepTime]]:
        """Run with time stamps; gives the outputs and the median time of every step in `repeats` runs."""
        inputs = self._inputs(arrays)
        with self._lock, self.device.lock:
            results = [None] * len(self._outputs)
            call = self._prepare(inputs, results)
            runs = [self._timed_run(inputs, call) for _ in range(repeats + 1)][1:]
            values = self._copy_outputs(call)
        times = [sorted(one)[len(one) // 2] for one in zip(*runs)]
        report = []
        for step, nanoseconds in zip(self.program.steps, times):
            host = isinstance(step, HostStep)
            flops, nbytes = (0, 0) if isinstance(step, HostStep) else (step.flops, step.bytes)
            sizes = self.sizes
            report.append(
                StepTime(step.label, step.layers, nanoseconds, evaluate(flops, sizes), evaluate(nbytes, sizes), 0, host)
            )
        return tuple(values), report

    def _timed_run(self, inputs: Sequence, call: _Call) -> list[int]:
        """Nanoseconds of every step in one run; each is a launch of its own."""
        times = [0] * len(self.program.steps)
        self._copy_inputs(inputs, call)
        spans = []
        for segment in self._segments:
            if segment.host is not None:
                start = self.device.mark(timing=True)
                self._run_host(segment.host, call)
                spans.append((segment.step, start, self.device.mark(timing=True)))
            for work in segment.work:
                start = self.device.mark(timing=True)
                self._run_work(work, call)
                if not isinstance(work, _Copy):
                    spans.append((work.step, start, self.device.mark(timing=True)))
        for step, start, end in spans:
            times[step] += int(self.device.milliseconds(start, end) * 1e6)
        return times
