"""Lays weights out the way the kernels read them, ahead of calls."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.fuse import anchor_kind
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import primitive, state_only_values


def layout(graph: Graph, context: PassContext) -> Graph:
    """`fusion{conv, ..}(x, w)  ->  fusion{conv, ..; packed}(x, pack(w))` where w depends on weights alone.

    A plain product or convolution is wrapped in a fusion of one node first. The body keeps the logical types.
    """
    state_only = state_only_values(graph)

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        plain = node.name in ("dot_general", "conv")
        if not plain and not (node.name == "fusion" and node.attrs["kind"] in ("dot", "conv", "depthwise")):
            return None
        if node.attrs.get("packed") or all(o in state_only for o in node.outputs):
            return None
        wanted = context.packing(node)
        if not wanted or not all(node.inputs[index] in state_only for index, _ in wanted):
            return None
        packed = list(inputs)
        for index, how in wanted:
            packed[index] = rewriter.emit(primitive("pack"), inputs[index], layout=how)
        attrs = dict(node.attrs) if not plain else {"kind": anchor_kind(node), "body": _single_body(node)}
        attrs["packed"] = tuple(wanted)
        types = [o.type for o in node.outputs]
        fused = Node(primitive("fusion"), packed, attrs, types, node.provenance)
        rewriter.target.nodes.append(fused)
        return fused.outputs

    return Rewriter(graph).run(visit)


def _single_body(node: Node) -> Graph:
    inputs = [Value(v.type) for v in node.inputs]
    copy = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs])
    return Graph(inputs, nodes=[copy], outputs=copy.outputs, name=node.name)
