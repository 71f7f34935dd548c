"""Steps that run on NumPy, as text: a graph of one node, whose reference is called with its attributes."""

from __future__ import annotations

from collections.abc import Callable

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.errors import ArtifactError
from kgraph.ir import Graph, Node, TensorType, Value
from kgraph.ir.parser import parse_graph
from kgraph.ir.printer import print_graph
from kgraph.ops.host import HostFunction
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import HostStep


def text_of(program: Program, step: HostStep) -> str:
    """The text of a step, for `function_of`. Raises TypeError for attributes without a text form."""
    function = step.function
    if not isinstance(function, HostFunction):
        raise TypeError(f"the step {step.label} cannot be saved")
    types = [TensorType(program.buffers[b].shape, program.buffers[b].dtype) for b in step.operands]
    split = len(types) - step.outputs
    inputs = [Value(t) for t in types[:split]]
    node = Node(function.primitive, inputs, function.attrs, types[split:])
    blobs: dict = {}
    text = print_graph(Graph(inputs, nodes=[node], outputs=list(node.outputs), name="host step"), blobs)
    if blobs:
        raise TypeError(f"the step {step.label} holds large constants, which have no text form")
    return text


def function_of(text: str) -> Callable:
    """The function of a host step. Raises ArtifactError for text that is no graph of one node."""
    graph = parse_graph(text)
    if len(graph.nodes) != 1:
        raise ArtifactError("a host step is one operation")
    return HostFunction(graph.nodes[0].primitive, graph.nodes[0].attrs)
