"""Nodes applied to all elements of a sequence at once: how each primitive takes operands with one more leading axis.

`batched(node, operands, flags, length)` gives the results with the leading axis, from operands of which `flags` says
that they have it. `summed` gives the sum of a batched value over that axis, and moves the sum into the products that
make the value, whose contraction it then is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kgraph import ops
from kgraph.ir import Node, Value
from kgraph.ir.dims import product
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
    if node.name == "conv":
        return flags[0] and not flags[1]
    if node.name == "pad":
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


# -- sums over the leading axis -----------------------------------------------------------------------------------------
def summed(value: Value, at: Callable[[Value], tuple], length):
    """The sum over the leading axis of what `value` is for each element of the sequence.

    at: gives (operand, whether it has the axis) for a value that the sum's maker reads.
    """
    node = value.node
    x, is_batched = at(value) if node is None or node.name not in _SUMS else (None, False)
    if node is not None and node.name in _SUMS:
        found = _SUMS[node.name](node, at, length)
        if found is not None:
            return found
        x, is_batched = at(value)
    if not is_batched:
        raise ValueError(f"{value!r} is the same for all elements")
    return ops.reduce_sum(x, axes=(0,))


def _sum_of_view(node, at, length):
    inner = summed(node.inputs[0], at, length)
    return getattr(ops, node.name)(inner, **node.attrs)


def _sum_of_sum(node, at, length):
    parts = [summed(v, at, length) for v in node.inputs]
    return ops.add(*parts) if all(p.shape == node.output.shape for p in parts) else None


def _sum_of_pad(node, at, length):
    if scalar_constant(node.inputs[1]) != 0:
        return None
    inner = summed(node.inputs[0], at, length)
    return ops.pad(inner, at(node.inputs[1])[0], **node.attrs)


def _sum_of_reduce_sum(node, at, length):
    x, is_batched = at(node.inputs[0])
    if not is_batched:
        return None
    total = ops.reduce_sum(x, axes=(0, *_shifted(node.attrs["axes"])))
    return ops.reshape(total, shape=node.output.shape)


def _sum_of_dot(node, at, length):
    """`sum_t a[t] b[t]` contracts t too."""
    (lhs, one), (rhs, other) = (at(v) for v in node.inputs)
    attrs = node.attrs
    if not (one and other) or attrs["lhs_batch"]:
        return None
    return ops.dot_general(
        lhs,
        rhs,
        lhs_contract=(0, *_shifted(attrs["lhs_contract"])),
        rhs_contract=(0, *_shifted(attrs["rhs_contract"])),
        lhs_batch=(),
        rhs_batch=(),
        preferred_dtype=attrs["preferred_dtype"],
    )


def _sum_of_conv(node, at, length):
    """Where images and filters both vary, the elements are more input channels of one convolution."""
    (x, one), (w, other) = (at(v) for v in node.inputs)
    if not (one and other) or node.attrs["feature_groups"] != 1:
        return None
    rank = len(node.output.shape)
    # x[t, n, *spatial, c] -> [n, *spatial, t c]; w[t, *window, c, f] -> [*window, t c, f]
    x = ops.transpose(x, permutation=(*range(1, rank), 0, rank))
    x = ops.reshape(x, shape=(*x.shape[: rank - 1], length * x.shape[-1]))
    w = ops.transpose(w, permutation=(*range(1, rank - 1), 0, rank - 1, rank))
    w = ops.reshape(w, shape=(*w.shape[: rank - 2], length * w.shape[-2], w.shape[-1]))
    return ops.conv(x, w, **node.attrs)


_SUMS: dict[str, Callable] = {
    **dict.fromkeys(("reshape", "transpose", "slice", "rev", "neg"), _sum_of_view),
    "add": _sum_of_sum,
    "pad": _sum_of_pad,
    "reduce_sum": _sum_of_reduce_sum,
    "dot_general": _sum_of_dot,
    "conv": _sum_of_conv,
}

__all__ = ["batched", "can_batch", "product", "summed"]
