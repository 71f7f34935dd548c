"""Reduction kernels: fused nodes of kind "reduce" and lone reduce_*, argmax, argmin nodes.

A node is an elementwise prologue over the operands' common shape, one or more reductions over the same axes, and an
elementwise epilogue over what they leave. Axes are merged into runs of kept ("k") and reduced ("r") ones; then
- "inner" kernels (innermost run reduced) make one result per unit, vectors running along the row;
- "outer" kernels (innermost run kept) make a strip of neighbouring results per unit, one per lane, down the rows.
Where there are few results and many operands, the outermost reduced run is cut into chunks of fixed length: a first
kernel gives a row of partial results per chunk, a second one reduces those and applies the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from kgraph.codegen.cpu import accumulators, expressions, regions
from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer
from kgraph.codegen.cpu.regions import Leaf
from kgraph.codegen.cpu.scalar_ops import convert
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.reductions import POSITIONS, Parts, in_stages, take_apart, walk
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

BLOCK_STEPS = 16  # vectors per accumulator added plainly before compensation
SLOTS = 4  # independent accumulators along a row
STRIP = 8  # vectors of neighbouring results of an outer kernel
CHUNK_ELEMENTS = 32768  # operands per chunk of a two-stage reduction
FEW_RESULTS = 64  # units below which two stages pay
TEMPLATE = "kgraph.codegen.cpu.reduce:render_{}"


def accepts(node: Node) -> str | None:
    """None where the node is prologue, reductions over the same axes, epilogue, with scalar code for everything."""
    parts = take_apart(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call, or two for few results of many operands; see the module's docstring."""
    parts = take_apart(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    return lower_parts(parts, target)


def merged(parts: Parts, target) -> tuple[Plan, list[Leaf], list[Leaf]]:
    """How the merged axes are walked, and the leaves and extras over these."""
    over = walk(parts)
    return Plan(over.sizes, over.roles, parts.prologue, target), over.leaves, over.extras


def lower_parts(parts: Parts, target) -> list[KernelCall]:
    over = walk(parts)
    plan = Plan(over.sizes, over.roles, parts.prologue, target)
    chunk = plan.chunk(parts.reductions)
    if not chunk:
        rest = parts.epilogue, parts.outputs
        return [call(plan, over.leaves, parts.prologue, parts.reductions, over.extras, *rest, 0)]
    stages = in_stages(parts, over, ceil_div(plan.sizes[plan.first_reduced], chunk))
    first = call(plan, over.leaves, parts.prologue, stages.first, [], stages.untouched, stages.partials, chunk)
    over = stages.walk
    # Partial results are few: short code that serves every width is worth more than wide strips.
    plan = Plan(over.sizes, over.roles, stages.untouched, target, widest=1)
    rest = parts.epilogue, parts.outputs
    return [first, call(plan, over.leaves, stages.untouched, stages.second, over.extras, *rest, 0)]


class Plan:
    """How the axes of one kernel are walked."""

    def __init__(self, sizes: list, roles: tuple, prologue: tuple, target, widest: int = STRIP):
        """widest: vectors of a strip of neighbouring results, at most."""
        self.sizes, self.roles = sizes, roles
        self.first_reduced = roles.index("r")
        self.inner = roles[-1] == "r"
        lanes = expressions.lanes(prologue, target)
        last = sizes[-1]
        while isinstance(last, int) and lanes > 1 and lanes // 2 >= last:
            lanes //= 2
        self.lanes = lanes
        strip = min(2 if expressions.is_heavy(prologue) else STRIP, widest)
        if isinstance(last, int):
            strip = max(1, min(strip, -(-last // lanes)))
        self.strip = strip
        kept = [s for s, r in zip(sizes, roles) if r == "k"]
        if self.inner:
            self.units = product(kept)
        else:
            self.units = product(kept[:-1]) * ceil_div(last, strip * lanes)

    def chunk(self, reductions) -> int:
        """Length of a chunk of the outermost reduced axis, or 0 for one stage."""
        if any(kind in POSITIONS for kind, _, _ in reductions):
            return 0
        if not isinstance(self.units, int) or self.units >= FEW_RESULTS:
            return 0
        total = product(self.sizes)
        if isinstance(total, int) and total <= 2 * CHUNK_ELEMENTS:
            return 0
        rest = product(s for a, s in enumerate(self.sizes) if a != self.first_reduced)
        chunk = max(1, CHUNK_ELEMENTS // max(rest, 1)) if isinstance(rest, int) else 64
        size = self.sizes[self.first_reduced]
        return 0 if isinstance(size, int) and size <= chunk else chunk


def call(
    plan: Plan, leaves, prologue, reductions, extras, epilogue, outputs, chunk: int, template=TEMPLATE, label: str = ""
) -> KernelCall:
    """The call of a kernel that walks as `plan` says, of this module or, with a label, of one with like parameters."""
    describe = lambda xs: tuple((x.dtype, x.spans, x.is_coordinate) for x in xs)
    names = [kind if kind in POSITIONS else f"reduce_{kind}" for kind, _, _ in reductions]
    name = label or regions.kernel_name("", prologue, *dict.fromkeys(names), epilogue)
    name += "_partial" if chunk else ""
    single = plan.inner and not chunk and plan.roles.count("r") == 1
    layout = (plan.roles, plan.lanes, plan.strip, bool(chunk), regions.bound_of(plan.sizes[-1]) if single else 0)
    params = (name, prologue, describe(leaves), reductions, describe(extras), epilogue, layout)
    operands = [x.value for x in (*leaves, *extras) if not x.is_coordinate] + list(outputs)
    sizes = [*plan.sizes, chunk] if chunk else list(plan.sizes)
    # A last axis of known size decides about masks, so it is part of the code.
    static = plan.sizes[-1] if isinstance(plan.sizes[-1], int) and not plan.inner else None
    extent = plan.units * ceil_div(plan.sizes[plan.first_reduced], chunk) if chunk else plan.units
    return KernelCall(
        spec=KernelSpec(name, template.format("inner" if plan.inner else "outer"), (*params, _whole(static, plan))),
        operands=operands,
        outputs=len(outputs),
        sizes=sizes,
        extent=extent,
        flops=product(plan.sizes) * (len(reductions) + expressions.flops(prologue)),
        bytes=regions.total_bytes(operands),
    )


def _whole(size: int | None, plan: Plan) -> bool:
    """Whether the strips of an outer kernel divide the axis, so that nothing is masked."""
    return size is not None and size % (plan.lanes * plan.strip) == 0


# -- renderers ------------------------------------------------------------------------------------------------------
class Kernel:
    """What both renderers share: operands, addresses, the nest of loops over the reduced axes."""

    def __init__(self, params: tuple, target):
        name, self.prologue, self.leaves, self.reductions, self.extras, self.epilogue, layout, self.whole = params
        self.roles, self.lanes, self.strip, self.chunked, self.bound = layout
        self.b = b = KernelBuilder(name, target)
        number = 0
        self.pointers: list[Pointer | None] = []
        for dtype, _, is_coordinate in (*self.leaves, *self.extras):
            self.pointers.append(None if is_coordinate else b.operand(number, dtype))
            number += not is_coordinate
        self.extra_pointers = self.pointers[len(self.leaves) :]
        self.outputs = [b.operand(number + i, d) for i, d in enumerate(expressions.output_dtypes(self.epilogue))]
        rank = len(self.roles)
        self.sizes = [b.size(a) for a in range(rank)]
        # A number of run time, since it differs with the size of every operand.
        self.chunk = b.size(rank) if self.chunked else None
        self.strides = [regions.row_strides(b, self.sizes, spans) for _, spans, _ in (*self.leaves, *self.extras)]
        self.kept = [a for a in range(rank) if self.roles[a] == "k"]
        self.reduced = [a for a in range(rank) if self.roles[a] == "r"]

    def unit(self, number, kept: list[int]):
        """(position of each axis in `kept`, chunk number) of a unit; chunks run slowest."""
        rest = number
        positions: dict[int, Int | int] = {}
        for place, axis in enumerate(reversed(kept)):
            size = self.kept_size(axis)
            if place == len(kept) - 1 and not self.chunked:
                positions[axis] = rest
            else:
                positions[axis], rest = rest % size, rest // size
        return positions, rest if self.chunked else 0

    def kept_size(self, axis: int):
        """Units along a kept axis: strips along the innermost one of an outer kernel."""
        if axis == len(self.roles) - 1:
            return self.b.ceil_div(self.sizes[axis], self.lanes * self.strip)
        return self.sizes[axis]

    def reduced_range(self, axis: int, chunk_number):
        """Where the loop over a reduced axis starts and stops."""
        if self.chunk is not None and axis == self.reduced[0]:
            start = chunk_number * self.chunk
            return start, self.b.min(start + self.chunk, self.sizes[axis])
        return 0, self.sizes[axis]

    def output_index(self, positions: dict, chunk_number):
        """Element of the dense results at kept positions; partial results of a chunk lie together."""
        index = chunk_number
        for axis in self.kept:
            index = index * self.sizes[axis] + positions[axis]
        return index

    def nest(self, positions: dict, chunk_number, innermost) -> None:
        """Loops over all reduced axes but the last; `innermost(positions)` emits the code inside."""

        def level(depth: int, at: dict) -> None:
            if depth == len(self.reduced) - 1:
                innermost(at)
                return
            axis = self.reduced[depth]
            with self.b.loop(*self.reduced_range(axis, chunk_number)) as i:
                level(depth + 1, {**at, axis: i})

        level(0, dict(positions))

    def address(self, number: int, positions: dict) -> Pointer | None:
        """Leaf `number` at the given positions; axes without a position count 0."""
        pointer = self.pointers[number]
        if pointer is None:
            return None
        strides = self.strides[number]
        axes = [a for a in positions if a < len(strides)]
        return pointer + regions.dot([positions[a] for a in axes], [strides[a] for a in axes])

    def coordinate(self, number: int, positions: dict, lanes: int) -> ir.Value:
        """A coordinate leaf along an axis whose position is fixed."""
        dtype, spans, _ = self.leaves[number]
        at = positions.get(spans.index(True), 0) if True in spans else 0
        return regions.coordinate(self.b, at, dtype, lanes, False)

    def accumulate(self, lanes: int, slots: int, across_rows: bool = False) -> list[accumulators.Accumulator]:
        one_block = not across_rows and 0 < self.bound <= lanes * slots * BLOCK_STEPS
        make = lambda kind, dtype: accumulators.make(self.b, kind, dtype, lanes, slots, across_rows, not one_block)
        return [make(kind, dtype) for kind, dtype, _ in self.reductions]

    @property
    def slots(self) -> int:
        """Accumulators side by side along a row."""
        return 1 if self.lanes == 1 or expressions.is_heavy(self.prologue) else SLOTS

    def for_each_strip(self, emit: Callable) -> None:
        """Calls `emit(positions, chunk number, mask per vector of the strip)` for the units of an outer kernel."""
        b, width = self.b, self.lanes * self.strip
        with b.loop(b.begin, b.end) as unit:
            positions, chunk_number = self.unit(unit, self.kept)
            column = positions[len(self.roles) - 1] * width
            positions[len(self.roles) - 1] = column
            if self.whole or self.lanes == 1:
                emit(positions, chunk_number, [None] * self.strip)
            else:
                rest = self.sizes[-1] - column
                with b.if_else(rest >= width) as (full, partial):
                    with full:
                        emit(positions, chunk_number, [None] * self.strip)
                    with partial:
                        masks = [b.tail_mask(rest - j * self.lanes, self.lanes) for j in range(self.strip)]
                        emit(positions, chunk_number, masks)

    def finished(self, values: list[ir.Value]) -> list[ir.Value]:
        """Results of the accumulators in their result dtypes (positions are counted as int32)."""
        return [
            convert(self.b, value, "int32", result) if kind in POSITIONS else value
            for value, (kind, _, result) in zip(values, self.reductions)
        ]


def render_inner(params: tuple, target) -> str:
    k = Kernel(params, target)
    b = k.b
    sums = k.accumulate(k.lanes, k.slots)
    with b.loop(b.begin, b.end) as unit:
        positions, chunk_number = k.unit(unit, k.kept)
        values = k.finished(row_totals(k, sums, positions, chunk_number))
        for number, pointer in enumerate(k.extra_pointers, start=len(k.leaves)):
            values.append(b.load(pointer + regions.dot(_at(positions, k), k.strides[number])))
        index = k.output_index(positions, chunk_number)
        for pointer, value in zip(k.outputs, expressions.emit_lanes(b, k.epilogue, values, 1)):
            b.store(pointer, index, value)
    return b.ir_text()


def row_totals(k: Kernel, sums: list, positions: dict, chunk_number, terms: Callable | None = None) -> list[ir.Value]:
    """What the accumulators `sums` make of a row's values: the prologue's, or of `terms(these)` where it is given."""
    b, lanes, slots = k.b, k.lanes, k.slots
    last = k.reduced[-1]
    block = lanes * slots * BLOCK_STEPS

    def row(positions):
        sources = [k.address(n, positions) for n in range(len(k.leaves))]

        def body(i, mask, slot):
            values = []
            for number, (at, (dtype, spans, is_coordinate)) in enumerate(zip(sources, k.leaves)):
                if is_coordinate and spans[-1]:
                    values.append(regions.coordinate(b, i, dtype, lanes, True))
                elif is_coordinate:
                    values.append(k.coordinate(number, positions, lanes))
                else:
                    values.append(b.load(at, i, lanes, mask) if spans[-1] else b.load_broadcast(at, 0, lanes))
            results = expressions.emit_lanes(b, k.prologue, values, lanes)
            for accumulator, value in zip(sums, terms(results, i) if terms else results):
                accumulator.step(slot, value, mask, i)

        start, stop = k.reduced_range(last, chunk_number)
        if 0 < k.bound <= block:
            b.vector_loop(start, stop, lanes, body, slots)
            return
        with b.loop(start, stop, block) as first:
            for accumulator in sums:
                accumulator.begin_block()
            b.vector_loop(first, b.min(first + block, stop), lanes, body, slots)
            for accumulator in sums:
                accumulator.end_block()

    for accumulator in sums:
        accumulator.reset()
    k.nest(positions, chunk_number, row)
    return [accumulator.scalar() for accumulator in sums]


def _at(positions: dict, k: Kernel) -> list:
    return [positions.get(a, 0) for a in range(len(k.roles))]


def render_outer(params: tuple, target) -> str:
    k = Kernel(params, target)
    k.for_each_strip(lambda positions, chunk_number, masks: _strip(k, positions, chunk_number, masks))
    return k.b.ir_text()


def _strip(k: Kernel, positions: dict, chunk_number, masks: list) -> None:
    """The results at one strip of columns."""
    b, lanes = k.b, k.lanes
    index = k.output_index(positions, chunk_number)
    for j, (mask, totals) in enumerate(zip(masks, strip_totals(k, positions, chunk_number, masks))):
        values = k.finished(totals)
        for number, pointer in enumerate(k.extra_pointers, start=len(k.leaves)):
            at = pointer + regions.dot(_at(positions, k), k.strides[number])
            spanned = k.extras[number - len(k.leaves)][1][-1]
            values.append(b.load(at, j * lanes, lanes, mask) if spanned else b.load_broadcast(at, 0, lanes))
        for pointer, value in zip(k.outputs, expressions.emit_lanes(b, k.epilogue, values, lanes)):
            b.store(pointer, index + j * lanes, value, mask)


def strip_totals(
    k: Kernel, positions: dict, chunk_number, masks: list, terms: Callable | None = None
) -> list[list[ir.Value]]:
    """Per vector of columns, the totals of the prologue's values, or of `terms(these, row, column)`."""
    b, lanes = k.b, k.lanes
    last = k.reduced[-1]
    # Narrow strips add rows to several accumulators in turn, to hide the latency of additions.
    turns = 1 if expressions.is_heavy(k.prologue) else max(1, SLOTS // k.strip)
    sums = [k.accumulate(lanes, turns, across_rows=True) for _ in masks]
    every = [accumulator for column in sums for accumulator in column]
    for accumulator in every:
        accumulator.reset()
    column_axis = len(k.roles) - 1

    def rows(at):
        sources = [k.address(n, at) for n in range(len(k.leaves))]

        def body(i, _, slot):
            for j, mask in enumerate(masks):
                values = []
                for number, (source, (dtype, spans, is_coordinate)) in enumerate(zip(sources, k.leaves)):
                    if is_coordinate and spans[column_axis]:
                        values.append(regions.coordinate(b, at[column_axis] + j * lanes, dtype, lanes, True))
                    elif is_coordinate:
                        values.append(k.coordinate(number, {**at, last: i}, lanes))
                    else:
                        here = source + i * k.strides[number][last]
                        spanned = spans[column_axis]
                        load = b.load(here, j * lanes, lanes, mask) if spanned else b.load_broadcast(here, 0, lanes)
                        values.append(load)
                results = expressions.emit_lanes(b, k.prologue, values, lanes)
                for accumulator, value in zip(sums[j], terms(results, i, j) if terms else results):
                    accumulator.step(slot, value, None, i)

        start, stop = k.reduced_range(last, chunk_number)
        block = BLOCK_STEPS * turns
        with b.loop(start, stop, block) as first:
            for accumulator in every:
                accumulator.begin_block()
            b.vector_loop(first, b.min(first + block, stop), 1, body, turns)
            for accumulator in every:
                accumulator.end_block()

    k.nest(positions, chunk_number, rows)
    return [[accumulator.total() for accumulator in column] for column in sums]
