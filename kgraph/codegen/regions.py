"""Taking fused nodes apart, collapsing axes: what the families of all code generators share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kgraph.codegen import expressions
from kgraph.codegen.kernel import Temporary
from kgraph.ir import Node, Value, constant_value

# Leaf of an expression: a value read from memory, the coordinate along an output axis (of an `iota`), or random words.


@dataclass(frozen=True)
class Leaf:
    """An input of an expression.

    value: the operand that is read, or None for a coordinate. spans: per (collapsed) axis whether the operand extends
    over it; a coordinate spans its one axis. dtype: of the elements.
    stream: number of the stream of random words that `value` is the seed of; -1 for all other leaves.
    view: (first element, elements from row to row) where the operand is some columns of `value`'s rows; None where it
    is dense.
    """

    value: Value | Temporary | None
    dtype: str
    spans: tuple[bool, ...]
    stream: int = -1
    view: tuple | None = None

    @property
    def is_coordinate(self) -> bool:
        return self.value is None


def spans_of(shape: Sequence, rank: int) -> tuple[bool, ...]:
    """Per axis of a result of `rank`, whether an operand of `shape` extends over it (NumPy alignment)."""
    return (False,) * (rank - len(shape)) + tuple(not (isinstance(s, int) and s == 1) for s in shape)


def collapse(shape: Sequence, spans: Sequence[tuple], marks: Sequence = ()) -> tuple[list, list[tuple]]:
    """Merges neighbouring axes over which every operand behaves alike and drops axes of size 1.

    shape: of the result. spans: one tuple of bools per operand. marks: a key per axis; axes of different keys stay
    apart. Gives (sizes, spans) of the merged axes; no axes for a single element.
    """
    sizes: list = []
    columns: list = []
    for axis, size in enumerate(shape):
        if isinstance(size, int) and size == 1:
            continue
        column = (tuple(s[axis] for s in spans), marks[axis] if marks else None)
        if columns and columns[-1] == column:
            sizes[-1] = sizes[-1] * size
        else:
            sizes.append(size)
            columns.append(column)
    return sizes, [tuple(c[0][i] for c in columns) for i in range(len(spans))]


def leaves_and_nodes(inputs: Sequence[Value], outer: Sequence[Value], nodes: Sequence[Node], shape: Sequence):
    """The leaves of elementwise `nodes` over a result of `shape`, and what is left to encode.

    inputs: values that the nodes read from outside; outer: what they stand for in the graph (the same for a lone node).
    Scalars that are constants in the graph move into the code; iotas become coordinates.
    Gives (inner values, leaves, nodes): the expression's inputs, described by the leaves, and its nodes.
    """
    rank = len(shape)
    read = {v for n in nodes for v in n.inputs}
    inner: list[Value] = []
    leaves: list[Leaf] = []
    kept: list[Node] = []
    for value, outside in zip(inputs, outer, strict=True):
        if value in inner:
            continue
        literal = constant_value(outside)
        if literal is not None and literal.size == 1 and value is outside and value in read:
            kept.append(value.producer)
            continue
        inner.append(value)
        leaves.append(Leaf(outside, value.dtype, spans_of(value.shape, rank)))
    for node in nodes:
        if node.name == "iota":
            out = node.output
            axis = rank - len(out.shape) + node.attrs["axis"] % max(len(out.shape), 1)
            inner.append(out)
            leaves.append(Leaf(None, out.dtype, tuple(a == axis for a in range(rank))))
        else:
            kept.append(node)
    return inner, leaves, kept


def body_of(node: Node) -> tuple[Sequence[Value], Sequence[Value], Sequence[Node], Sequence[Value]]:
    """(inner inputs, outer inputs, nodes, inner outputs) of a fused node, or of a lone one as its own body."""
    if node.name == "fusion":
        body = node.attrs["body"]
        return body.inputs, node.inputs, body.nodes, body.outputs
    return node.inputs, node.inputs, [node], node.outputs


def needed(nodes: Sequence[Node], values: Sequence[Value], stop: Sequence[Value] = ()) -> list[Node]:
    """The nodes, in order, that `values` are computed from; `stop` values are taken as given."""
    wanted = {v for v in values if v not in stop}
    out: list[Node] = []
    for node in reversed(nodes):
        if any(o in wanted for o in node.outputs):
            out.append(node)
            wanted.update(v for v in node.inputs if v not in stop)
    return out[::-1]


def used_inputs(
    inputs: Sequence[Value], outer: Sequence[Value], nodes: Sequence[Node], results: Sequence[Value]
) -> tuple[list[Value], list[Value]]:
    """The inputs (inner, outer) that `nodes` read or that are results themselves."""
    read = {v for n in nodes for v in n.inputs} | set(results)
    pairs = [(i, o) for i, o in zip(inputs, outer, strict=True) if i in read]
    return [i for i, _ in pairs], [o for _, o in pairs]


def total_bytes(operands: Sequence):
    """Bytes of distinct operands (Values or Temporaries)."""
    return sum((v.type.nbytes for v in dict.fromkeys(operands)), start=0)


def inplace_pairs(leaves: Sequence[Leaf], outputs: Sequence, first_output: int) -> tuple:
    """(output, input) operand positions of outputs that may overwrite an operand: one of as many elements of the same
    size, so that every element is read before it is written."""
    operands = [leaf for leaf in leaves if not leaf.is_coordinate]
    return tuple(
        (first_output + o, i)
        for o, out in enumerate(outputs)
        for i, leaf in enumerate(operands)
        if leaf.value is not None
        and leaf.stream < 0
        and leaf.view is None
        and leaf.value.type.itemsize == out.type.itemsize
        and leaf.value.type.size == out.type.size
    )


def kernel_name(prefix: str, *parts) -> str:
    """A name made of what is in the kernel; empty expressions leave no trace."""
    words = [prefix, *(expressions.name(p) if isinstance(p, tuple) else p for p in parts if p)]
    return "_".join(w for w in words if w)
