"""Taking softmax, its relatives and the normalisations apart, each with the elementwise nodes around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kgraph.codegen import regions, rows
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, Temporary
from kgraph.codegen.regions import Leaf
from kgraph.ir import Node, TensorType, Value

EXPONENTIAL = ("softmax", "log_softmax", "logsumexp")
ROW_NORMS = ("layer_norm", "rms_norm")


# -- softmax ----------------------------------------------------------------------------------------------------------
def take_apart_softmax(node: Node) -> rows.Parts | str:
    """The parts of a node around one of EXPONENTIAL, or the reason why it has none."""
    return rows.take_apart(node, EXPONENTIAL, _softmax_axes)


def _softmax_axes(core: Node) -> tuple[int, ...]:
    axes = core.attrs["axes"] if core.name == "logsumexp" else core.attrs["axis"]
    axes = (axes,) if isinstance(axes, int) else axes
    rank = len(core.inputs[0].shape)
    return tuple(sorted(a % rank for a in axes))


# -- normalisations ---------------------------------------------------------------------------------------------------
def take_apart_norm(node: Node) -> rows.Parts | str:
    """The parts of a node around a layer, RMS or group normalisation, whose gamma and beta head the extras.

    The axes of a group normalisation are the spatial ones; its groups are still to be told apart (`in_groups`).
    """
    if any(n.name == "group_norm" for n in regions.body_of(node)[2]):
        spatial = lambda core: tuple(range(1, len(core.inputs[0].shape) - 1))
        parts = rows.take_apart(node, ("group_norm",), spatial, _affine)
        if isinstance(parts, str):
            return parts
        channel_numbers = any(x.is_coordinate and x.spans[-1] for x in (*parts.leaves, *parts.extras))
        return "channel numbers in a fused group_norm" if channel_numbers else parts
    return rows.take_apart(node, ROW_NORMS, _norm_axes, _affine)


def _norm_axes(core: Node) -> tuple[int, ...]:
    rank = len(core.inputs[0].shape)
    return tuple(sorted(a % rank for a in core.attrs["axes"]))


def _affine(core: Node, parameters: list[Value], rank: int):
    """gamma (and beta) as leaves, and `normalised * gamma + beta` as instructions."""
    dtype = core.output.dtype
    leaves = [Leaf(v, v.dtype, regions.spans_of(v.shape, rank)) for v in parameters]
    instructions = [("mul", (0, 1), (), dtype)]
    if len(parameters) == 2:
        instructions.append(("add", (3, 2), (), dtype))
    return leaves, tuple(instructions)


def in_groups(parts: rows.Parts) -> rows.Parts:
    """A group normalisation over [N, *spatial, groups, channels of a group], each group of each sample a row."""
    groups, rank = parts.core.attrs["groups"], len(parts.shape)
    split = lambda leaves: [Leaf(x.value, x.dtype, (*x.spans, x.spans[-1])) for x in leaves]
    return replace(
        parts,
        shape=(*parts.shape[:-1], groups, parts.shape[-1] // groups),
        axes=(*range(1, rank - 1), rank),
        leaves=split(parts.leaves),
        extras=split(parts.extras),
    )


def lower_batch_norm(node: Node, lower_expression: Callable, target) -> list[KernelCall]:
    """`x * scale + shift`, where a first kernel makes scale and shift from the statistics.

    lower_expression: that of a code generator's elementwise family.
    """
    x, mean, variance, gamma, beta = node.inputs
    dtype, rank, axis = x.dtype, len(x.shape), node.attrs["axis"]
    wide = compute_dtype(dtype)
    channels = (x.shape[axis],)
    scale, shift = (Temporary(TensorType(channels, wide)) for _ in range(2))
    statistics = (
        (dtype,) * 4,  # mean, variance, gamma, beta
        (
            ("constant", (), (("value", node.attrs["epsilon"]),), dtype),
            ("add", (1, 4), (), dtype),
            ("sqrt", (5,), (), dtype),
            ("div", (2, 6), (), dtype),
            ("mul", (0, 7), (), dtype),
            ("sub", (3, 8), (), dtype),
        ),
        (7, 9),
    )
    vectors = [Leaf(v, dtype, (True,)) for v in (mean, variance, gamma, beta)]
    first = lower_expression(statistics, vectors, channels, [scale, shift], target)
    affine = ((dtype, wide, wide), (("mul", (0, 1), (), wide), ("add", (3, 2), (), dtype)), (4,))
    channel = tuple(a == axis for a in range(rank))
    leaves = [Leaf(x, dtype, (True,) * rank), Leaf(scale, wide, channel), Leaf(shift, wide, channel)]
    return [*first, *lower_expression(affine, leaves, x.shape, node.outputs, target)]
