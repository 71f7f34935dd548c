"""A program prepared for concrete sizes, and calls of it."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import InputError, KGraphError
from kgraph.runtime import context as context_module
from kgraph.runtime import layout, threads
from kgraph.runtime.context import FIRST_EXTERNAL, Context
from kgraph.runtime.storage import place_buffers
from kgraph.runtime.table import BoundStep, StepTable

if TYPE_CHECKING:
    from kgraph.runtime.plan import Program
    from kgraph.runtime.steps import HostStep

# NumPy's flags C_CONTIGUOUS and ALIGNED.
_DENSE = 0x101
# Contexts kept for later calls; more arise, and go again, while more calls are in flight at once.
_MAX_WAITING_CONTEXTS = 32


@dataclass(frozen=True)
class StepTime:
    """Time of one step in one call, from the moment all threads are ready to the moment all are done."""

    label: str
    layers: tuple[str, ...]
    nanoseconds: int
    flops: int
    bytes: int
    threads: int
    host: bool


class Binding:
    """A program for concrete sizes, callable from any number of threads at once: each call has a context of its own.

    run: `run(arrays)`, a call without `out=`; the fast path, prepared for this program's inputs and outputs.
    used: set by every call, for the program to see which bindings are in use. input_dtypes: one per input.
    """

    def __init__(self, program: Program, sizes: dict[str, int]):
        self.program, self.sizes = program, sizes
        self.generation = threads.generation
        self.used = True
        memo: dict[Dim, int] = {}

        def value(size) -> int:
            if not isinstance(size, Dim):
                return int(size)
            if size not in memo:
                memo[size] = evaluate(size, sizes)
            return memo[size]

        self.storage = place_buffers(program, value)
        self.table = StepTable(program, self.storage, value)
        self.constants = dict(program.constants)
        for b, buffer in enumerate(program.buffers):
            if buffer.kind == "dim":
                self.constants[b] = np.array(value(buffer.value), dtype=program.dtypes[b])
        self.param_slots = [(i, place) for i, place in enumerate(self.table.slots) if place.space == "param"]
        self._free: deque[Context] = deque(maxlen=_MAX_WAITING_CONTEXTS)
        self.input_dtypes = [program.dtypes[b] for b in program.inputs]
        self._outputs = [(self.storage.shapes[b], program.dtypes[b]) for b in program.outputs]
        # Outputs that overwrite an input: (output number, input number).
        self._donated = [(o, i) for o, i in enumerate(self.storage.donors) if i >= 0]
        # Outputs that are copied after the run: (output number, buffer id).
        self._copied = [(i, program.outputs[i]) for i, b in enumerate(self.storage.direct) if b < 0]
        simple = len(self.table.segments) == 1 and not self._copied and self.table.segments[0].host is None
        # Without kernels there is no executor, and nothing that would call it.
        self._native: Any = program.executor.run if program.executor is not None else None
        self.run: Callable[[Sequence[np.ndarray]], tuple] = self._prepare_run() if simple else self._run_in_segments

    @property
    def steps(self) -> list[BoundStep]:
        """One entry per step of the program."""
        return self.table.steps

    @property
    def threads(self) -> int:
        """The most threads that a step uses."""
        return self.table.threads

    @property
    def num_barriers(self) -> int:
        """How often all threads wait for each other in a call."""
        return self.table.num_barriers

    @property
    def arena_bytes(self) -> int:
        """Memory of the temporaries of one call."""
        return self.storage.arena_bytes

    @property
    def scratch_bytes(self) -> int:
        """Memory that each thread of a call has to itself."""
        return self.table.scratch_bytes

    # -- contexts ---------------------------------------------------------------------------------------------------
    def num_contexts(self) -> int:
        """Contexts that wait for a call."""
        return len(self._free)

    def idle_bytes(self) -> int:
        """Memory of the contexts that wait for a call."""
        return len(self._free) * (self.arena_bytes + self.threads * self.scratch_bytes)

    def release_contexts(self) -> None:
        """Drop the contexts that wait for a call, and their memory."""
        self._free.clear()

    def release_old_params(self) -> None:
        """Make waiting contexts refer to the program's current parameters, so that old ones can be freed."""
        values = self.program.values
        if any(v is None for v in values):
            return
        for _ in range(len(self._free)):
            try:
                context = self._free.pop()
            except IndexError:
                return
            context.set_params(values)
            self._free.appendleft(context)

    def _context(self) -> Context:
        """A context of this call's own, with the current parameters."""
        try:
            context = self._free.pop()
        except IndexError:
            self.program.trim(self)
            context = Context(self)
        if context.params is not self.program.values:
            context.set_params(self.program.values)
        return context

    # -- calls ------------------------------------------------------------------------------------------------------
    def __call__(self, arrays: Sequence[np.ndarray], out: Sequence[np.ndarray | None] | None = None) -> tuple:
        """Run on `arrays`, which have this binding's shapes; gives fresh arrays, or those of `out`."""
        if out is None:
            return self.run(arrays)
        if self.generation != threads.generation:
            return self.program.bind(self.sizes)(arrays, out)
        arrays = self.dense_inputs(arrays)
        results, finals = self.check_out(arrays, out)
        self.run_into(arrays, results)
        for final, result in zip(finals, results):
            if final is not None and final is not result:
                np.copyto(final, result)
        return tuple([r if f is None else f for f, r in zip(finals, results)])

    def _prepare_run(self) -> Callable[[Sequence[np.ndarray]], tuple]:
        """The fast path of a program without host steps: one native call, and nothing looked up that can be bound."""
        program, free, new_context = self.program, self._free, self._context
        native, generation, ndarray, empty = self._native, self.generation, np.ndarray, np.empty
        dtypes, outputs = self.input_dtypes, self._outputs
        first, slow = FIRST_EXTERNAL, self._run_in_segments

        donated = self._donated
        if len(dtypes) == len(outputs) == 1 and not donated and context_module.EXTERNAL_OFFSET >= 0:
            ((dtype,), ((shape, out_dtype),)) = dtypes, outputs

            def run_single(arrays: Sequence[np.ndarray]) -> tuple:
                (a,) = arrays
                if (
                    type(a) is not ndarray
                    or a.dtype is not dtype
                    or a.flags.num & _DENSE != _DENSE
                    or generation != threads.generation
                ):
                    return slow(arrays)
                self.used = True
                result = empty(shape, out_dtype)
                try:
                    context = free.pop()
                except IndexError:
                    context = new_context()
                if context.params is not program.values:
                    context.set_params(program.values)
                words = context.words
                words[first] = id(a)
                words[first + 1] = id(result)
                native(context.address)
                # A context that an exception leaves behind is not reused: nothing needs to be undone.
                free.append(context)
                return (result,)

            return run_single

        def run(arrays: Sequence[np.ndarray]) -> tuple:
            for a, dtype in zip(arrays, dtypes):
                if type(a) is not ndarray or a.dtype is not dtype or a.flags.num & _DENSE != _DENSE:
                    return slow(arrays)
            if generation != threads.generation:
                return slow(arrays)
            self.used = True
            results = self._new_results(arrays) if donated else [empty(shape, dtype) for shape, dtype in outputs]
            context = new_context()
            _set_externals(context, arrays, results)
            native(context.address)
            free.append(context)
            return tuple(results)

        return run

    def _run_in_segments(self, arrays: Sequence[np.ndarray]) -> tuple:
        """A call of any program with any arrays."""
        if self.generation != threads.generation:
            return self.program.bind(self.sizes).run(arrays)
        self.used = True
        arrays = self.dense_inputs(arrays)
        results = self._new_results(arrays)
        self.run_into(arrays, results)
        return tuple(results)

    def run_into(self, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
        """A call on dense arrays that writes into `results`, which nothing else reads or writes meanwhile."""
        context = self._context()
        self._call(context, arrays, results)
        self._free.append(context)

    def _new_results(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays to run into: those of donated inputs, and fresh ones."""
        donors = self.storage.donors
        return [np.empty(*own) if d < 0 else arrays[d] for d, own in zip(donors, self._outputs)]

    def _call(self, context: Context, arrays, results, times: list[int] | None = None) -> None:
        """Run all segments on dense `arrays` into `results`; a donated input is overwritten if it is the result too.

        times: for a profile; gets the nanoseconds of host steps, and native steps are called one by one.
        """
        for number, donor in self._donated:
            if results[number] is not arrays[donor]:
                np.copyto(results[number], arrays[donor])
        _set_externals(context, arrays, results)
        for number, segment in enumerate(self.table.segments):
            if segment.host is None and times is None:
                self._run_native(context, number, segment.first, segment.last, segment.threads)
            elif segment.host is None:
                for record in range(segment.first, segment.last):
                    self._run_native(context, record, record, record + 1, segment.threads)
            else:
                start = time.perf_counter_ns()
                self._run_host(segment.host, context, arrays, results)
                if times is not None:
                    times[segment.index] = time.perf_counter_ns() - start
        for number, b in self._copied:
            np.copyto(results[number], self._view(b, context, arrays, results))

    def _run_native(self, context: Context, part: int, first: int, last: int, threads: int) -> None:
        """Run the records [first, last), the part of the context's work that has the count of runs number `part`."""
        context.put(layout.CONTEXT_EPOCH, context.epochs + part * layout.LINE)
        context.put(layout.CONTEXT_FIRST, first)
        context.put(layout.CONTEXT_LAST, last)
        context.put(layout.CONTEXT_THREADS, threads)
        self._native(context.address)

    def _run_host(self, step: HostStep, context: Context, arrays, results) -> None:
        split = len(step.operands) - step.outputs
        given = [self._view(b, context, arrays, results) for b in step.operands[:split]]
        answers = step.function(given, self.sizes, *([self._overwritten(step)] if step.inplace else []))
        targets = step.operands[split:]
        where = f"{self.program.name}: host step {step.label}"
        if len(answers) != len(targets):
            raise KGraphError(f"{where} gave {len(answers)} arrays, expected {len(targets)}")
        for b, answer in zip(targets, answers):
            answer = np.asarray(answer)
            if answer.shape != self.storage.shapes[b]:
                raise KGraphError(f"{where} gave shape {answer.shape}, expected {self.storage.shapes[b]}")
            target = self._view(b, context, arrays, results)
            if answer.ctypes.data != target.ctypes.data:
                np.copyto(target, answer, casting="unsafe")

    def _overwritten(self, step: HostStep) -> frozenset[int]:
        """The positions of operands in whose memory an output of the step lies."""
        places = self.storage.places
        lies_in = lambda output, source: places[step.operands[output]] == places[step.operands[source]]
        return frozenset(source for output, source in step.inplace if lies_in(output, source))

    def _view(self, b: int, context: Context, arrays, results) -> np.ndarray:
        """The content of a buffer as an array, during a call."""
        place = self.storage.places[b]
        if place.space == "arena":
            owner = context.arena
        elif place.space == "input":
            owner = arrays[place.index]
        elif place.space == "output":
            owner = results[place.index]
        elif place.space == "param":
            owner = context.params[place.index]
        else:
            owner = self.constants[place.index]
        shape, nbytes, dtype = self.storage.shapes[b], self.storage.nbytes[b], self.program.dtypes[b]
        if nbytes == 0:
            return np.empty(shape, dtype)
        flat = owner.reshape(-1).view(np.uint8)
        return flat[place.offset : place.offset + nbytes].view(dtype).reshape(shape)

    def dense_inputs(self, arrays) -> list[np.ndarray]:
        """The arrays as plain, contiguous, aligned ones. Raises InputError for a wrong number or dtype."""
        if len(arrays) != len(self.input_dtypes):
            raise InputError(f"{self.program.name} takes {len(self.input_dtypes)} arrays, {len(arrays)} were given")
        out = []
        for i, (a, dtype) in enumerate(zip(arrays, self.input_dtypes)):
            a = np.asarray(a)
            if a.dtype != dtype:
                raise InputError(f"{self.program.name}: {self.program.input_names[i]} is {a.dtype}, expected {dtype}")
            if a.flags.num & _DENSE != _DENSE or type(a) is not np.ndarray:
                a = np.array(a, dtype=dtype, order="C", copy=True, subok=False)
            out.append(a)
        return out

    def check_out(self, arrays, out) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Arrays to run into, and the caller's; they differ where the caller's cannot be written during the run."""
        name = self.program.name
        if len(out) != len(self._outputs):
            raise InputError(f"{name} has {len(self._outputs)} outputs, out= has {len(out)}")
        others = list(arrays)
        results = []
        for i, (given, (shape, dtype)) in enumerate(zip(out, self._outputs)):
            if given is None:
                results.append(np.empty(shape, dtype))
                continue
            if not isinstance(given, np.ndarray) or given.dtype != dtype or given.shape != shape:
                what = f"{given.dtype}{list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
                raise InputError(f"{name}: out[{i}] is {what}, expected {dtype}{list(shape)}")
            if not given.flags.writeable:
                raise InputError(f"{name}: out[{i}] is read-only")
            usable = type(given) is np.ndarray and given.flags.num & _DENSE == _DENSE
            if usable and not any(np.may_share_memory(given, o) for o in others) and not self.program.holds(given):
                others.append(given)
                results.append(given)
            else:
                results.append(np.empty(shape, dtype))
        return results, list(out)

    def profile(self, arrays: Sequence[np.ndarray], repeats: int = 5) -> tuple[tuple, list[StepTime]]:
        """Run with time stamps; gives the outputs and the median time of every step of the program in `repeats` runs.

        A run ahead of them brings memory and code into the caches. Every step is a native call of its own here: inside
        of one call thread 0 may find steps done that others ran while it waited for its core.
        """
        arrays = self.dense_inputs(arrays)
        results = [np.empty(shape, dtype) for shape, dtype in self._outputs]
        context = Context(self, profile=True)
        context.set_params(self.program.values)
        runs = [self._timed_run(context, arrays, results) for _ in range(repeats + 1)][1:]
        times = [sorted(one)[len(one) // 2] for one in zip(*runs)]
        report = [
            StepTime(s.label, s.layers, t, s.flops, s.bytes, s.threads, s.host) for s, t in zip(self.steps, times)
        ]
        return tuple(results), report

    def _timed_run(self, context: Context, arrays, results) -> list[int]:
        """Nanoseconds of every step of the program in one run."""
        times = [0] * len(self.steps)
        stamps = array("q", bytes(2 * layout.WORD * (self.table.num_records + 1)))
        context.put(layout.CONTEXT_PROFILE, stamps.buffer_info()[0])
        self._call(context, arrays, results, times)
        for index, record in enumerate(self.table.records):
            if record >= 0:
                # A step ends where the next of its segment begins; only a segment's last has a stamp for its end.
                end = stamps[2 * record + 1] or stamps[2 * record + 2]
                times[index] = end - stamps[2 * record]
        return times


def _set_externals(context: Context, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
    """Tell the executor the call's inputs and outputs, which the caller keeps alive."""
    words, slot = context.words, FIRST_EXTERNAL
    if context_module.EXTERNAL_OFFSET >= 0:
        for a in arrays:
            words[slot] = id(a)
            slot += 1
        for a in results:
            words[slot] = id(a)
            slot += 1
    else:
        for a in (*arrays, *results):
            words[slot] = a.ctypes.data
            slot += 1
