"""Regions that reduce rows and apply what they found to the same rows, as the quantisation of activations does."""

from __future__ import annotations

from kgraph.ir import Node, Value
from kgraph.ir.dims import product
from kgraph.passes.patterns import is_elementwise
from kgraph.passes.regions import Contraction, is_inline_constant

LONGEST_ROW = 1 << 15  # elements: a row that is read twice stays in the nearest caches
LARGEST_REGION = 24
REDUCTIONS = ("reduce_max", "reduce_min", "reduce_sum")


def grow_rescaling(contraction: Contraction, reduction: Node) -> tuple[list[Node], list[int]]:
    """`s = f(reduce(g(x))); y = h(x, s)`: nodes around `reduction`, and how many of the first ones make a region.

    Rows are the last axes of x, of known length. s may be read outside, and one value of the shape of x, unless what
    reads that is elementwise: then a kernel of its own may hold more than this one.
    """
    nothing: tuple[list[Node], list[int]] = [reduction], []
    if reduction.name not in REDUCTIONS or not reduction.attrs["keepdims"] or not _reduces_rows(reduction):
        return nothing
    shape, small = reduction.inputs[0].shape, reduction.output.shape
    before, row = _operand(contraction, reduction)
    if row is None:
        return nothing
    nodes = [*before, reduction]
    grown = True
    while grown:  # what is made of the statistic alone
        grown = False
        for value in [n.output for n in nodes if n.output.shape == small]:
            for user in contraction.users.get(value, ()):
                if _joins(contraction, user, nodes, small) and _reads_only(user, nodes):
                    nodes.append(user)
                    grown = True
    counts: list[int] = []
    statistics = {n.output for n in nodes if n.output.shape == small}
    full = {row}
    pending = [user for value in statistics for user in contraction.users.get(value, ())]
    pending.sort(key=contraction.index.__getitem__)
    while pending and len(nodes) < LARGEST_REGION:
        user = pending.pop(0)
        if not _joins(contraction, user, nodes, shape) or full.isdisjoint(user.inputs):
            continue
        nodes.append(user)
        full.add(user.output)
        live = [v for v in contraction.live_outputs(nodes) if v.shape == shape]
        if len(live) == 1 and not any(is_elementwise(u) for u in contraction.users.get(live[0], ()) if u not in nodes):
            counts.append(len(nodes))
        pending += contraction.users.get(user.output, ())
    return nodes, counts


def _reduces_rows(reduction: Node) -> bool:
    shape = reduction.inputs[0].shape
    axes = sorted(a % len(shape) for a in reduction.attrs["axes"])
    if not axes or len(axes) == len(shape) or axes != list(range(len(shape) - len(axes), len(shape))):
        return False
    length = product(shape[a] for a in axes)
    return isinstance(length, int) and 1 < length <= LONGEST_ROW


def _operand(contraction: Contraction, reduction: Node) -> tuple[list[Node], Value | None]:
    """The elementwise nodes that the reduction's operand is computed by, read by nobody else, and the one value of its
    shape that they read; None where they read more."""
    nodes: list[Node] = []
    value = reduction.inputs[0]
    while True:
        producer = value.node
        if producer is None or not _joins(contraction, producer, [*nodes, reduction], value.shape):
            break
        if value in contraction.outputs or any(u is not reduction and u not in nodes for u in contraction.users[value]):
            break
        operands = {v for v in producer.inputs if not is_inline_constant(v)}
        if len(operands) != 1 or next(iter(operands)).shape != value.shape:
            break
        nodes.insert(0, producer)
        (value,) = operands
    shared = any(user not in nodes and user is not reduction for user in contraction.users.get(value, ()))
    return nodes, value if shared else None


def _joins(contraction: Contraction, node: Node, nodes: list[Node], shape: tuple) -> bool:
    return (
        is_elementwise(node)
        and node.name != "constant"
        and len(node.outputs) == 1
        and node.output.shape == shape
        and node not in nodes
        and node not in contraction.region_of
        and contraction.can_absorb(node, nodes)
    )


def _reads_only(node: Node, nodes: list[Node]) -> bool:
    return all(v.node in nodes or is_inline_constant(v) for v in node.inputs)
