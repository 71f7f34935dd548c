"""Steps that run on NumPy, as text: a graph of one node, whose reference is called with its attributes."""

from __future__ import annotations

from collections.abc import Callable

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.errors import ArtifactError
from kgraph.ir import Graph, Node, Value
from kgraph.ir.parser import parse_graph
from kgraph.ir.printer import print_graph
from kgraph.ops.host import HostFunction


def text_of(node: Node) -> str:
    """The text of a node, for `function_of`. Raises TypeError for attributes without a text form."""
    inputs = [Value(v.type) for v in node.inputs]
    copy = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs])
    blobs: dict = {}
    text = print_graph(Graph(inputs, nodes=[copy], outputs=copy.outputs, name="host step"), blobs)
    if blobs:
        raise TypeError(f"the step {node.name} holds large constants, which have no text form")
    return text


def function_of(text: str) -> Callable:
    """The function of a host step. Raises ArtifactError for text that is no graph of one node."""
    graph = parse_graph(text)
    if len(graph.nodes) != 1:
        raise ArtifactError("a host step is one operation")
    return HostFunction(graph.nodes[0].primitive, graph.nodes[0].attrs)
