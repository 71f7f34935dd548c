"""Runs the threads of simulated kernels in turns, in one Python thread.

Numba's simulator has a Python thread for every CUDA thread, and these wait for each other and for the interpreter's
lock most of the time. Here `cuda.syncthreads()` becomes a `yield`: a thread is a generator that goes on when all of its
block have come to the barrier. Between barriers the threads run one after another, upwards and downwards in turn and
the other way round in every second block, so that what lacks a barrier gives wrong results in one of two blocks.
`cuda` itself is what Numba's simulator has for kernels.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from ast import literal_eval
from types import FunctionType
from typing import Any

import numpy as np
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule

from kgraph.errors import DeviceError

_BARRIER = re.compile(r"^( *)cuda\.syncthreads\(\)$", re.MULTILINE)
_CONSTANT = re.compile(r"\b(u?int\d+|float\d+)\((-?\d[\d.e+-]*)\)")
_GARBAGE = 0xA5


def load(key: str, source: str) -> FunctionType:
    """The kernel of a rendered module; a generator function if it has barriers. Tracebacks show its lines."""
    name = f"<kernel {key}>"
    constants: dict[str, tuple[str, Any]] = {}

    def constant(match: re.Match) -> str:
        """The name of a number that is made once: half of what a kernel computes is made of them."""
        value = getattr(np, match[1])(literal_eval(match[2]))
        return constants.setdefault(match[0], (f"constant{len(constants)}", value))[0]

    source = _CONSTANT.sub(constant, _BARRIER.sub(r"\1yield", source))
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict = {"__name__": name, **dict(constants.values())}
    exec(compile(source, name, "exec", dont_inherit=True), namespace)
    (function,) = (v for v in namespace.values() if isinstance(v, FunctionType) and v.__module__ == name)
    return function


def run(function: FunctionType, grid: int, block: int, shared_bytes: int, arguments: list) -> None:
    """One launch. Raises what a kernel raises, with the thread in a note, and DeviceError where a barrier is reached by
    some threads of a block only."""
    cuda = _Module((grid, 1, 1), (block, 1, 1), shared_bytes)
    function.__globals__["cuda"] = cuda
    for number in range(grid):
        cuda.enter_block(number, shared_bytes)
        if inspect.isgeneratorfunction(function):
            _run_block(cuda, {thread: function(*arguments) for thread in range(block)}, number)
        else:
            for thread in _in_turn(range(block), number):
                cuda.resume(thread, function, *arguments)


def _run_block(cuda: _Module, threads: dict[int, Any], number: int) -> None:
    turn = number
    while threads:
        waiting = [t for t in _in_turn(threads, turn) if not cuda.resume(t, next, threads[t], cuda)]
        lines = {threads[t].gi_frame.f_lineno for t in waiting}
        if len(lines) > 1 or 0 < len(waiting) < len(threads):
            name = next(iter(threads.values())).__name__
            raise DeviceError(
                f"{name}: of {len(threads)} threads of block {number}, {len(waiting)} wait at barriers, in lines "
                f"{sorted(lines)}: all have to meet at one"
            )
        threads = {t: threads[t] for t in sorted(waiting)}
        turn += 1


def _in_turn(threads, turn: int) -> list[int]:
    """Upwards, and downwards every other turn."""
    return sorted(threads, reverse=turn % 2 == 1)


class _Module(FakeCUDAModule):
    """`cuda` as the thread that runs sees it. `next(generator, cuda)` gives this object where the thread ends."""

    threadIdx: Any = None
    blockIdx: Any = None

    def enter_block(self, number: int, shared_bytes: int) -> None:
        self.blockIdx = Dim3(number, 0, 0)
        self._shared, self._local = _Shared(shared_bytes), _Local()

    def resume(self, thread: int, call, *arguments) -> bool:
        """Runs a thread until its next barrier; gives whether it came to its end."""
        self.threadIdx = Dim3(thread, 0, 0)
        try:
            return call(*arguments) is self
        except Exception as error:
            error.add_note(f"thread {thread} of block {self.blockIdx.x}")
            raise


class _Shared:
    """The arrays of a block, by the line that declares them; they hold garbage at first."""

    def __init__(self, shared_bytes: int):
        self._dynamic = _garbage(shared_bytes, np.uint8)
        self._arrays: dict[int, np.ndarray] = {}

    def array(self, count: int, dtype) -> np.ndarray:
        """count: 0 for all of the memory that the launch asks for."""
        if count == 0:
            whole = len(self._dynamic) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
            return self._dynamic[:whole].view(dtype)
        line = sys._getframe(1).f_lineno
        if line not in self._arrays:
            self._arrays[line] = _garbage(count, dtype)
        return self._arrays[line]


class _Local:
    """Arrays of a thread's own; they hold garbage at first."""

    def array(self, count: int, dtype) -> np.ndarray:
        return _garbage(count, dtype)


def _garbage(count: int, dtype) -> np.ndarray:
    return np.full(count * np.dtype(dtype).itemsize, _GARBAGE, np.uint8).view(dtype)


__all__ = ["load", "run"]
