"""What a graph computes, as plain data: two graphs have one `repr` of it only where they compute the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from kgraph.ir.dims import Dim
from kgraph.ir.graph import Graph, Node, Value
from kgraph.ir.primitive import Primitive
from kgraph.ir.types import TensorType

# Bytes of an array up to which its content stands for itself, in place of a digest.
_SHORT = 32
_EXACT = frozenset({type(None), bool, int, float, complex, str, bytes, Dim, TensorType})


def plain(value):
    """The same as nested tuples of what `repr` tells exactly. Raises TypeError for what it may not tell exactly."""
    if type(value) in _EXACT or isinstance(value, np.dtype):
        return value
    if isinstance(value, (tuple, list)):
        exact = _EXACT.issuperset(map(type, value))  # as nearly always: shapes, axes
        return type(value).__name__, *(value if exact else map(plain, value))
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = value.tobytes() if value.nbytes <= _SHORT else hashlib.sha256(np.ascontiguousarray(value)).digest()
        return "array", value.dtype.str, value.shape, content
    if isinstance(value, np.generic):
        return "scalar", value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return "dict", *[(k, plain(v)) for k, v in sorted(value.items())]
    if isinstance(value, (set, frozenset)):
        return "set", *sorted(map(repr, map(plain, value)))
    if isinstance(value, Primitive):
        return "primitive", value.name
    if isinstance(value, Graph):
        return "graph", *plain_graph(value)
    raise TypeError(f"{type(value)} has no exact text")


def plain_graph(graph: Graph) -> tuple:
    """A graph with the names and provenances in it; types and provenances are numbers of those in two lists."""
    numbers = numbers_of(graph)
    types: dict[TensorType, int] = {}
    provenances: dict[frozenset, int] = {}
    nodes = [
        (
            node.primitive.name,
            [numbers[v] for v in node.inputs],
            plain(node.attrs) if node.attrs else (),
            [(types.setdefault(v.type, len(types)), v.name) for v in node.outputs],
            provenances.setdefault(node.provenance, len(provenances)),
        )
        for node in graph.nodes
    ]
    given = [(v.type, v.name) for v in (*graph.inputs, *graph.params)]
    return given, nodes, list(types), list(map(sorted, provenances)), places(graph, numbers)


def plain_value(nodes: Sequence[Node], given: Sequence[Value], value: Value) -> tuple:
    """How `value` is computed of the given ones by these nodes, all of which it needs: whatever they are called."""
    numbers = number_values(nodes, given)
    steps = [
        (
            node.primitive.name,
            [numbers[v] for v in node.inputs],
            plain(node.attrs) if node.attrs else (),
            [v.type for v in node.outputs],
        )
        for node in nodes
    ]
    return [v.type for v in given], steps, numbers[value]


def number_values(nodes: Iterable[Node], given: Sequence[Value]) -> dict[Value, int]:
    """Numbers of the given values, then of the results of the nodes."""
    numbers = {value: i for i, value in enumerate(given)}
    for node in nodes:
        for value in node.outputs:
            numbers[value] = len(numbers)
    return numbers


def numbers_of(graph: Graph) -> dict[Value, int]:
    """Numbers of a graph's inputs, params and results of nodes."""
    return number_values(graph.nodes, [*graph.inputs, *graph.params])


def places(graph: Graph, numbers: dict[Value, int]) -> tuple:
    """A graph without its nodes: name, numbers of inputs, params and outputs."""
    return graph.name, *([numbers[v] for v in values] for values in (graph.inputs, graph.params, graph.outputs))
