"""Evaluates nodes whose operands are all constants."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Dim, Graph, Node, Rewriter, constant_value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import primitive

LARGEST_FOLD = 1 << 24  # bytes; a larger result is cheaper to compute than to store


def _static_attrs(node: Node) -> bool:
    for value in node.attrs.values():
        if isinstance(value, Dim) or (isinstance(value, tuple) and any(isinstance(v, Dim) for v in value)):
            return False
    return True


def _worth_storing(node: Node, operand_bytes: int) -> bool:
    """Whether the result is small enough, or no larger than its operands."""
    nbytes = sum(o.type.nbytes for o in node.outputs)
    if not node.inputs and node.name != "full":
        return nbytes <= 1 << 16
    if node.name == "broadcast_to":
        return nbytes <= 1 << 14
    return nbytes <= max(LARGEST_FOLD, operand_bytes)


def fold_constants(graph: Graph, context: PassContext | None = None) -> Graph:
    """`f(constant)  ->  constant`, by the primitive's own reference."""

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.primitive.name in ("constant", "fusion") or node.primitive.traits & {"random", "control"}:
            return None
        if not _static_attrs(node) or not all(o.type.is_static for o in node.outputs):
            return None
        arrays = [a for v in inputs if (a := constant_value(v)) is not None]
        if len(arrays) < len(inputs):
            return None
        if not _worth_storing(node, sum(a.nbytes for a in arrays)):
            return None
        results = node.primitive.reference(*arrays, **node.attrs)
        if not isinstance(results, tuple):
            results = (results,)
        return tuple(
            rewriter.emit(primitive("constant"), value=np.asarray(r, o.type.np_dtype))
            for r, o in zip(results, node.outputs, strict=True)
        )

    return Rewriter(graph).run(visit)
