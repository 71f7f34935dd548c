"""Nodes for kernel tests, with result types given by hand, so that a family is tested apart from the primitives."""

from __future__ import annotations

from kgraph.ir import NotDifferentiable, Primitive, TensorType, Value
from kgraph.ir.graph import Node


def node(name: str, inputs: list[tuple], outputs: list[tuple], **attrs) -> Node:
    """A node of the primitive called `name`; inputs and outputs are (shape, dtype)."""
    primitive = Primitive(
        name, _unused, _unused, NotDifferentiable("a stand-in"), frozenset(), lambda: (), results=len(outputs)
    )
    values = [Value(TensorType(tuple(shape), dtype), name=f"x{k}") for k, (shape, dtype) in enumerate(inputs)]
    return Node(primitive, values, attrs, [TensorType(tuple(shape), dtype) for shape, dtype in outputs])


def _unused(*_, **__):
    raise AssertionError("stand-in nodes have no rules")
