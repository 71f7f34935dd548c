"""A program on a device prepared for concrete sizes, and calls of it.

A segment of its plan that is called again on the same addresses is captured as a graph, and from then on one call of
the driver replays it. Addresses are the same from call to call where arrays come from the host: they are copied into
memory of the binding's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kgraph.dims import evaluate
from kgraph.errors import DeviceError, InputError, KGraphError
from kgraph.runtime import threads
from kgraph.runtime.binding import StepTime
from kgraph.runtime.cuda import control
from kgraph.runtime.cuda.device_array import Allocation, DeviceArray, from_foreign
from kgraph.runtime.cuda.device_plan import Bases, Copy, DevicePlan, Segment, address_of
from kgraph.runtime.cuda.staging import MOST_PINNED, HostInputs, aligned
from kgraph.runtime.steps import HostStep
from kgraph.runtime.storage import Place

if TYPE_CHECKING:
    from kgraph.runtime.cuda.program import CudaProgram

# Results up to this many bytes are copied out of the binding's memory: fresh arrays would be new addresses for graphs.
_SMALL = 64 << 10
_MOST_GRAPHS = 8
_MOST_BORROWED = 2  # calls whose foreign arrays are kept without waiting


class _Call(NamedTuple):
    """The memory of a call: addresses of the spaces of `Place`, by (space, number)."""

    bases: Bases
    key: tuple[int, ...]


class CudaBinding:
    """A program for concrete sizes, callable from any number of threads: calls take turns.

    used: set by every call, for the program to see which bindings are in use. input_dtypes: one per input.
    """

    def __init__(self, program: CudaProgram, sizes: dict[str, int]):
        self.program, self.device, self.sizes = program, program.device, sizes
        self.generation = threads.generation
        self.used = True
        self._lock = threading.Lock()
        self.plan = DevicePlan(program, sizes)
        self.storage = self.plan.storage
        self.input_dtypes = [program.dtypes[b] for b in program.inputs]
        self._outputs = [(self.storage.shapes[b], program.dtypes[b]) for b in program.outputs]
        self._memory: Allocation | None = None
        self._host_inputs = HostInputs(self.device)
        self._pinned_out: np.ndarray | None = None
        self._graphs: dict[tuple, Any] = {}
        self._seen: deque[tuple[int, ...]] = deque(maxlen=_MOST_GRAPHS)  # addresses of the last calls
        self._borrowed: deque[tuple[Any, list]] = deque()  # arrays of other libraries that calls may still read
        self.device.add_holder(self)

    # -- memory -------------------------------------------------------------------------------------------------------
    def held_bytes(self) -> int:
        """Memory on the device that calls of this binding share."""
        return (self.plan.nbytes if self._memory is not None else 0) + self._host_inputs.held_bytes()

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
            self._memory = Allocation(self.device, self.plan.nbytes)
        bases = {space: self._memory.address + offset for space, offset in self.plan.offsets.items()}
        room = self._host_inputs.place({n: a for n, a in enumerate(inputs) if isinstance(a, np.ndarray)})
        for number, array in enumerate(inputs):
            bases["input", number] = array.address if isinstance(array, DeviceArray) else room[number]
        for number, result in enumerate(results):
            donor = self.plan.donors.get(number)
            # An output that may not be written where its donor lies as long as that is read is copied there at the end.
            space = "donor" if donor is not None and self.storage.donors[number] < 0 else "output"
            if result is not None:
                bases[space, number] = result.address
            elif donor is not None:
                bases[space, number] = bases["input", donor]
        bases.update(self.plan.resident())
        return _Call(bases, tuple(bases.values()))

    def _address(self, place: Place, call: _Call) -> int:
        return address_of(place, call.bases)

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
                n: r
                for n, r in enumerate(results)
                if r is not None and n not in self.plan.donors and r.nbytes <= _SMALL
            }
            call = self._prepare(inputs, [None if n in late else r for n, r in enumerate(results)])
            self._copy_inputs(inputs, call)
            for number, segment in enumerate(self.plan.segments):
                self._run_segment(number, segment, call)
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
        donor = self.plan.donors.get(number)
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
    def _run_segment(self, number: int, segment: Segment, call: _Call) -> None:
        if segment.host is not None:
            self._run_host(segment.host, call)
            return
        graph = self._graphs.get((number, call.key))
        if graph is None and segment.kept and call.key in self._seen:
            graph = self._capture(segment, call)
            while len(self._graphs) >= _MOST_GRAPHS * len(self.plan.segments):
                del self._graphs[next(iter(self._graphs))]
            self._graphs[number, call.key] = graph
        if graph is not None:
            self.device.replay(graph)
            return
        for work in segment.work:
            self.plan.run(work, call.bases)

    def _capture(self, segment: Segment, call: _Call) -> Any:
        self.device.begin_capture()
        try:
            for work in segment.work:
                self.plan.run(work, call.bases)
        except BaseException:
            with contextlib.suppress(DeviceError):  # the stream leaves the capture; what it holds is of no use
                self.device.end_capture()
            raise
        return self.device.end_capture()

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
            for view, result in zip(views[split:], run(views[:split], views[split:], self.sizes, self.device)):
                if result.nbytes != view.nbytes:
                    raise KGraphError(f"{self.program.name}: {step.label} gave {result!r}, expected {view!r}")
                if view.address != result.address:
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
        for segment in self.plan.segments:
            if segment.host is not None:
                start = self.device.mark(timing=True)
                self._run_host(segment.host, call)
                spans.append((segment.step, start, self.device.mark(timing=True)))
            for work in segment.work:
                start = self.device.mark(timing=True)
                self.plan.run(work, call.bases)
                if not isinstance(work, Copy):
                    spans.append((work.step, start, self.device.mark(timing=True)))
        for step, start, end in spans:
            times[step] += int(self.device.milliseconds(start, end) * 1e6)
        return times
