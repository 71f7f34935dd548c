"""Taking windowed reductions apart: the axes that windows touch, the fused epilogue, the operands of it."""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.codegen import expressions
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import product

COMBINE = {"max": "maximum", "min": "minimum", "sum": "add"}


@dataclass
class Parts:
    """A pooling node taken apart. extras: further inputs of the epilogue; expression: of it, its input 0 the pooled."""

    node: Node
    source: Value
    extras: list[Value]
    outputs: tuple[Value, ...]
    expression: tuple


def refuses(node: Node) -> str | None:
    """Why there is no kernel for the windows of a reduce_window or select_and_scatter_add; None where there is one."""
    attrs, dtype = node.attrs, node.inputs[0].dtype
    windows = (*attrs["window"], *attrs["strides"], *attrs["window_dilation"], *attrs["base_dilation"])
    if any(isinstance(n, Dim) for n in (*windows, *(p for pair in attrs["padding"] for p in pair))):
        return "a window of symbolic size"
    if dtype not in expressions.DTYPES or dtype == "bool":
        return f"no pooling of {dtype}"
    return None


def take_apart(node: Node) -> Parts | str:
    """The parts of a reduce_window or of a fused node around one; a string says why it cannot be done."""
    if node.name == "reduce_window":
        expression = expressions.identity(node.output.dtype)
        return Parts(node, node.inputs[0], [], node.outputs, expression)
    if node.name != "fusion":
        return f"{node.name} is no pooling"
    body = node.attrs["body"]
    cores = [n for n in body.nodes if n.name == "reduce_window"]
    if len(cores) != 1 or cores[0].inputs[0] not in body.inputs:
        return "a pooling kernel needs exactly one reduce_window, of an input"
    core = cores[0]
    rest = [n for n in body.nodes if n is not core]
    if any(v.shape != core.output.shape for v in body.outputs):
        return "the epilogue changes the shape"
    outer = dict(zip(body.inputs, node.inputs, strict=True))
    used = {v for n in rest for v in n.inputs}
    extras = [v for v in body.inputs if v in used]
    encoded = expressions.encode_nodes(rest, [core.output, *extras], body.outputs)
    if isinstance(encoded, str):
        return encoded
    return Parts(core, outer[core.inputs[0]], [outer[v] for v in extras], node.outputs, encoded)


def groups_of(node: Node) -> tuple[int, int]:
    """(first windowed axis, first axis of the channels): the axes between them are walked one by one."""
    attrs, rank = node.attrs, node.inputs[0].type.rank
    plain = [
        (w, s, tuple(p), wd, bd) == (1, 1, (0, 0), wd, 1)
        for w, s, p, wd, bd in zip(
            attrs["window"],
            attrs["strides"],
            attrs["padding"],
            attrs["window_dilation"],
            attrs["base_dilation"],
            strict=True,
        )
    ]
    if all(plain):
        return 0, 0
    first = plain.index(False)
    last = rank - plain[::-1].index(False)
    return first, last


def refuses_extras(parts: Parts) -> str | None:
    """Why there is no kernel for the epilogue's operands; None where there is one."""
    groups = groups_of(parts.node)
    for value in parts.extras:
        if extra_strides(value, parts.node.output.shape, groups) is None:
            return f"an epilogue operand {value.type} spans a part of a group of axes of {parts.node.output.type}"
    return None


def extra_strides(value: Value, shape: tuple, groups: tuple[int, int]) -> tuple | None:
    """Strides of an epilogue operand along (batch, windowed axes..., channels); None where it spans part of a group."""
    first, last = groups
    own = (1,) * (len(shape) - value.type.rank) + tuple(value.shape)
    pieces = [slice(0, first), *(slice(k, k + 1) for k in range(first, last)), slice(last, len(shape))]
    spans = []
    for piece in pieces:
        if own[piece] == tuple(shape[piece]):
            spans.append(product(shape[piece]))
        elif all(not isinstance(n, Dim) and n == 1 for n in own[piece]):
            spans.append(None)
        else:
            return None
    return tuple(0 if n is None else product([m for m in spans[k + 1 :] if m is not None]) for k, n in enumerate(spans))
