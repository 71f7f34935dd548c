"""The table of steps that the native executor walks over, for concrete sizes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kgraph.runtime import layout, threads
from kgraph.runtime.arena import ALIGNMENT
from kgraph.runtime.schedule import StepCost, choose_chunks, choose_threads, place_barriers
from kgraph.runtime.steps import HostStep, NativeStep
from kgraph.runtime.storage import Place, Storage

if TYPE_CHECKING:
    from kgraph.runtime.plan import Program

_ROW = layout.STEP_BYTES // layout.WORD
_FUNCTION = layout.STEP_FUNCTION // layout.WORD
_OPERANDS = layout.STEP_OPERANDS // layout.WORD
_SIZES = layout.STEP_SIZES // layout.WORD
_EXTENT = layout.STEP_EXTENT // layout.WORD
_THREADS = layout.STEP_THREADS // layout.WORD
_CHUNKS = layout.STEP_CHUNKS // layout.WORD
_GRAIN = layout.STEP_GRAIN // layout.WORD
_CLAIMS = layout.STEP_CLAIMS // layout.WORD
_BARRIER = layout.STEP_BARRIER // layout.WORD
_GROUP = layout.STEP_GROUP // layout.WORD
_GROUP_CHUNKS = layout.STEP_GROUP_CHUNKS // layout.WORD


@dataclass(frozen=True)
class BoundStep:
    """A step at concrete sizes, for reports. threads: how many share it (0 for a step skipped because it is empty)."""

    label: str
    layers: tuple[str, ...]
    kernel: str
    threads: int
    extent: int
    flops: int
    bytes: int
    host: bool
    reason: str


@dataclass
class Segment:
    """Native steps [first, last) of the table that run in one call, or a host step and its index in the program."""

    first: int
    last: int
    threads: int
    host: HostStep | None = None
    index: int = -1


class StepTable:
    """The native form of a program's steps; shared, read-only, by all contexts of a binding.

    words: the step records; sizes: the kernels' run-time integers, which the records point to.
    patches: the slots that get the address of an input or output in each call.
    slots: where each operand slot's buffer lies. segments: what runs in one native call.
    steps: one BoundStep per program step; records: the number of its record, or -1.
    num_records: of all, those that end segments included. threads: the most that a step uses.
    num_claims, num_groups: counters that a context needs.
    """

    def __init__(self, program: Program, storage: Storage, value: Callable[[object], int]):
        self._program, self._storage = program, storage
        self.words, self.sizes, self.patches = array("q"), array("q"), array("q")
        self.slots: list[Place] = []
        self.segments: list[Segment] = []
        self.steps: list[BoundStep] = []
        self.records: list[int] = []
        self.scratch_bytes = 0
        self.num_records = self.num_claims = self.num_groups = 0
        self._first_size: list[tuple[int, int]] = []  # (record, index of its first size)
        costs = [self._cost(step, value) for step in program.steps]
        counts = self._choose_threads([c for c in costs if c is not None])
        pending: list[int] = []
        for index, (step, cost) in enumerate(zip(program.steps, costs)):
            count = 0
            self.records.append(-1)
            if isinstance(step, HostStep):
                count = 1
                self._end_segment(pending)
                self.segments.append(Segment(0, 0, 1, step, index))
            elif cost is not None:
                count = next(counts)
                pending.append(index)
                self.records[index] = self.num_records
                self._append(step, cost, count, value)
            self.steps.append(_bound_step(step, cost, count))
        self._end_segment(pending)
        self.sizes.append(0)
        base = self.sizes.buffer_info()[0]
        for record, first in self._first_size:
            self.words[record * _ROW + _SIZES] = base + first * layout.WORD
        self.num_barriers = sum(self.words[_BARRIER::_ROW])
        self._collect_patches()

    def _cost(self, step: NativeStep | HostStep, value: Callable) -> StepCost | None:
        """Cost of a kernel launch; None for a host step and for an extent of 0."""
        if isinstance(step, HostStep):
            return None
        extent = value(step.extent)
        if extent <= 0:
            return None
        self.scratch_bytes = max(self.scratch_bytes, -(-value(step.scratch_bytes) // ALIGNMENT) * ALIGNMENT)
        return StepCost(value(step.flops), value(step.bytes), extent, step.grain)

    def _choose_threads(self, costs: list[StepCost]):
        counts = choose_threads(costs, threads.get_num_threads())
        self.threads = max(counts, default=1)
        self.pool: threads.Pool | None = None
        if self.threads > 1 and self._program.executor is not None:
            self.pool = threads.pool(self._program.executor)
            self.threads = self.pool.ensure(self.threads)
        return iter([min(count, self.threads) for count in counts])

    def _append(self, step: NativeStep, cost: StepCost, count: int, value: Callable) -> None:
        row = [0] * _ROW
        row[_FUNCTION] = self._program.functions[step.kernel]
        row[_OPERANDS] = len(self.slots) * layout.WORD
        row[_EXTENT], row[_THREADS] = cost.extent, count
        row[_CHUNKS], row[_GRAIN] = choose_chunks(cost, count)
        if count > 1:
            row[_CLAIMS] = self.num_claims * layout.LINE
            self.num_claims += count
        self.words.extend(row)
        self.slots += [self._storage.places[b] for b in step.operands]
        self._first_size.append((self.num_records, len(self.sizes)))
        self.sizes.extend([value(size) for size in step.sizes])
        self.num_records += 1

    def _end_segment(self, pending: list[int]) -> None:
        """Close the run of kernel launches `pending` (indices in the program) and place its barriers."""
        if not pending:
            return
        rows = range(self.num_records - len(pending), self.num_records)
        counts = [self.words[row * _ROW + _THREADS] for row in rows]
        self.words.extend([0] * _ROW)
        self.num_records += 1
        if max(counts) > 1:
            reads, writes = [], []
            for index in pending:
                step = self._program.steps[index]
                split = len(step.operands) - step.outputs
                ranges = [self._written_range(b) for b in step.operands]
                reads.append([r for r in ranges[:split] if r is not None])
                writes.append([r for r in ranges[split:] if r is not None])
            self.num_groups = set_barriers(self.words, rows, place_barriers(counts, reads, writes), self.num_groups)
        self.segments.append(Segment(rows.start, rows.stop, max(counts)))
        pending.clear()

    def _written_range(self, b: int) -> tuple[int, int] | None:
        """The bytes of a buffer in one address space of the arena and all outputs; None for what no step writes."""
        place, nbytes = self._storage.places[b], self._storage.nbytes[b]
        if place.space == "arena":
            return place.offset, place.offset + nbytes
        if place.space == "output":
            start = (1 + place.index) << 56
            return start + place.offset, start + place.offset + nbytes
        return None

    def _collect_patches(self) -> None:
        num_inputs = len(self._program.inputs)
        for slot, place in enumerate(self.slots):
            if place.space in ("input", "output"):
                external = place.index + (num_inputs if place.space == "output" else 0)
                self.patches.extend([slot * layout.WORD, external * layout.WORD, place.offset])

    @property
    def num_patches(self) -> int:
        """Records in `patches`."""
        return len(self.patches) * layout.WORD // layout.PATCH_BYTES

    def meeting_everywhere(self) -> tuple[array, int]:
        """A copy of the records in which all threads meet before every step, and its number of groups."""
        words = array("q", self.words)
        groups = 0
        for segment in self.segments:
            if segment.threads > 1:
                rows = range(segment.first, segment.last)
                groups = set_barriers(words, rows, [row > segment.first for row in rows], groups)
        return words, groups


def set_barriers(words: array, rows: range, barriers: Sequence[bool], groups: int) -> int:
    """Write barriers before the steps `rows`, each with the counter and the chunks of the group of steps that it ends.

    The record after the last step ends the last group. groups: the next counter; gives the one after the last used.
    """
    chunks = 0
    for row, barrier in zip([*rows, rows.stop], [*barriers, True]):
        start = row * _ROW
        if barrier:
            words[start + _GROUP] = groups * layout.LINE
            words[start + _GROUP_CHUNKS] = chunks
            groups += 1
            chunks = 0
        words[start + _BARRIER] = int(barrier and row < rows.stop)
        chunks += words[start + _THREADS] * words[start + _CHUNKS]
    return groups


def _bound_step(step: NativeStep | HostStep, cost: StepCost | None, count: int) -> BoundStep:
    extent, flops, nbytes = (cost.extent, cost.flops, cost.bytes) if cost is not None else (0, 0, 0)
    if isinstance(step, HostStep):
        return BoundStep(step.label, step.layers, "", count, extent, flops, nbytes, True, step.reason)
    return BoundStep(step.label, step.layers, step.kernel, count, extent, flops, nbytes, False, "")
