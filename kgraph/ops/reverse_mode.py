"""Reverse mode over recorded nodes: runs their gradient rules from the last to the first.

The rules are written with primitives, so that this evaluates on arrays and records under any tracer: a pass over a
graph, the body of a loop, and a function that a user traces are differentiated by the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kgraph import ops
from kgraph.errors import GradientError
from kgraph.ir import Node, NotDifferentiable, Value, bind
from kgraph.ir.primitive import Traced
from kgraph.ir.recorder import inheriting
from kgraph.ops.common import INEXACT, Array, zeros_like

BACKWARD_MARK = " (backward)"


def backward_provenance(provenance: frozenset) -> frozenset:
    """The provenance of the backward nodes of a node: the same layers and functions, marked."""
    return frozenset(p if p.endswith(BACKWARD_MARK) else p + BACKWARD_MARK for p in provenance)


def depending_on(nodes: Sequence[Node], wrt: Sequence[Value]) -> set[Value]:
    """The values that can change smoothly with those of `wrt`: only their cotangents matter."""
    active = {v for v in wrt if v.dtype in INEXACT}
    for node in nodes:
        if node.name != "stop_gradient" and any(v in active for v in node.inputs):
            active.update(o for o in node.outputs if o.dtype in INEXACT)
    return active


def pull_back(
    nodes: Sequence[Node],
    operand: Callable[[Value], Array],
    cotangents: Mapping[Value, Array | None],
    wrt: Sequence[Value],
    recomputed: Sequence[tuple[int, int]] = (),
) -> list[Array | None]:
    """Cotangents of `wrt`, None where no derivative reaches one.

    nodes: in topological order. operand: gives what stands for a value in the rules, an array or a traced value.
    cotangents: of values that the nodes make (or of `wrt` themselves); None stands for zero.
    recomputed: ranges of `nodes` (start, stop), disjoint or nested, whose values the rules do not read: the nodes of a
        range are recorded once more, just before its rules, on its operands behind barriers.

    Cotangents of a value that is read several times are summed. Only nodes that lie between `wrt` and the given
    cotangents are visited; GradientError if the derivative of one of them does not exist.
    """
    active = depending_on(nodes, wrt)
    found: dict[Value, Array] = {}

    def add(value: Value, cotangent: Array | None) -> None:
        if cotangent is not None and value in active:
            found[value] = ops.add(found[value], cotangent) if value in found else cotangent

    for value, cotangent in cotangents.items():
        add(value, cotangent)

    def visit(start: int, stop: int, operand: Callable, ranges: Sequence[tuple[int, int]], forward: set) -> None:
        """Run the rules of nodes[start:stop], on the values that `operand` gives. forward: no results of rules."""
        ends = {hi: (lo, hi) for lo, hi in _outermost(ranges)}
        if ends:
            forward = forward | {_value_of(operand(o)) for node in nodes[start:stop] for o in node.outputs}
        read: set[Value | None] = set()
        while stop > start:
            if stop in ends:
                lo, hi = ends.pop(stop)
                own = [o for node in nodes[lo:hi] for o in node.outputs]
                if any(o in found for o in own):
                    _add_read(read, found.values(), forward)
                    kept = {o for o in own if _value_of(operand(o)) in read}
                    inner = [r for r in ranges if lo <= r[0] and r[1] <= hi and r != (lo, hi)]
                    visit(lo, hi, _replayed(nodes[lo:hi], operand, kept), inner, forward)
                stop = lo
                continue
            stop -= 1
            node = nodes[stop]
            if not any(o in found for o in node.outputs) or not any(v in active for v in node.inputs):
                continue
            with inheriting(backward_provenance(node.provenance)):
                for value, cotangent in zip(node.inputs, _through(node, operand, found), strict=True):
                    add(value, cotangent)

    visit(0, len(nodes), operand, recomputed, set())
    return [found.get(v) for v in wrt]


def _outermost(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges that are not empty and lie in no other one."""
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(set(ranges), key=lambda r: (r[0], -r[1])):
        if lo < hi and (not out or lo >= out[-1][1]):
            out.append((lo, hi))
    return out


def _value_of(x: Array) -> Value | None:
    """The value of a graph that an operand of the rules stands for; None for an array."""
    return getattr(x, "value", None) if isinstance(x, Traced) else None


def _add_read(read: set[Value | None], cotangents: Iterable[Array], forward: set[Value | None]) -> None:
    """Add to `read` all values that cotangents have been computed from, up to and including those of `forward`."""
    stack = [value for x in cotangents if (value := _value_of(x)) is not None]
    while stack:
        value = stack.pop()
        if value not in read:
            read.add(value)
            if value.node is not None and value not in forward:
                stack.extend(value.node.inputs)


def _replayed(nodes: Sequence[Node], operand: Callable[[Value], Array], kept: set[Value]) -> Callable[[Value], Array]:
    """What stands for a value in the rules after the nodes have been recorded once more.

    kept: values that rules of later nodes have read; they are there anyway and not computed again.
    """
    values: dict[Value, Array] = {}

    def get(value: Value) -> Array:
        return values[value] if value in values else operand(value)

    own = {o for node in nodes for o in node.outputs if o not in kept}
    for node in nodes:
        if all(o in kept for o in node.outputs):
            continue
        with inheriting(backward_provenance(node.provenance)):
            for value in node.inputs:
                if value not in own and value not in values and not _is_constant(value):
                    values[value] = ops.optimization_barrier(operand(value))
            out = bind(node.primitive, *(get(v) for v in node.inputs), **node.attrs)
            results = zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=True)
            values.update((value, x) for value, x in results if value in own)
    return get


def _is_constant(value: Value) -> bool:
    return value.node is not None and not value.node.inputs


def _through(node: Node, operand: Callable, found: dict) -> tuple:
    """The cotangents of a node's inputs."""
    rule = node.primitive.gradient
    if isinstance(rule, NotDifferentiable):
        where = ", ".join(sorted(node.provenance))
        raise GradientError(
            f"a gradient needs the derivative of {node.name}{f' (from {where})' if where else ''}, which has none: "
            f"{rule.reason}. Keep it off the path from the parameters to the loss, or cut the path with "
            "keras.ops.stop_gradient."
        )
    outputs = tuple(operand(o) for o in node.outputs)
    cotangents = tuple(found[o] if o in found else zeros_like(x) for o, x in zip(node.outputs, outputs))
    return rule(cotangents, tuple(operand(v) for v in node.inputs), outputs, **node.attrs)
