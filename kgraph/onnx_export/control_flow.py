"""Loops and branches in ONNX. What a body only reads is taken from around it."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.ir import Graph, Node, TensorType
from kgraph.onnx_export.builder import Body, Builder, rule


@rule("scan")
def _scan(b: Builder, node: Node, inputs: list[str]):
    attrs, graph = node.attrs, node.attrs["body"]
    carried = attrs["num_carry"]
    moving = carried + attrs["num_xs"]
    if not attrs["num_xs"]:  # ONNX counts the steps by a sequence
        return _counted(b, node, inputs)
    with b.body() as body:
        names = [b.fresh("part") for _ in range(moving)]
        body.takes(*[(n, v.dtype, v.type.rank) for n, v in zip(names, graph.inputs)])
        _give(b, body, b.inline(graph, [*names, *inputs[moving:]]), graph)
    backward = [int(attrs["reverse"])] * attrs["num_xs"]
    return b.scan(body, inputs[:carried], inputs[carried:moving], 0, backward)


def _counted(b: Builder, node: Node, inputs: list[str]):
    """A scan without sequences, over the numbers of its steps, which it does not read."""
    graph, carried = node.attrs["body"], node.attrs["num_carry"]
    scalar = b.emit("Squeeze", b.size(node.attrs["length"]), b.constant([0], "int64"))
    count = b.emit("Range", b.constant(0, "int64"), scalar, b.constant(1, "int64"))
    with b.body() as body:
        names = [b.fresh("part") for _ in range(carried + 1)]
        body.takes(*[(n, v.dtype, v.type.rank) for n, v in zip(names, graph.inputs[:carried])])
        body.takes((names[carried], "int64", 0))
        _give(b, body, b.inline(graph, [*names[:carried], *inputs[carried:]]), graph)
    return b.scan(body, inputs[:carried], [count], 0, [int(node.attrs["reverse"])])


@rule("cond")
def _cond(b: Builder, node: Node, inputs: list[str]):
    index, *operands = inputs
    branches = node.attrs["branches"]
    if node.inputs[0].dtype == "bool":
        return _if(b, index, (branches[1], branches[0]), operands)
    return _switch(b, index, branches, 0, operands)


def _switch(b: Builder, index: str, branches: Sequence[Graph], first: int, operands: list[str]) -> list[str]:
    """The branch of an index; the last one serves all that are larger."""
    if first == len(branches) - 1:
        return b.inline(branches[first], operands)
    here = b.emit("LessOrEqual", index, b.like(first, "int32"))
    return _if(b, here, (branches[first], lambda: _switch(b, index, branches, first + 1, operands)), operands)


def _if(b: Builder, which: str, branches: Sequence, operands: list[str]) -> list[str]:
    """branches: for true and for false; graphs, or what emits the results of the like."""
    graph = branches[0]
    bodies = []
    for branch in branches:
        with b.body() as body:
            _give(b, body, b.inline(branch, operands) if isinstance(branch, Graph) else branch(), graph)
        bodies.append(b.proto(body))
    results = b.emit("If", which, outputs=len(graph.outputs), then_branch=bodies[0], else_branch=bodies[1])
    return [results] if isinstance(results, str) else results


@rule("while_loop")
def _while_loop(b: Builder, node: Node, inputs: list[str]):
    condition, graph = node.attrs["cond"], node.attrs["body"]
    (first,) = b.inline(condition, inputs)
    with b.body() as body:
        names = [b.fresh("part") for _ in inputs]
        body.takes((b.fresh("number"), "int64", 0), (b.fresh("goes_on"), "bool", 0))
        body.takes(*[(n, v.dtype, v.type.rank) for n, v in zip(names, graph.inputs)])
        after = b.inline(graph, names)
        goes_on = b.emit("Identity", b.inline(condition, after)[0])
        body.gives((goes_on, "bool", 0))
        _give(b, body, after, graph)
    results = b.emit("Loop", "", first, *inputs, outputs=len(inputs), body=b.proto(body))
    return [results] if isinstance(results, str) else results


def _give(b: Builder, body: Body, names: Sequence[str], graph: Graph) -> None:
    """Results of a body: each a value of its own."""
    types: list[TensorType] = [v.type for v in graph.outputs]
    for name, type_ in zip(names, types, strict=True):
        body.gives((b.emit("Identity", name), type_.dtype, type_.rank))
