"""Computes cheap elementwise values again where they are read, rather than storing them for several kernels."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.fuse import WITH_PROLOGUE, anchor_kind, computes_operands, is_made_of_less, reduction_of, source_of
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import is_elementwise
from kgraph.passes.regions import Contraction

MOST_READERS = 6
LONGEST_CHAIN = 4


def duplicate_producers(graph: Graph, context: PassContext | None = None) -> Graph:
    """`c = x - m; v = reduce_sum(c * c); y = c * f(v)  ->  c = x - m; v = reduce_sum(c * c); d = x - m; y = d * f(v)`.

    For values that would be written because kernels that cannot be one read them, and whose only operand of their size
    is in memory anyway: then each of the kernels reads that operand instead. Or there is none of their size.
    """
    contraction = Contraction(graph)
    doubles: dict[Node, set[Node]] = {}  # per reader, the producers that it gets copies of
    for node in graph.nodes:
        if (source_of(node) is not None or is_made_of_less(node)) and _root_is_stored(contraction, node):
            for reader in _apart(contraction, node):
                doubles.setdefault(reader, set()).add(node)
    if not doubles:
        return graph

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        producers = doubles.get(node)
        if producers is None:
            return None
        new = [
            _copy(contraction, doubles, old.node, rewriter) if old.node in producers else value
            for old, value in zip(node.inputs, inputs)
        ]
        copy = Node(node.primitive, new, node.attrs, [o.type for o in node.outputs], node.provenance)
        rewriter.target.nodes.append(copy)
        return copy.outputs

    return Rewriter(graph).run(visit)


def _below(contraction: Contraction, node: Node) -> Node | None:
    """The producer that is copied along with `node`: a cheap one which nobody else reads."""
    source = source_of(node)
    if source is None or source.node is None or source in contraction.outputs:
        return None
    producer = source.node
    if set(contraction.users[source]) != {node}:
        return None
    cheap = is_elementwise(producer) and (source_of(producer) is not None or is_made_of_less(producer))
    return producer if cheap else None


def _root_is_stored(contraction: Contraction, node: Node) -> bool:
    """Whether what the chain of cheap producers starts from is in memory anyway."""
    for _ in range(LONGEST_CHAIN):
        below = _below(contraction, node)
        if below is None:
            break
        node = below
    else:
        return False
    root = source_of(node)
    if root is None or root.node is None or root in contraction.outputs or len(set(contraction.users[root])) > 1:
        return True
    return not is_elementwise(root.node) and anchor_kind(root.node) is None


def _apart(contraction: Contraction, node: Node) -> list[Node]:
    """The readers that cannot be in one kernel with `node` and its first readers; none if one of them needs the value
    in memory."""
    value = node.output
    readers = sorted(set(contraction.users.get(value, ())), key=contraction.index.__getitem__)
    if not 2 <= len(readers) <= MOST_READERS or value in contraction.outputs:
        return []
    if not all(computes_operands(contraction, reader, value) for reader in readers):
        return []
    together = [node, readers[0]]
    apart = []
    for reader in readers[1:]:
        same = _leads_to(contraction, reader) == _leads_to(contraction, readers[0])
        if same and contraction.can_absorb(reader, together):
            together.append(reader)
        else:
            apart.append(reader)
    return apart


def _leads_to(contraction: Contraction, reader: Node) -> tuple | None:
    """What tells the kernel apart whose prologue the reader is part of; None where it is in none."""
    for _ in range(LONGEST_CHAIN):
        kind = anchor_kind(reader)
        if kind in WITH_PROLOGUE:
            return reduction_of(reader) if kind == "reduce" else (reader,)
        readers = set(contraction.users.get(reader.output, ())) if is_elementwise(reader) else ()
        if len(readers) != 1 or reader.output in contraction.outputs:
            return None
        (reader,) = readers
    return None


def _copy(contraction: Contraction, doubles: dict, node: Node, rewriter: Rewriter) -> Value:
    """A copy of a producer, and of the producers that it is computed from where these are copied too."""
    inputs = []
    for value in node.inputs:
        producer = value.node
        if producer is not None and (producer in doubles.get(node, ()) or producer is _below(contraction, node)):
            inputs.append(_copy(contraction, doubles, producer, rewriter))
        else:
            inputs.append(rewriter.map(value))
    copy = Node(node.primitive, inputs, node.attrs, [node.output.type], node.provenance)
    rewriter.target.nodes.append(copy)
    return copy.output
