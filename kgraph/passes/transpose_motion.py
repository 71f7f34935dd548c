"""Moves transposes down through the graph until they meet their inverse, so that channels-first models cost nothing."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import is_elementwise, made_by, primitive


def _permute(sequence, permutation) -> tuple:
    return tuple(sequence[axis] for axis in permutation)


def _inverse(permutation) -> tuple:
    out = [0] * len(permutation)
    for i, axis in enumerate(permutation):
        out[axis] = i
    return tuple(out)


def _untransposed(value: Value, permutation: tuple, rank: int, state_only, rewriter: Rewriter) -> Value | None:
    """The operand of an elementwise node as seen before `transpose(...; permutation)`; None where that costs a copy."""
    if made_by(value, "transpose") and value.producer.attrs["permutation"] == permutation:
        return value.producer.inputs[0]
    if all(isinstance(s, int) and s == 1 for s in value.shape):
        return value if not value.shape else rewriter.emit(primitive("reshape"), value, shape=())
    if value not in state_only:
        return None
    if len(value.shape) < rank:
        value = rewriter.emit(primitive("reshape"), value, shape=(1,) * (rank - len(value.shape)) + value.shape)
    moved = rewriter.emit(primitive("transpose"), value, permutation=_inverse(permutation))
    state_only.add(moved)
    return moved


def transpose_motion(graph: Graph, context: PassContext | None = None) -> Graph:
    """`f(transpose(x), transpose(y), bias) -> transpose(f(x, y, transpose(bias)))` for elementwise f; also through
    pad, concatenate, reduce_window and reductions. Adjacent transposes then merge in `canonicalise`."""
    state_only = set(graph.params)

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        name = node.primitive.name
        if name == "constant" or (
            inputs
            and all(v in state_only for v in inputs)
            and all(o.type.is_static for o in node.outputs)
            and not node.primitive.traits & {"random", "control"}
        ):
            kept = node
            if inputs != node.inputs:
                kept = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs], node.provenance)
            rewriter.target.nodes.append(kept)
            state_only.update(kept.outputs)
            return kept.outputs
        transposed = [v for v in inputs if made_by(v, "transpose") and v not in state_only]
        if not transposed:
            return None
        permutation = transposed[0].producer.attrs["permutation"]
        rank = len(permutation)
        emit = rewriter.emit
        if is_elementwise(node) and len(node.outputs) == 1 and node.output.type.rank == rank:
            # A transpose that is read elsewhere too would be kept besides the moved one.
            new = []
            for v in inputs:
                operand = _untransposed(v, permutation, rank, state_only, rewriter)
                if operand is None:
                    return None
                new.append(operand)
            moved = rewriter.target.add(node.primitive, new, node.provenance, **node.attrs)
            return emit(primitive("transpose"), moved, permutation=permutation)
        source = transposed[0].producer.inputs[0]
        inverse = _inverse(permutation)
        if name == "pad" and inputs[0] is transposed[0]:
            attrs = {key: _permute(node.attrs[key], inverse) for key in ("low", "high", "interior")}
            moved = emit(primitive("pad"), source, inputs[1], **attrs)
            return emit(primitive("transpose"), moved, permutation=permutation)
        if name == "reduce_window":
            keys = ("window", "strides", "padding", "window_dilation", "base_dilation")
            attrs = {key: _permute(node.attrs[key], inverse) for key in keys}
            moved = emit(node.primitive, source, kind=node.attrs["kind"], **attrs)
            return emit(primitive("transpose"), moved, permutation=permutation)
        if name == "concatenate" and len(transposed) == len(inputs):
            if all(v.producer.attrs["permutation"] == permutation for v in inputs):
                sources = [v.producer.inputs[0] for v in inputs]
                moved = emit(node.primitive, *sources, axis=permutation[node.attrs["axis"]])
                return emit(primitive("transpose"), moved, permutation=permutation)
        if name.startswith("reduce_") and "axes" in node.attrs and inputs[0] is transposed[0]:
            axes = tuple(sorted(permutation[a] for a in node.attrs["axes"]))
            moved = emit(node.primitive, source, axes=axes, keepdims=node.attrs["keepdims"])
            if node.attrs["keepdims"]:
                return emit(primitive("transpose"), moved, permutation=permutation)
            left = [a for a in permutation if a not in axes]
            order = tuple(sorted(left).index(a) for a in left)
            return emit(primitive("transpose"), moved, permutation=order)
        return None

    return Rewriter(graph).run(visit)
