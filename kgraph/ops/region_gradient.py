"""Reverse mode through the graph of a control-flow primitive: the graph that computes its inputs' cotangents."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph import ops
from kgraph.ir import Graph, TensorType, Value, bind
from kgraph.ir.recorder import Recorder
from kgraph.ops import reverse_mode
from kgraph.ops.common import INEXACT, Array, zeros_like


def record_region(name: str, types: Sequence[TensorType], build) -> Graph:
    """The graph over inputs of `types` with the values that `build(*inputs)` gives as outputs."""
    recorder = Recorder(name)
    inputs = [recorder.input(t) for t in types]
    with recorder.active():
        results = build(*inputs)
    recorder.graph.outputs = [recorder.value(r) for r in results]
    return recorder.graph


def replay(graph: Graph, operands: Sequence) -> tuple[tuple, dict[Value, Array]]:
    """(outputs, all values) of the graph applied to operands of a running trace, or to arrays."""
    values: dict[Value, Array] = dict(zip(graph.inputs, operands, strict=True))
    for node in graph.nodes:
        out = bind(node.primitive, *(values[v] for v in node.inputs), **node.attrs)
        values.update(zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=True))
    return tuple(values[v] for v in graph.outputs), values


def pull_back(graph: Graph, values: dict, cotangents: Sequence) -> list:
    """Cotangents of the graph's inputs, None for those without, from the outputs' cotangents (None stands for zero).

    values: those of `replay`. Raises GradientError where a primitive on the way has no gradient rule.
    """
    given: dict[Value, Array] = {}
    for value, cotangent in zip(graph.outputs, cotangents, strict=True):
        if cotangent is not None:
            given[value] = ops.add(given[value], cotangent) if value in given else cotangent
    return reverse_mode.pull_back(graph.nodes, values.__getitem__, given, graph.inputs)


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
