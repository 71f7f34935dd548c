"""Taking apart what reduces rows and applies the result to the same rows: abs-max quantisation, unit normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kgraph.codegen import expressions, regions
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.reductions import KINDS, POSITIONS
from kgraph.codegen.regions import Leaf
from kgraph.codegen.rows import Parts
from kgraph.ir import Node


@dataclass
class Rescaling:
    """A node taken apart.

    rows: the row as operand; `rows.epilogue` makes the outputs of its shape out of the row, the statistics and the
    extras, in this order. kind: of the reduction. term: gives what is reduced out of an element of the row. middle:
    gives the statistics out of what the reduction gives. stored: numbers of the statistics that are outputs, which come
    after the outputs of the row's shape.
    """

    rows: Parts
    kind: str
    term: tuple
    middle: tuple
    stored: tuple[int, ...]


def take_apart(node: Node) -> Rescaling | str:
    """The parts of a fused node, or the reason why it has none."""
    inputs, outer, nodes, outputs = regions.body_of(node)
    found = [n for n in nodes if n.name in KINDS and n.name not in POSITIONS]
    if len(found) != 1:
        return f"a kernel that rescales rows needs exactly one reduction, not {len(found)}"
    (core,) = found
    operand, shape, small = core.inputs[0], core.inputs[0].shape, core.output.shape
    if not core.attrs["keepdims"] or small == shape:
        return "the reduction has to keep its axes as ones"
    before = regions.needed(nodes, [operand])
    operands, _ = regions.used_inputs(inputs, outer, before, [operand])
    if len(operands) != 1 or operands[0].shape != shape:
        return "the reduction reads more than one operand"
    (row,) = operands
    if compute_dtype(row.dtype) != compute_dtype(operand.dtype) or core.output.dtype != operand.dtype:
        return "the reduction changes the dtype"
    term = expressions.encode_nodes(before, [row], [operand])
    full = [v for v in outputs if v.shape == shape]
    after = [n for n in nodes if n not in before and n is not core and n.output.shape == shape]
    read = {v for n in after for v in n.inputs}
    statistics = [v for n in nodes for v in n.outputs if v.shape == small and (v in read or v in outputs)]
    if not full or len(full) + len([v for v in statistics if v in outputs]) != len(outputs):
        return "the outputs need the shape of the rows or of the statistic"
    middle = expressions.encode_nodes(regions.needed(nodes, statistics, stop=core.outputs), [core.output], statistics)
    needed = regions.needed(nodes, full, stop=statistics)
    inner, leaves, kept = regions.leaves_and_nodes(*regions.used_inputs(inputs, outer, needed, full), needed, shape)
    extras = [(v, leaf) for v, leaf in zip(inner, leaves, strict=True) if v is not row]
    epilogue = expressions.encode_nodes(kept, [row, *statistics, *(v for v, _ in extras)], full)
    if isinstance(term, str) or isinstance(middle, str) or isinstance(epilogue, str):
        return next(expression for expression in (term, middle, epilogue) if isinstance(expression, str))
    outside = dict(zip(inputs, outer, strict=True))
    given = dict(zip(outputs, node.outputs, strict=True))
    stored = [v for v in statistics if v in given]
    rank = len(shape)
    rows = Parts(
        core,
        shape,
        tuple(sorted(a % rank for a in core.attrs["axes"])),
        [Leaf(outside[row], row.dtype, regions.spans_of(shape, rank))],
        expressions.identity(row.dtype),
        [leaf for _, leaf in extras],
        epilogue,
        [given[v] for v in (*full, *stored)],
        label=expressions.name(epilogue),
    )
    return Rescaling(rows, KINDS[core.name], term, middle, tuple(statistics.index(v) for v in stored))


def lower_rescaling(node: Node, lower_parts: Callable, template: str, target) -> list[KernelCall]:
    """One kernel call; the algorithm is (kind, term, middle, (number, dtype) of the statistics that are stored).

    lower_parts: that of a code generator's `rows`.
    """
    parts = take_apart(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    statistics = expressions.output_dtypes(parts.middle)
    algorithm = (parts.kind, parts.term, parts.middle, tuple((n, statistics[n]) for n in parts.stored))
    (call,) = lower_parts(parts.rows, template, algorithm, target, f"reduce_{parts.kind}")
    # The order of accesses is kept for outputs of the row's shape alone.
    first = len(call.operands) - len(parts.stored)
    pairs = tuple((o, i) for o, i in call.notes["inplace"] if o < first)
    return [replace(call, notes={**call.notes, "inplace": pairs})]
