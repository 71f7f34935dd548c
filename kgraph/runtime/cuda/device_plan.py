"""The steps of a program at concrete sizes as work for a device, and how one piece of it is asked for.

Steps between host steps make a segment, which can be captured as a graph. A scan whose body has no host steps is part
of the segments around it (`loops.py`); one of very many launches makes several segments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import InputError, KGraphError
from kgraph.runtime.control import Scan
from kgraph.runtime.cuda.device import Argument
from kgraph.runtime.cuda.device_array import Allocation
from kgraph.runtime.cuda.libraries import LibraryPlan
from kgraph.runtime.cuda.loops import Loop
from kgraph.runtime.cuda.resident import Resident
from kgraph.runtime.cuda.staging import ALIGNMENT, aligned
from kgraph.runtime.steps import HostStep, LaunchStep
from kgraph.runtime.storage import Place, place_buffers

if TYPE_CHECKING:
    from kgraph.runtime.cuda.program import CudaProgram

# Elements that the 32-bit indices of kernels reach.
_MOST_ELEMENTS = 1 << 31
# Launches of a loop that one graph holds, and those of a loop that graphs hold at all: they take memory for each.
GRAPH_LAUNCHES = 4096
LOOP_LAUNCHES = 4 * GRAPH_LAUNCHES

Bases = dict[tuple[str, int], int]  # addresses of the spaces of `Place`, by (space, number)


@dataclass
class Launch:
    """A kernel call at concrete sizes. buffers: place, bytes and dtype of each operand. step: number in the program."""

    function: Any
    grid: int
    block: int
    shared_bytes: int
    buffers: list[tuple[Place, int, str]]
    sizes: list[int]
    step: int


@dataclass
class LibraryCall:
    """Work of the device's library. buffers, step: as in `Launch`."""

    plan: LibraryPlan
    buffers: list[tuple[Place, int, str]]
    step: int


@dataclass
class LoopPart:
    """Some of a loop's iterations, from `start` on and below `stop`; after the last one come its final copies.

    number: of the loop in the plan. operands, results: places of the scan's. step: as in `Launch`.
    """

    loop: Loop
    number: int
    operands: list[Place]
    results: list[Place]
    start: int
    stop: int
    step: int


class Copy(NamedTuple):
    """Bytes that move within the device."""

    target: Place
    source: Place
    nbytes: int


Work = Launch | LibraryCall | LoopPart | Copy


@dataclass
class Segment:
    """Work that is handed over at once, or a host step and its number in the program. kept: whether as a graph, where
    that pays."""

    work: list[Work]
    host: HostStep | None = None
    step: int = -1
    kept: bool = True


class _Preparation(NamedTuple):
    """A launch that makes what the library reads of a parameter or constant. key: equal ones make the same: the kernel,
    the space and number of what it reads, offset and sizes."""

    launch: Launch
    key: tuple


class DevicePlan:
    """A program at concrete sizes: where its buffers lie, and its work.

    scattered: whether outputs may lie at any address. offsets: in the plan's own memory of `nbytes`, by space.
    donors: numbers of the inputs in whose place outputs are at the end, by output.
    refusals: why the device's library does not take a step, by the number of the step; long_loops: launches of loops
    that are too many for graphs, likewise.
    """

    def __init__(self, program: CudaProgram, sizes: dict[str, int], scattered: bool = False):
        self.program, self.device, self.sizes, self._scattered = program, program.device, sizes, scattered
        memo: dict[Dim, int] = {}

        def value(size) -> int:
            if not isinstance(size, Dim):
                return int(size)
            if size not in memo:
                memo[size] = evaluate(size, sizes)
            return memo[size]

        self._value: Callable[[Any], int] = value
        self.storage = place_buffers(program, value)
        self._check_sizes()
        self.constants: dict[int, np.ndarray] = dict(program.constants)
        for b, buffer in enumerate(program.buffers):
            if buffer.kind == "dim":
                self.constants[b] = np.array(value(buffer.value), dtype=program.dtypes[b])
        self._dims = Resident(self.device)
        in_place = lambda output: program.keeps_places or self.storage.donors[output] >= 0
        self.donors = {output: number for number, output in program.donations if in_place(output)}
        self.refusals: dict[int, str] = {}
        self.long_loops: dict[int, int] = {}
        self._preparations: list[_Preparation] = []
        self._loops: list[Loop] = []
        self._place_own_memory()
        self.segments = self._cut()
        places = list(self._places())
        self._params = sorted({p.index for p in places if p.space == "param"})
        self._constants = sorted({p.index for p in places if p.space == "constant"})

    def _place_own_memory(self) -> None:
        """The arena comes first, then room for the outputs."""
        self.offsets: Bases = {("arena", 0): 0}
        self.nbytes = aligned(self.storage.arena_bytes)
        for number, b in enumerate(self.program.outputs):
            if self.storage.donors[number] < 0:  # others lie where their donors lie
                self._add_memory(("output", number), self.storage.nbytes[b])

    def _add_memory(self, space: tuple[str, int], nbytes: int) -> None:
        self.offsets[space] = self.nbytes
        self.nbytes += aligned(nbytes)

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
    def _cut(self) -> list[Segment]:
        """The program's steps as segments, with the copies to outputs at the end."""
        segments = [Segment([])]
        done = False  # whether a library did what the next step may continue
        for number, step in enumerate(self.program.steps):
            if isinstance(step, HostStep):
                loop = self._loop(step)
                if loop is None:
                    segments += [Segment([], step, number), Segment([])]
                else:
                    self._add_loop(segments, loop, step, number)
                continue
            assert isinstance(step, LaunchStep)
            if step.continues and done:
                continue
            work = self._library_work(step, number)
            done = work is not None
            segments[-1].work += self._launch(step, number) if work is None else work
        segments[-1].work += self._final_copies()
        return [s for s in segments if s.work or s.host is not None]

    def _loop(self, step: HostStep) -> Loop | None:
        """The loop of a scan whose body has no host steps; None for other host steps."""
        scan = step.function
        if not isinstance(scan, Scan):
            return None
        split = len(step.operands) - step.outputs
        types = [(self.storage.shapes[b], self.program.dtypes[b]) for b in step.operands[:split]]
        loop = Loop(scan, types, self.sizes, lambda program, sizes: DevicePlan(program, sizes, scattered=True))
        return loop if loop.is_native and loop.body.num_launches() <= GRAPH_LAUNCHES else None

    def _add_loop(self, segments: list[Segment], loop: Loop, step: HostStep, number: int) -> None:
        """Put a loop into the last segment, or into some of its own."""
        places = [self.storage.places[b] for b in step.operands]
        split = len(places) - step.outputs
        own = len(self._loops)
        self._loops.append(loop)
        self._add_memory(("loop", own), loop.nbytes)
        part = lambda start, stop: LoopPart(loop, own, places[:split], places[split:], start, stop, number)
        each, total = loop.launches_of_a_step(), loop.num_launches()
        if total > LOOP_LAUNCHES:
            self.long_loops[number] = total
            segments += [Segment([part(0, loop.count)], kept=False), Segment([])]
        elif sum(map(launches_of, segments[-1].work)) + total <= GRAPH_LAUNCHES:
            segments[-1].work.append(part(0, loop.count))
        else:
            steps = max(GRAPH_LAUNCHES // each, 1)
            starts = range(0, loop.count, steps)
            segments += [Segment([part(start, min(start + steps, loop.count))]) for start in starts]
            segments.append(Segment([]))

    def _library_work(self, step: LaunchStep, number: int) -> list[Work] | None:
        """A step as a call of the device's library, where there is one that takes it."""
        call = step.library
        if call is None or self._value(step.extent) <= 0:
            return None
        buffers = [self._buffer(b) for b in call.operands]
        alignments = [self._alignment(place) for place, _, _ in buffers]
        with self.device.lock:  # libraries are not for several threads at once
            self.device.make_current()
            library = self.device.library(type(call.task))
            plan = library if isinstance(library, str) else library.plan(call.task, self._value, alignments)
        if isinstance(plan, str):
            self.refusals[number] = plan
            return None
        work: list[Work] = []
        for before in call.before:
            launches = self._launch(before, number)
            if self.storage.places[before.operands[-1]].space == "prepared":
                source = self.storage.places[before.operands[0]]
                key = (before.kernel, source.space, source.index, source.offset)
                self._preparations += [_Preparation(launch, (*key, *launch.sizes)) for launch in launches]
            else:
                work += launches
        after = [launch for step in call.after for launch in self._launch(step, number)]
        return [*work, LibraryCall(plan, buffers, number), *after]

    def _launch(self, step: LaunchStep, number: int) -> list[Launch]:
        """A step as a launch; none where there is nothing to do."""
        extent = self._value(step.extent)
        if extent <= 0:
            return []
        buffers = [self._buffer(b) for b in step.operands]
        blocks = min(extent, self.device.most_blocks)
        sizes = [self._value(s) for s in step.sizes]
        function = self.program.functions[step.kernel]
        return [Launch(function, blocks, step.block, self._value(step.shared_bytes), buffers, sizes, number)]

    def _alignment(self, place: Place) -> int:
        """Bytes to which a place is aligned in every call. Inputs may be arrays of other libraries, which lie anywhere,
        and outputs may lie where inputs lie."""
        foreign = place.space in ("input", "donor")
        foreign |= place.space == "output" and (self._scattered or self.storage.donors[place.index] >= 0)
        return math.gcd(1 if foreign else ALIGNMENT, place.offset)

    def _buffer(self, b: int) -> tuple[Place, int, str]:
        """Place, bytes and dtype of a buffer."""
        return self.storage.places[b], self.storage.nbytes[b], self.program.buffers[b].dtype

    def _final_copies(self) -> list[Copy]:
        """What brings outputs to their places after the last step: views, inputs, and those with a donor that is read
        until the end. A donated input that is an output too is copied aside before it is overwritten."""
        program, storage = self.program, self.storage
        aside: list[Copy] = []
        out: list[Copy] = []
        for number, b in enumerate(program.outputs):
            place, nbytes = storage.places[b], storage.nbytes[b]
            if storage.donors[number] >= 0:
                continue
            target = Place("donor" if number in self.donors else "output", number, 0)
            if place == target:
                continue
            if place.space == "input" and place.index in self.donors.values():
                self._add_memory(("aside", number), nbytes)
                room = Place("aside", number, 0)
                aside.append(Copy(room, place, nbytes))
                place = room
            out.append(Copy(target, place, nbytes))
        return aside + out

    def _places(self) -> Iterator[Place]:
        """Every place that work and host steps name."""
        for segment in self.segments:
            if segment.host is not None:
                yield from (self.storage.places[b] for b in segment.host.operands)
            for work in segment.work:
                if isinstance(work, Copy):
                    yield from (work.source, work.target)
                elif isinstance(work, LoopPart):
                    yield from (*work.operands, *work.results)
                else:
                    yield from (place for place, _, _ in work.buffers)

    # -- counts -------------------------------------------------------------------------------------------------------
    def num_launches(self) -> int:
        """Launches, calls of libraries and copies, those of loops included."""
        return sum(launches_of(work) for segment in self.segments for work in segment.work)

    def num_library_calls(self) -> int:
        """Steps that the device's libraries do, those of loops' bodies included."""
        own = sum(isinstance(work, LibraryCall) for segment in self.segments for work in segment.work)
        return own + sum(loop.body.num_library_calls() for loop in self._loops)

    # -- memory -------------------------------------------------------------------------------------------------------
    def resident(self) -> Bases:
        """Where parameters, constants and what is made of them lie, with those of loops. Uploads and makes what is not
        there. Raises KGraphError for a parameter without a value, DeviceMemoryError."""
        bases: Bases = {}
        program = self.program
        for index in self._params:
            bases["param", index] = program.resident_params.address(index, self._param(index))
        for index in self._constants:
            resident = program.resident_constants if index in program.constants else self._dims
            bases["constant", index] = resident.address(index, self.constants[index])
        for preparation in self._preparations:
            target, _, _ = preparation.launch.buffers[-1]
            bases[target.space, target.index] = self._prepared(preparation)
        for loop in self._loops:
            loop.upload()
        return bases

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

        kernel, _, _, *numbers = preparation.key
        return self.program.prepared.made(preparation.key, (kernel, *numbers), array, nbytes, fill)

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self, work: Work, bases: Bases) -> None:
        """Ask for one piece of work."""
        if isinstance(work, Copy):
            self.device.copy(address_of(work.target, bases), address_of(work.source, bases), work.nbytes)
        elif isinstance(work, LibraryCall):
            self.device.make_current()
            work.plan.run([address_of(place, bases) for place, _, _ in work.buffers])
        elif isinstance(work, LoopPart):
            self._run_loop(work, bases)
        else:
            buffers = [Argument(address_of(place, bases), nbytes, dtype) for place, nbytes, dtype in work.buffers]
            self.device.launch(work.function, work.grid, work.block, work.shared_bytes, buffers, work.sizes)

    def _run_loop(self, part: LoopPart, bases: Bases) -> None:
        loop, body = part.loop, part.loop.body
        given, wanted = ([address_of(p, bases) for p in places] for places in (part.operands, part.results))
        last = part.stop + (part.stop == loop.count)
        for step in itertools.islice(loop.steps(bases["loop", part.number], given, wanted), part.start, last):
            for copy in step.before:
                self.device.copy(*copy)
            if step.bases is not None:
                for work in itertools.chain(*(segment.work for segment in body.segments)):
                    body.run(work, step.bases)
            for copy in step.copies:
                self.device.copy(*copy)


def address_of(place: Place, bases: Bases) -> int:
    """The address of a place."""
    return bases[place.space, place.index] + place.offset


def launches_of(work: Work) -> int:
    """Launches and copies that a piece of work consists of."""
    return work.loop.launches_of_a_step() * (work.stop - work.start) if isinstance(work, LoopPart) else 1


__all__ = ["Bases", "Copy", "DevicePlan", "LibraryCall", "LoopPart", "Segment", "Work", "address_of"]
