"""Reduction kernels: fused nodes of kind "reduce" and lone reduce_*, argmax, argmin nodes.

A node is an elementwise prologue over the operands' common shape, one or more reductions over the same axes, and an
elementwise epilogue over what they leave. A block makes `units` results side by side with `lanes` threads for each:
- where the innermost merged axis is reduced, the lanes of a result are neighbours and walk along the row together;
- where it is kept, neighbouring threads have neighbouring results, and the lanes walk down the rows.
So memory is read by neighbouring threads at neighbouring addresses either way. Lanes are merged within warps, then in
shared memory, in an order that is the block's alone. Where there are few results of many operands, the reduced axes are
cut into chunks of a length that sizes and target decide: a first kernel leaves a row of partial results per chunk, a
second reduces those. Long float sums keep the rounding errors of their steps beside the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kgraph.codegen import expressions, regions
from kgraph.codegen.cuda.accumulators import GROUP, Lanes, accumulator, strips
from kgraph.codegen.cuda.loop import leaf_value
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.reductions import POSITIONS, Parts, Walk, in_stages, take_apart, walk
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cuda.reduce:render"
LONG_ROW = 1024  # elements from which on a whole block reduces one row
SHORT_ROW = 8  # elements up to which a thread does it alone
CHUNK = 4096  # operands that a block reduces at least, where the reduced axes are cut
PLAIN_STEPS = 16  # additions per lane up to which sums are not compensated
GROUPED_FLOPS = 16  # operations per element up to which several are computed side by side
WAVES = 2  # blocks per multiprocessor below which the reduced axes are cut


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


def lower_parts(parts: Parts, target) -> list[KernelCall]:
    over = walk(parts)
    shape = BlockShape.choose(over, target)
    chunk = chunk_of(parts, over, shape, target)
    last = parts.epilogue, parts.outputs
    if not chunk:
        return [call(over, shape, parts.prologue, parts.reductions, over.extras, *last, 0, target)]
    stages = in_stages(parts, over, ceil_div(product(over.reduced_sizes), chunk))
    first = call(over, shape, parts.prologue, stages.first, [], stages.untouched, stages.partials, chunk, target)
    over = stages.walk
    shape = BlockShape.choose(over, target)
    return [first, call(over, shape, stages.untouched, stages.second, over.extras, *last, 0, target)]


@dataclass(frozen=True)
class BlockShape:
    """units: results that a block makes side by side; lanes: threads for each. inner: whether the innermost merged axis
    is reduced."""

    inner: bool
    units: int
    lanes: int

    @staticmethod
    def choose(over: Walk, target) -> BlockShape:
        inner = over.roles[-1] == "r"
        units, length = product(over.kept_sizes), product(over.reduced_sizes)
        if inner:
            lanes = target.group
            if isinstance(length, int) and length <= SHORT_ROW:
                lanes = 1
            elif (isinstance(length, int) and length >= LONG_ROW) or (
                isinstance(units, int) and units < target.num_sms
            ):
                lanes = target.block
            return BlockShape(True, target.block // lanes, lanes)
        side = min(target.group, target.block)
        if isinstance(units, int):
            side = min(side, 1 << max(units - 1, 0).bit_length())
        lanes = target.block // side
        if isinstance(length, int):
            lanes = min(lanes, 1 << max(length - 1, 0).bit_length())
        return BlockShape(False, target.block // lanes, lanes)


def chunk_of(parts: Parts, over: Walk, shape: BlockShape, target) -> int:
    """Reduced elements that one block takes, or 0 for one stage."""
    units, length = product(over.kept_sizes), product(over.reduced_sizes)
    if any(kind in POSITIONS for kind, _, _ in parts.reductions) or not isinstance(units, int) or units == 0:
        return 0
    blocks = -(-units // shape.units)
    wanted = WAVES * target.num_sms
    least = max(1, CHUNK // shape.units)
    if blocks >= wanted or (isinstance(length, int) and length <= 2 * least):
        return 0
    if isinstance(length, int):
        return max(least, -(-length * blocks // wanted))
    return 4 * least


def call(
    over: Walk, shape: BlockShape, prologue, reductions, extras, epilogue, outputs, chunk: int, target, label: str = ""
) -> KernelCall:
    """The call of a kernel that makes `outputs`, or rows of partial results if a chunk is given."""
    describe = lambda leaves: tuple((x.dtype, x.spans, x.is_coordinate) for x in leaves)
    names = [kind if kind in POSITIONS else f"reduce_{kind}" for kind, _, _ in reductions]
    name = label or regions.kernel_name("", prologue, *dict.fromkeys(names), epilogue)
    name += "_partial" if chunk else ""
    units, length = product(over.kept_sizes), product(over.reduced_sizes)
    steps = chunk or length
    compensated = not (isinstance(steps, int) and steps <= PLAIN_STEPS * shape.lanes)
    grouped = expressions.flops(prologue) <= GROUPED_FLOPS and not (isinstance(steps, int) and steps < 2 * shape.lanes)
    layout = (over.roles, shape, bool(chunk), compensated, GROUP if grouped else 1, index_type([product(over.sizes)]))
    operands = [x.value for x in (*over.leaves, *extras) if not x.is_coordinate] + list(outputs)
    groups = ceil_div(units, shape.units)
    return KernelCall(
        spec=KernelSpec(
            name, TEMPLATE, (name, prologue, describe(over.leaves), reductions, describe(extras), epilogue, layout)
        ),
        operands=operands,
        outputs=len(outputs),
        sizes=[*over.sizes, chunk] if chunk else list(over.sizes),
        extent=groups * ceil_div(length, chunk) if chunk else groups,
        flops=product(over.sizes) * (len(reductions) + expressions.flops(prologue)),
        bytes=regions.total_bytes(operands),
        launch=Launch(target.block),
    )


# -- the kernel -------------------------------------------------------------------------------------------------------
def render(params: tuple, target) -> str:
    name, prologue, leaves, reductions, extras, epilogue, layout = params
    roles, shape, chunked, compensated, group, index = layout
    k = KernelSource(name, target, target.block, index)
    pointers = [None if is_coordinate else k.operand(dtype) for dtype, _, is_coordinate in (*leaves, *extras)]
    outputs = [k.operand(dtype) for dtype in expressions.output_dtypes(epilogue)]
    sizes = [k.size() for _ in roles]
    kept = [a for a, role in enumerate(roles) if role == "k"]
    reduced = [a for a, role in enumerate(roles) if role == "r"]
    units = k.let(k.product([sizes[a] for a in kept]), "units")
    length = k.let(k.product([sizes[a] for a in reduced]), "length")
    chunk = k.size() if chunked else None
    groups = k.let(k.ceil_div(units, shape.units), "groups")
    total = k.let(k.mul(groups, k.ceil_div(length, chunk)), "total") if chunked else groups
    thread = k.thread()
    across, along = (k.div, k.mod) if shape.inner else (k.mod, k.div)
    width = shape.lanes if shape.inner else shape.units
    slot, lane = k.let(across(thread, width), "slot"), k.let(along(thread, width), "lane")
    sums = [accumulator(k, kind, dtype, compensated) for kind, dtype, _ in reductions]
    merged = Lanes(k, sums, shape.lanes, 1 if shape.inner else shape.units)
    with k.block_stride(total) as number:
        first = k.mod(number, groups) if chunked else number
        unit = k.let(k.add(k.mul(first, shape.units), slot), "unit")
        start, stop = lane, length
        if chunked:
            begin = k.let(k.mul(k.div(number, groups), chunk), "begin")
            end = k.add(begin, chunk)
            start, stop = k.add(begin, lane), k.let(f"({end} if {end} < {length} else {length})", "stop")
        for s in sums:
            s.reset()
        coordinates = [""] * len(roles)
        with k.suite(f"if {unit} < {units}:"):
            for a, at in zip(kept, k.coordinates(unit, [sizes[a] for a in kept])):
                coordinates[a] = at

            def element(j: str) -> list[str]:
                at_reduced = list(coordinates)
                for a, at in zip(reduced, k.coordinates(j, [sizes[a] for a in reduced])):
                    at_reduced[a] = at
                whole = k.let(k.offset(at_reduced, sizes, [True] * len(sizes)))
                values = [
                    leaf_value(k, pointer, dtype, spans, whole, at_reduced, sizes)
                    for pointer, (dtype, spans, _) in zip(pointers, leaves)
                ]
                return k.emit(prologue, values)

            for positions in strips(k, start, stop, shape.lanes, group):
                elements = [element(j) for j in positions]
                taken = 0
                for s in sums:
                    s.group([values[taken : taken + s.inputs] for values in elements], positions)
                    taken += s.inputs
        for s in sums:
            s.finish()
        merged.merge(thread, lane)
        with k.suite(f"if {lane} == {k.i(0)} and {unit} < {units}:"):
            values = [v for s, (_, _, result) in zip(sums, reductions) for v in s.results(result)]
            # A reduced axis counts 0; extras do not extend over it.
            at_kept = [at if role == "k" else k.i(0) for at, role in zip(_again(k, unit, kept, sizes, roles), roles)]
            for pointer, (_, spans, _) in zip(pointers[len(leaves) :], extras):
                assert pointer is not None
                values.append(k.load(pointer, k.offset(at_kept, sizes, spans)))
            place = k.add(k.mul(k.div(number, groups), units), unit) if chunked else unit
            place = k.let(place)
            for output, value in zip(outputs, k.emit(epilogue, values)):
                k.store(output, place, value)
        merged.synchronise()
    return k.text()


def _again(k: KernelSource, unit: str, kept: list[int], sizes: list[str], roles: Sequence[str]) -> list[str]:
    """The coordinates of a unit, computed where they are needed: those of the loop are not set in all threads."""
    out = [""] * len(roles)
    for a, at in zip(kept, k.coordinates(unit, [sizes[a] for a in kept])):
        out[a] = at
    return out
