"""Takes zero padding into the convolution or window reduction that reads it."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import made_by, scalar_constant


def _zero_padding(value: Value) -> tuple[Value, tuple, tuple] | None:
    """(source, low, high) of a value that is `pad(source, 0)` without cropping and without gaps."""
    if not made_by(value, "pad"):
        return None
    node = value.producer
    if scalar_constant(node.inputs[1]) != 0 or any(node.attrs["interior"]):
        return None
    low, high = node.attrs["low"], node.attrs["high"]
    if not all(isinstance(e, int) and e >= 0 for e in (*low, *high)):
        return None
    return node.inputs[0], low, high


def _is_nonnegative(value: Value) -> bool:
    return any(made_by(value, name) for name in ("relu", "relu6", "logistic", "abs", "exp"))


def fold_padding(graph: Graph, context: PassContext | None = None) -> Graph:
    """`conv(pad(x, 0; p), w; padding=q) -> conv(x, w; padding=p+q)`.

    The same for a windowed sum, and for a windowed maximum of what is not negative.
    """

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name == "conv":
            first, axes = 1, len(node.attrs["padding"])
        elif node.name == "reduce_window" and node.attrs["kind"] in ("sum", "max"):
            first, axes = 0, len(node.attrs["padding"])
        else:
            return None
        padded = _zero_padding(inputs[0])
        if padded is None:
            return None
        source, low, high = padded
        if node.name == "reduce_window" and node.attrs["kind"] == "max":
            # The zeros must not decide: no element is below them, and every window that reaches into them holds one.
            sides = zip(low, high, node.attrs["padding"], node.attrs["window"], node.attrs["window_dilation"])
            if not _is_nonnegative(source) or any(
                (p or q) and (max(p + own[0], q + own[1]) >= w or d != 1) for p, q, own, w, d in sides
            ):
                return None
        spatial = range(first, first + axes)
        if any(low[a] or high[a] for a in range(len(low)) if a not in spatial):
            return None
        dilation = node.attrs["lhs_dilation" if node.name == "conv" else "base_dilation"]
        if any(d != 1 for d in dilation):
            return None
        padding = tuple((p + low[a], q + high[a]) for a, (p, q) in zip(spatial, node.attrs["padding"]))
        attrs = dict(node.attrs, padding=padding)
        return rewriter.emit(node.primitive, source, *inputs[1:], **attrs)

    return Rewriter(graph).run(visit)
