"""Removes nodes whose results nobody reads."""

from __future__ import annotations

from kgraph.ir import Graph
from kgraph.passes.manager import PassContext


def dead_code(graph: Graph, context: PassContext | None = None) -> Graph:
    """`y = f(x); return x  ->  return x`. Inputs stay (they are the signature); unread params leave."""
    live = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if any(o in live for o in node.outputs):
            kept.append(node)
            live.update(node.inputs)
    kept.reverse()
    params = [p for p in graph.params if p in live]
    return Graph(graph.inputs, params, kept, graph.outputs, graph.name)
