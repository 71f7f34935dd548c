"""NumPy's `einsum`, lowered to transposes, reductions and `dot_general`."""

from __future__ import annotations

import math

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import Dim
from kgraph.ir.dims import evaluate, symbols
from kgraph.ops.common import Array, dtype_of, sizes_differ
from kgraph.ops.contraction import contract_labels, sum_labels
from kgraph.ops.rules import reorder

__all__ = ["diagonal", "einsum"]

# What a symbolic size counts for where the order of contractions is chosen.
_TYPICAL_SIZE = 32


def einsum(subscripts: str, *operands, preferred_dtype: str | None = None):
    """Einstein summation over labelled axes, as `numpy.einsum` spells it.

    subscripts: such as "bth,bsh->bts"; an ellipsis stands for leading axes that broadcast; a label repeated in one
        operand takes the diagonal; without "->" the result has the labels that occur once, in alphabetical order.
    operands: one tensor per term, all of one dtype; the result has that dtype or `preferred_dtype`.
    Raises ShapeError for subscripts that do not describe the operands and for sizes that do not agree.
    """
    terms, result = _parse(subscripts, operands)
    pending = [_take_diagonals(x, labels) for x, labels in zip(operands, terms)]
    if len(pending) == 1:
        value, labels = sum_labels(*pending[0], set(result))
        value = reorder(value, labels, result)
        return value if preferred_dtype in (None, dtype_of(value)) else ops.convert(value, dtype=preferred_dtype)
    while len(pending) > 1:
        i, j = _cheapest_pair(pending, result)
        (x, x_labels), (y, y_labels) = pending[i], pending[j]
        rest = [p for k, p in enumerate(pending) if k not in (i, j)]
        needed = {*result}.union(*(labels for _, labels in rest))
        kept = [label for label in dict.fromkeys((*x_labels, *y_labels)) if label in needed]
        if not rest:
            kept = result
        pending = [*rest, (contract_labels(x, x_labels, y, y_labels, kept, preferred_dtype), kept)]
    return pending[0][0]


def _parse(subscripts: str, operands) -> tuple[list[list], list]:
    """Labels of every operand and of the result; the axes under an ellipsis are numbered from the back."""
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise ShapeError(f"einsum: {subscripts!r} describes {len(terms)} operands, got {len(operands)}")
    parsed = [_labels(term, len(x.shape), subscripts) for term, x in zip(terms, operands)]
    numbers = sorted({a for labels in parsed for a in labels if isinstance(a, int)}, reverse=True)
    letters = [a for labels in parsed for a in labels if isinstance(a, str)]
    if not arrow:
        return parsed, [*numbers, *sorted(a for a in set(letters) if letters.count(a) == 1)]
    before, dots, after = output.partition("...")
    result = [*before, *(numbers if dots else ()), *after]
    unknown = set(result) - {*letters, *numbers}
    if unknown or len(set(result)) != len(result):
        raise ShapeError(f"einsum: the result of {subscripts!r} names a label twice or one that no operand has")
    if numbers and not dots:
        raise ShapeError(f"einsum: {subscripts!r} has an ellipsis in an operand and none in the result")
    return parsed, result


def _labels(term: str, rank: int, subscripts: str) -> list:
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not dots) or not (before + after).replace("", "a").isalpha():
        raise ShapeError(f"einsum: the term {term!r} of {subscripts!r} does not describe an operand of rank {rank}")
    return [*before, *range(hidden, 0, -1), *after]


def _take_diagonals(x, labels: list) -> tuple[Array, list]:
    """`x` with every repeated label reduced to the diagonal of its axes."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            rest = [a for a in range(len(labels)) if a not in (first, second)]
            size = x.shape[first]
            if sizes_differ(size, x.shape[second]):
                raise ShapeError(f"einsum: label {label!r} names axes of sizes {size} and {x.shape[second]}")
            x = diagonal(ops.transpose(x, permutation=(*rest, first, second)))
            labels = [*(labels[a] for a in rest), label]
    return x, labels


def diagonal(x):
    """The main diagonal of square matrices: [..., N, N] gives [..., N].

    With N zeros behind the N*N elements the diagonal is the first column of an [N, N + 1] matrix, so that padding,
    reshaping and slicing suffice, for symbolic sizes too.
    """
    lead, size = tuple(x.shape[:-2]), x.shape[-1]
    rank = len(lead)
    flat = ops.reshape(x, shape=(*lead, size * size))
    flat = ops.pad(
        flat,
        ops.full(shape=(), value=0, dtype=dtype_of(x)),
        low=(0,) * (rank + 1),
        high=(*(0,) * rank, size),
        interior=(0,) * (rank + 1),
    )
    columns = ops.reshape(flat, shape=(*lead, size, size + 1))
    first = ops.slice(columns, start=(0,) * (rank + 2), limit=(*lead, size, 1), stride=(1,) * (rank + 2))
    return ops.reshape(first, shape=(*lead, size))


def _cheapest_pair(pending: list, result: list) -> tuple[int, int]:
    """The two operands whose product has the fewest elements, earlier ones first."""
    if len(pending) == 2:
        return 0, 1
    sizes = {label: _estimate(size) for x, labels in pending for label, size in zip(labels, x.shape)}
    best = (math.inf, 0, 1)
    for i in range(len(pending)):
        for j in range(i + 1, len(pending)):
            others = {*result}.union(*(labels for k, (_, labels) in enumerate(pending) if k not in (i, j)))
            elements = 1
            for label in {*pending[i][1], *pending[j][1]} & others:
                elements *= sizes[label]
            if elements < best[0]:
                best = (elements, i, j)
    return best[1], best[2]


def _estimate(size) -> int:
    return evaluate(size, dict.fromkeys(symbols((size,)), _TYPICAL_SIZE)) if isinstance(size, Dim) else size
