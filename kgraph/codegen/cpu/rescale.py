"""Rows that are rescaled by a statistic of their own, in one kernel: fused nodes of kind "rescale".

A row is read twice, the second time from the nearest cache (short rows of known length stay in registers): first for
the statistic, then for what is made of the row by it.
"""

from __future__ import annotations

from kgraph.codegen.cpu import expressions, rows
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.rescaling import lower_rescaling, take_apart
from kgraph.ir import Node

TEMPLATE = "kgraph.codegen.cpu.rescale:render"


def accepts(node: Node) -> str | None:
    """None where the node is one reduction of rows with scalar code around it."""
    parts = take_apart(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call; a unit is a row."""
    return lower_rescaling(node, rows.lower_parts, TEMPLATE, target)


def render(params: tuple, target) -> str:
    kernel = rows.RowKernel(params, target)
    return kernel.for_each_row(_rescale)


def _rescale(k: rows.RowKernel) -> None:
    b = k.b
    kind, term, middle, stored = k.algorithm
    (found,) = k.read((kind,), lambda value: expressions.emit(b, term, [value])[0])
    statistics = [expressions.emit(b, middle, [value]) for value in found]
    k.write(lambda value, spot: [value, *statistics[spot.column]])
    for place, (number, dtype) in enumerate(stored):
        k.write_statistic([values[number] for values in statistics], k.output(place, dtype))
