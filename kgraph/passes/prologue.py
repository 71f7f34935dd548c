"""Splits a graph into what depends on weights alone and what depends on a call's inputs."""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.ir import Graph, Node, Value, constant_value
from kgraph.ir.printer import assign_names
from kgraph.passes.dead_code import dead_code
from kgraph.passes.patterns import state_only_values


@dataclass
class Split:
    """prologue: params -> prepared weights, evaluated when weights change. main: reads these as its own params.

    `main.params[i]` takes the value of `prologue.outputs[i]`.
    """

    prologue: Graph
    main: Graph

    def assign_names(self, captured: Graph) -> None:
        """Give every value a name that is unique in both graphs, so that none depends on which is printed first.

        captured: the graph that they were made of; its inputs and params get the names that it prints.
        """
        params = dict.fromkeys([*self.main.params, *captured.params])
        assign_names(Graph(captured.inputs, captured.params))
        assign_names(Graph(captured.inputs, params, self.main.nodes))
        assign_names(self.prologue)


def split_prologue(graph: Graph) -> Split:
    """Cut the graph at the values that depend on params and constants alone.

    Constants stay in the main graph (they need no evaluation), except where the prologue reads them too.
    """
    state_only = state_only_values(graph)
    needed: dict[Value, None] = {}
    early: list[Node] = []
    late: list[Node] = []
    for node in graph.nodes:
        (early if all(o in state_only for o in node.outputs) else late).append(node)
    for node in late:
        for value in node.inputs:
            if value in state_only:
                needed.setdefault(value)
    for value in graph.outputs:
        if value in state_only:
            needed.setdefault(value)
    constants = [v.producer for v in needed if constant_value(v) is not None]
    boundary = [v for v in needed if constant_value(v) is None]
    prologue = dead_code(Graph([], graph.params, early, boundary, f"{graph.name}/prologue"))
    main = Graph(graph.inputs, boundary, constants + late, graph.outputs, graph.name)
    return Split(prologue, main)
