"""Joins scans that carry the same values over the same sequences, such as a forward pass and its repetition in a
gradient that wants the carries of every step."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value, append_graph, live_nodes
from kgraph.passes.canonicalise import canonicalise
from kgraph.passes.common_subexpressions import common_subexpressions
from kgraph.passes.manager import PassContext


def merge_scans(graph: Graph, context: PassContext | None = None) -> Graph:
    """`c, a = scan(x; f); _, b = scan(x; g)  ->  c, a, b = scan(x; f and g)`, where f and g give equal carries."""
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if node.name == "scan":
            attrs = node.attrs
            key = (*map(id, node.inputs), attrs["num_carry"], attrs["num_xs"], attrs["length"], attrs["reverse"])
            groups.setdefault(key, []).append(node)
    partners = _partners(groups)
    merged: dict[Node, tuple[Value, ...]] = {}

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node in merged:
            return merged[node]
        if node not in partners:
            return None
        other, body, places = partners[node]
        rewriter.provenance = node.provenance | other.provenance
        out = rewriter.emit(node.primitive, *inputs, **dict(node.attrs, body=body))
        results = [out[place] for place in places]
        merged[other] = tuple(results[len(node.outputs) :])
        return tuple(results[: len(node.outputs)])

    return Rewriter(graph).run(visit) if partners else graph


def _partners(groups: dict[tuple, list[Node]]) -> dict[Node, tuple[Node, Graph, list[int]]]:
    """For the first of two scans the second one, the common body, and the place of each result of both among its."""
    out: dict[Node, tuple[Node, Graph, list[int]]] = {}
    for nodes in groups.values():
        waiting = list(nodes)
        while waiting:
            first = waiting.pop(0)
            for other in waiting:
                found = _common_body(first, other)
                if found is not None:
                    out[first] = other, *found
                    waiting.remove(other)
                    break
    return out


def _common_body(first: Node, other: Node) -> tuple[Graph, list[int]] | None:
    """The body of both, and where each of their results is among its results; None where the carries differ."""
    bodies = first.attrs["body"], other.attrs["body"]
    num_carry = first.attrs["num_carry"]
    own = Graph([Value(v.type, name=v.name) for v in bodies[0].inputs], name=bodies[0].name)
    if [v.type for v in bodies[1].inputs] != [v.type for v in own.inputs]:
        return None
    split = len(bodies[0].outputs)
    for body in bodies:
        own.outputs = [*own.outputs, *append_graph(own, body, own.inputs)]
    own = common_subexpressions(canonicalise(own))
    one, two = own.outputs[:split], own.outputs[split:]
    if one[:num_carry] != two[:num_carry]:
        return None
    stacked: list[Value] = []
    places = []
    for results in (one, two):
        places += list(range(num_carry))
        for value in results[num_carry:]:
            if value not in stacked:
                stacked.append(value)
            places.append(num_carry + stacked.index(value))
    own.outputs = [*one[:num_carry], *stacked]
    own.nodes = live_nodes(own.nodes, own.outputs)
    return own, places
