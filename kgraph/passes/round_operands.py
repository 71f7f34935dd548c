"""Rounds what products and convolutions multiply to bfloat16; their sums, and all the rest, stay float32."""

from __future__ import annotations

from collections import Counter

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.patterns import primitive


def round_operands(graph: Graph) -> tuple[Graph, Counter]:
    """`dot_general(x, w) -> dot_general(convert(x, bf16), convert(w, bf16), preferred_dtype=f32)`, and the same for
    convolutions, whose operands are widened again: they have no other result than their operands' dtype.

    For float32 operands and results. A rewrite of the captured graph, ahead of all passes, so that interpreter,
    processors, GPUs and exported models round alike. Products inside of attention, recurrent layers and bodies of
    control flow are no nodes of their own and stay as they are. Gives the graph and how many nodes of each primitive
    are rounded.
    """
    rounded: Counter = Counter()

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name not in ("dot_general", "conv") or {v.dtype for v in (*inputs, *node.outputs)} != {"float32"}:
            return None
        rounded[node.name] += 1

        def narrow(value: Value) -> Value:
            return rewriter.emit(primitive("convert"), value, dtype="bfloat16")

        if node.name == "dot_general":
            attrs = {**node.attrs, "preferred_dtype": "float32"}
            return rewriter.emit(node.primitive, *map(narrow, inputs), **attrs)
        wide = [rewriter.emit(primitive("convert"), narrow(value), dtype="float32") for value in inputs]
        return rewriter.emit(node.primitive, *wide, **node.attrs)

    return Rewriter(graph).run(visit), rounded
