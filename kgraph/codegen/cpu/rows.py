"""Kernels that look at a row several times: softmax and the normalisations.

A row is everything that one statistic covers. It is read once, goes through the elementwise prologue, stays in vector
registers (short rows of known length) or in the thread's scratch memory (all others), and is written once, through the
elementwise epilogue. As in reduce.py, "inner" rows lie along the lanes, and in "outer" kernels every lane has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from kgraph.codegen.cpu import accumulators, expressions, regions
from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.normalisations import EXPONENTIAL
from kgraph.codegen.reductions import walk
from kgraph.codegen.rows import Parts, row_dtype
from kgraph.ir.dims import ceil_div, product

SLOTS = 4  # independent accumulators along a row
STRIP = 2  # vectors of rows of an outer kernel
BLOCK_STEPS = 16


def lower_parts(
    parts: Parts,
    template: str,
    algorithm: tuple,
    target,
    prefix: str,
    registers: int = 8,
    strip_of: Callable | None = None,
) -> list[KernelCall]:
    """One kernel call; `algorithm` is what the renderer has to know about the core.

    registers: the longest row of known length, in vectors, that stays in registers (on machines with 32 of them).
    strip_of(lanes): vectors in a strip of an outer kernel, where the algorithm minds.
    """
    over = walk(parts)
    sizes, roles, leaves, extras = over.sizes, over.roles, over.leaves, over.extras
    inner = roles[-1] == "r"
    last = sizes[-1]
    widest = max(expressions.widest(parts.prologue), expressions.widest(parts.epilogue))
    lanes = max(1, target.vector_bytes // widest)
    while isinstance(last, int) and lanes > 1 and lanes // 2 >= last:
        lanes //= 2
    element = itemsize(row_dtype(parts.prologue))
    reduced_sizes, kept_sizes = over.reduced_sizes, over.kept_sizes
    strip, static = 1, 0
    registers = registers * target.num_vector_registers // 32
    if inner:
        if len(reduced_sizes) == 1 and isinstance(last, int) and 0 < last <= registers * lanes:
            static = last
        row = product(reduced_sizes[:-1]) * ceil_div(last, lanes) * lanes
        units = product(kept_sizes)
    else:
        strip = min(STRIP, -(-last // lanes)) if isinstance(last, int) and last else STRIP
        strip = strip_of(lanes) if strip_of else strip
        row = product(reduced_sizes) * (strip * lanes)
        units = product(kept_sizes[:-1]) * ceil_div(last, strip * lanes)
    describe = lambda xs: tuple((x.dtype, x.spans, x.is_coordinate) for x in xs)
    name = regions.kernel_name(expressions.name(parts.prologue), prefix, parts.label)
    bound = regions.bound_of(last) if inner and len(reduced_sizes) == 1 else 0
    layout = (roles, lanes, strip, static, bound, parts.reduced)
    operands = [x.value for x in (*leaves, *extras) if x.value is not None] + list(parts.outputs)
    total = product(parts.shape)
    work = expressions.flops(parts.prologue) + expressions.flops(parts.epilogue) + (24 if prefix in EXPONENTIAL else 6)
    # A row is read in full before it is written, and extras are read element by element ahead of the outputs.
    inplace = regions.inplace_pairs([*leaves, *extras], parts.outputs, len(operands) - len(parts.outputs))
    return [
        KernelCall(
            spec=KernelSpec(
                name,
                template,
                (name, parts.prologue, describe(leaves), describe(extras), parts.epilogue, layout, algorithm),
            ),
            operands=operands,
            outputs=len(parts.outputs),
            sizes=list(sizes),
            extent=units,
            flops=total * work,
            bytes=regions.total_bytes(operands),
            scratch_bytes=0 if static else row * element,
            notes={"inplace": () if parts.reduced else inplace},
        )
    ]


@dataclass
class Spot:
    """Where a piece of code stands in a row: the mask of its vector, the accumulator slot, the column of a strip."""

    mask: ir.Value | None
    slot: int
    column: int
    positions: dict
    kept: Any  # where the vector is kept: its number in registers, or its element in scratch memory


class RowKernel:
    """The frame of a row kernel: `for_each_row(algorithm)`, whose argument gets this object with the row set up.

    `dtype` is the row's compute dtype and `columns` the number of statistics side by side (1 for inner rows).
    Statistics are lists of vectors, one per column.
    """

    def __init__(self, params: tuple, target):
        name, self.prologue, self.leaves, self.extras, self.epilogue, layout, self.algorithm = params
        self.roles, self.lanes, self.strip, self.static, self.bound, self.is_reduced = layout
        self.b = b = KernelBuilder(name, target)
        number = 0
        self.pointers: list[Any] = []  # None for a coordinate
        for dtype, _, is_coordinate in (*self.leaves, *self.extras):
            self.pointers.append(None if is_coordinate else b.operand(number, dtype))
            number += not is_coordinate
        self.outputs = [b.operand(number + i, d) for i, d in enumerate(expressions.output_dtypes(self.epilogue))]
        self.further = number + len(self.outputs)
        regions.keep_order(b, (*self.leaves, *self.extras), self.pointers, self.outputs)
        self.rank = len(self.roles)
        self.inner = self.roles[-1] == "r"
        self.sizes = [b.size(a) for a in range(self.rank)]
        if self.static:
            self.sizes[-1] = self.static
        every = [spans for _, spans, _ in (*self.leaves, *self.extras)]
        self.strides = [regions.row_strides(b, self.sizes, spans) for spans in every]
        self.dense = regions.row_strides(b, self.sizes, [True] * self.rank)
        self.kept = [a for a in range(self.rank) if self.roles[a] == "k"]
        self.reduced = [a for a in range(self.rank) if self.roles[a] == "r"]
        self.dtype = row_dtype(self.prologue)
        self.columns = 1 if self.inner else self.strip
        self.scratch = b.scratch(self.dtype)
        # Without a prologue the operand is as near as scratch memory, and later sweeps read it again.
        self.rereads = not self.static and not self.prologue[1]
        self.kept_yet = False
        self.registers: dict[int, ir.Value] = {}
        self.masks: list = [None] * self.strip
        self.unit_positions: dict = {}

    # -- units --------------------------------------------------------------------------------------------------------
    def for_each_row(self, algorithm: Callable[[RowKernel], None]) -> str:
        """Emits `algorithm(self)` for every unit and gives the kernel's IR text."""
        b, width = self.b, self.lanes * self.strip
        with b.loop(b.begin, b.end) as unit:
            self.unit_positions = self._unit(unit)
            if self.inner:
                algorithm(self)
            else:
                self.unit_positions[self.rank - 1] = self.unit_positions[self.rank - 1] * width
                self._strip(algorithm, self.sizes[-1] - self.unit_positions[self.rank - 1], width)
        return b.ir_text()

    def _strip(self, algorithm, rest, width: int) -> None:
        b = self.b
        if self.lanes == 1:
            algorithm(self)
            return
        with b.if_else(rest >= width) as (full, partial):
            with full:
                algorithm(self)
            with partial:
                self.masks = [b.tail_mask(rest - j * self.lanes, self.lanes) for j in range(self.strip)]
                algorithm(self)
        self.masks = [None] * self.strip

    def _unit(self, number) -> dict:
        rest, positions = number, {}
        for place, axis in enumerate(reversed(self.kept)):
            size = self.sizes[axis]
            if axis == self.rank - 1:
                size = self.b.ceil_div(size, self.lanes * self.strip)
            if place == len(self.kept) - 1:
                positions[axis] = rest
            else:
                positions[axis], rest = rest % size, rest // size
        return positions

    def row_length(self) -> ir.Value:
        """Elements of a row, as a vector of the row's dtype."""
        count: int | Int = 1
        for axis in self.reduced:
            count = self.sizes[axis] * count
        if isinstance(count, int):
            return self.b.constant(count, self.dtype, self.lanes)
        value = self.b.ir.sitofp(count.value, self.b.type(self.dtype))
        return self.b.broadcast(value, self.lanes)

    # -- sweeps -------------------------------------------------------------------------------------------------------
    def read(self, kinds: Sequence[str], term: Callable | None = None) -> list:
        """First sweep: prologue values. Gives their statistics: per kind ("sum", "max" ...) a list over the columns;
        of `term(value)` where that is given."""
        self.kept_yet = not self.rereads
        visit = None if term is None else lambda value, spot: (value, (term(value),) * len(kinds))
        return self._sweep(self._load, visit, kinds, self.kept_yet, expressions.is_heavy(self.prologue))

    def again(self, visit: Callable, kinds: Sequence[str] = (), keep: bool = False, heavy: bool = False) -> list:
        """Another sweep: `visit(value, spot)` gives a new value, kept if `keep`, and the terms of the statistics.

        heavy: `visit` emits long code.
        """
        out = self._sweep(self._current, visit, kinds, keep, heavy)
        self.kept_yet = self.kept_yet or keep
        return out

    def output(self, number: int, dtype: str) -> Pointer:
        """An operand after those that the epilogue writes."""
        return self.b.operand(self.further + number, dtype)

    def write(self, visit: Callable) -> None:
        """Last sweep: `visit(value, spot)` gives the core's result, or a list of results, which go through the epilogue
        to the outputs."""

        def store(value, spot):
            results = visit(value, spot)
            values = list(results) if isinstance(results, list) else [results]
            for number in range(len(self.leaves), len(self.pointers)):
                values.append(self._leaf(number, self.extras[number - len(self.leaves)], spot))
            index = regions.dot([spot.positions[a] for a in range(self.rank)], self.dense) + spot.column * self.lanes
            results = expressions.emit_lanes(self.b, self.epilogue, values, self.lanes)
            for pointer, result in zip(self.outputs, results, strict=True):
                self.b.store(pointer, index, result, spot.mask)
            return value, ()

        self._sweep(self._current, store, (), False, expressions.is_heavy(self.epilogue))

    def write_statistic(self, values: list[ir.Value], to: Pointer | None = None) -> None:
        """Stores one value per row (all lanes alike for inner rows) to an operand, by default the first output."""
        b = self.b
        index: int | Int = 0
        for axis in self.kept:
            index = index * self.sizes[axis] + self.unit_positions[axis]
        for column, value in enumerate(values):
            if self.inner and self.lanes > 1:
                value = b.lane(value, 0)
            mask = None if self.inner else self.masks[column]
            b.store(to or self.outputs[0], index + column * self.lanes, value, mask)

    def _sweep(self, source: Callable, visit: Callable | None, kinds: Sequence[str], keep: bool, heavy: bool) -> list:
        b = self.b
        slots = SLOTS if self.inner and self.lanes > 1 and not heavy else 1
        one_block = 0 < self.bound <= self.lanes * slots * BLOCK_STEPS
        make = lambda kind: accumulators.make(b, kind, self.dtype, self.lanes, slots, blocks=not one_block)
        sums = [[make(k) for k in kinds] for _ in range(self.columns)]
        every = [a for column in sums for a in column]
        for accumulator in every:
            accumulator.reset()

        def step(spot: Spot) -> None:
            value = source(spot)
            terms: Sequence = (value,) * len(kinds)
            if visit is not None:
                value, terms = visit(value, spot)
            if keep:
                self._keep(value, spot)
            for accumulator, term in zip(sums[spot.column], terms, strict=True):
                accumulator.step(spot.slot, term, spot.mask if self.inner else None)

        if self.static:
            self._static_row(step, every, slots)
        else:
            self._nest(step, every, slots)
        return [[self._statistic(column[k]) for column in sums] for k in range(len(kinds))]

    def _statistic(self, accumulator) -> ir.Value:
        if not self.inner:
            return accumulator.total()
        return self.b.broadcast(accumulator.scalar(), self.lanes)

    def _static_row(self, step: Callable, every: list, slots: int) -> None:
        for accumulator in every:
            accumulator.begin_block()
        for number, start in enumerate(range(0, self.static, self.lanes)):
            rest = self.static - start
            mask = self.b.tail_mask(rest, self.lanes) if rest < self.lanes else None
            step(Spot(mask, number % slots, 0, {**self.unit_positions, self.rank - 1: start}, number))
        for accumulator in every:
            accumulator.end_block()

    def _nest(self, step: Callable, every: list, slots: int) -> None:
        b = self.b
        last = self.reduced[-1]
        width = b.ceil_div(self.sizes[last], self.lanes) * self.lanes if self.inner else self.lanes * self.strip

        def innermost(positions: dict, row) -> None:
            start_of_row = row * width if self.inner else row * self.sizes[last] * width

            def body(i, mask, slot):
                at = {**positions, last: i}
                if self.inner:
                    step(Spot(mask, slot, 0, at, start_of_row + i))
                    return
                for column, column_mask in enumerate(self.masks):
                    step(Spot(column_mask, slot, column, at, start_of_row + i * width + column * self.lanes))

            lanes = self.lanes if self.inner else 1
            block = lanes * slots * BLOCK_STEPS
            if not every:
                b.vector_loop(0, self.sizes[last], lanes, body, slots)
                return
            if 0 < self.bound <= block:
                b.vector_loop(0, self.sizes[last], lanes, body, slots)
                return
            with b.loop(0, self.sizes[last], block) as first:
                for accumulator in every:
                    accumulator.begin_block()
                b.vector_loop(first, b.min(first + block, self.sizes[last]), lanes, body, slots)
                for accumulator in every:
                    accumulator.end_block()

        def level(depth: int, positions: dict, row) -> None:
            if depth == len(self.reduced) - 1:
                innermost(positions, row)
                return
            axis = self.reduced[depth]
            with b.loop(0, self.sizes[axis]) as i:
                level(depth + 1, {**positions, axis: i}, row * self.sizes[axis] + i)

        level(0, dict(self.unit_positions), 0)

    # -- values -------------------------------------------------------------------------------------------------------
    def _keep(self, value: ir.Value, spot: Spot) -> None:
        if self.static:
            self.registers[spot.kept] = value
        else:
            self.b.store(self.scratch, spot.kept, value)

    def _current(self, spot: Spot) -> ir.Value:
        """The row's value at a spot, as the last sweep that kept something left it."""
        if not self.kept_yet:
            return self._load(spot)
        if self.static:
            return self.registers[spot.kept]
        return self.b.load(self.scratch, spot.kept, self.lanes)

    def _load(self, spot: Spot) -> ir.Value:
        values = [self._leaf(number, leaf, spot) for number, leaf in enumerate(self.leaves)]
        return expressions.emit_lanes(self.b, self.prologue, values, self.lanes)[0]

    def _leaf(self, number: int, leaf: tuple, spot: Spot) -> ir.Value:
        """An operand's values at a spot."""
        b = self.b
        dtype, spans, is_coordinate = leaf
        along = spans[-1]
        if is_coordinate:
            axis = spans.index(True) if True in spans else None
            at = 0 if axis is None else spot.positions[axis]
            return regions.coordinate(b, at + spot.column * self.lanes if along else at, dtype, self.lanes, along)
        index = regions.dot([spot.positions[a] for a in range(self.rank)], self.strides[number])
        pointer = self.pointers[number]
        if along:
            return b.load(pointer, index + spot.column * self.lanes, self.lanes, spot.mask)
        return b.load_broadcast(pointer, index, self.lanes)
