"""Updates what is cut into windows, changed there and put together again where it lies.

A cache of keys and values for all layers is carried through a loop as one array: every layer takes its part, writes one
row, and the parts are stacked for the next step. As updates of the whole, of which layers read windows, the steps of a
loop write the rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kgraph.ir import Graph, Node, Rewriter, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import primitive


def window_updates(graph: Graph, context: PassContext | None = None) -> Graph:
    """`concatenate(dynamic_update_slice(x[:n], u, i), x[n:])  ->  dynamic_update_slice(x, u, i)`.

    What else reads an updated part reads a slice of the whole after the update, of the last one there is by then.
    """
    plans = _plans(graph)
    if not plans:
        return graph
    updates = {window.updates[0]: window for plan in plans for window in plan.updated}
    wholes = {plan.node: plan for plan in plans}
    current: dict[Value, Value] = {}
    parts: dict[tuple[Value, Value], Value] = {}

    def part(window: _Window, old: Value, rewriter: Rewriter) -> Value:
        whole = current[window.base]
        if (whole, old) not in parts:
            limit = tuple(a + n for a, n in zip(window.starts, window.sizes))
            cut = rewriter.emit(primitive("slice"), whole, start=window.starts, limit=limit, stride=(1,) * len(limit))
            parts[whole, old] = rewriter.emit(primitive("reshape"), cut, shape=old.shape)
        return parts[whole, old]

    def visit(node: Node, inputs: tuple[Value, ...], rewriter: Rewriter):
        if node in updates:
            window = updates[node]
            base = window.base
            current[base] = _updated(window, current.get(base, rewriter.map(base)), inputs, rewriter)
            return node.outputs  # readers are given a part below
        if node in wholes:
            return rewriter.emit(primitive("reshape"), current[wholes[node].base], shape=node.output.shape)
        if not any(v.node in updates for v in node.inputs):
            return None
        given = [
            part(updates[old.node], old, rewriter) if old.node in updates else new
            for old, new in zip(node.inputs, inputs)
        ]
        kept = Node(node.primitive, given, node.attrs, [o.type for o in node.outputs], node.provenance)
        rewriter.target.nodes.append(kept)
        return kept.outputs

    return Rewriter(graph).run(visit)


@dataclass(frozen=True)
class _Window:
    """What a value is of another one: base[starts : starts + sizes] with `updates`, nodes that change some of it.

    axes: for each axis of the value that of the base, -1 for an axis of one element that may be any.
    """

    base: Value
    starts: tuple
    sizes: tuple
    axes: tuple[int, ...]
    updates: tuple[Node, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.base.shape


@dataclass(frozen=True)
class _Plan:
    """node: puts `base` together again. updated: its windows with an update."""

    node: Node
    base: Value
    updated: list[_Window]


def _plans(graph: Graph) -> list[_Plan]:
    if not any(node.name == "dynamic_update_slice" for node in graph.nodes):
        return []
    windows = _Windows()
    uses = graph.uses()
    outputs = set(graph.outputs)
    plans: dict[Value, _Plan | None] = {}
    for node in graph.nodes:
        if node.name != "concatenate":
            continue
        window = windows.of(node.output)
        base = window.base
        if base is node.output or not window.is_whole or not window.updates:
            continue
        plan = _plan(node, windows, uses, outputs)
        plans[base] = None if base in plans else plan  # two versions of the base are not one array
    return [plan for plan in plans.values() if plan is not None]


def _plan(node: Node, windows: _Windows, uses: dict[Value, list[Node]], outputs: set[Value]) -> _Plan | None:
    """The plan for a node that puts a base together, unless someone else reads the base or a part as it was."""
    base = windows.of(node.output).base
    members: dict[Node, None] = {}
    stack = [node]
    while stack:
        member = stack.pop()
        if member not in members:
            members[member] = None
            read = member.inputs[:1] if member.name == "dynamic_update_slice" else member.inputs
            stack += [v.node for v in read if v is not base and v.node is not None]
    updated = [windows.of(m.output) for m in members if m.name == "dynamic_update_slice"]
    as_it_was = [base, *(m.output for m in members if not windows.of(m.output).updates)]
    if any(v in outputs or any(reader not in members for reader in uses.get(v, ())) for v in as_it_was):
        return None
    if any(window.updates[0].output in outputs for window in updated):
        return None
    # An update of an updated part would need the part between the two.
    return _Plan(node, base, updated) if all(len(w.updates) == 1 for w in updated) else None


class _Windows:
    """The window that each value is; a value that is none is all of itself."""

    def __init__(self) -> None:
        self._known: dict[Value, _Window] = {}

    def of(self, value: Value) -> _Window:
        if value not in self._known:
            found = None
            if value.node is not None and value.node.name in _RULES and value.type.is_static:
                found = _RULES[value.node.name](value.node, [self.of(v) for v in _read(value.node)])
            rank = len(value.shape)
            self._known[value] = found or _Window(value, (0,) * rank, value.shape, tuple(range(rank)))
        return self._known[value]


def _read(node: Node) -> Sequence[Value]:
    return node.inputs if node.name == "concatenate" else node.inputs[:1]


def _of_reshape(node: Node, windows: list[_Window]) -> _Window | None:
    """Axes of one element come and go."""
    (window,) = windows
    before = [(n, a) for n, a in zip(node.inputs[0].shape, window.axes) if n != 1]
    if [n for n, _ in before] != [n for n in node.output.shape if n != 1]:
        return None
    axes = iter([a for _, a in before])
    return replace(window, axes=tuple(-1 if n == 1 else next(axes) for n in node.output.shape))


def _of_slice(node: Node, windows: list[_Window]) -> _Window | None:
    (window,) = windows
    attrs, x, out = node.attrs, node.inputs[0], node.output
    if window.updates or any(step != 1 for step in attrs["stride"] or ()):
        return None
    starts, sizes = list(window.starts), list(window.sizes)
    for start, own, n, axis in zip(attrs["start"], x.shape, out.shape, window.axes):
        if n != own:
            if axis < 0:
                return None
            starts[axis] += start
            sizes[axis] = n
    return replace(window, starts=tuple(starts), sizes=tuple(sizes))


def _of_update(node: Node, windows: list[_Window]) -> _Window | None:
    (window,) = windows
    x, update = node.inputs[:2]
    for own, n, axis in zip(x.shape, update.shape, window.axes):
        # Starts are clamped to where the update fits: into the window, which has to be where it fits into the base.
        if n != own and (axis < 0 or window.sizes[axis] != window.base.shape[axis]):
            return None
    return replace(window, updates=(*window.updates, node))


def _of_concatenate(node: Node, windows: list[_Window]) -> _Window | None:
    first, out = windows[0], node.output
    along = node.attrs["axis"] % len(out.shape)
    varying = lambda w, v: tuple(-1 if n == 1 else a for n, a in zip(v.shape, w.axes))
    seen = [varying(w, v)[:along] + varying(w, v)[along + 1 :] for w, v in zip(windows, node.inputs)]
    if any(w.base is not first.base or s != seen[0] for w, s in zip(windows, seen)):
        return None
    moving = [k for k in range(len(first.starts)) if any(w.starts[k] != first.starts[k] for w in windows)]
    if len(moving) != 1:
        return None
    (axis,) = moving
    at = first.starts[axis]
    for window, part in zip(windows, node.inputs):
        others = window.sizes[:axis] + window.sizes[axis + 1 :] == first.sizes[:axis] + first.sizes[axis + 1 :]
        if not others or window.starts[axis] != at or window.sizes[axis] != part.shape[along]:
            return None
        at += window.sizes[axis]
    axes = (*seen[0][:along], axis, *seen[0][along:])
    in_order = [a for a in axes if a >= 0]
    if in_order != sorted(set(in_order)):
        return None
    sizes = (*first.sizes[:axis], at - first.starts[axis], *first.sizes[axis + 1 :])
    return _Window(first.base, first.starts, sizes, axes, tuple(u for w in windows for u in w.updates))


_RULES = {
    "reshape": _of_reshape,
    "slice": _of_slice,
    "dynamic_update_slice": _of_update,
    "concatenate": _of_concatenate,
}


def _updated(window: _Window, whole: Value, inputs: tuple[Value, ...], rewriter: Rewriter) -> Value:
    """The whole base after the update of a window; inputs: those of the update in the new graph."""
    (node,) = window.updates
    x, update, *starts = node.inputs
    dtype = starts[0].dtype if starts else "int32"
    shape = [1] * len(window.starts)
    at: dict[int, Value] = {}
    for own, n, axis, start in zip(x.shape, update.shape, window.axes, inputs[2:]):
        if own != 1:
            shape[axis] = n
        if n != own:
            at[axis] = start
    literal: Any = lambda k: rewriter.emit(primitive("constant"), value=np.array(window.starts[k], dtype))
    places = [at[k] if k in at else literal(k) for k in range(len(shape))]
    given = rewriter.emit(primitive("reshape"), inputs[1], shape=tuple(shape))
    return rewriter.emit(primitive("dynamic_update_slice"), whole, given, *places)
