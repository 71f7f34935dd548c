"""Branches and loops over compiled bodies: the functions of their host steps.

A body is a program of its own. A loop whose body is one native call runs it on addresses: slices of sequences are read
where they lie, results are stacked where they are written, and carried values are read where the step before wrote
them, so that nothing is copied or allocated per step. Other bodies (with host steps of their own) are called on arrays.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.runtime import context as context_module
from kgraph.runtime.binding import Binding
from kgraph.runtime.context import FIRST_EXTERNAL
from kgraph.runtime.plan import Program
from kgraph.types import np_dtype

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Body:
    """A compiled body.

    program: takes the body's operands, then `constants`, then for each of `symbols` a bool array of that length, which
        tells a size that no operand's shape gives.
    results: per result of the body where it is: ("output", number) of the program, or ("input", number).
    types: their (shape, dtype).
    """

    program: Program
    results: tuple[tuple[str, int], ...]
    types: tuple[tuple[tuple, str], ...]
    constants: tuple[np.ndarray, ...] = ()
    symbols: tuple[str, ...] = ()

    def extra(self, sizes: dict[str, int]) -> list[np.ndarray]:
        """What the program takes besides the operands."""
        return [*self.constants, *(np.empty(sizes[s], np.bool_) for s in self.symbols)]

    def bind(self, shapes: Sequence[tuple[int, ...]]) -> Binding:
        """The program for operands (and extras) of these shapes."""
        return self.program.bind(self.program.resolve(shapes))

    def result_types(self, sizes: dict[str, int], binding: Binding) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Concrete shapes and dtypes of the results."""
        known = {**sizes, **binding.sizes}
        return [(tuple([evaluate(s, known) for s in shape]), np_dtype(dtype)) for shape, dtype in self.types]

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

    first: whether to begin. body: the next operands, then whether to go on.
    """

    first: Body
    body: Body

    def __call__(self, arrays: Arrays, sizes: dict[str, int]) -> list[np.ndarray]:
        given = [*arrays, *self.first.extra(sizes)]
        binding = self.first.bind([a.shape for a in given])
        if not self.first.run(binding, given, self.first.result_types(sizes, binding))[0]:
            return list(arrays)
        rest = self.body.extra(sizes)
        given = [*arrays, *rest]
        binding = self.body.bind([a.shape for a in given])
        types = self.body.result_types(sizes, binding)
        if is_one_native_call(binding):
            return self._on_addresses(binding, given, types)
        while True:
            *given, go_on = self.body.run(binding, given, types)
            if not go_on:
                return given
            given += rest

    def _on_addresses(self, binding: Binding, given: Arrays, types: list) -> list[np.ndarray]:
        runs = NativeRuns(binding, given)
        *sources, flag = [runs.slot(place) for place in self.body.results]
        for number in range(len(binding.program.outputs)):
            runs.alternate(number)
        runs.carry(sources)
        cells = runs.cells
        while True:
            runs.run()
            go_on = ctypes.c_bool.from_address(cells[flag]).value
            runs.advance()
            if not go_on:
                return runs.finish(types[:-1])


@dataclass(frozen=True)
class Scan:
    """The function of a `scan` step; see `kgraph.ops.scan`."""

    body: Body
    num_carry: int
    num_xs: int
    length: int | Dim
    reverse: bool

    def __call__(self, arrays: Arrays, sizes: dict[str, int]) -> list[np.ndarray]:
        count, held = evaluate(self.length, sizes), self.num_carry + self.num_xs
        carries, xs = arrays[: self.num_carry], [np.ascontiguousarray(x) for x in arrays[self.num_carry : held]]
        rest = [*arrays[held:], *self.body.extra(sizes)]
        binding = self.body.bind([a.shape for a in carries] + [x.shape[1:] for x in xs] + [a.shape for a in rest])
        types = self.body.result_types(sizes, binding)
        stacks = [np.empty((count, *shape), dtype) for shape, dtype in types[self.num_carry :]]
        if count and is_one_native_call(binding):
            return [*self._on_addresses(binding, carries, xs, rest, types, stacks, count), *stacks]
        for t in range(count)[:: -1 if self.reverse else 1]:
            results = self.body.run(binding, [*carries, *(np.asarray(x[t]) for x in xs), *rest], types)
            carries = results[: self.num_carry]
            for stack, y in zip(stacks, results[self.num_carry :]):
                stack[t] = y
        return [*carries, *stacks]

    def _on_addresses(self, binding: Binding, carries, xs, rest, types, stacks, count: int) -> list[np.ndarray]:
        """Fill `stacks`, and give the last carries."""
        first, sign = (count - 1, -1) if self.reverse else (0, 1)
        row = lambda a, t: a[t : t + 1]
        runs = NativeRuns(binding, [*carries, *(row(x, first) for x in xs), *rest])
        for slot, x in enumerate(xs, runs.first + self.num_carry):
            runs.move(slot, sign * row(x, 0).nbytes)
        sources = [runs.slot(place) for place in self.body.results]
        # An output of the program is written where one of the stacks has it, if one has: as a result of this step, or
        # as a carry with which the next one begins. All other results are copied.
        written: set[int] = set()
        ahead: list[tuple[int, np.ndarray]] = []
        others: list[tuple[np.ndarray, int]] = []
        for stack, source in zip(stacks, sources[self.num_carry :]):
            if source >= runs.first_output and source not in written:
                written.add(source)
                runs.put(source, row(stack, first))
                runs.move(source, sign * row(stack, 0).nbytes)
            else:
                others.append((stack, source))
        copied: list[tuple[np.ndarray, int]] = []
        for stack, source in others:
            carry = source - runs.first
            into = sources[carry] if carry < self.num_carry else -1
            if into < runs.first_output or into in written:
                copied.append((stack, source))
                continue
            written.add(into)
            stack[first] = carries[carry].reshape(stack.shape[1:])
            ahead.append((into, np.empty_like(row(stack, 0))))
            runs.put(into, row(stack, first + sign if count > 1 else first))
            runs.move(into, sign * row(stack, 0).nbytes)
        for number in range(len(binding.program.outputs)):
            if runs.first_output + number not in written:
                runs.alternate(number)
        runs.carry(sources[: self.num_carry])
        places = [[row(stack, first).ctypes.data, source, row(stack, 0).nbytes] for stack, source in copied]
        cells = runs.cells
        for left in range(count - 1, -1, -1):
            if not left:
                for slot, last in ahead:
                    runs.put(slot, last)
            runs.run()
            for place in places:
                address, source, nbytes = place
                ctypes.memmove(address, cells[source], nbytes)
                place[0] = address + sign * nbytes
            runs.advance()
        return runs.finish(types[: self.num_carry])


def is_one_native_call(binding: Binding) -> bool:
    """Whether the program runs in one native call that writes all outputs where it is told to."""
    segments = binding.table.segments
    return len(segments) == 1 and segments[0].host is None and min(binding.storage.direct, default=0) >= 0


class NativeRuns:
    """Repeated runs of a program that is one native call, on addresses in `cells`: one per input, then per output.

    given: what the inputs are at first; contiguous. All memory is kept until the object goes.
    """

    def __init__(self, binding: Binding, given: Arrays):
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
        for slot, a in enumerate(given, self.first):
            self.put(slot, np.ascontiguousarray(a))
        self._native, self._address = binding._native, self.context.address
        self._sources: list[int] = []
        self._toggles: list[tuple[int, int]] = []
        self._moves: list[tuple[int, int]] = []

    def slot(self, place: tuple[str, int]) -> int:
        """The cell of ("input", number) or ("output", number)."""
        kind, number = place
        return (self.first if kind == "input" else self.first_output) + number

    def put(self, slot: int, a: np.ndarray) -> None:
        """Use the memory of a contiguous array from now on."""
        self._kept.append(a)
        self.cells[slot] = a.ctypes.data

    def alternate(self, number: int) -> None:
        """Write an output to two pieces of memory in turn: what was written last can be read by the next run."""
        b = self.binding.program.outputs[number]
        nbytes = self.binding.storage.nbytes[b]
        one, other = (np.empty(nbytes + 64, np.uint8) for _ in range(2))
        self._kept.append(other)
        self.put(self.first_output + number, one)
        self._toggles.append((self.first_output + number, one.ctypes.data ^ other.ctypes.data))

    def move(self, slot: int, step: int) -> None:
        """Go on by `step` bytes after every run."""
        self._moves.append((slot, step))

    def carry(self, sources: Sequence[int]) -> None:
        """The first inputs of a run are read where these cells point to in the run before."""
        self._sources = list(sources)

    def run(self) -> None:
        """One run of the program."""
        self._native(self._address)

    def advance(self) -> None:
        """To the memory of the next run."""
        cells = self.cells
        new = [cells[source] for source in self._sources]
        for slot, address in enumerate(new, self.first):
            cells[slot] = address
        for slot, toggle in self._toggles:
            cells[slot] ^= toggle
        for slot, step in self._moves:
            cells[slot] += step

    def finish(self, types: Sequence[tuple]) -> list[np.ndarray]:
        """Copies of the carried values, of these shapes and dtypes; the object is spent afterwards."""
        out = []
        for slot, (shape, dtype) in enumerate(types, self.first):
            a = np.empty(shape, dtype)
            ctypes.memmove(a.ctypes.data, self.cells[slot], a.nbytes)
            out.append(a)
        self.binding._free.append(self.context)
        return out
