"""layer_norm, rms_norm, group_norm and batch_norm (inference form), alone or in fused nodes of kind "norm".

Where a row stays in registers, its mean is computed first, then the mean of squared differences from it; longer rows
are read once for both (`accumulators.Moments`).
"""

from __future__ import annotations

from kgraph.codegen.cuda import loop, rows
from kgraph.codegen.cuda.accumulators import accumulator
from kgraph.codegen.cuda.scalar_ops import suffix
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.normalisations import in_groups, lower_batch_norm, take_apart_norm
from kgraph.ir import Node

TEMPLATE = "kgraph.codegen.cuda.norm:render"


def accepts(node: Node) -> str | None:
    """None where the node is a normalisation with scalar code around it."""
    if node.name == "batch_norm":
        return None
    parts = take_apart_norm(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call (two for batch_norm); see rows.py."""
    if node.name == "batch_norm":
        return lower_batch_norm(node, loop.lower_expression, target)
    parts = take_apart_norm(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    core = parts.core
    if core.name == "group_norm":
        parts = in_groups(parts)
    return rows.lower_parts(parts, TEMPLATE, (core.name, core.attrs["epsilon"]), target, core.name)


def render(params: tuple, target) -> str:
    kernel = rows.RowKernel(params, target)
    core, epsilon = kernel.algorithm
    k, dtype = kernel.k, kernel.dtype
    square = lambda value: f"({value} * {value})"

    def normalise(row: rows.RowKernel) -> None:
        mean = ""
        row.read()
        if core != "rms_norm" and not row.kept:
            moments = accumulator(k, "moments", dtype, compensated=False)
            row.accumulate([moments])
            mean, variance = moments.results(dtype)
        else:
            if core != "rms_norm":
                total = accumulator(k, "sum", dtype, compensated=False)
                row.accumulate([total])
                mean = k.let(f"({total.names[0]} / {row.row_length()})")
                row.each(lambda value, spot: f"({value} - {mean})")
            squares = accumulator(k, "sum", dtype, compensated=not row.kept)
            row.accumulate([squares], square)
            variance = k.let(f"({squares.names[0]} / {row.row_length()})")
        inverse = k.let(f"({row.c(1)} / sqrt{suffix(dtype)}({variance} + {row.c(epsilon)}))")
        centred = mean and not row.kept
        row.write(lambda value, spot: f"(({value} - {mean}) * {inverse})" if centred else f"({value} * {inverse})")

    return kernel.for_each_row(normalise)
