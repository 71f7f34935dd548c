"""A graph as a networkx graph, for analysis and drawing; the hot path of a compile does not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kgraph.ir.graph import Graph, Value

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """Nodes are integers (inputs and params first, then the graph's nodes in order), edges are values.

    Node attributes: `label` (the primitive's name, or the kind of a fused node, or the input's name), `kind` ("input",
    "param", "node"), `layers` (Keras layer paths). Edge attributes: `type` (text such as `f32[N,64]`) and `operand`
    (position among the reader's operands).
    """
    import networkx

    out = networkx.MultiDiGraph(name=graph.name)
    number: dict[Value, int] = {}
    for kind, values in (("input", graph.inputs), ("param", graph.params)):
        for value in values:
            number[value] = len(out)
            out.add_node(len(out), label=value.name or kind, kind=kind, layers=())
    for node in graph.nodes:
        own = len(out)
        label = node.attrs["kind"] if node.name == "fusion" else node.name
        out.add_node(own, label=label, kind="node", layers=tuple(sorted(node.provenance)))
        for position, value in enumerate(node.inputs):
            out.add_edge(number[value], own, type=str(value.type), operand=position)
        number.update(dict.fromkeys(node.outputs, own))
    return out
