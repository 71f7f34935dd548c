"""What the elementwise, reduction and normalisation families share: taking fused nodes apart, collapsing axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from kgraph.codegen.cpu import expressions
from kgraph.codegen.cpu.builder import I32, Int, KernelBuilder, itemsize
from kgraph.codegen.cpu.scalar_ops import convert
from kgraph.codegen.kernel import Temporary
from kgraph.ir import Node, Value, constant_value

# Leaf of an expression: a value read from memory, the coordinate along an output axis (of an `iota`), or random words.


@dataclass(frozen=True)
class Leaf:
    """An input of an expression.

    value: the operand that is read, or None for a coordinate. spans: per (collapsed) axis whether the operand extends
    over it; a coordinate spans its one axis. dtype: of the elements.
    stream: number of the stream of random words that `value` is the seed of; -1 for all other leaves.
    """

    value: Value | Temporary | None
    dtype: str
    spans: tuple[bool, ...]
    stream: int = -1

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


def row_strides(b: KernelBuilder, sizes: Sequence, spans: Sequence[bool]) -> list:
    """Strides in elements of a dense operand along the collapsed axes; 0 where it is broadcast."""
    out: list = [0] * len(sizes)
    step: int | Int = 1
    for axis in reversed(range(len(sizes))):
        if spans[axis]:
            out[axis] = step
            step = sizes[axis] * step
    return out


def coordinate(b: KernelBuilder, position, dtype: str, lanes: int, along_lanes: bool) -> ir.Value:
    """The index `position` as data of `dtype`; counting up from it over the lanes if `along_lanes`."""
    wide = dtype in ("int64", "uint64", "float64")
    base = b.i64(position)
    if not wide:
        base = b.ir.trunc(base, I32)
    value = b.broadcast(base, lanes)
    if along_lanes and lanes > 1:
        value = b.add(value, b.lane_numbers("int64" if wide else "int32", lanes))
    return convert(b, value, "int64" if wide else "int32", dtype)


def bound_of(size) -> int:
    """A power of two not below a known size (so that many sizes share a kernel); 0 for a run-time size."""
    return 1 << max(size - 1, 0).bit_length() if isinstance(size, int) else 0


class Odometer:
    """Indices of the outer axes while rows are visited in order; no division but at the start."""

    def __init__(self, b: KernelBuilder, sizes: Sequence, first: int | Int):
        self.b, self.sizes = b, list(sizes)
        rest: int | Int = first
        starts = []
        for axis in reversed(range(len(sizes))):
            if axis == 0:
                starts.append(rest)
            else:
                starts.append(rest % sizes[axis])
                rest = rest // sizes[axis]
        self.slots = [b.variable(b.i64(s)) for s in reversed(starts)]

    def indices(self) -> list[Int]:
        return [self.b.int(s.get()) for s in self.slots]

    def advance(self) -> None:
        """To the next row."""
        self._advance(len(self.slots) - 1)

    def _advance(self, axis: int) -> None:
        if axis < 0:
            return
        b, slot = self.b, self.slots[axis]
        following = b.int(slot.get()) + 1
        slot.set(following.value)
        if axis == 0:
            return
        with b.if_then(following >= self.sizes[axis]):
            slot.set(b.i64(0))
            self._advance(axis - 1)


def dot(indices: Sequence, strides: Sequence):
    """sum(index * stride)"""
    out: int | Int = 0
    for index, stride in zip(indices, strides, strict=True):
        if not (isinstance(stride, int) and stride == 0):
            out = index * stride + out
    return out


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
        and leaf.value.type.itemsize == out.type.itemsize
        and leaf.value.type.size == out.type.size
    )


def keep_order(b: KernelBuilder, leaves: Sequence[tuple], pointers: Sequence, outputs: Sequence) -> None:
    """For several outputs: no promise about operands that `inplace_pairs` lets them overwrite.

    leaves: (dtype, spans, is_coordinate) of each pointer.
    """
    if len(outputs) == 1:
        return
    for out in outputs:
        for pointer, (dtype, spans, _) in zip(pointers, leaves, strict=True):
            if pointer is not None and all(spans) and itemsize(dtype) == itemsize(out.dtype):
                b.may_share(out, pointer)


def kernel_name(prefix: str, *parts) -> str:
    """A name made of what is in the kernel; empty expressions leave no trace."""
    words = [prefix, *(expressions.name(p) if isinstance(p, tuple) else p for p in parts if p)]
    return "_".join(w for w in words if w)
