"""Reverse mode through the graph of a control-flow primitive: the graph that computes its inputs' cotangents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.ir import PRIMITIVES, Graph, Node, NotDifferentiable, TensorType, Traced, Tracer, Value, bind, type_of
from kgraph.ir.primitive import current_tracer
from kgraph.ops.common import INEXACT, Array, zeros_like

# A constant of equal elements above this many becomes `full`, so that it takes no memory in the graph.
_LARGEST_UNIFORM_CONSTANT = 16


class RegionValue(Traced):
    """A value of a region while it is recorded; gradient rules need no more than its shape and dtype."""

    __slots__ = ("tracer", "value")

    def __init__(self, tracer: RegionTracer, value: Value):
        self.tracer, self.value = tracer, value

    @property
    def shape(self) -> tuple:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype


class RegionTracer(Tracer):
    """Records primitives into one graph, whose inputs are the only outer values it sees."""

    def __init__(self, name: str):
        self.graph = Graph(name=name)

    def input(self, type: TensorType) -> RegionValue:
        value = Value(type)
        self.graph.inputs.append(value)
        return RegionValue(self, value)

    def value(self, x) -> Value:
        """The value of an operand; a concrete array becomes a constant."""
        if isinstance(x, RegionValue):
            return x.value
        array = np.asarray(x)
        if array.size > _LARGEST_UNIFORM_CONSTANT and array.dtype.kind in "biuf" and (array == array.flat[0]).all():
            attrs = {"shape": array.shape, "value": array.flat[0].item(), "dtype": type_of(array).dtype}
            return self.graph.add(PRIMITIVES["full"], (), **attrs)
        return self.graph.add(PRIMITIVES["constant"], (), value=array)

    def record(self, primitive, args, attrs):
        out = self.graph.add(primitive, [self.value(a) for a in args], **attrs)
        return tuple(RegionValue(self, o) for o in out) if isinstance(out, tuple) else RegionValue(self, out)


def record_region(name: str, types: Sequence[TensorType], build) -> Graph:
    """The graph over inputs of `types` with the values that `build(*inputs)` gives as outputs."""
    tracer = RegionTracer(name)
    inputs = [tracer.input(t) for t in types]
    token = current_tracer.set(tracer)
    try:
        results = build(*inputs)
    finally:
        current_tracer.reset(token)
    tracer.graph.outputs = [tracer.value(r) for r in results]
    return tracer.graph


def replay(graph: Graph, operands: Sequence) -> tuple[tuple, dict[Value, Array]]:
    """(outputs, all values) of the graph applied to operands of a running trace, or to arrays."""
    values: dict[Value, Array] = dict(zip(graph.inputs, operands, strict=True))
    for node in graph.nodes:
        out = bind(node.primitive, *(values[v] for v in node.inputs), **node.attrs)
        values.update(zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=True))
    return tuple(values[v] for v in graph.outputs), values


def pull_back(graph: Graph, values: dict, cotangents: Sequence) -> list:
    """Cotangents of the graph's inputs, None for those without, from the outputs' cotangents (None stands for zero).

    values: those of `replay`. Raises UnsupportedError where a primitive on the way has no gradient rule.
    """
    active = _depending_on_floats(graph)
    found: dict[Value, Array] = {}

    def add(value: Value, cotangent) -> None:
        if cotangent is not None and value in active:
            found[value] = ops.add(found[value], cotangent) if value in found else cotangent

    for value, cotangent in zip(graph.outputs, cotangents, strict=True):
        add(value, cotangent)
    for node in reversed(graph.nodes):
        if any(o in found for o in node.outputs):
            for value, cotangent in zip(node.inputs, _through(node, values, found), strict=True):
                add(value, cotangent)
    return [found.get(v) for v in graph.inputs]


def _through(node: Node, values: dict, found: dict) -> tuple:
    rule = node.primitive.gradient
    if isinstance(rule, NotDifferentiable):
        raise UnsupportedError(f"{node.name} inside of a loop or branch has no gradient: {rule.reason}")
    outputs = tuple(values[o] for o in node.outputs)
    cotangents = tuple(found[o] if o in found else zeros_like(x) for o, x in zip(node.outputs, outputs))
    return rule(cotangents, tuple(values[v] for v in node.inputs), outputs, **node.attrs)


def _depending_on_floats(graph: Graph) -> set[Value]:
    """Float values that depend on float inputs; only their cotangents matter."""
    active = {v for v in graph.inputs if v.dtype in INEXACT}
    for node in graph.nodes:
        if any(v in active for v in node.inputs):
            active.update(o for o in node.outputs if o.dtype in INEXACT)
    return active


def transposed_region(graph: Graph, results: Sequence[int]) -> Graph:
    """The graph from its inputs and the cotangents of the outputs numbered `results` to its float inputs' cotangents.

    The forward nodes are computed again inside of it; those that the cotangents do not need are dead code.
    """
    count = len(graph.inputs)
    types = [*(v.type for v in graph.inputs), *(graph.outputs[i].type for i in results)]

    def build(*operands):
        _, values = replay(graph, operands[:count])
        given = dict(zip(results, operands[count:]))
        cotangents = pull_back(graph, values, [given.get(i) for i in range(len(graph.outputs))])
        inputs = zip(operands[:count], graph.inputs, cotangents)
        return [zeros_like(x) if c is None else c for x, v, c in inputs if v.dtype in INEXACT]

    return record_region(f"{graph.name}_gradient", types, build)
