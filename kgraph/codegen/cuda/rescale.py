"""Rows that are rescaled by a statistic of their own, in one kernel: fused nodes of kind "rescale".

A row is read twice, the second time from a cache in general (rows of known length up to a limit stay in registers):
first for the statistic, then for what is made of the row by it.
"""

from __future__ import annotations

from kgraph.codegen.cuda import rows
from kgraph.codegen.cuda.accumulators import accumulator
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.reductions import neutral
from kgraph.codegen.rescaling import lower_rescaling, take_apart
from kgraph.ir import Node

TEMPLATE = "kgraph.codegen.cuda.rescale:render"


def accepts(node: Node) -> str | None:
    """None where the node is one reduction of rows with scalar code around it."""
    parts = take_apart(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call; see rows.py."""
    return lower_rescaling(node, rows.lower_parts, TEMPLATE, target)


def render(params: tuple, target) -> str:
    (*_, (_, _, _, stored)) = params
    kernel = rows.RowKernel(params, target, [dtype for _, dtype in stored])
    return kernel.for_each_row(_rescale)


def _rescale(row: rows.RowKernel) -> None:
    k = row.k
    kind, term, middle, stored = row.algorithm
    found = accumulator(k, kind, row.dtype, compensated=not row.kept)
    row.read()
    row.accumulate([found], lambda value: k.emit(term, [value])[0], neutral(kind, row.dtype))
    statistics = k.emit(middle, found.results(row.dtype))
    row.write(lambda value, spot: [value, *statistics])
    for (number, _), output in zip(stored, row.further, strict=True):
        row.write_statistic(statistics[number], output)
