"""Mean and variance of an operand over axes in one pass over memory: nodes `moments`, with an elementwise prologue.

A chunk of the operand small enough for the cache is read twice: for its mean, then for the sum of squared differences
from that mean, so that nothing cancels (and for their sum, which tells what rounding took from the mean). A second
kernel combines the chunks in their order: with n elements of mean m and sum of squares s in each, mean = sum(n m) /
sum(n) and variance = sum(s + n (m - mean)^2) / sum(n). The chunks' means are kept in two parts. Chunks depend on sizes
alone. Axes are walked as in reduce.py.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from kgraph.codegen.cpu import reduce, regions
from kgraph.codegen.cpu.regions import Leaf
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, Temporary
from kgraph.codegen.reductions import take_apart_moments
from kgraph.ir import Node, TensorType
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cpu.moments:render_{}"


def accepts(node: Node) -> str | None:
    """None where the node is one `moments` behind elementwise nodes with scalar code."""
    parts = take_apart_moments(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call where the operand is small, else one over its chunks and one that combines these."""
    parts = take_apart_moments(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    plan, leaves, _ = reduce.merged(parts, target)
    name = regions.kernel_name("", parts.prologue, "moments")
    chunk = plan.chunk(parts.reductions)
    # An output's dtype is that of the stores; the epilogue's says it to the renderer.
    stored = (tuple(o.dtype for o in parts.outputs), (), (0, 1))
    if not chunk:
        return [
            reduce.call(plan, leaves, parts.prologue, parts.reductions, [], stored, parts.outputs, 0, TEMPLATE, name)
        ]
    first_reduced = plan.sizes[plan.first_reduced]
    chunks = ceil_div(first_reduced, chunk)
    kept = [s for s, r in zip(plan.sizes, plan.roles) if r == "k"]
    dtype = parts.epilogue[0][0]
    partials = [Temporary(TensorType((chunks, *kept), dtype)) for _ in range(3)]
    first = reduce.call(
        plan, leaves, parts.prologue, parts.reductions, [], parts.epilogue, partials, chunk, TEMPLATE, name
    )
    columns = [product(kept)] if kept else []
    spans = (True,) * (1 + len(columns))
    combined = reduce.Plan([chunks, *columns], ("r", "k")[: len(spans)], parts.epilogue, target, widest=1)
    second = reduce.call(
        combined,
        [Leaf(t, dtype, spans) for t in partials],
        parts.epilogue,
        (("sum", dtype, dtype),) * 2,
        [],
        stored,
        parts.outputs,
        0,
        "kgraph.codegen.cpu.moments:render_combined_{}",
        "combine_moments",
    )
    inner = product(s for a, (s, r) in enumerate(zip(plan.sizes, plan.roles)) if r == "r" and a != plan.first_reduced)
    second.sizes = [*second.sizes, chunk * inner, first_reduced * inner]
    return [first, second]


# -- renderers --------------------------------------------------------------------------------------------------------
def render_inner(params: tuple, target) -> str:
    return _render(params, target, _chunk_moments)


def render_outer(params: tuple, target) -> str:
    return _render(params, target, _chunk_moments)


def render_combined_inner(params: tuple, target) -> str:
    return _render(params, target, _combined_moments)


def render_combined_outer(params: tuple, target) -> str:
    return _render(params, target, _combined_moments)


def _render(params: tuple, target, algorithm: Callable) -> str:
    """The kernel in which `algorithm(kernel, chunk number, totals)` gives the results per vector of columns.

    totals(terms): per vector of columns, the sums over what is reduced of `terms(prologue values, index along the last
    reduced axis, vector number)`, a list; for rows along the lanes there is one vector, with the sums in every lane.
    """
    k = reduce.Kernel(params, target)
    b = k.b

    def columns(positions, chunk_number, masks) -> None:
        totals = lambda terms: reduce.strip_totals(k, positions, chunk_number, masks, terms)
        index = k.output_index(positions, chunk_number)
        for j, (mask, results) in enumerate(zip(masks, algorithm(k, chunk_number, totals))):
            for pointer, value in zip(k.outputs, results):
                b.store(pointer, index + j * k.lanes, value, mask)

    def row(unit) -> None:
        positions, chunk_number = k.unit(unit, k.kept)

        def totals(terms: Callable) -> list[list[ir.Value]]:
            sums = k.accumulate(k.lanes, k.slots)
            values = reduce.row_totals(k, sums, positions, chunk_number, lambda values, i: terms(values, i, 0))
            return [[b.broadcast(v, k.lanes) for v in values]]

        (results,) = algorithm(k, chunk_number, totals)
        for pointer, value in zip(k.outputs, results):
            b.store(pointer, k.output_index(positions, chunk_number), b.lane(value, 0) if k.lanes > 1 else value)

    if k.roles[-1] == "k":
        k.for_each_strip(columns)
    else:
        with b.loop(b.begin, b.end) as unit:
            row(unit)
    return b.ir_text()


def _chunk_moments(k: reduce.Kernel, chunk_number, totals: Callable) -> list[tuple]:
    """What `_corrected` gives; the mean and the variance where nothing is chunked."""
    b = k.b
    start, stop = k.reduced_range(k.reduced[0], chunk_number)
    count = stop - start
    for axis in k.reduced[1:]:
        count = k.sizes[axis] * count
    number = _float(k, count)
    rough = [b.div(sums[0], number) for sums in totals(lambda values, i, column: values)]

    def differences(values, i, column):
        difference = b.sub(values[0], rough[column])
        return [difference, b.mul(difference, difference)]

    parts = _corrected(k, number, rough, totals(differences))
    return parts if k.chunked else _moments(k, number, parts)


def _corrected(k: reduce.Kernel, number, rough: list, sums: list) -> list[tuple]:
    """(rough mean, what it lacks, sum of squared differences from the mean), given the sums of the differences from
    the rough mean and of their squares."""
    b, out = k.b, []
    for mean, (rest, squares) in zip(rough, sums):
        correction = b.div(rest, number)
        squares = b.fma(b.ir.fneg(correction), rest, squares)
        # Differences from an infinite mean are no numbers.
        usable = b.ir.fcmp_ordered("ord", correction, correction)
        out.append((mean, b.select(usable, correction, b.constant_of(correction.type, 0.0)), squares))
    return out


def _moments(k: reduce.Kernel, number, parts: list) -> list[tuple]:
    return [(k.b.add(mean, rest), k.b.div(squares, number)) for mean, rest, squares in parts]


def _combined_moments(k: reduce.Kernel, chunk_number, totals: Callable) -> list[tuple]:
    """The mean and the variance of all chunks; the operands are what `_corrected` gives for each."""
    b = k.b
    rank = len(k.roles)
    full, every = b.size(rank), b.size(rank + 1)
    chunks = k.sizes[0]

    def weight(i) -> ir.Value:
        """Elements in chunk i, of which the last may be shorter; for rows along the lanes in chunks i, i + 1 ..."""
        if k.roles[-1] == "k":
            return _float(k, b.min(full, every - i * full))
        at = b.broadcast(b.i64(i), k.lanes)
        at = b.add(at, b.lane_numbers("int64", k.lanes)) if k.lanes > 1 else at
        last = b.compare("==", at, b.broadcast(b.i64(chunks - 1), k.lanes))
        return b.select(last, _float(k, every - (chunks - 1) * full), _float(k, full))

    number = _float(k, every)
    weighted = totals(lambda values, i, column: [b.mul(b.add(values[0], values[1]), weight(i))])
    rough = [b.div(sums[0], number) for sums in weighted]

    def differences(values, i, column):
        difference = b.add(b.sub(values[0], rough[column]), values[1])
        weighed = b.mul(difference, weight(i))
        return [weighed, b.fma(weighed, difference, values[2])]

    return _moments(k, number, _corrected(k, number, rough, totals(differences)))


def _float(k: reduce.Kernel, count) -> ir.Value:
    """A count as a vector of the sums' dtype."""
    dtype = compute_dtype(k.reductions[0][1])
    return k.b.broadcast(k.b.ir.sitofp(k.b.i64(count), k.b.type(dtype)), k.lanes)
