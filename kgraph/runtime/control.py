"""Branches and loops over compiled bodies: the functions of their host steps.

A body is a program of its own. A loop whose body is one native call runs natively as a whole, on addresses: slices of
sequences are read where they lie, results are stacked where they are written, and carried values are read where the
iteration before wrote them, so that nothing is copied or allocated per iteration. Other bodies (with host steps of
their own) are called on arrays, from Python.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import KGraphError
from kgraph.runtime import context as context_module
from kgraph.runtime.binding import Binding
from kgraph.runtime.context import FIRST_EXTERNAL
from kgraph.runtime.plan import Program
from kgraph.runtime.storage import Storage
from kgraph.types import np_dtype

Arrays = Sequence[np.ndarray]
Type = tuple[tuple[int, ...], np.dtype]
# The words of the table of `codegen.cpu.repeat`. run, context: the executor's entry and its argument. cells: addresses
# of the program's inputs and outputs. count: iterations. flag: the cell of the output that says whether to go on, or
# -1. first, carries, sources: so many cells from `first` on take, after each iteration, the addresses in these cells;
# new: room for as many words. toggles, toggle_rows: number of, and (cell, mask of bits that change). moves, move_rows:
# (cell, bytes to add). copies, copy_rows: (to where, cell of the source, bytes, bytes to go on). going: the last flag.
TABLE = tuple(
    """run context cells count flag first carries sources new toggles toggle_rows moves move_rows copies copy_rows
    going""".split()
)
PAIR_WORDS, COPY_WORDS = 2, 4
# Iterations between two looks at Python's signals.
_TURNS = 256
_REPEAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Bound(Protocol):
    """A program at concrete sizes."""

    sizes: dict[str, int]
    storage: Storage


@dataclass(frozen=True)
class Body:
    """A compiled body.

    program: takes the body's operands, then `constants`, then for each of `symbols` a bool array of that length, which
        tells a size that no operand's shape gives.
    results: per result of the body where it is: ("output", number) of the program, or ("input", number).
    types: their (shape, dtype). repeat: the key of the program's kernel that repeats it natively, for bodies of loops.
    """

    program: Program
    results: tuple[tuple[str, int], ...]
    types: tuple[tuple[tuple, str], ...]
    constants: tuple[np.ndarray, ...] = ()
    symbols: tuple[str, ...] = ()
    repeat: str = ""

    def extra(self, sizes: dict[str, int]) -> list[np.ndarray]:
        """What the program takes besides the operands."""
        return [*self.constants, *(np.empty(sizes[s], np.bool_) for s in self.symbols)]

    def bind(self, shapes: Sequence[tuple[int, ...]]) -> Binding:
        """The program for operands (and extras) of these shapes."""
        return self.program.bind(self.program.resolve(shapes))

    def result_types(self, sizes: dict[str, int], binding: Bound) -> list[Type]:
        """Concrete shapes and dtypes of the results. Raises KGraphError where the program does not give these."""
        known, program = {**sizes, **binding.sizes}, self.program
        types = [(tuple([evaluate(s, known) for s in shape]), np_dtype(dtype)) for shape, dtype in self.types]
        for (shape, dtype), (kind, number) in zip(types, self.results):
            b = (program.inputs if kind == "input" else program.outputs)[number]
            if dtype != program.dtypes[b] or math.prod(shape) * dtype.itemsize != binding.storage.nbytes[b]:
                raise KGraphError(f"{program.name}: result {number} is not {dtype}{list(shape)}")
        return types

    def run(self, binding: Binding, arrays: Arrays, types: Sequence[tuple]) -> list[np.ndarray]:
        """The results for concrete operands and extras; they may be operands themselves."""
        outputs = binding.run(arrays)
        places = [(arrays if kind == "input" else outputs)[number] for kind, number in self.results]
        return [a.reshape(shape) for a, (shape, _) in zip(places, types)]


@dataclass(frozen=True)
class Branches:
    """The function of a `cond` step: one of several bodies runs."""

    bodies: tuple[Body, ...]

    def __call__(self, arrays: Arrays, sizes: dict[str, int]) -> list[np.ndarray]:
        body = self.bodies[min(max(int(arrays[0]), 0), len(self.bodies) - 1)]
        given = [*arrays[1:], *body.extra(sizes)]
        binding = body.bind([a.shape for a in given])
        return body.run(binding, given, body.result_types(sizes, binding))


@dataclass(frozen=True)
class While:
    """The function of a `while_loop` step.

    first: whether to begin. body: the next operands, then whether to go on. wanted: numbers of the operands of which
    the step gives what becomes of them.
    """

    first: Body
    body: Body
    wanted: tuple[int, ...]

    @property
    def inplace(self) -> tuple[tuple[int, int], ...]:
        """See `steps.HostStep`."""
        return carried_in_place(len(self.body.results) - 1, self.wanted, self.body.program.donations)

    def __call__(self, arrays: Arrays, sizes: dict[str, int], own: Collection[int] = ()) -> list[np.ndarray]:
        given = [*arrays, *self.first.extra(sizes)]
        binding = self.first.bind([a.shape for a in given])
        if not self.first.run(binding, given, self.first.result_types(sizes, binding))[0]:
            return self._wanted(arrays)
        rest = self.body.extra(sizes)
        given = [*arrays, *rest]
        binding = self.body.bind([a.shape for a in given])
        types = self.body.result_types(sizes, binding)
        check_carried(self.body.program.name, types_of(arrays), types[:-1])
        if self.body.repeat and is_one_native_call(binding):
            return self._on_addresses(binding, given, types, own)
        given = _own_donors(binding, given, own)
        while True:
            *given, go_on = self.body.run(binding, given, types)
            if not go_on:
                return self._wanted(given)
            given += rest

    def _wanted(self, carries: Arrays) -> list[np.ndarray]:
        return [carries[i] for i in self.wanted]

    def _on_addresses(self, binding: Binding, given: Arrays, types: list, own: Collection[int]) -> list[np.ndarray]:
        runs = NativeRuns(binding, given, self.body.repeat)
        *sources, flag = [runs.slot(place) for place in self.body.results]
        in_place = runs.place_outputs(given, own=own)
        runs.carry(sources)
        while runs.repeat(_TURNS, flag):
            pass
        return runs.finish({i: types[i] for i in self.wanted}, in_place)


def changing(results: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """Numbers of the operands that the body of a loop with these `results` (see `Body`) does not just pass on."""
    return tuple(i for i, place in enumerate(results[:-1]) if place != ("input", i))


def carried_in_place(
    num_operands: int, given: Sequence[int], donations: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Pairs (output, input) of positions in the step of a loop that gives these of its carries.

    donations: those of its body: what it may write over the carry before.
    """
    donated = {carry for carry, _ in donations}
    return tuple((num_operands + place, carry) for place, carry in enumerate(given) if carry in donated)


def is_handed_on(results: Sequence[tuple[str, int]], carry: int, output: int) -> bool:
    """Whether that output of a loop's body is what becomes of that carry, and nothing else is made of either."""
    place = ("output", output)
    return results[carry] == place and results.count(place) == 1 and ("input", carry) not in results


def _own_donors(binding: Binding, arrays: Arrays, own: Collection[int]) -> list[np.ndarray]:
    """The arrays, with copies for those that the program overwrites and that are not the step's `own`."""
    donors = {d for d in binding.storage.donors if d >= 0 and d not in own}
    return [np.array(a, order="C") if i in donors else a for i, a in enumerate(arrays)]


@dataclass(frozen=True)
class Scan:
    """The function of a `scan` step; see `kgraph.ops.scan`."""

    body: Body
    num_carry: int
    num_xs: int
    length: int | Dim
    reverse: bool

    @property
    def inplace(self) -> tuple[tuple[int, int], ...]:
        """See `steps.HostStep`."""
        num_operands = len(self.body.program.inputs) - len(self.body.constants) - len(self.body.symbols)
        return carried_in_place(num_operands, range(self.num_carry), self.body.program.donations)

    def __call__(self, arrays: Arrays, sizes: dict[str, int], own: Collection[int] = ()) -> list[np.ndarray]:
        count, held = evaluate(self.length, sizes), self.num_carry + self.num_xs
        carries, xs = arrays[: self.num_carry], [np.ascontiguousarray(x) for x in arrays[self.num_carry : held]]
        rest = [*arrays[held:], *self.body.extra(sizes)]
        binding = self.body.bind([a.shape for a in carries] + [x.shape[1:] for x in xs] + [a.shape for a in rest])
        types = self.body.result_types(sizes, binding)
        check_carried(self.body.program.name, types_of(carries), types)
        if any(len(x) != count for x in xs):
            raise KGraphError(f"{self.body.program.name}: a sequence has another length than {count}")
        stacks = [np.empty((count, *shape), dtype) for shape, dtype in types[self.num_carry :]]
        if count and self.body.repeat and is_one_native_call(binding):
            return [*self._on_addresses(binding, carries, xs, rest, types, stacks, count, own), *stacks]
        carries = _own_donors(binding, carries, own)
        for t in range(count)[:: -1 if self.reverse else 1]:
            results = self.body.run(binding, [*carries, *(np.asarray(x[t]) for x in xs), *rest], types)
            carries = results[: self.num_carry]
            for stack, y in zip(stacks, results[self.num_carry :]):
                stack[t] = y
        return [*carries, *stacks]

    def _on_addresses(self, binding: Binding, carries, xs, rest, types, stacks, count: int, own) -> list[np.ndarray]:
        """Fill `stacks`, and give the last carries."""
        first, sign = (count - 1, -1) if self.reverse else (0, 1)
        row = lambda a, t: a[t : t + 1]
        runs = NativeRuns(binding, [*carries, *(row(x, first) for x in xs), *rest], self.body.repeat)
        for slot, x in enumerate(xs, runs.first + self.num_carry):
            runs.move(slot, sign * row(x, 0).nbytes)
        sources = [runs.slot(place) for place in self.body.results]
        # An output of the program is written where one of the stacks has it, if one has: as a result of this step, or
        # as a carry with which the next one begins. All other results are copied.
        written: set[int] = set()
        ahead: list[tuple[int, np.ndarray]] = []
        others = []
        for stack, source in zip(stacks, sources[self.num_carry :]):
            if source >= runs.first_output and source not in written:
                written.add(source)
                runs.put(source, row(stack, first))
                runs.move(source, sign * row(stack, 0).nbytes)
            else:
                others.append((stack, source))
        for stack, source in others:
            carry = source - runs.first
            into = sources[carry] if carry < self.num_carry else -1
            if into < runs.first_output or into in written:
                runs.copy(row(stack, first), source, sign * row(stack, 0).nbytes)
                continue
            written.add(into)
            stack[first] = carries[carry].reshape(stack.shape[1:])
            ahead.append((into, np.empty_like(row(stack, 0))))
            runs.put(into, row(stack, first + sign if count > 1 else first))
            runs.move(into, sign * row(stack, 0).nbytes)
        in_place = runs.place_outputs(carries, written, own)
        runs.carry(sources[: self.num_carry])
        for start in range(0, count - 1, _TURNS):
            runs.repeat(min(_TURNS, count - 1 - start))
        for slot, last in ahead:
            runs.put(slot, last)
        runs.repeat(1)
        return runs.finish(dict(enumerate(types[: self.num_carry])), in_place)


def check_carried(name: str, before: Sequence[Type], after: Sequence[Type]) -> None:
    """Raises KGraphError where a carried value leaves the body of a loop with another type than it entered with."""
    for number, ((shape, dtype), (later, later_dtype)) in enumerate(zip(before, after)):
        if tuple(shape) != tuple(later) or dtype != later_dtype:
            raise KGraphError(f"{name}: carry {number} is {dtype}{list(shape)}, not {later_dtype}{list(later)}")


def types_of(arrays: Sequence) -> list[Type]:
    """Shapes and dtypes of arrays."""
    return [(a.shape, a.dtype) for a in arrays]


def is_one_native_call(binding: Binding) -> bool:
    """Whether the program runs in one native call that writes all outputs where it is told to."""
    segments = binding.table.segments
    return len(segments) == 1 and segments[0].host is None and min(binding.storage.direct, default=0) >= 0


class NativeRuns:
    """Repeated runs of a program that is one native call, on addresses in `cells`: one per input, then per output.

    given: what the inputs are at first; contiguous. repeat: key of the kernel that repeats the program. All memory is
    kept until the object goes.
    """

    def __init__(self, binding: Binding, given: Arrays, repeat: str):
        binding.used = True
        self.binding, self.context = binding, binding._context()
        self._kept: list[np.ndarray] = []
        total = len(given) + len(binding.program.outputs)
        offset = context_module.EXTERNAL_OFFSET
        if offset >= 0:
            # The executor reads the address of the data out of an array object; here out of a cell.
            self.first, self.cells = 0, array("q", bytes(8 * total))
            start = self.cells.buffer_info()[0] - offset
            for slot in range(total):
                self.context.words[FIRST_EXTERNAL + slot] = start + 8 * slot
        else:
            self.first, self.cells = FIRST_EXTERNAL, self.context.words
        self.first_output = self.first + len(given)
        for slot, (a, dtype) in enumerate(zip(given, binding.input_dtypes, strict=True), self.first):
            if a.dtype != dtype:
                raise KGraphError(f"{binding.program.name} takes {dtype}, not {a.dtype}")
            self.put(slot, np.ascontiguousarray(a))
        self._repeat = _REPEAT(binding.program.functions[repeat])
        self._sources, self._toggles, self._moves, self._copies = (array("q") for _ in range(4))
        self._new = array("q")

    def slot(self, place: tuple[str, int]) -> int:
        """The cell of ("input", number) or ("output", number)."""
        kind, number = place
        return (self.first if kind == "input" else self.first_output) + number

    def put(self, slot: int, a: np.ndarray) -> None:
        """Use the memory of a contiguous array from now on."""
        self._kept.append(a)
        self.cells[slot] = a.ctypes.data

    def place_outputs(
        self, carries: Arrays, written: Collection[int] = (), own: Collection[int] = ()
    ) -> dict[int, np.ndarray]:
        """Place the outputs but for the cells `written`: over the carry that was donated for one, else in turn.

        Gives those of the carries `own` that are overwritten, by number; others are copied first.
        """
        in_place = {}
        for number, donor in enumerate(self.binding.storage.donors):
            if donor >= 0 and donor in own and carries[donor].flags.c_contiguous:
                in_place[donor] = carries[donor]
                self.put(self.first_output + number, carries[donor])
            elif donor >= 0:
                self.put(self.first_output + number, np.array(carries[donor], order="C"))
            elif self.first_output + number not in written:
                self._alternate(number)
        return in_place

    def _alternate(self, number: int) -> None:
        """Write an output to two pieces of memory in turn: what was written last can be read by the next run."""
        b = self.binding.program.outputs[number]
        nbytes = self.binding.storage.nbytes[b]
        one, other = (np.empty(nbytes + 64, np.uint8) for _ in range(2))
        self._kept.append(other)
        self.put(self.first_output + number, one)
        self._toggles.extend((self.first_output + number, one.ctypes.data ^ other.ctypes.data))

    def move(self, slot: int, step: int) -> None:
        """Go on by `step` bytes after every run."""
        self._moves.extend((slot, step))

    def copy(self, a: np.ndarray, slot: int, step: int) -> None:
        """Copy what a cell points to into `a` after every run, then go on by `step` bytes."""
        self._copies.extend((a.ctypes.data, slot, a.nbytes, step))

    def carry(self, sources: Sequence[int]) -> None:
        """The first inputs of a run are read where these cells point to in the run before; call it last.

        What a carry takes over from another one may lie where an output is about to be written again: it is copied.
        """
        own, alternating = list(sources), set(self._toggles[::PAIR_WORDS])
        behind = {number: self._runs_behind(number, sources, alternating) for number in range(len(sources))}
        for number in sorted((n for n, runs in behind.items() if runs), key=behind.__getitem__, reverse=True):
            memory = self._kept[number].copy()
            self.put(self.first + number, memory)
            self.copy(memory, sources[number], 0)
            own[number] = self.first + number
        self._sources, self._new = array("q", own), array("q", bytes(8 * len(own)))

    def _runs_behind(self, number: int, sources: Sequence[int], alternating: set[int]) -> int:
        """How many runs an output of these cells takes to get to a carry, beyond the first; 0 if none gets there."""
        for runs in range(len(sources)):
            slot = sources[number]
            number = slot - self.first
            if not 0 <= number < len(sources):
                return runs if slot in alternating else 0
        return 0

    def repeat(self, count: int, flag: int = -1) -> bool:
        """Up to `count` runs, as long as the output at the cell `flag` is true; gives that output's last value."""
        rows = {"sources": self._sources, "new": self._new, "toggle_rows": self._toggles, "move_rows": self._moves}
        rows["copy_rows"] = self._copies
        fields = {name: a.buffer_info()[0] for name, a in rows.items()}
        fields |= {
            "run": ctypes.cast(self.binding._native, ctypes.c_void_p).value or 0,
            "context": self.context.address,
        }
        fields |= {"cells": self.cells.buffer_info()[0], "count": count, "flag": flag, "first": self.first}
        fields |= {"carries": len(self._sources), "toggles": len(self._toggles) // PAIR_WORDS}
        fields |= {"moves": len(self._moves) // PAIR_WORDS, "copies": len(self._copies) // COPY_WORDS, "going": 0}
        table = array("q", [fields[name] for name in TABLE])
        self._repeat(table.buffer_info()[0])
        return bool(table[TABLE.index("going")])

    def finish(self, types: dict[int, tuple], in_place: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Carried values, by their numbers with shapes and dtypes; the object is spent afterwards.

        in_place: those that lie where the step wants them; of the others it gives copies.
        """
        out = []
        for number, (shape, dtype) in types.items():
            if number in in_place:
                out.append(in_place[number])
                continue
            a = np.empty(shape, dtype)
            ctypes.memmove(a.ctypes.data, self.cells[self.first + number], a.nbytes)
            out.append(a)
        self.binding._free.append(self.context)
        return out
