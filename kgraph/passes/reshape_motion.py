"""Moves reshapes of results below the elementwise nodes that read them, so that these join the kernel above."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.ir.dims import product
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import is_elementwise, is_outer_operation, made_by, primitive, state_only_values


def _before_reshape(value: Value, source: tuple, shape: tuple, state_only, rewriter: Rewriter) -> Value | None:
    """The operand as it broadcasts against `source` instead of `shape`; None where that is not a free change."""
    if all(isinstance(s, int) and s == 1 for s in value.shape):
        return value if not value.shape else rewriter.emit(primitive("reshape"), value, shape=())
    if value.shape == shape:
        if made_by(value, "reshape") and value.producer.inputs[0].shape == source:
            return value.producer.inputs[0]
        node = value.node
        if node is not None and is_outer_operation(node):
            operands = [_before_reshape(v, source, shape, state_only, rewriter) for v in node.inputs]
            if not any(o is None for o in operands):
                return rewriter.target.add(node.primitive, operands, node.provenance, **node.attrs)
        return rewriter.emit(primitive("reshape"), value, shape=source)
    if value in state_only:
        # A weight along the last axes of `shape` which together are the last axis of `source`.
        trailing = value.shape
        while trailing and trailing[0] == 1:
            trailing = trailing[1:]
        count = len(trailing)
        if trailing and trailing == shape[len(shape) - count :] and product(trailing) == source[-1]:
            return rewriter.emit(primitive("reshape"), value, shape=(source[-1],))
    lead = len(source) - 1
    if source[:lead] == shape[:lead] and product(shape[lead:]) == source[-1]:
        padded = (1,) * (len(shape) - len(value.shape)) + value.shape
        if all(s == 1 for s in padded[lead:]) or padded[lead:] == shape[lead:]:
            return rewriter.emit(primitive("reshape"), value, shape=(*padded[:lead], product(padded[lead:])))
    return None


def reshape_motion(graph: Graph, context: PassContext | None = None) -> Graph:
    """`f(reshape(dot(x, w)), bias) -> reshape(f(dot(x, w), reshape(bias)))` for elementwise f."""
    state_only = state_only_values(graph)
    readers = graph.uses()

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if all(o in state_only for o in node.outputs):
            return _keep(node, inputs, rewriter, state_only)
        if not is_elementwise(node) or len(node.outputs) != 1:
            return None
        shape = node.output.shape
        for old, value in zip(node.inputs, inputs):
            if not made_by(value, "reshape") or value.shape != shape or value in state_only:
                continue
            below = value.producer.inputs[0]
            if below.node is None or not (below.node.name in ("dot_general", "conv") or is_elementwise(below.node)):
                continue
            if len(readers.get(old, ())) > 1:
                continue
            operands = [_before_reshape(v, below.shape, shape, state_only, rewriter) for v in inputs]
            if any(o is None for o in operands):
                continue
            out = rewriter.target.add(node.primitive, operands, node.provenance, **node.attrs)
            return rewriter.emit(primitive("reshape"), out, shape=shape)
        return None

    return Rewriter(graph).run(visit)


def _keep(node: Node, inputs: tuple, rewriter: Rewriter, state_only: set) -> tuple:
    if inputs != node.inputs:
        node = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
    rewriter.target.nodes.append(node)
    state_only.update(node.outputs)
    return node.outputs
