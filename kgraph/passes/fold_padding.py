"""Takes zero padding into the convolution or window reduction that reads it; a cropped convolution makes less."""

from __future__ import annotations

from collections import Counter

from kgraph.ir import Dim, Graph, Node, Rewriter, Value
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


def _cropping(node: Node) -> tuple[tuple, tuple] | None:
    """(low, high): how many elements a node that does nothing else takes away from both ends of each axis."""
    attrs, size = node.attrs, node.inputs[0].shape
    if node.name == "slice":
        if any(s != 1 for s in attrs["stride"]):
            return None
        low, high = attrs["start"], tuple(n - limit for n, limit in zip(size, attrs["limit"]))
    else:
        if any(attrs["interior"]):
            return None
        low, high = (tuple(-e for e in attrs[side]) for side in ("low", "high"))
    return (low, high) if all(not isinstance(e, Dim) and e >= 0 for e in (*low, *high)) else None


def _cropped_convolution(node: Node, conv: Value, rewriter: Rewriter) -> Value | None:
    """The convolution that makes no more than what `node` keeps of `conv`; None where it is no crop of pixels."""
    cropping = _cropping(node)
    if cropping is None:
        return None
    (low, high), attrs = cropping, conv.producer.attrs
    if low[0] or high[0] or low[-1] or high[-1]:
        return None
    padding = tuple(
        (before - cut * stride, after - cut_after * stride)
        for (before, after), stride, cut, cut_after in zip(attrs["padding"], attrs["strides"], low[1:-1], high[1:-1])
    )
    producer = conv.producer
    return rewriter.emit(producer.primitive, *producer.inputs, **dict(attrs, padding=padding))


def fold_padding(graph: Graph, context: PassContext | None = None) -> Graph:
    """`conv(pad(x, 0; p), w; padding=q) -> conv(x, w; padding=p+q)`.

    The same for the cotangent of the filters, for a windowed sum, and for a windowed maximum of what is not negative.
    Where a convolution is cropped, as is the cotangent of a padded input: `slice(conv(x, w; padding=q); c) ->
    conv(x, w; padding=q-c)`.
    """
    uses = Counter(v for node in graph.nodes for v in node.inputs)
    uses.update(graph.outputs)

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name in ("slice", "pad"):
            crops_only = made_by(inputs[0], "conv") and uses[node.inputs[0]] == 1
            return _cropped_convolution(node, inputs[0], rewriter) if crops_only else None
        if node.name in ("conv", "conv_filter_gradient"):
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
        dilation = {"conv": "lhs_dilation", "reduce_window": "base_dilation"}.get(node.name)
        if dilation is not None and any(d != 1 for d in node.attrs[dilation]):
            return None
        padding = tuple((p + low[a], q + high[a]) for a, (p, q) in zip(spatial, node.attrs["padding"]))
        attrs = dict(node.attrs, padding=padding)
        return rewriter.emit(node.primitive, source, *inputs[1:], **attrs)

    return Rewriter(graph).run(visit)
