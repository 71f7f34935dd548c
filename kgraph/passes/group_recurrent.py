"""Joins recurrent layers that read the same sequence, such as the two directions of a bidirectional one."""

from __future__ import annotations

from collections.abc import Iterator

from kgraph.ir import Graph, Node, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.regions import Contraction, Region, fused_node, replace_regions


def group_recurrent(graph: Graph, context: PassContext) -> Graph:
    """`rnn(x, ..), rnn(x, ..; reverse)  ->  fusion{rnn, rnn}(x, ..)`: one kernel whose parts run on several threads.

    The layers must not depend on one another and agree in all attributes but the direction. Where all that reads their
    sequences is a concatenation of these, it joins them. Gradients join likewise where the target takes that.
    """
    contraction = Contraction(graph)
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if node.name in ("rnn", "rnn_gradient"):
            attrs = tuple(sorted((k, v) for k, v in node.attrs.items() if k != "reverse"))
            groups.setdefault((node.name, node.inputs[0], attrs), []).append(node)
    fused: dict[Region, tuple[Node, list[Value]]] = {}
    for (kind, *_), nodes in groups.items():
        layers = nodes[:1]
        for node in nodes[1:]:
            if contraction.can_absorb(node, layers) and not _depends(node, layers):
                layers.append(node)
        if len(layers) < 2:
            continue
        for members, results in _forms(contraction, layers):
            node, _ = fused_node(contraction, kind, members, results)
            if context.accepts(node) is None:
                region = Region(kind, members)
                contraction.claim(region)
                fused[region] = (node, results)
                break
    return replace_regions(graph, contraction, fused)


def _forms(contraction: Contraction, layers: list[Node]) -> Iterator[tuple[list[Node], list[Value]]]:
    """(nodes, results) of a kernel for the layers or gradients: with the concatenation of sequences, and without."""
    sequences = [node.outputs[0] for node in layers]
    readers = contraction.users.get(sequences[0], [])
    last = readers[0] if readers else None
    if last is not None and last.name == "concatenate" and set(last.inputs) == set(sequences):
        single = all(contraction.users[v] == [last] and v not in contraction.outputs for v in sequences)
        in_order = [node for v in last.inputs for node in layers if node.outputs[0] is v]
        whole = len(last.inputs) == len(layers) and last.attrs["axis"] == 2
        if single and whole and contraction.can_absorb(last, layers):
            yield [*in_order, last], [last.output, *(v for node in in_order for v in node.outputs[1:])]
    yield layers, [value for node in layers for value in node.outputs]


def _depends(node: Node, others: list[Node]) -> bool:
    return any(v.node in others for v in node.inputs)
