"""Nodes applied to all elements of a sequence at once: how each primitive takes operands with one more leading axis.

`batched(node, operands, flags, length)` gives the result with the leading axis, from operands of which `flags` says
that they have it. The other functions are about sums over that axis, which move into the products that make the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kgraph import ops
from kgraph.ir import Node, Value
from kgraph.passes.patterns import is_elementwise, scalar_constant

RULES: dict[str, Callable] = {}


def rule(*names: str):
    def register(function):
        for name in names:
            RULES[name] = function
        return function

    return register


def can_batch(node: Node, flags: Sequence[bool]) -> bool:
    """Whether `batched` takes the node with these operands having the axis (one of them at least)."""
    if len(node.outputs) != 1 or node.primitive.traits & {"random", "control", "host"}:
        return False
    if node.name in ("conv", "pad"):
        return flags[0] and not flags[1]
    return node.name in RULES or is_elementwise(node)


def batched(node: Node, operands: Sequence, flags: Sequence[bool], length):
    """The node's one result with a leading axis of size `length`."""
    if is_elementwise(node):
        rank = len(node.output.shape)
        given = [_aligned(x, rank) if flag else x for x, flag in zip(operands, flags)]
        return getattr(ops, node.name)(*given, **node.attrs)
    return RULES[node.name](node, operands, flags, length)


def _aligned(x, rank: int):
    """A batched operand whose elements get axes of size 1 in front, up to `rank`."""
    missing = rank + 1 - len(x.shape)
    return ops.reshape(x, shape=(x.shape[0], *(1,) * missing, *x.shape[1:])) if missing else x


def _shifted(axes) -> tuple[int, ...]:
    return tuple(a + 1 for a in axes)


@rule("reshape")
def _reshape(node, operands, flags, length):
    return ops.reshape(operands[0], shape=(length, *node.attrs["shape"]))


@rule("transpose")
def _transpose(node, operands, flags, length):
    return ops.transpose(operands[0], permutation=(0, *_shifted(node.attrs["permutation"])))


@rule("broadcast_to")
def _broadcast_to(node, operands, flags, length):
    return ops.broadcast_to(_aligned(operands[0], len(node.output.shape)), shape=(length, *node.attrs["shape"]))


@rule("slice")
def _slice(node, operands, flags, length):
    start, limit, stride = (tuple(node.attrs[name]) for name in ("start", "limit", "stride"))
    return ops.slice(operands[0], start=(0, *start), limit=(length, *limit), stride=(1, *stride))


@rule("rev")
def _rev(node, operands, flags, length):
    return ops.rev(operands[0], axes=_shifted(node.attrs["axes"]))


@rule("pad")
def _pad(node, operands, flags, length):
    low, high, interior = (tuple(node.attrs[name]) for name in ("low", "high", "interior"))
    return ops.pad(*operands, low=(0, *low), high=(0, *high), interior=(0, *interior))


@rule("concatenate")
def _concatenate(node, operands, flags, length):
    parts = [x if flag else ops.broadcast_to(x, shape=(length, *x.shape)) for x, flag in zip(operands, flags)]
    return ops.concatenate(*parts, axis=node.attrs["axis"] + 1)


@rule("reduce_sum", "reduce_prod", "reduce_max", "reduce_min")
def _reduce(node, operands, flags, length):
    axes = _shifted(node.attrs["axes"])
    return getattr(ops, node.name)(operands[0], axes=axes, keepdims=node.attrs["keepdims"])


@rule("dot_general")
def _dot_general(node, operands, flags, length):
    (lhs, rhs), attrs = operands, node.attrs
    names = ("lhs_contract", "rhs_contract", "lhs_batch", "rhs_batch")
    left, right, left_batch, right_batch = (tuple(attrs[name]) for name in names)
    dtype = attrs["preferred_dtype"]
    if all(flags) or left_batch:
        lhs, rhs = (x if flag else ops.broadcast_to(x, shape=(length, *x.shape)) for x, flag in zip(operands, flags))
        return ops.dot_general(
            lhs,
            rhs,
            lhs_contract=_shifted(left),
            rhs_contract=_shifted(right),
            lhs_batch=(0, *_shifted(left_batch)),
            rhs_batch=(0, *_shifted(right_batch)),
            preferred_dtype=dtype,
        )
    plain = {"lhs_batch": (), "rhs_batch": (), "preferred_dtype": dtype}
    if flags[0]:
        return ops.dot_general(lhs, rhs, lhs_contract=_shifted(left), rhs_contract=right, **plain)
    # The batched operand goes first, then the free axes return to their order.
    out = ops.dot_general(rhs, lhs, lhs_contract=_shifted(right), rhs_contract=left, **plain)
    first = len(rhs.shape) - len(right)
    rank = len(out.shape)
    return ops.transpose(out, permutation=(0, *range(first, rank), *range(1, first)))


@rule("conv")
def _conv(node, operands, flags, length):
    x, w = operands
    out = ops.conv(ops.reshape(x, shape=(length * x.shape[1], *x.shape[2:])), w, **node.attrs)
    return ops.reshape(out, shape=(length, x.shape[1], *out.shape[1:]))


# -- sums over the leading axis ---------------------------------------------------------------------------------------
_LINEAR = frozenset({"reshape", "transpose", "slice", "rev", "neg"})


def sum_operands(node: Node, varies: Callable[[Value], bool]) -> list[Value] | None:
    """The values of which `summed_node` wants the sums, where it passes the sum on to the node's operands; else None.

    varies: whether a value is another one for each element of the sequence.
    """
    if node.name in _LINEAR or (node.name == "add" and all(v.shape == node.output.shape for v in node.inputs)):
        wanted = list(node.inputs)
    elif node.name == "pad" and scalar_constant(node.inputs[1]) == 0:
        wanted = [node.inputs[0]]
    else:
        return None
    return wanted if all(map(varies, wanted)) else None


def contracts(node: Node, varies: Callable[[Value], bool]) -> bool:
    """Whether the node is a sum over axes of its operands, which `contracted` extends to the leading axis."""
    if not all(map(varies, node.inputs)):
        return False
    if node.name in ("conv", "conv_filter_gradient"):
        return node.attrs["feature_groups"] == 1 or node.name == "conv_filter_gradient"
    return node.name == "reduce_sum" or (node.name == "dot_general" and not node.attrs["lhs_batch"])


def summed_node(node: Node, sums: Sequence, other: Callable[[Value], Any]):
    """The sum of a node's result from the sums of its `sum_operands`. other: what stands for further operands."""
    if node.name == "pad":
        return ops.pad(sums[0], other(node.inputs[1]), **node.attrs)
    return getattr(ops, node.name)(*sums, **node.attrs)


def contracted(node: Node, operands: Sequence, length):
    """The sum over the leading axis of a node that `contracts`, from its operands with that axis."""
    attrs = node.attrs
    if node.name == "reduce_sum":
        total = ops.reduce_sum(operands[0], axes=(0, *_shifted(attrs["axes"])))
        return ops.reshape(total, shape=node.output.shape)
    if node.name == "dot_general":
        left, right = ((0, *_shifted(attrs[name])) for name in ("lhs_contract", "rhs_contract"))
        plain = {"lhs_batch": (), "rhs_batch": (), "preferred_dtype": attrs["preferred_dtype"]}
        return ops.dot_general(*operands, lhs_contract=left, rhs_contract=right, **plain)
    x, w = operands
    if node.name == "conv_filter_gradient":  # the sum over the batch
        merge = lambda a: ops.reshape(a, shape=(length * a.shape[1], *a.shape[2:]))
        return ops.conv_filter_gradient(merge(x), merge(w), **attrs)
    # Images and filters both vary: the elements are more input channels of one convolution.
    # x[t, n, *spatial, c] -> [n, *spatial, t c]; w[t, *window, c, f] -> [*window, t c, f]
    rank = len(node.output.shape)
    x = ops.transpose(x, permutation=(*range(1, rank), 0, rank))
    x = ops.reshape(x, shape=(*x.shape[: rank - 1], length * x.shape[-1]))
    w = ops.transpose(w, permutation=(*range(1, rank - 1), 0, rank - 1, rank))
    w = ops.reshape(w, shape=(*w.shape[: rank - 2], length * w.shape[-2], w.shape[-1]))
    return ops.conv(x, w, **attrs)
