"""Merges equal nodes."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Graph, Node, Rewriter
from kgraph.passes.manager import PassContext


def _key(node: Node, inputs: tuple):
    attrs = []
    for name, value in sorted(node.attrs.items()):
        if isinstance(value, np.ndarray):
            if value.nbytes > 4096:  # hashing megabytes of weights costs more than it finds; identity is enough
                value = ("array", id(value))
            else:
                value = ("array", value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, Graph) or (isinstance(value, tuple) and any(isinstance(v, Graph) for v in value)):
            return None
        # 1, 1.0 and True are equal as dictionary keys but not as attributes.
        attrs.append((name, type(value).__name__, repr(value) if isinstance(value, float) else value))
    return (node.primitive.name, tuple(map(id, inputs)), tuple(attrs))


def common_subexpressions(graph: Graph, context: PassContext | None = None) -> Graph:
    """`a = f(x); b = f(x)  ->  b = a`. Random nodes never merge; the provenance of merged nodes is united."""
    seen: dict = {}

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if "random" in node.primitive.traits:
            return None
        key = _key(node, inputs)
        if key is None:
            return None
        first = seen.get(key)
        if first is not None:
            first.provenance = first.provenance | node.provenance
            return first.outputs
        kept = node
        if inputs != node.inputs:
            kept = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
        rewriter.target.nodes.append(kept)
        seen[key] = kept
        return kept.outputs

    return Rewriter(graph).run(visit)
