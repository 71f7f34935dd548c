"""Regions of nodes that become one kernel: growth, legality and the construction of the fused node."""

from __future__ import annotations

from collections.abc import Iterable

from kgraph.ir import Graph, Node, Value, constant_value
from kgraph.passes.patterns import primitive


class Region:
    """Nodes to be fused, in topological order, around an optional anchor (`conv`, `dot_general`, `softmax` ...)."""

    __slots__ = ("anchor", "kind", "nodes")

    def __init__(self, kind: str, nodes: Iterable[Node], anchor: Node | None = None):
        self.kind, self.nodes, self.anchor = kind, list(nodes), anchor


class Contraction:
    """A graph seen with regions contracted to single nodes; answers which growth keeps it free of cycles."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.users = graph.uses()
        self.outputs = set(graph.outputs)
        self.region_of: dict[Node, Region] = {}
        # For each node the set of those that it is computed from, through regions, and itself: bit i is node number i.
        self.sources: dict[Node, int] = {}
        for number, node in enumerate(graph.nodes):
            bits = 1 << number
            for value in node.inputs:
                if value.node is not None:
                    bits |= self.sources[value.node]
            self.sources[node] = 0 if node.name == "constant" else bits  # constants are in no region

    def claim(self, region: Region) -> None:
        """Contract the nodes of `region`: no other region may take them."""
        sources, region_of = self.sources, self.region_of
        bits = 0
        for node in region.nodes:
            region_of[node] = region
            bits |= sources[node]
        changed = [node for node in region.nodes if sources[node] != bits]
        sources.update(dict.fromkeys(region.nodes, bits))
        while changed:
            node = changed.pop()
            for value in node.outputs:
                for user in self.users.get(value, ()):
                    bits = sources[user] | sources[node]
                    if bits != sources[user]:
                        joined = region_of.get(user)
                        nodes = [user] if joined is None else joined.nodes
                        sources.update(dict.fromkeys(nodes, bits))
                        changed += nodes

    def external_inputs(self, nodes: Iterable[Node]) -> list[Value]:
        """Values that the nodes read and do not make, in order of first use, scalar constants left out."""
        inside = set(nodes)
        seen: dict[Value, None] = {}
        for node in nodes:
            for value in node.inputs:
                if value.node not in inside and not is_inline_constant(value):
                    seen.setdefault(value)
        return list(seen)

    def live_outputs(self, nodes: Iterable[Node]) -> list[Value]:
        """Results of the nodes that are read outside of them or are results of the graph."""
        inside = set(nodes)
        out = []
        for node in nodes:
            for value in node.outputs:
                if value in self.outputs or any(u not in inside for u in self.users.get(value, ())):
                    out.append(value)
        return out

    def can_absorb(self, node: Node, nodes: list[Node]) -> bool:
        """Whether joining `node` to `nodes` leaves the contracted graph acyclic.

        It does if nothing that they read from outside is computed, through contracted regions, from a result of them.
        """
        inside = {node, *nodes}
        own = 0
        for member in inside:
            own |= 1 << self.index[member]
        sources = self.sources
        for member in inside:
            for value in member.inputs:
                if value.node is not None and value.node not in inside and sources[value.node] & own:
                    return False
        return True

    def sorted(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes in the order of the graph."""
        return sorted(nodes, key=self.index.__getitem__)


def is_inline_constant(value: Value) -> bool:
    """Whether a value is a scalar constant, which goes into the kernel's code."""
    array = constant_value(value)
    return array is not None and array.ndim == 0


def fused_node(
    contraction: Contraction, kind: str, nodes: list[Node], results: list[Value] | None = None
) -> tuple[Node, list[Value]]:
    """The `fusion` node that stands for `nodes`, and the old values that its results replace.

    results: the values to give; by default those that are read outside.
    """
    inputs = contraction.external_inputs(nodes)
    results = contraction.live_outputs(nodes) if results is None else results
    mapping: dict[Value, Value] = {v: Value(v.type) for v in inputs}
    body = Graph([mapping[v] for v in inputs], name=kind)
    provenance: frozenset = frozenset()
    for node in nodes:
        operands = []
        for value in node.inputs:
            if value not in mapping:  # a scalar constant
                mapping[value] = body.add(primitive("constant"), (), value=constant_value(value))
            operands.append(mapping[value])
        copy = Node(node.primitive, operands, node.attrs, [o.type for o in node.outputs])
        body.nodes.append(copy)
        mapping.update(zip(node.outputs, copy.outputs))
        provenance |= node.provenance
    body.outputs = [mapping[v] for v in results]
    fused = Node(primitive("fusion"), inputs, {"kind": kind, "body": body}, [v.type for v in results], provenance)
    return fused, results


def replace_regions(graph: Graph, contraction: Contraction, fused: dict[Region, tuple[Node, list[Value]]]) -> Graph:
    """The graph with every region replaced by its fused node, in a new topological order.

    A region takes the place of its anchor, else of its last node: a weight's gradient is computed where its operands
    are at hand, also if the optimizer's update, which comes after the whole backward part, is its epilogue.
    """
    mapping: dict[Value, Value] = {}
    for node, results in fused.values():
        mapping.update(zip(results, node.outputs))
    new_nodes: list[Node] = []
    for node in graph.nodes:
        region = contraction.region_of.get(node)
        if region is None:
            if any(v in mapping for v in node.inputs):
                inputs = [mapping.get(v, v) for v in node.inputs]
                copy = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
                mapping.update(zip(node.outputs, copy.outputs))
                node = copy
            new_nodes.append(node)
        elif (region.anchor or region.nodes[-1]) is node:
            new_nodes.append(fused[region][0])
    # Inputs of fused nodes and of copies may have been replaced after they were made.
    for node in new_nodes:
        node.inputs = tuple(_resolve(mapping, v) for v in node.inputs)
    outputs = [_resolve(mapping, v) for v in graph.outputs]
    return Graph(graph.inputs, graph.params, _topological(new_nodes), outputs, graph.name)


def _resolve(mapping: dict[Value, Value], value: Value) -> Value:
    while value in mapping:
        value = mapping[value]
    return value


def _topological(nodes: list[Node]) -> list[Node]:
    """Depth-first order that keeps the given one where it can (a node is placed right before its first reader)."""
    own = set(nodes)
    done: set[Node] = set()
    out: list[Node] = []
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done.add(node)
                out.append(node)
                continue
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs) if v.node in own and v.node not in done)
    return out
