"""Graphs inside nodes: how `fusion` and control flow type-check and evaluate the graphs in their attributes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.dims import substitute
from kgraph.ir.interpreter import WIDE, evaluate
from kgraph.ops.common import sizes_differ
from kgraph.ops.rules import dtype_error, shape_error


def result_types(name: str, graph: Graph, types: Sequence[TensorType]) -> tuple[TensorType, ...]:
    """Types of the graph's outputs for operands of `types`, which must match its inputs.

    Sizes that are symbolic in the graph take the operands' values. Operands of float64 where the graph has a narrower
    float stand for an evaluation of the whole graph in float64, as the oracle does it.
    Raises ShapeError, DTypeError.
    """
    sizes = match_sizes(name, graph, types)
    wide = is_widened(graph, types)
    for own, given in zip(graph.inputs, types):
        if given.dtype != own.dtype and not (wide and given.dtype == WIDE.get(own.dtype, own.dtype)):
            raise dtype_error(name, types, f"an operand of type {own.type}, got {given}")
    return tuple(
        TensorType(tuple(substitute(s, sizes) for s in v.shape), WIDE.get(v.dtype, v.dtype) if wide else v.dtype)
        for v in graph.outputs
    )


def run(name: str, graph: Graph, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The graph's outputs for concrete operands."""
    types = [TensorType(a.shape, a.dtype.name) for a in arrays]
    precision = "float64" if is_widened(graph, types) else None
    return tuple(evaluate(graph, list(arrays), sizes=match_sizes(name, graph, types), precision=precision))


def is_widened(graph: Graph, types: Sequence[TensorType]) -> bool:
    """Whether the operands are those of an evaluation in float64 of a graph in narrower floats."""
    return any(t.dtype != v.dtype and t.dtype in ("float64", "complex128") for v, t in zip(graph.inputs, types))


def match_sizes(name: str, graph: Graph, types: Sequence[TensorType]) -> dict:
    """Values of the symbols in the graph's input shapes, read off the operands' shapes. Raises ShapeError."""
    wanted = [v.type for v in graph.inputs]
    text = "operands of types " + ", ".join(map(str, wanted))
    if len(types) != len(wanted) or any(t.rank != w.rank for t, w in zip(types, wanted)):
        raise shape_error(name, types, text)
    pairs = [pair for t, w in zip(types, wanted) for pair in zip(w.shape, t.shape)]
    sizes: dict = {}
    for own, given in pairs:
        if isinstance(own, Dim) and (solved := _solve(own, given)) is not None:
            sizes.setdefault(*solved)
    if any(sizes_differ(substitute(own, sizes), given) for own, given in pairs):
        raise shape_error(name, types, text)
    return sizes


def _solve(size: Dim, value) -> tuple | None:
    """(symbol, its value) for a size a * symbol + b of the given value; None for other forms."""
    terms = dict(size.terms)
    constant = terms.pop((), 0)
    if len(terms) != 1:
        return None
    ((monomial, factor),) = terms.items()
    if len(monomial) != 1 or not isinstance(monomial[0], str):
        return None
    rest = value - constant
    if factor == 1:
        return monomial[0], rest
    return (monomial[0], rest // factor) if isinstance(rest, int) and rest % factor == 0 else None
