"""Accumulators of reductions, kept in registers while a kernel walks over its operands.

Float sums add short blocks plainly and the sums of blocks with their rounding errors kept (a two-sum), so that the
error does not grow with the number of blocks: better than pairwise summation at a few instructions per block.
The order of all operations depends on sizes and the target only, never on how work was split between threads.
"""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.cpu.builder import I32, KernelBuilder, compute_dtype, is_float, lanes_of
from kgraph.codegen.cpu.scalar_ops import EMITTERS, extremum, is_float_dtype, is_signed
from kgraph.codegen.reductions import POSITIONS, neutral

MAX_NUMBER = "max_number"  # the maximum of what is not NaN: one instruction, where NaN shows up later anyway


def combine(b: KernelBuilder, kind: str, dtype: str, x, y):
    """Two partial results of a reduction that keeps no position."""
    if kind == MAX_NUMBER:
        return b.select(b.compare(">", y, x), y, x)
    if kind in ("max", "min"):
        return extremum(b, x, y, dtype, greater=kind == "max")
    name = {"sum": "add", "prod": "mul", "and": "bitwise_and", "or": "bitwise_or"}[kind]
    return EMITTERS[name](b, [x, y], [dtype, dtype], dtype)


def make(
    b: KernelBuilder, kind: str, dtype: str, lanes: int, slots: int, across_rows: bool = False, blocks: bool = True
) -> Accumulator:
    """The accumulator of a reduction of `dtype` values (compute form), `slots` vectors of `lanes` side by side.

    across_rows: every lane is a result of its own, and all lanes of a step have one position.
    blocks: whether there may be more than one block, so that sums need compensation.
    """
    if kind in POSITIONS:
        return PositionAccumulator(b, kind, dtype, lanes, slots, across_rows)
    if kind == "sum" and blocks and is_float_dtype(dtype):
        return SumAccumulator(b, kind, dtype, lanes, slots)
    return Accumulator(b, kind, dtype, lanes, slots)


class Accumulator:
    """Plain accumulation in `slots` independent vectors.

    Use: `reset` per result; per block `begin_block`, any number of `step`, `end_block`; then `total` (slots merged, one
    result per lane), or `scalar` (lanes merged too).
    """

    def __init__(self, b: KernelBuilder, kind: str, dtype: str, lanes: int, slots: int):
        self.b, self.kind, self.dtype, self.lanes = b, kind, compute_dtype(dtype), lanes
        self.zero = b.constant(neutral(kind, self.dtype), self.dtype, lanes)
        self.slots = [b.variable(self.zero) for _ in range(slots)]

    def reset(self) -> None:
        for slot in self.slots:
            slot.set(self.zero)

    def begin_block(self) -> None:
        """Starts a block of at most a few dozen steps per slot."""

    def step(self, slot: int, value: ir.Value, mask: ir.Value | None, position=None) -> None:
        """Adds `value` to vector `slot`; lanes off in `mask` do not count. position: index of the first lane."""
        if mask is not None:
            value = self.b.ir.select(mask, value, self.zero)
        variable = self.slots[slot]
        variable.set(self._merge(variable.get(), value))

    def end_block(self) -> None:
        """Ends a block."""

    def total(self) -> ir.Value:
        return self._tree([s.get() for s in self.slots])

    def scalar(self) -> ir.Value:
        return self.b.reduce_lanes(self.total(), self._merge)

    def _merge(self, x, y):
        return combine(self.b, self.kind, self.dtype, x, y)

    def _tree(self, values: list) -> ir.Value:
        while len(values) > 1:
            pairs = [self._merge(x, y) for x, y in zip(values[::2], values[1::2])]
            values = pairs + values[len(pairs) * 2 :]
        return values[0]


class SumAccumulator(Accumulator):
    """Float sums: blocks added plainly, their sums with compensation."""

    def __init__(self, b: KernelBuilder, kind: str, dtype: str, lanes: int, slots: int):
        super().__init__(b, kind, dtype, lanes, slots)
        self.sum, self.lost = b.variable(self.zero), b.variable(self.zero)

    def reset(self) -> None:
        self.sum.set(self.zero)
        self.lost.set(self.zero)

    def begin_block(self) -> None:
        for slot in self.slots:
            slot.set(self.zero)

    def end_block(self) -> None:
        b = self.b
        block, before = super().total(), self.sum.get()
        after = b.add(before, block)
        rounded = b.sub(after, before)
        error = b.add(b.sub(before, b.sub(after, rounded)), b.sub(block, rounded))
        self.sum.set(after)
        self.lost.set(b.add(self.lost.get(), error))

    def total(self) -> ir.Value:
        # After an overflow or an infinite operand the error is NaN while the sum itself is right.
        b, sum, lost = self.b, self.sum.get(), self.lost.get()
        return b.select(b.ir.fcmp_unordered("uno", lost, lost), sum, b.add(sum, lost))


class PositionAccumulator(Accumulator):
    """argmax and argmin: the extremum and its first position (int32); the first NaN wins over everything."""

    def __init__(self, b: KernelBuilder, kind: str, dtype: str, lanes: int, slots: int, across_rows: bool):
        super().__init__(b, kind, dtype, lanes, slots)
        self.across_rows = across_rows
        self.positions = [b.variable(self._start(k)) for k in range(slots)]

    def _start(self, slot: int) -> ir.Value:
        # Each lane starts at its own first position, so that a row of neutral elements gives position 0.
        if self.across_rows:
            return self.b.constant(0, "int32", self.lanes)
        return self.b.add(self.b.lane_numbers("int32", self.lanes), slot * self.lanes)

    def reset(self) -> None:
        super().reset()
        for k, position in enumerate(self.positions):
            position.set(self._start(k))

    def _beats(self, x, y):
        """Lanes in which x comes before y, whatever their positions."""
        b = self.b
        symbol = ">" if self.kind == "argmax" else "<"
        if self.dtype == "bool":
            winner, loser = (x, y) if self.kind == "argmax" else (y, x)
            return b.ir.and_(winner, self._not(loser))
        beats = b.compare(symbol, x, y, signed=is_signed(self.dtype))
        if not is_float(x):
            return beats
        # x is NaN and y is not: `y == y` and not (x == x).
        return b.ir.or_(beats, b.ir.and_(b.ir.fcmp_unordered("uno", x, x), b.ir.fcmp_ordered("ord", y, y)))

    def step(self, slot: int, value: ir.Value, mask: ir.Value | None, position=None) -> None:
        b = self.b
        at = b.broadcast(b.ir.trunc(b.i64(position), I32), self.lanes)
        if self.lanes > 1 and not self.across_rows:
            at = b.add(at, b.lane_numbers("int32", self.lanes))
        best, where = self.slots[slot].get(), self.positions[slot].get()
        better = self._beats(value, best)
        if mask is not None:
            better = b.ir.and_(better, mask)
        self.slots[slot].set(b.ir.select(better, value, best))
        self.positions[slot].set(b.ir.select(better, at, where))

    def _merge_pairs(self, x, y):
        b = self.b
        (value_x, at_x), (value_y, at_y) = x, y
        loses = self._beats(value_y, value_x)
        tie = self._not(b.ir.or_(self._beats(value_x, value_y), loses))
        take_y = b.ir.or_(loses, b.ir.and_(tie, b.compare("<", at_y, at_x)))
        return b.ir.select(take_y, value_y, value_x), b.ir.select(take_y, at_y, at_x)

    def _not(self, mask):
        return self.b.ir.xor(mask, self.b.constant(True, "bool", lanes_of(mask)))

    def _merged(self):
        pairs = [(s.get(), p.get()) for s, p in zip(self.slots, self.positions)]
        while len(pairs) > 1:
            pairs = [self._merge_pairs(*pairs[:2]), *pairs[2:]]
        return pairs[0]

    def total(self) -> ir.Value:
        return self._merged()[1]

    def scalar(self) -> ir.Value:
        b = self.b
        value, at = self._merged()
        lanes = self.lanes
        while lanes > 1:
            half = lanes // 2
            low, high = list(range(half)), list(range(half, lanes))
            pick = (lambda v, w: b.shuffle(v, None, w)) if half > 1 else (lambda v, w: b.lane(v, w[0]))
            value, at = self._merge_pairs((pick(value, low), pick(at, low)), (pick(value, high), pick(at, high)))
            lanes = half
        return at
