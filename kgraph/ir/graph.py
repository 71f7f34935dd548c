"""The graph: nodes in topological order over typed SSA values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kgraph.ir.primitive import Primitive
from kgraph.ir.types import TensorType


class Value:
    """One SSA value. `node` is None for graph inputs and parameters; `index` is the result number of its node."""

    __slots__ = ("index", "name", "node", "type")

    def __init__(self, type: TensorType, node: Node | None = None, index: int = 0, name: str = ""):
        self.type, self.node, self.index, self.name = type, node, index, name

    @property
    def shape(self) -> tuple:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def producer(self) -> Node:
        """The node that makes the value. Raises ValueError for inputs and params of a graph."""
        if self.node is None:
            raise ValueError(f"{self!r} is made by no node")
        return self.node

    def __repr__(self):
        return f"%{self.name or '?'}: {self.type}"


class Node:
    """A primitive applied to values. Nodes with equal primitive, inputs and attrs may merge; provenance is apart."""

    __slots__ = ("attrs", "inputs", "outputs", "primitive", "provenance")

    def __init__(self, primitive: Primitive, inputs, attrs: dict, types, provenance: frozenset = frozenset()):
        self.primitive = primitive
        self.inputs: tuple[Value, ...] = tuple(inputs)
        self.attrs = attrs
        self.provenance = provenance
        self.outputs: tuple[Value, ...] = tuple(Value(t, self, i) for i, t in enumerate(types))

    @property
    def name(self) -> str:
        return self.primitive.name

    @property
    def output(self) -> Value:
        """The only result. Raises ValueError for a node with several."""
        (out,) = self.outputs
        return out

    def __repr__(self):
        outs = ", ".join(map(repr, self.outputs))
        return f"{outs} = {self.primitive.name}({', '.join(f'%{v.name or chr(63)}' for v in self.inputs)})"


class Graph:
    """Inputs (run-time operands), params (state such as weights), nodes in topological order, outputs.

    `params` are values that change rarely; what depends on them alone may be computed ahead of a call.
    """

    def __init__(self, inputs: Iterable[Value] = (), params: Iterable[Value] = (), nodes=(), outputs=(), name="graph"):
        self.name = name
        self.inputs: list[Value] = list(inputs)
        self.params: list[Value] = list(params)
        self.nodes: list[Node] = list(nodes)
        self.outputs: list[Value] = list(outputs)

    def uses(self) -> dict[Value, list[Node]]:
        """For every value the nodes that read it, in order (a node once per operand slot)."""
        out: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                out.setdefault(value, []).append(node)
        return out

    def add(self, primitive: Primitive, inputs, provenance: frozenset = frozenset(), **attrs) -> Any:
        """Append a node with inferred result types; gives its Value, or a tuple of them for several results."""
        node = make_node(primitive, inputs, attrs, provenance)
        self.nodes.append(node)
        return node.outputs[0] if primitive.results == 1 else node.outputs

    def __str__(self):
        from kgraph.ir.printer import print_graph

        return print_graph(self)


def make_node(primitive: Primitive, inputs, attrs: dict, provenance: frozenset = frozenset()) -> Node:
    """A node whose result types come from the primitive's shape rule."""
    inferred = primitive.infer(*(v.type for v in inputs), **attrs)
    types = inferred if isinstance(inferred, tuple) else (inferred,)
    return Node(primitive, inputs, attrs, types, provenance)


class Rewriter:
    """Rebuilds a graph node by node; the frame of every pass.

    `visit(node, inputs, rewriter)` gives the replacement values (a tuple as long as the node's outputs, built with
    `rewriter.emit`), or None to keep the node on its new inputs.
    """

    def __init__(self, graph: Graph):
        self.source = graph
        self.target = Graph(graph.inputs, graph.params, name=graph.name)
        self.mapping: dict[Value, Value] = {}
        self.provenance: frozenset = frozenset()

    def map(self, value: Value) -> Value:
        """What stands in the new graph for a value of the old one."""
        return self.mapping.get(value, value)

    def emit(self, primitive: Primitive, *inputs: Value, **attrs) -> Any:
        """Append a node carrying the provenance of the node being visited; gives its Value, or a tuple of them."""
        return self.target.add(primitive, inputs, self.provenance, **attrs)

    def run(self, visit: Callable[[Node, tuple, Rewriter], tuple | None]) -> Graph:
        """The graph after `visit` has seen every node in order. Raises ValueError for a wrong number of values."""
        mapping = self.mapping
        for node in self.source.nodes:
            inputs = node.inputs
            for value in inputs:
                if value in mapping:
                    inputs = tuple([mapping.get(v, v) for v in inputs])
                    break
            self.provenance = node.provenance
            new = visit(node, inputs, self)
            if new is None:
                if inputs is node.inputs:
                    self.target.nodes.append(node)
                    continue
                kept = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
                self.target.nodes.append(kept)
                new = kept.outputs
            elif isinstance(new, Value):
                new = (new,)
            for old, value in zip(node.outputs, new, strict=True):
                if old is not value:
                    mapping[old] = value
        self.target.outputs = [self.map(v) for v in self.source.outputs]
        return self.target


def append_graph(
    target: Graph, source: Graph, operands: Sequence[Value], provenance: frozenset = frozenset()
) -> list[Value]:
    """Append copies of the nodes of `source` to `target`; gives what its outputs are for these operands.

    operands: values of `target`, one per input of `source`, of the same types. provenance: joins that of each node.
    """
    mapping = dict(zip(source.inputs, operands, strict=True))
    for node in source.nodes:
        types = [o.type for o in node.outputs]
        copy = Node(node.primitive, [mapping[v] for v in node.inputs], node.attrs, types, node.provenance | provenance)
        target.nodes.append(copy)
        mapping.update(zip(node.outputs, copy.outputs))
    return [mapping[v] for v in source.outputs]


def copy_graph(graph: Graph) -> Graph:
    """The same inputs and params with nodes of its own, whose results have no names yet."""
    given = [*graph.inputs, *graph.params]
    copy = Graph(graph.inputs, graph.params, name=graph.name)
    copy.outputs = append_graph(copy, Graph(given, nodes=graph.nodes, outputs=graph.outputs), given)
    return copy


def live_nodes(nodes: Sequence[Node], values: Iterable[Value]) -> list[Node]:
    """Those of `nodes`, in their order, that `values` are computed from."""
    live = set(values)
    kept = []
    for node in reversed(nodes):
        if any(o in live for o in node.outputs):
            kept.append(node)
            live.update(node.inputs)
    return kept[::-1]


def constant_value(value: Value) -> np.ndarray | None:
    """The array of a value made by a `constant` node, else None."""
    if value.node is not None and value.node.primitive.name == "constant":
        return value.node.attrs["value"]
    return None
