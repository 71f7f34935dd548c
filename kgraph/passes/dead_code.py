"""Removes nodes whose results nobody reads."""

from __future__ import annotations

from kgraph.ir import Graph, live_nodes
from kgraph.passes.manager import PassContext


def dead_code(graph: Graph, context: PassContext | None = None) -> Graph:
    """`y = f(x); return x  ->  return x`. Inputs stay (they are the signature); unread params leave."""
    nodes = live_nodes(graph.nodes, graph.outputs)
    read = {*graph.outputs, *(v for node in nodes for v in node.inputs)}
    params = [p for p in graph.params if p in read]
    return Graph(graph.inputs, params, nodes, graph.outputs, graph.name)
