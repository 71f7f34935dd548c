"""Checks the invariants of a graph; run after every pass in the tests."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from kgraph.errors import DimDecisionError, VerificationError
from kgraph.ir.graph import Graph, Node, Value
from kgraph.ir.primitive import PRIMITIVES
from kgraph.ir.printer import assign_names, print_node

NEIGHBOURS = 3  # lines shown on each side of a fault


def verify(graph: Graph, after: str = "") -> Graph:
    """Give the graph back if it keeps the invariants of the IR.

    Every operand is defined before its use, in this graph; every value knows its node and number; types are what the
    primitives' shape rules say; attributes are hashable, arrays or graphs (verified too); provenance is a frozenset of
    strings. after: the pass that made the graph, for the message.
    Raises VerificationError that shows the nodes around the fault.
    """
    defined: set[Value] = set()
    for kind, values in (("input", graph.inputs), ("parameter", graph.params)):
        for value in values:
            if value.node is not None:
                _fail(graph, after, None, f"the {kind} {value!r} is the result of a node")
            if value in defined:
                _fail(graph, after, None, f"the {kind} {value!r} is listed twice")
            defined.add(value)
    for position, node in enumerate(graph.nodes):
        fault = _node_fault(node, defined)
        if fault:
            _fail(graph, after, position, fault)
        defined.update(node.outputs)
        for nested in _graphs(node.attrs.values()):
            verify(nested, after)
    for value in graph.outputs:
        if value not in defined:
            _fail(graph, after, None, f"the output {value!r} is not defined in the graph")
    return graph


def _node_fault(node: Node, defined: set[Value]) -> str | None:
    """What is wrong with a node, given the values defined before it."""
    if PRIMITIVES.get(node.name) is not node.primitive:
        return f"its primitive {node.name!r} is not the registered one"
    for value in node.inputs:
        if value not in defined:
            return f"its operand {value!r} is not defined before it"
    for index, value in enumerate(node.outputs):
        if value.node is not node or value.index != index:
            return (
                f"its result {value!r} belongs to {value.node!r} as number {value.index}, expected number {index} of it"
            )
        if value in defined:
            return f"its result {value!r} is defined twice"
    if not isinstance(node.provenance, frozenset) or not all(isinstance(p, str) for p in node.provenance):
        return f"its provenance is {node.provenance!r}, expected a frozenset of strings"
    for name, value in node.attrs.items():
        if not isinstance(value, (Hashable, np.ndarray)):
            return f"its attribute {name}={value!r} is not hashable"
    return _type_fault(node)


def _type_fault(node: Node) -> str | None:
    try:
        inferred = node.primitive.infer(*(v.type for v in node.inputs), **node.attrs)
    except DimDecisionError:
        return None  # the shape rule asks more about sizes than the pass knew to hold; the run-time sizes decide
    except Exception as error:  # whatever a rule raises for a malformed node is a fault of the node
        return f"its shape rule refuses it: {type(error).__name__}: {error}"
    types = inferred if isinstance(inferred, tuple) else (inferred,)
    actual = tuple(v.type for v in node.outputs)
    if types != actual:
        show = lambda ts: ", ".join(map(str, ts))
        return f"its shape rule gives {show(types)}, but its results are {show(actual)}"
    return None


def _graphs(values):
    for value in values:
        if isinstance(value, Graph):
            yield value
        elif isinstance(value, tuple):
            yield from _graphs(value)


def _fail(graph: Graph, after: str, position: int | None, fault: str) -> None:
    assign_names(graph)
    where = f"after {after}" if after else "as given"
    lines = [f"graph {graph.name!r} {where} breaks the IR: {fault}"]
    if position is not None:
        low, high = max(position - NEIGHBOURS, 0), min(position + NEIGHBOURS + 1, len(graph.nodes))
        lines += [f"{'>' if i == position else ' '} {i}: {_line(graph.nodes[i])}" for i in range(low, high)]
    raise VerificationError("\n".join(lines))


def _line(node: Node) -> str:
    try:
        return print_node(node)
    except Exception:  # a malformed node may not print; the message must come through all the same
        return repr(node)
