"""Moments of a concatenation are those of its operands, of which some are known.

Networks with dense connections normalise, layer after layer, what they had before and a few channels more.
"""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import made_by, primitive


def share_moments(graph: Graph, context: PassContext | None = None) -> Graph:
    """`moments(concatenate(a, b))  ->  concatenate(moments(a), moments(b))`, where those of `a` are computed anyway.

    Holds for moments over other axes than the one that is concatenated along.
    """
    known: dict[tuple[Value, tuple], tuple[Value, ...]] = {}

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name != "moments":
            return None
        axes = node.attrs["axes"]
        known[inputs[0], axes] = results = found(inputs[0], axes, rewriter)
        return results

    def found(x: Value, axes: tuple, rewriter: Rewriter) -> tuple[Value, ...]:
        if (x, axes) in known:
            return known[x, axes]
        if made_by(x, "concatenate") and (axis := x.producer.attrs["axis"]) not in axes:
            parts = x.producer.inputs
            if any((part, axes) in known for part in parts):
                each = [found(part, axes, rewriter) for part in parts]
                known.update({(part, axes): moments for part, moments in zip(parts, each, strict=True)})
                along = axis - sum(a < axis for a in axes)
                join = primitive("concatenate")
                return tuple(rewriter.emit(join, *values, axis=along) for values in zip(*each, strict=True))
        return tuple(rewriter.emit(primitive("moments"), x, axes=axes))

    return Rewriter(graph).run(visit)
