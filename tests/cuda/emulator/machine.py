"""Runs kernels: every instruction on all threads of some blocks at once.

Threads that part ways at a branch are run apart. Those with the lowest basic block go first, so that they meet again
where the branches end. Where threads do something together, and at barriers, they wait for each other.

If threads may have raced, a launch is repeated with others going first, for every two threads both of them in turn:
results have to be the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.cuda.emulator import warps
from tests.cuda.emulator.code import Code, Frame, Index, Launch, laid_out
from tests.cuda.emulator.counts import Counts
from tests.cuda.emulator.memory import EmulatedFault, GlobalMemory, Memory
from tests.cuda.emulator.parse import parse

THREADS_AT_ONCE = 1 << 13
BARRIER = np.uint64((1 << 32) + 1)  # what a thread has passed more behind a barrier of its block, and of its warp
WARP_BARRIER = np.uint64(1)


class Run:
    """Threads of a frame on their way through a function. rank: of each thread; lower ones go first where they can."""

    def __init__(self, code: Code, frame: Frame, rank: np.ndarray):
        self._code, self._frame, self._rank = code, frame, rank
        self._several = bool((rank != rank[0]).any())
        self._pending: dict[tuple[int, int], list[np.ndarray]] = {}  # threads by rank and the block that they come to
        self._gathering: dict[int, list[np.ndarray]] = {}  # by the block at whose end they wait for lanes
        self._waiting: list[tuple[int, np.ndarray]] = []  # at barriers, with the block that they come to
        self._done = np.zeros(frame.count, bool)

    def to_the_end(self) -> None:
        """Raises EmulatedFault."""
        self._go(0, np.arange(self._frame.count))
        while True:
            if self._pending:
                key = min(self._pending)
                self._run_block(key[1], _joined(self._pending.pop(key)))
            elif self._gathering:
                self._gather()
            elif self._waiting:
                self._open_barrier()
            else:
                return

    def _go(self, number: int, index: np.ndarray) -> None:
        """Threads come to a block."""
        if not self._several:
            if len(index):
                self._pending.setdefault((0, number), []).append(index)
            return
        ranks = self._rank[index]
        for rank in np.unique(ranks):
            self._pending.setdefault((int(rank), number), []).append(index[ranks == rank])

    def _chosen(self, index: np.ndarray) -> Index:
        return None if len(index) == self._frame.count else index

    def _run_block(self, number: int, index: np.ndarray) -> None:
        code, frame, chosen = self._code, self._frame, self._chosen(index)
        counts = frame.launch.counts
        if counts is not None:
            warps_here = len(np.unique(frame.identity["warp"][index]))
            for name, count in code.mix[number].items():
                counts.instructions[name] += count * warps_here
        for step in code.steps[number]:
            step(frame, chosen)
        end, condition = code.ends[number], code.conditions[number]
        if code.together[number] is not None:
            lacking = self._do_together(number, index)
            if len(lacking):
                self._gathering.setdefault(number, []).append(lacking)
            return
        taken = index
        if condition is not None:
            truth = condition(frame, chosen)
            taken = index[truth]
            self._go(number + 1, index[~truth])
        if end is None:
            self._go(number + 1, index)
        elif end.opcode.startswith("bra"):
            self._go(code.blocks[number].target, taken)
        elif end.opcode.startswith("bar"):
            self._waiting.append((number + 1, taken))
        elif end.opcode in ("ret", "exit"):
            self._done[taken] = True
        else:
            raise ValueError(f"{end.line}: this instruction is not emulated with a guard")

    def _do_together(self, number: int, index: np.ndarray) -> np.ndarray:
        """Let those threads do what they do together whose partners are there, and give the others."""
        frame, together = self._frame, self._code.together[number]
        assert together is not None
        identity = frame.identity
        place, lane = identity["warp_place"], identity["lane"]
        there = np.zeros(frame.count, np.uint64)
        bits = np.uint64(1) << lane[index].astype(np.uint64)
        np.bitwise_or.at(there, place[index], bits)
        # Lanes that a warp does not have take no part.
        members = together.members(frame, self._chosen(index)).astype(np.uint64) & identity["lanes"][index]
        complete = members & ~there[place[index]] == 0
        ready = index if complete.all() else index[complete]
        if len(ready):
            together.step(frame, self._chosen(ready))
            identity["barriers"][ready] += WARP_BARRIER
            self._go(number + 1, ready)
        return index[~complete]

    def _gather(self) -> None:
        for number in sorted(self._gathering):
            index = _joined(self._gathering.pop(number))
            lacking = self._do_together(number, index)
            if len(lacking):
                self._gathering[number] = [lacking]
            if len(lacking) < len(index):
                return
        end = self._code.ends[min(self._gathering)]
        raise EmulatedFault(f"threads wait for others of their warp that never come: {end and end.line}")

    def _open_barrier(self) -> None:
        """Let all threads that wait go on."""
        blocks = self._frame.identity["block"]
        there = np.concatenate([index for _, index in self._waiting])
        if len(np.intersect1d(blocks[there], blocks[self._done])):
            raise EmulatedFault("threads wait at a barrier that others of their block have left out")
        self._frame.identity["barriers"][there] += BARRIER
        waiting, self._waiting = self._waiting, []
        for number, index in waiting:
            self._go(number, index)


def _joined(groups: list[np.ndarray]) -> np.ndarray:
    return groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))


def _in_step(number: np.ndarray) -> np.ndarray:
    return np.zeros(len(number), np.int64)


def _half_first(bit: int, first: int, number: np.ndarray) -> np.ndarray:
    """Ranks by which threads go first whose numbers have `first` as this bit."""
    return (number >> np.uint32(bit) & np.uint32(1) ^ np.uint32(first)).astype(np.int64)


class Kernel:
    """The entry of a module of PTX. memory: where its global variables are put."""

    def __init__(self, text: str, memory: GlobalMemory):
        self.module, self._memory = parse(text), memory
        self.counts: Counts | None = None  # of the next launch
        shared = [v for v in self.module.variables.values() if v.space == "shared"]
        fixed = [v for v in shared if v.nbytes]
        self.symbols, self.shared_bytes = laid_out(fixed, 0)
        self.symbols.update((v.name, self.shared_bytes) for v in shared if not v.nbytes)
        for variable in self.module.variables.values():
            if variable.space in ("global", "const"):
                address = memory.allocate(variable.nbytes)
                if address is None:
                    raise EmulatedFault("no memory is left for a kernel's variables")
                content = np.frombuffer(variable.content.ljust(variable.nbytes, b"\0"), np.uint8)
                at = address - memory.base
                memory.content[at : at + variable.nbytes] = content
                self.symbols[variable.name] = address

    @functools.cache  # noqa: B019 - kernels live as long as their device
    def code(self, name: str) -> Code:
        return Code(self.module.functions[name], self)

    @property
    def name(self) -> str:
        """What kgraph calls the kernel, as far as Numba leaves it in the text: its name comes twice, behind lengths."""
        found = re.search(r"NumbaEnv\d+(.*?)_kernel", " ".join(self.module.variables))
        text = found[1] if found else "kernel"
        half = re.match(r"(.+?)\d+\1$", text)
        return half[1] if half else text

    def run(self, code: Code, frame: Frame) -> None:
        """Run a function that has no barriers on all threads of a frame."""
        Run(code, frame, np.zeros(frame.count, np.int64)).to_the_end()

    @property
    def num_parameters(self) -> int:
        return len(self.module.entry.parameters)

    def launch(self, grid: int, block: int, dynamic: int, words: Sequence[int]) -> None:
        """Run all blocks. words: the arguments, 64 bits each. Raises EmulatedFault."""
        if self.module.threads and block > self.module.threads:
            raise EmulatedFault(f"a block of {block} threads, of at most {self.module.threads}")
        memory = self._memory
        memory.launch += 1
        memory.suspicion = ""
        before = memory.in_use.copy()
        self._run(grid, block, dynamic, words, _in_step)
        if self.counts is not None:
            self.counts.local_bytes = self.code(self.module.entry.name).local_bytes
            self.counts.finish()
            self.counts = None
        if not memory.suspicion:
            return
        results = memory.in_use.copy()
        memory.watches = False
        try:
            for bit in range((grid * block - 1).bit_length()):
                for first in (0, 1):
                    memory.in_use[:] = before
                    self._run(grid, block, dynamic, words, functools.partial(_half_first, bit, first))
                    if not np.array_equal(memory.in_use, results):
                        raise EmulatedFault(f"{memory.suspicion} (results depend on bit {bit} of threads' order)")
        finally:
            memory.watches = True

    def _run(self, grid: int, block: int, dynamic: int, words: Sequence[int], rank: Callable) -> None:
        """rank: gives that of threads by their numbers."""
        memory, code = self._memory, self.code(self.module.entry.name)
        nbytes = self.shared_bytes + dynamic
        some = max(THREADS_AT_ONCE // block, 1)
        for first in range(0, grid, some):
            blocks = np.repeat(np.arange(first, min(first + some, grid), dtype=np.uint32), block)
            tid = np.tile(np.arange(block, dtype=np.uint32), len(blocks) // block)
            lane = tid % np.uint32(warps.LANES)
            in_block = -(-block // warps.LANES)  # warps
            number = blocks * np.uint32(block) + tid
            warp = blocks * np.uint32(in_block) + tid // np.uint32(warps.LANES)
            identity = {
                "number": number,
                "block": blocks,
                "place": blocks - np.uint32(first),
                "lane": lane,
                "warp": warp,
                "warp_place": warp - warp[0],
                "lanes": np.minimum(block - (tid - lane), warps.LANES).astype(np.uint64),
                "barriers": np.zeros(len(blocks), np.uint64),
            }
            identity["lanes"] = (np.uint64(1) << identity["lanes"]) - np.uint64(1)
            full = lambda value, like=tid: np.full_like(like, value)
            special = {"tid.x": tid, "ctaid.x": blocks, "ntid.x": full(block), "nctaid.x": full(grid), "laneid": lane}
            parameters = {
                v.name: np.tile(np.array([word], np.uint64).view(np.uint8), (len(blocks), 1))
                for v, word in zip(self.module.entry.parameters, words, strict=True)
            }
            shared = Memory("shared", len(blocks) // block * nbytes)
            shared.watches = memory.watches
            frame = Frame(code, parameters, identity, Launch(memory, shared, nbytes, special, self.counts))
            with np.errstate(all="ignore"):
                Run(code, frame, rank(number)).to_the_end()
            memory.suspicion = memory.suspicion or shared.suspicion
