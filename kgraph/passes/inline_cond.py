"""Turns conditions between cheap branches into selections, which fuse with what surrounds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kgraph import ops
from kgraph.ir import Graph, Node, Rewriter, Value, append_graph, np_dtype
from kgraph.ir.recorder import Recorder, inheriting
from kgraph.passes.manager import Decision, PassContext
from kgraph.passes.patterns import estimated_elements, is_elementwise

MOST_BRANCHES = 4
# Elements that may always be computed in vain, and how many may be per element of the results: to run one branch alone
# ends a native call, and copies every result.
FREE_ELEMENTS = 1 << 16
ELEMENTS_PER_RESULT = 48
_DRAWS = frozenset({"random_words", "random_bits", "random_uniform", "random_normal", "truncated_normal"})
_LINEAR = _DRAWS | frozenset(
    """constant full iota dim_value reshape transpose broadcast_to slice rev pad concatenate
    reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or argmax argmin""".split()
)


def inline_cond(graph: Graph, context: PassContext) -> Graph:
    """`cond(p, x; f, g)  ->  select(p, g(x), f(x))`, where both branches are elementwise and the like.

    Branches that would be costly to compute in vain stay branches; the reason is stored.
    """

    def visit(node: Node, inputs: tuple[Value, ...], rewriter: Rewriter):
        if node.name != "cond":
            return None
        branches = [inline_cond(branch, context) for branch in node.attrs["branches"]]
        reason = _refuses(node, branches, context)
        if reason is not None:
            context.decisions.append(Decision("cond", "kept as a branch", reason, node.provenance))
            return rewriter.emit(node.primitive, *inputs, **dict(node.attrs, branches=tuple(branches)))
        index, *operands = inputs
        results = [append_graph(rewriter.target, branch, operands, node.provenance) for branch in branches]
        return tuple(_selected(index, list(values), rewriter, node.provenance) for values in zip(*results))

    return Rewriter(graph).run(visit)


def _refuses(node: Node, branches: list[Graph], context: PassContext) -> str | None:
    """None if all branches may be computed every time, else the reason why not."""
    if len(branches) > MOST_BRANCHES:
        return f"{len(branches)} branches"
    work = 0
    for branch in branches:
        if any(own.type != given.type for own, given in zip(branch.inputs, node.inputs[1:], strict=True)):
            return "a branch has sizes of its own"
        for inner in branch.nodes:
            if inner.name not in _LINEAR and not is_elementwise(inner):
                return f"{inner.name} may be costly"
            if inner.name not in _DRAWS | {"constant", "dim_value", "reshape"}:
                reason = context.accepts(inner)
                if reason is not None:
                    return f"{inner.name}: {reason}"
            if inner.name not in ("constant", "reshape"):
                work += max(estimated_elements(v.shape) for v in (*inner.inputs, *inner.outputs))
    allowed = max(FREE_ELEMENTS, ELEMENTS_PER_RESULT * sum(estimated_elements(v.shape) for v in node.outputs))
    return None if work <= allowed else f"the branches compute about {work} elements, {allowed} would do"


def _selected(index: Value, values: list[Value], rewriter: Rewriter, provenance: frozenset) -> Value:
    """values[index], the index clamped into their range."""
    if all(v is values[0] for v in values):
        return values[0]
    recorder = Recorder(graph=rewriter.target)
    with recorder.active(), inheriting(provenance):
        number, candidates = recorder.wrap(index), [recorder.wrap(v) for v in values]
        if index.dtype == "bool":
            return recorder.value(ops.select(number, candidates[1], candidates[0]))
        out: Any = candidates[-1]
        for i in reversed(range(len(candidates) - 1)):
            out = ops.select(ops.le(number, np.array(i, np_dtype(index.dtype))), candidates[i], out)
        return recorder.value(out)
