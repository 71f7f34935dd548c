"""What the threads of a warp hand to each other without shared memory: `shfl.sync`.

All threads of the block have to come to an exchange. The simulator's threads take turns: there every thread leaves its
value in shared memory and takes another one's between two barriers.
"""

from __future__ import annotations

import numpy as np

from kgraph.codegen.cuda.source import KernelSource, Operand

_ALL = "uint32(4294967295)"  # the threads that take part


class Shuffles:
    """Exchanges in the warp of `thread`, the number of the thread in its block."""

    def __init__(self, k: KernelSource, thread: str):
        self.k, self.thread = k, thread
        self._arrays: dict[str, Operand] = {}
        self.place = k.let(k.mod(thread, k.target.group), "place")

    def down(self, value: str, dtype: str, distance: str) -> str:
        """The value of the thread so far behind in the warp; a thread's own one beyond the end."""
        return self._exchange("shfl_down_sync", value, dtype, distance)

    def up(self, value: str, dtype: str, distance: str) -> str:
        """The value of the thread so far ahead in the warp; a thread's own one before the beginning."""
        return self._exchange("shfl_up_sync", value, dtype, distance)

    def of(self, value: str, dtype: str, place: str) -> str:
        """The value of the thread at a place of the warp."""
        return self._exchange("shfl_sync", value, dtype, place)

    def synchronise(self) -> None:
        """The threads of the warp see what all of them have written before."""
        if self.k.target.simulator:
            self.k.synchronise()
        else:
            self.k.line("cuda.syncwarp()")

    def _exchange(self, name: str, value: str, dtype: str, by: str) -> str:
        """`value` is a variable in compute form, and so is what this gives."""
        k = self.k
        if k.target.simulator:
            return self._exchange_in_turns(name, value, dtype, by)
        if dtype in ("float32", "float64"):
            return k.let(f"cuda.{name}({_ALL}, {value}, int32({by}))", "x")
        # Integers are exchanged as signed ones of 32 or 64 bits.
        word = "int64" if dtype != "bool" and np.dtype(dtype).itemsize == 8 else "int32"
        text = f"cuda.{name}({_ALL}, {word}({value}), int32({by}))"
        return k.let(f"({text} != int32(0))" if dtype == "bool" else f"{dtype}({text})", "x")

    def _exchange_in_turns(self, name: str, value: str, dtype: str, by: str) -> str:
        k, thread = self.k, self.thread
        if dtype not in self._arrays:
            self._arrays[dtype] = k.shared(dtype, k.block)
        array = self._arrays[dtype]
        if name == "shfl_sync":
            other = k.add(k.sub(thread, self.place), by)
        elif name == "shfl_up_sync":
            other = f"({k.sub(thread, by)} if {self.place} >= {by} else {thread})"
        else:
            other = f"({k.add(thread, by)} if {k.add(self.place, by)} < {k.i(k.target.group)} else {thread})"
        k.store(array, thread, value)
        k.synchronise()
        result = k.load(array, other)
        k.synchronise()
        return result


__all__ = ["Shuffles"]
