"""Moves per-channel scales that depend on weights alone into the weights before them."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.ops.packing import is_reordering
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import is_channel_vector, primitive, state_only_values

# Of a weight that is kept as it is: below, a second copy costs less than another operation for each sum.
LEAST_KEPT_BYTES = 256 << 10


def _split_scale(node: Node, inputs: tuple, state_only) -> tuple[Value, Value] | None:
    """(x, scale) for `x * scale` with a per-channel scale from weights."""
    for x, scale in (inputs, inputs[::-1]):
        if scale in state_only and x not in state_only and is_channel_vector(scale.shape, x.shape):
            if x.shape == node.output.shape and scale.type.rank >= 1:
                return x, scale
    return None


def fold_batch_norm(graph: Graph, context: PassContext | None = None) -> Graph:
    """`conv(x, w) * s -> conv(x, w * s)`, `(y + b) * s -> y * s + b * s` and `(y + b) + t -> y + (b + t)`, for s, b
    and t from weights only.

    Only where the convolution or product has no other reader. The folded weights are computed when weights change,
    not per call, so they are never stale. Dense layers are served as well. Large weights of which the kernel wants
    nothing but another order are left as they are, and their results multiplied by s: in memory there is one copy of
    them then, where a folded one would be the second.
    """
    context = context or PassContext()
    state_only = state_only_values(graph)
    single = {value for value, nodes in graph.uses().items() if len(nodes) == 1}
    single -= set(graph.outputs)
    originals: dict[Value, Value] = {}  # values of the new graph -> the old ones that they replace

    def is_single(value: Value) -> bool:
        return originals.get(value, value) in single

    def is_kept(node: Node) -> bool:
        if node.name not in ("conv", "dot_general") or node.inputs[1] not in state_only:
            return False
        w = node.inputs[1].type
        if not w.is_static or w.nbytes < LEAST_KEPT_BYTES:
            return False
        return any(index == 1 and is_reordering(layout, w.dtype) for index, layout in context.packing(node) or ())

    def emit_state(rewriter, name, *operands, **attrs):
        out = rewriter.emit(primitive(name), *operands, **attrs)
        state_only.add(out)
        return out

    def scaled(x: Value, scale: Value, rewriter: Rewriter) -> Value | None:
        """`x * scale` without a multiplication at run time, or None."""
        if x.node is None or not is_single(x):
            return None
        inner = x.node
        if inner.name in ("conv", "dot_general") and inner.inputs[1].dtype != scale.dtype:
            return None  # weights of less precision than their products
        rewriter.provenance |= inner.provenance
        if inner.name == "add":
            for y, bias in (inner.inputs, inner.inputs[::-1]):
                if bias in state_only and y not in state_only and is_channel_vector(bias.shape, x.shape):
                    y_scaled = scaled(y, scale, rewriter)
                    if y_scaled is None:
                        return None
                    return rewriter.emit(
                        primitive("add"), y_scaled, emit_state(rewriter, "mul", bias, flat(scale, rewriter))
                    )
            return None
        if is_kept(inner):
            return rewriter.emit(primitive("mul"), x, scale)
        if inner.name == "conv" and inner.inputs[1] in state_only:
            weights = emit_state(rewriter, "mul", inner.inputs[1], flat(scale, rewriter))
            return rewriter.emit(inner.primitive, inner.inputs[0], weights, **inner.attrs)
        if inner.name == "dot_general" and inner.inputs[1] in state_only and not inner.attrs["rhs_batch"]:
            w = inner.inputs[1]
            if tuple(inner.attrs["rhs_contract"]) == tuple(range(w.type.rank - 1)):
                weights = emit_state(rewriter, "mul", w, flat(scale, rewriter))
                return rewriter.emit(inner.primitive, inner.inputs[0], weights, **inner.attrs)
        return None

    def merged_shift(node: Node, inputs: tuple, rewriter: Rewriter) -> Value | None:
        """`(y + b) + t -> y + (b + t)` for b and t from weights."""
        for x, shift in (inputs, inputs[::-1]):
            if shift not in state_only or x in state_only or x.node is None or x.node.name != "add":
                continue
            if not is_single(x) or x.shape != node.output.shape:
                continue
            for y, bias in (x.node.inputs, x.node.inputs[::-1]):
                if bias in state_only and y not in state_only and y.shape == x.shape:
                    rewriter.provenance |= x.node.provenance
                    return rewriter.emit(primitive("add"), y, emit_state(rewriter, "add", bias, shift))
        return None

    def flat(scale: Value, rewriter: Rewriter) -> Value:
        if scale.type.rank <= 1:
            return scale
        return emit_state(rewriter, "reshape", scale, shape=scale.shape[-1:])

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name == "mul":
            parts = _split_scale(node, inputs, state_only)
            if parts is not None:
                new = scaled(*parts, rewriter)
                if new is not None:
                    originals[new] = node.output
                    return new
        if node.name == "add":
            new = merged_shift(node, inputs, rewriter)
            if new is not None:
                originals[new] = node.output
                return new
        if inputs != node.inputs or any(v in rewriter.mapping for v in node.inputs):
            kept = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
        else:
            kept = node
        rewriter.target.nodes.append(kept)
        for old, new in zip(node.outputs, kept.outputs):
            originals[new] = old
            if old in state_only:
                state_only.add(new)
        return kept.outputs

    return Rewriter(graph).run(visit)
