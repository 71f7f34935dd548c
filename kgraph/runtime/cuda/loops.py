"""Scans as launches on a device: what each iteration reads and writes is known before the first one begins.

Slices of sequences are read where they lie, results are written into the stacked arrays, and a carried value is read
where the iteration before wrote it, or is changed where it lies: nothing is copied that has a place to be written to,
and Python takes no part once the launches are captured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kgraph.dims import evaluate
from kgraph.errors import KGraphError
from kgraph.runtime.control import Scan, check_carried
from kgraph.runtime.cuda.resident import Resident
from kgraph.runtime.cuda.staging import aligned

if TYPE_CHECKING:
    from kgraph.runtime.cuda.device_plan import Bases, DevicePlan

Type = tuple[tuple[int, ...], np.dtype]


class Iteration(NamedTuple):
    """bases: of the body's spaces; None after the last iteration. copies: (to, from, bytes), behind the iteration;
    before: likewise, ahead of it."""

    bases: Bases | None
    copies: list[tuple[int, int, int]]
    before: Sequence[tuple[int, int, int]] = ()


class Loop:
    """A scan over operands of these types.

    body: the plan of its body. count: of iterations. nbytes: of the memory that the loop works in.
    Raises KGraphError where operands do not go together.
    """

    def __init__(self, scan: Scan, types: Sequence[Type], sizes: dict[str, int], plan: Callable[..., DevicePlan]):
        self._scan, self.count, program = scan, evaluate(scan.length, sizes), scan.body.program
        held = scan.num_carry + scan.num_xs
        if any(shape[0] != self.count for shape, _ in types[scan.num_carry : held]):
            raise KGraphError(f"{program.name}: a sequence has another length than {self.count}")
        self._extra = scan.body.extra(sizes)
        inputs = [*types[: scan.num_carry], *((shape[1:], dtype) for shape, dtype in types[scan.num_carry : held])]
        inputs += [*types[held:], *((a.shape, a.dtype) for a in self._extra)]
        for number, (b, (_, dtype)) in enumerate(zip(program.inputs, inputs, strict=True)):
            if program.dtypes[b] != dtype:
                raise KGraphError(f"{program.name}: operand {number} is {dtype}, expected {program.dtypes[b]}")
        self.body = plan(program, program.resolve([shape for shape, _ in inputs]))
        self._input_bytes = [_nbytes(type) for type in inputs]
        results = scan.body.result_types(sizes, self.body)
        check_carried(program.name, types[: scan.num_carry], results)
        self._result_bytes = [_nbytes(type) for type in results]
        self._arrange()
        self._fixed: Bases = {}

    @property
    def is_native(self) -> bool:
        """Whether the body has no host steps."""
        return all(segment.host is None for segment in self.body.segments)

    def _arrange(self) -> None:
        """Decide where the outputs of the body's program are written.

        An output goes where one of the stacks has it: as a result of its iteration, or as a carry with which the next
        one begins. One that may overwrite the carry before does so, where the scan's result will be. Others go to
        buffers in turn, of which there is one more than carries that may still name one.
        """
        carries, ys = self._carried, self._scan.body.results[self._scan.num_carry :]
        self._stack: dict[int, int] = {}  # by output: the stack that it is written to
        self._ahead: dict[int, int] = {}  # by output: the stack in which it is the next iteration's
        for number, (kind, output) in enumerate(ys):
            if kind == "output":
                self._stack.setdefault(output, number)
        for number, (kind, source) in enumerate(ys):
            of, output = carries[source] if kind == "input" and source < len(carries) else ("", -1)
            if of == "output" and output not in self._stack:
                self._ahead.setdefault(output, number)
        self._donors = self.body.donors  # by output: the carry that it overwrites, which no stack has
        placed = {*self._stack.values(), *self._ahead.values()}
        self._copied = [number for number in range(len(ys)) if number not in placed]
        self._final: dict[int, int] = {}  # by output: the carry whose last value it is
        for number, (kind, output) in enumerate(carries):
            if kind == "output" and output not in self._stack:
                self._final.setdefault(output, number)
        self.nbytes = self.body.nbytes
        self._pools: dict[int, list[int]] = {}
        origins = [self._origin(number) for number in range(len(carries))]
        for output, b in enumerate(self.body.program.outputs):
            pool = self._pools[output] = []
            if output in self._stack or output in self._ahead or output in self._donors:
                continue
            for _ in range(origins.count(output) + 1):
                pool.append(self.nbytes)
                self.nbytes += aligned(max(self.body.storage.nbytes[b], 1))

    @property
    def _carried(self) -> tuple[tuple[str, int], ...]:
        return self._scan.body.results[: self._scan.num_carry]

    def _origin(self, carry: int) -> int:
        """The output that a carry's value was, maybe some iterations ago; -1 for none."""
        for _ in range(len(self._carried) + 1):
            kind, number = self._carried[carry]
            if kind == "output":
                return number
            if number >= len(self._carried):
                break
            carry = number
        return -1

    # -- counts -------------------------------------------------------------------------------------------------------
    def launches_of_a_step(self) -> int:
        """Launches and copies of one iteration."""
        return self.body.num_launches() + len(self._copied)

    def num_launches(self) -> int:
        return self.count * self.launches_of_a_step()

    # -- running ------------------------------------------------------------------------------------------------------
    def upload(self) -> None:
        """Bring to the device what the body reads besides the scan's operands; nothing of it ever changes."""
        if self._fixed:
            return
        self._resident = Resident(self.body.device)
        first = len(self._input_bytes) - len(self._extra)
        extra = {("input", n): self._resident.address(n, a) for n, a in enumerate(self._extra, first)}
        self._fixed = {**self.body.resident(), **extra}

    def steps(self, room: int, operands: Sequence[int], results: Sequence[int]) -> Iterator[Iteration]:
        """The iterations in their order, and what comes after them. room: address of the loop's memory; operands,
        results: addresses of the scan's."""
        num_carry, held = self._scan.num_carry, self._scan.num_carry + self._scan.num_xs
        carries, finals, ys = list(operands[:num_carry]), results[:num_carry], self._scan.body.results[num_carry:]
        own = {space: room + offset for space, offset in self.body.offsets.items()}
        y_bytes, x_bytes = self._result_bytes[num_carry:], self._input_bytes[num_carry:held]
        row = lambda number, t: results[num_carry + number] + t * y_bytes[number]
        order = range(self.count)[:: -1 if self._scan.reverse else 1]
        # Where a stack has what iterations begin with, and is written one ahead.
        ahead = self._ahead.values() if self.count else ()
        copies = [(row(number, order[0]), carries[ys[number][1]], y_bytes[number]) for number in ahead]
        before = []
        for carry in self._donors.values() if self.count else ():
            if carries[carry] != finals[carry]:
                before.append((finals[carry], carries[carry], self._result_bytes[carry]))
                carries[carry] = finals[carry]
        for t, following in itertools.zip_longest(order, order[1:]):
            xs = [x + t * nbytes for x, nbytes in zip(operands[num_carry:held], x_bytes)]
            bases = {**self._fixed, **own}
            bases.update((("input", n), address) for n, address in enumerate([*carries, *xs, *operands[held:]]))
            for output, pool in self._pools.items():
                if output in self._stack:
                    address = row(self._stack[output], t)
                elif output in self._donors:
                    address = finals[self._donors[output]]
                elif following is None and finals[self._final[output]] not in carries:
                    address = finals[self._final[output]]
                elif output in self._ahead:
                    address = row(self._ahead[output], following)
                else:
                    address = next(room + offset for offset in pool if room + offset not in carries)
                bases["output", output] = address
            copies += [(row(number, t), bases[ys[number]], y_bytes[number]) for number in self._copied]
            yield Iteration(bases, copies, before)
            carries, copies, before = [bases[place] for place in self._carried], [], []
        ends = zip(finals, carries, self._result_bytes)
        yield Iteration(None, copies + [(to, source, nbytes) for to, source, nbytes in ends if to != source])


def _nbytes(type: Type) -> int:
    shape, dtype = type
    return math.prod(shape) * dtype.itemsize
