"""How the primitives that move data see their operands: strided views, and axes of a foreground on a background."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.strided import dense_strides
from kgraph.ir import Dim, Node, Value


# -- how each primitive reads its source: (base offset, [(size, source stride)] per axis of the result) ---------------
def _transpose_view(node: Node):
    x = node.inputs[0]
    strides = dense_strides(x.shape)
    return 0, [(x.shape[k], strides[k]) for k in node.attrs["permutation"]]


def _slice_view(node: Node):
    strides = dense_strides(node.inputs[0].shape)
    start, step = node.attrs["start"], node.attrs["stride"]
    base = sum((s * t for s, t in zip(start, strides, strict=True)), 0)
    step = step or (1,) * len(strides)
    return base, [(n, t * k) for n, t, k in zip(node.output.shape, strides, step, strict=True)]


def _rev_view(node: Node):
    x = node.inputs[0]
    strides = dense_strides(x.shape)
    axes = {a % x.type.rank for a in node.attrs["axes"]}
    base = sum(((x.shape[a] - 1) * strides[a] for a in axes), 0)
    return base, [(n, -t if k in axes else t) for k, (n, t) in enumerate(zip(x.shape, strides, strict=True))]


def _broadcast_view(node: Node):
    x, out = node.inputs[0], node.output
    missing = out.type.rank - x.type.rank
    own = [0 if not isinstance(n, Dim) and n == 1 else t for n, t in zip(x.shape, dense_strides(x.shape), strict=True)]
    return 0, list(zip(out.shape, [0] * missing + own, strict=True))


def _dynamic_slice_view(node: Node):
    return 0, list(zip(node.output.shape, dense_strides(node.inputs[0].shape), strict=True))


def dense_offset(node: Node) -> int | Dim | None:
    """The element of a slice's operand from which on the slice lies there, where it lies there densely."""
    x, out = node.inputs[0], node.output
    base, axes = _slice_view(node)
    varying = [k for k, n in enumerate(out.shape) if isinstance(n, Dim) or n != 1]
    dense = dense_strides(out.shape)
    inside = all(axes[k][1] == dense[k] for k in varying)
    return base if inside and out.type.rank == x.type.rank else None


VIEWS = {
    "transpose": _transpose_view,
    "slice": _slice_view,
    "rev": _rev_view,
    "broadcast_to": _broadcast_view,
    "dynamic_slice": _dynamic_slice_view,
}


def starts_of(node: Node) -> list[tuple[Value, int | Dim, int | Dim]]:
    """Per start operand: the value, the greatest start that stays inside, the stride it counts in."""
    if node.name != "dynamic_slice":
        return []
    x = node.inputs[0]
    return [
        (start, n - m, stride)
        for start, n, m, stride in zip(node.inputs[1:], x.shape, node.output.shape, dense_strides(x.shape), strict=True)
    ]


# -- pad and dynamic_update_slice: a foreground over a background -----------------------------------------------------
# An axis is (size of the result, size of the foreground, start of the foreground, interior). The start is a size, or
# ("start", operand, greatest start, scale) where an operand holds it.
def pad_axes(node: Node) -> list[tuple]:
    """The axes of a pad, merged."""
    x = node.inputs[0]
    low, interior = node.attrs["low"], node.attrs.get("interior") or (0,) * x.type.rank
    return _merged(list(zip(node.output.shape, x.shape, low, interior, strict=True)))


def update_axes(node: Node) -> list[tuple]:
    """The axes of a dynamic_update_slice, merged; its starts are operands of the node."""
    x, update = node.inputs[:2]
    axes = []
    for number, (n, m) in enumerate(zip(x.shape, update.shape, strict=True)):
        start = 0 if covers(n, m, 0, 0) else ("start", number + 2, n - m, 1)
        axes.append((n, m, start, 0))
    return _merged(axes)


def covers(size, own, start, interior) -> bool:
    """Whether the foreground covers an axis in full."""
    same = isinstance(size, Dim) == isinstance(own, Dim) and size == own
    return same and not isinstance(start, tuple | Dim) and start == 0 and interior == 0


def _merged(axes: Sequence[tuple]) -> list[tuple]:
    """Fewer axes: one that the foreground covers joins the one before it, if that has no interior."""
    out: list[tuple] = []
    for size, own, start, interior in axes:
        if out and covers(size, own, start, interior) and out[-1][3] == 0:
            wide, wide_own, at, _ = out.pop()
            scaled = (*at[:3], at[3] * size) if isinstance(at, tuple) else at * size
            out.append((wide * size, wide_own * size, scaled, 0))
        else:
            out.append((size, own, start, interior))
    return out or [(1, 1, 0, 0)]


# -- pad_mirror -------------------------------------------------------------------------------------------------------
MIRROR_MODES = frozenset({"reflect", "symmetric", "edge", "wrap"})


def mirror_axes(node: Node) -> list[tuple]:
    """The axes of a pad_mirror, merged: (size of the result, size of x, elements before x, whether none are added)."""
    x, out = node.inputs[0], node.output
    axes: list[tuple] = []
    for n, m, before, after in zip(out.shape, x.shape, node.attrs["low"], node.attrs["high"], strict=True):
        plain = all(not isinstance(p, Dim) and p == 0 for p in (before, after))
        if plain and axes and axes[-1][3]:
            wide, own, _, _ = axes.pop()
            axes.append((wide * n, own * m, 0, True))
        else:
            axes.append((n, m, before, plain))
    return axes or [(1, 1, 0, True)]
