"""The generator's words inside of elementwise kernels: `random_words`, which `loop` fuses with what reads them.

Words are made in whole groups (see `kgraph.ops.philox`, which defines them) into a tile of scratch memory that stays in
the first-level cache; the loop over the elements reads them there like an operand. So any cut of the extent and any
number of lanes sees the same words, and a group costs what its 64 words cost, whatever the elements are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

from llvmlite import ir

from kgraph.codegen.cpu.builder import I32, I64, Int, KernelBuilder, Pointer

LANES, GROUP, ROUNDS = 16, 64, 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
TILE = 512  # elements between two fillings of the scratch memory
ROOM = TILE + 2 * GROUP  # words of scratch memory per stream: a tile may begin and end within a group
FLOPS = 8  # per word, for estimates of time


def scratch_bytes(num_streams: int) -> int:
    """Scratch memory that tiles of this many streams take."""
    return 4 * ROOM * num_streams


class WordTiles:
    """Tiles of words for a loop over elements.

    sources: per stream the pointer to its seed and its number.
    """

    def __init__(self, b: KernelBuilder, sources: Sequence[tuple[Pointer, int]]):
        self.b = b
        self.streams = [_Stream(b, seed, stream) for seed, stream in sources]
        self.rooms = [b.scratch("uint32", 4 * ROOM * i) for i in range(len(sources))]

    @contextmanager
    def over(self, start, stop, shift):
        """A loop over tiles of the positions [start, stop), of which position i is element shift + i of the draw.

        Gives (first position, end, `load`): `load(number, i, lanes)` reads the words at i, i + 1 ... of a stream.
        """
        b = self.b
        with b.loop(start, stop, TILE) as tile:
            end = b.min(tile + TILE, stop)
            first = shift + tile
            skipped = first % GROUP
            group = (first - skipped) // GROUP
            count = b.ceil_div(skipped + (end - tile), GROUP)
            with b.loop(0, count) as turn:
                for stream, room in zip(self.streams, self.rooms):
                    stream.emit_group(room + turn * GROUP, group + turn)

            def load(number: int, position, lanes: int) -> ir.Value:
                return b.load(self.rooms[number] + skipped, position - tile, lanes)

            yield tile, end, load


class _Stream:
    """One stream of one seed: its round keys, and the code for a group."""

    def __init__(self, b: KernelBuilder, seed: Pointer, stream: int):
        self.b, self.stream = b, stream
        # Two vector registers per state word: one alone would wait for each product.
        self.lanes = max(2, min(LANES, b.target.vector_bytes // 4))
        key = [b.load(seed, number) for number in range(2)]
        self.keys = []
        for number in range(ROUNDS):
            steps = [b.ir.add(k, ir.Constant(I32, number * s & 0xFFFFFFFF)) for k, s in zip(key, KEY_STEPS)]
            self.keys.append([b.broadcast(b.ir.zext(k, I64), self.lanes) for k in steps])

    def emit_group(self, out: Pointer, group: Int) -> None:
        """Writes the 64 words of a group to `out`."""
        b = self.b
        for first in range(0, LANES, self.lanes):
            numbers = b.add(b.broadcast(b.i64(group * LANES + first), self.lanes), b.lane_numbers("int64", self.lanes))
            for word, value in enumerate(self._rounds(numbers)):
                narrow = b.ir.trunc(value, ir.VectorType(I32, self.lanes))
                b.store(out, word * LANES + first, narrow)

    def _rounds(self, numbers: ir.Value) -> list[ir.Value]:
        """The four words of counters, each in the lower half of a 64-bit lane; the upper halves hold anything."""
        b = self.b
        constant: Callable[[int], ir.Constant] = lambda value: b.constant_of(numbers.type, value)
        words = [numbers, b.ir.lshr(numbers, constant(32)), constant(self.stream), constant(0)]
        low = constant(0xFFFFFFFF)
        for keys in self.keys:
            # Lanes are multiplied 32 by 32 bits, one instruction: what the mask clears is never read.
            first, second = (b.ir.mul(b.ir.and_(words[2 * i], low), constant(MULTIPLIERS[i])) for i in range(2))
            upper = [b.ir.lshr(product, constant(32)) for product in (second, first)]
            mixed = [b.ir.xor(b.ir.xor(h, w), k) for h, w, k in zip(upper, (words[1], words[3]), keys)]
            words = [mixed[0], second, mixed[1], first]
        return words
