"""The memory of a call in flight."""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kgraph.errors import InputError
from kgraph.runtime import layout
from kgraph.runtime.arena import ALIGNMENT

if TYPE_CHECKING:
    from kgraph.runtime.binding import Binding

# Index in `Context.words` of the first word for an input or output.
FIRST_EXTERNAL = layout.CONTEXT_BYTES // layout.WORD


def _data_pointer_offset() -> int:
    """Where an ndarray object keeps the address of its data, or -1 if it does not lie where NumPy's ABI has it.

    The executor reads the address there itself, which spares Python the slow ways to ask for it.
    """
    offset = object.__basicsize__
    if sys.implementation.name != "cpython":
        return -1
    for sample in (np.zeros(3, np.float32), np.zeros((2, 5), np.int64)[1:], np.array(1.5)):
        if ctypes.c_size_t.from_address(id(sample) + offset).value != sample.ctypes.data:
            return -1
    return offset


EXTERNAL_OFFSET = _data_pointer_offset()


class Context:
    """The memory of one call in flight: operand slots, counters, arena, scratch.

    words: the native context, then a word per input and output, then the operand slots.
    address: where `words` lie. arena: the temporaries. params: the parameters that the slots point to.
    epochs: where the counts of runs lie, one per segment, a line apart.
    profile: whether every step is to be run by a native call of its own, so that its time is its own.
    """

    __slots__ = (
        "_counters",
        "_memory",
        "_records",
        "_slots",
        "address",
        "arena",
        "binding",
        "epochs",
        "params",
        "words",
    )

    def __init__(self, binding: Binding, profile: bool = False):
        self.binding = binding
        table, storage, program = binding.table, binding.storage, binding.program
        self._slots = FIRST_EXTERNAL + len(program.inputs) + len(program.outputs)
        self.words = words = array("q", bytes(layout.WORD * (self._slots + len(table.slots))))
        self.address = words.buffer_info()[0]
        self.params: tuple = ()
        # One allocation for the arena and each thread's scratch; untouched pages cost nothing.
        arena = -(-storage.arena_bytes // ALIGNMENT) * ALIGNMENT
        self._memory = _aligned(np.empty, arena + table.threads * table.scratch_bytes)
        base = self._memory.ctypes.data
        self.arena = self._memory[:arena]
        self._records: array
        self._records, groups = table.meeting_everywhere() if profile else (table.words, table.num_groups)
        claims = table.num_claims * layout.LINE
        # One count of runs for each part that is run by a native call of its own.
        parts = table.num_records if profile else len(table.segments)
        self._counters = _aligned(np.zeros, claims + (groups + parts) * layout.LINE)
        counters = self._counters.ctypes.data
        self.epochs = counters + claims + groups * layout.LINE
        for offset, value in {
            layout.CONTEXT_STEPS: self._records.buffer_info()[0],
            layout.CONTEXT_LAST: table.segments[0].last if table.segments else 0,
            layout.CONTEXT_OPERANDS: self.address + self._slots * layout.WORD,
            layout.CONTEXT_SCRATCH: base + arena,
            layout.CONTEXT_SCRATCH_STRIDE: table.scratch_bytes,
            layout.CONTEXT_POOL: table.pool.address if table.pool is not None else 0,
            layout.CONTEXT_THREADS: table.threads,
            layout.CONTEXT_EXTERNALS: self.address + FIRST_EXTERNAL * layout.WORD,
            layout.CONTEXT_EXTERNAL_OFFSET: EXTERNAL_OFFSET,
            layout.CONTEXT_PATCHES: table.patches.buffer_info()[0],
            layout.CONTEXT_NUM_PATCHES: table.num_patches,
            layout.CONTEXT_CLAIMS: counters,
            layout.CONTEXT_DONE: counters + claims,
            layout.CONTEXT_EPOCH: self.epochs,
        }.items():
            self.put(offset, value)
        addresses = {b: a.ctypes.data for b, a in binding.constants.items()}
        for slot, place in enumerate(table.slots, self._slots):
            if place.space == "arena":
                words[slot] = base + place.offset
            elif place.space == "constant":
                words[slot] = addresses[place.index] + place.offset

    def put(self, offset: int, value: int) -> None:
        """Set the field of the native context at `offset` bytes."""
        self.words[offset // layout.WORD] = value

    def set_params(self, values: tuple) -> None:
        """Point the operand slots at these parameters and keep them alive."""
        addresses: dict[int, int] = {}
        for slot, place in self.binding.param_slots:
            number = place.index
            if number not in addresses:
                if values[number] is None:
                    raise InputError(f"{self.binding.program.name}: parameter {number} was never set")
                addresses[number] = values[number].ctypes.data
            self.words[self._slots + slot] = addresses[number] + place.offset
        self.params = values


def _aligned(allocate: Callable, nbytes: int) -> np.ndarray:
    """Bytes from `allocate` (np.empty, np.zeros) that start on a cache line; at least one."""
    memory = allocate(nbytes + 2 * ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + max(nbytes, 1)]
