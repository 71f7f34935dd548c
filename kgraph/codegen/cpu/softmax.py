"""softmax, log_softmax and logsumexp, alone or in fused nodes of kind "softmax"."""

from __future__ import annotations

from kgraph.codegen.cpu import rows
from kgraph.codegen.cpu import vector_math as vm
from kgraph.codegen.cpu.accumulators import MAX_NUMBER
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.normalisations import take_apart_softmax
from kgraph.ir import Node

TEMPLATE = "kgraph.codegen.cpu.softmax:render"


def accepts(node: Node) -> str | None:
    """None where the node is one of `EXPONENTIAL` with scalar code around it."""
    parts = take_apart_softmax(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call; a unit is a row (or a strip of rows where the axis is not the last)."""
    parts = take_apart_softmax(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    return rows.lower_parts(parts, TEMPLATE, (parts.core.name,), target, parts.core.name)


def render(params: tuple, target) -> str:
    kernel = rows.RowKernel(params, target)
    (core,) = kernel.algorithm
    return kernel.for_each_row({"softmax": _softmax, "log_softmax": _log_softmax, "logsumexp": _logsumexp}[core])


# A NaN in a row reaches all its results through the sum, so the maximum need not look for it.


def _softmax(k: rows.RowKernel) -> None:
    b = k.b
    (largest,) = k.read((MAX_NUMBER,))

    def exponential(value, spot):
        e = vm.exp_nonpositive(b, b.sub(value, largest[spot.column]))
        return e, (e,)

    (total,) = k.again(exponential, ("sum",), keep=True, heavy=True)
    inverse = [b.div(1.0, t) for t in total]
    k.write(lambda value, spot: b.mul(value, inverse[spot.column]))


def _log_softmax(k: rows.RowKernel) -> None:
    b = k.b
    (largest,) = k.read((MAX_NUMBER,))

    def shifted(value, spot):
        value = b.sub(value, largest[spot.column])
        return value, (vm.exp_nonpositive(b, value),)

    (total,) = k.again(shifted, ("sum",), keep=True, heavy=True)
    logarithm = [vm.log(b, t) for t in total]
    k.write(lambda value, spot: b.sub(value, logarithm[spot.column]))


def _logsumexp(k: rows.RowKernel) -> None:
    b = k.b
    (largest,) = k.read((MAX_NUMBER,))
    # An infinite maximum is the result; subtracting it would give NaN.
    finite = [b.select(b.compare("<", vm.absolute(b, m), vm.INF), m, 0.0) for m in largest]

    def exponential(value, spot):
        return value, (vm.exp(b, b.sub(value, finite[spot.column])),)

    (total,) = k.again(exponential, ("sum",), heavy=True)
    k.write_statistic([b.add(m, vm.log(b, t)) for m, t in zip(finite, total)])
