"""Joins recurrent layers that read the same sequence, such as the two directions of a bidirectional one."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.regions import Contraction, Region, fused_node, replace_regions


def group_recurrent(graph: Graph, context: PassContext) -> Graph:
    """`rnn(x, ..), rnn(x, ..; reverse)  ->  fusion{rnn, rnn}(x, ..)`: one kernel whose parts run on several threads.

    The layers must not depend on one another and agree in all attributes but the direction.
    """
    contraction = Contraction(graph)
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if node.name == "rnn":
            attrs = tuple(sorted((k, v) for k, v in node.attrs.items() if k != "reverse"))
            groups.setdefault((node.inputs[0], attrs), []).append(node)
    fused: dict[Region, tuple[Node, list[Value]]] = {}
    for nodes in groups.values():
        joined = nodes[:1]
        for node in nodes[1:]:
            if contraction.can_absorb(node, joined) and not _depends(node, joined):
                joined.append(node)
        if len(joined) < 2:
            continue
        results = [value for node in joined for value in node.outputs]
        node, _ = fused_node(contraction, "rnn", joined, results)
        if context.accepts(node) is None:
            region = Region("rnn", joined)
            contraction.claim(region)
            fused[region] = (node, results)
    return replace_regions(graph, contraction, fused)


def _depends(node: Node, others: list[Node]) -> bool:
    return any(v.node in others for v in node.inputs)
