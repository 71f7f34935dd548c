"""Taking reductions apart: prologue, reductions over the same axes, epilogue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kgraph.codegen import expressions, regions
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import Temporary
from kgraph.codegen.regions import Leaf
from kgraph.ir import Node, TensorType, Value
from kgraph.ir.types import FLOATS

KINDS = {
    "reduce_sum": "sum",
    "reduce_prod": "prod",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "argmax": "argmax",
    "argmin": "argmin",
}
POSITIONS = ("argmax", "argmin")


@dataclass
class Parts:
    """A node taken apart.

    shape, axes: of the reductions' operands. leaves, prologue: what the reductions read, over `shape`; one expression
    output per reduction. reductions: (kind, dtype of the operand, dtype of the result). extras, epilogue: further
    operands over the kept axes; the expression's inputs are the reductions, then the extras. outputs: values written.
    """

    shape: tuple
    axes: tuple[int, ...]
    leaves: list[Leaf]
    prologue: tuple
    reductions: tuple
    extras: list[Leaf]
    epilogue: tuple
    outputs: Sequence[Value]


def take_apart(node: Node) -> Parts | str:
    """The parts of a node, or the reason why it has none."""
    inputs, outer, nodes, outputs = regions.body_of(node)
    reductions = [n for n in nodes if n.name in KINDS]
    if not reductions:
        return f"{node.name} holds no reduction"
    first = reductions[0]
    shape, axes = first.inputs[0].shape, _axes(first)
    keepdims = first.attrs.get("keepdims", False)
    for n in reductions:
        if n.inputs[0].shape != shape or _axes(n) != axes or n.attrs.get("keepdims", False) != keepdims:
            return "the reductions of one kernel need the same operand shape, axes and keepdims"
    stage = _stages(nodes)
    if isinstance(stage, str):
        return stage
    before = regions.needed(nodes, [n.inputs[0] for n in reductions])
    inner, leaves, kept = regions.leaves_and_nodes(
        *regions.used_inputs(inputs, outer, before, [n.inputs[0] for n in reductions]), before, shape
    )
    prologue = expressions.encode_nodes(kept, inner, [n.inputs[0] for n in reductions])
    if isinstance(prologue, str):
        return prologue
    result_shape = first.output.shape
    if any(o.shape != result_shape for o in outputs):
        return "the outputs of a reduction kernel need the reduced shape"
    results = [n.output for n in reductions]
    after = [n for n in regions.needed(nodes, outputs, stop=results) if n not in reductions]
    inner, extras, kept = regions.leaves_and_nodes(
        *regions.used_inputs(inputs, outer, after, outputs), after, result_shape
    )
    epilogue = expressions.encode_nodes(kept, [*results, *inner], outputs)
    if isinstance(epilogue, str):
        return epilogue
    if any(leaf.is_coordinate for leaf in extras):
        return "coordinates in the epilogue of a reduction"
    extras = [Leaf(e.value, e.dtype, _kept_spans(e.spans, len(shape), axes, keepdims)) for e in extras]
    kinds = tuple((KINDS[n.name], n.inputs[0].dtype, n.output.dtype) for n in reductions)
    return Parts(shape, axes, leaves, prologue, kinds, extras, epilogue, node.outputs)


def take_apart_moments(node: Node) -> Parts | str:
    """The parts of a node that gives the mean and the variance of a prologue, or the reason why it has none.

    The reductions stand for what their kernels sum up, and the epilogue gives three partial results as they are.
    """
    inputs, outer, nodes, outputs = regions.body_of(node)
    found = [n for n in nodes if n.name == "moments"]
    if len(found) != 1 or tuple(outputs) != tuple(found[0].outputs):
        return "a kernel of moments gives just the mean and the variance of one operand"
    (core,) = found
    (x,) = core.inputs
    before = regions.needed(nodes, [x])
    inner, leaves, kept = regions.leaves_and_nodes(*regions.used_inputs(inputs, outer, before, [x]), before, x.shape)
    prologue = expressions.encode_nodes(kept, inner, [x])
    if isinstance(prologue, str):
        return prologue
    dtype = compute_dtype(x.dtype)
    triple = ((dtype,) * 3, (), (0, 1, 2))
    sums = (("sum", x.dtype, dtype),) * 2
    return Parts(x.shape, core.attrs["axes"], leaves, prologue, sums, [], triple, node.outputs)


def _axes(node: Node) -> tuple[int, ...]:
    rank = len(node.inputs[0].shape)
    if node.name in POSITIONS:
        return (node.attrs["axis"] % rank,)
    return tuple(sorted(a % rank for a in node.attrs["axes"]))


def _stages(nodes: Sequence[Node]) -> str | None:
    """A reason if a reduction depends on another one."""
    reduced: set[Value] = set()
    for n in nodes:
        depends = any(v in reduced for v in n.inputs)
        if depends and n.name in KINDS:
            return "a reduction of another reduction's result"
        if depends or n.name in KINDS:
            reduced.update(n.outputs)
    return None


def _kept_spans(spans: tuple, rank: int, axes: tuple, keepdims: bool) -> tuple:
    """Spans over the result's axes as spans over the operands' axes."""
    if keepdims:
        return spans
    rest = iter(spans)
    return tuple(False if a in axes else next(rest) for a in range(rank))


def neutral(kind: str, dtype: str):
    """The Python value that changes no reduction of this kind."""
    if kind in ("sum", "or"):
        return 0
    if kind in ("prod", "and"):
        return 1
    greatest = kind in ("min", "argmin")
    if dtype == "bool":
        return greatest
    if dtype in FLOATS:
        return math.inf if greatest else -math.inf
    limits = np.iinfo(dtype)
    return int(limits.max if greatest else limits.min)


@dataclass
class Walk:
    """The merged axes of a reduction: sizes, roles ("k" for kept, "r" for reduced), leaves and extras over them."""

    sizes: list
    roles: tuple[str, ...]
    leaves: list[Leaf]
    extras: list[Leaf]

    @property
    def kept_sizes(self) -> list:
        return [s for s, role in zip(self.sizes, self.roles) if role == "k"]

    @property
    def reduced_sizes(self) -> list:
        return [s for s, role in zip(self.sizes, self.roles) if role == "r"]


class Reduced(Protocol):
    """What `walk` asks of the parts of a node."""

    shape: tuple
    axes: tuple[int, ...]
    leaves: list[Leaf]
    extras: list[Leaf]


def walk(parts: Reduced) -> Walk:
    """Merges the axes of a reduction's operands; one axis at least is reduced."""
    roles = tuple("r" if a in parts.axes else "k" for a in range(len(parts.shape)))
    spans = [leaf.spans for leaf in parts.leaves] + [leaf.spans for leaf in parts.extras]
    roled = [tuple(r == "k" for r in roles)]  # the results themselves, which also carry the roles through
    sizes, columns = regions.collapse(parts.shape, spans + roled, roles)
    kept = columns.pop() if columns else ()
    if all(kept):  # nothing is left to reduce: one step over an axis of size 1
        sizes, kept = [1, *sizes], (False, *kept)
        columns = [(False, *m) for m in columns]
    roles = tuple("k" if k else "r" for k in kept)
    count = len(parts.leaves)
    leaves = [Leaf(x.value, x.dtype, s) for x, s in zip(parts.leaves, columns[:count])]
    extras = [Leaf(x.value, x.dtype, s) for x, s in zip(parts.extras, columns[count:])]
    return Walk(sizes, roles, leaves, extras)


@dataclass
class Stages:
    """A reduction in two kernels: the first leaves a row of partial results per chunk, the second reduces those.

    partials: their buffers. untouched: the expression that gives them as they are. first, second: the reductions of
    both kernels, like `Parts.reductions`. walk: over the partial results.
    """

    partials: list[Temporary]
    untouched: tuple
    first: tuple
    second: tuple
    walk: Walk


def in_stages(parts: Parts, over: Walk, chunks) -> Stages:
    """The stages of a reduction (of no positions) that is cut into `chunks` along its reduced axes."""
    kept_sizes = over.kept_sizes
    dtypes = [compute_dtype(dtype) for _, dtype, _ in parts.reductions]
    partials = [Temporary(TensorType((chunks, *kept_sizes), d)) for d in dtypes]
    first = tuple((kind, dtype, d) for (kind, dtype, _), d in zip(parts.reductions, dtypes))
    second = tuple((kind, d, result) for (kind, _, result), d in zip(parts.reductions, dtypes))
    kept_only = [(False, *(s for s, r in zip(x.spans, over.roles) if r == "k")) for x in over.extras]
    sizes, columns = regions.collapse(
        [chunks, *kept_sizes], [*kept_only, (False, *(True for _ in kept_sizes))], "r" + "k" * len(kept_sizes)
    )
    results = columns.pop()
    if all(results):  # one chunk only
        sizes, results, columns = [1, *sizes], (False, *results), [(False, *m) for m in columns]
    spread = tuple(not (isinstance(s, int) and s == 1) for s in sizes)
    leaves = [Leaf(p, d, spread) for p, d in zip(partials, dtypes)]
    extras = [Leaf(x.value, x.dtype, s) for x, s in zip(over.extras, columns)]
    again = Walk(sizes, tuple("k" if k else "r" for k in results), leaves, extras)
    return Stages(partials, (tuple(dtypes), (), tuple(range(len(partials)))), first, second, again)
