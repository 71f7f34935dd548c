"""The transforms of Winograd convolutions on registers; `kgraph.ops.winograd` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from llvmlite import ir

from kgraph.codegen.cpu.builder import KernelBuilder
from kgraph.codegen.cpu.products import multiply_add
from kgraph.ops.winograd import TAPS, Pairs, even_polynomial, filter_matrix

Vectors = Sequence[ir.Value]
Read = Callable[[int], ir.Value]  # gives a vector by its number: loads it, perhaps


def input_parts(pairs: Pairs) -> list[tuple[int, ...]]:
    """Numbers of the points, cut into parts that can be computed apart with no work done twice."""
    return [(0,), *((2 * i + 1, 2 * i + 2) for i in range(len(pairs))), (2 * len(pairs) + 1,)]


def input_part(b: KernelBuilder, read: Read, pairs: Pairs, part: tuple[int, ...]) -> list[ir.Value]:
    """Some of B^T x, for m + 2 vectors x: the values at the points of a part, of `winograd.points` and infinity.

    The value at a point is that of all inputs as coefficients, weighted by the product over all other points.
    """
    whole = even_polynomial(pairs)
    if len(part) == 1:
        first = 0 if part == (0,) else 1
        return [_sum(b, [(f, read(2 * i + first)) for i, f in enumerate(whole)])]
    pair = pairs[part[0] // 2]
    others = even_polynomial(tuple(p for p in pairs if p != pair))
    even, odd = (_sum(b, [(f, read(2 * i + first)) for i, f in enumerate(others)]) for first in (2, 1))
    return [_sum(b, [(Fraction(1), even), (sign * pair, odd)]) for sign in (1, -1)]


def input_transform(b: KernelBuilder, x: Vectors, pairs: Pairs) -> list[ir.Value]:
    """B^T x for m + 2 vectors: the values at all points."""
    return [value for part in input_parts(pairs) for value in input_part(b, x.__getitem__, pairs, part)]


def output_part(b: KernelBuilder, read: Read, pairs: Pairs, powers: Sequence[int]) -> list[ir.Value]:
    """Some of A^T values, for m + 2 vectors: the outputs of these numbers. Even ones share work, and odd ones do."""
    outputs = 2 * len(pairs)
    combined = {}
    for odd in sorted({power % 2 for power in powers}):
        combine = b.sub if odd else b.add
        combined[odd] = [combine(read(2 * i + 1), read(2 * i + 2)) for i in range(outputs // 2)]
    out = []
    for power in powers:
        terms = [(p**power, v) for p, v in zip(pairs, combined[power % 2], strict=True)]
        if power == 0:
            terms.append((Fraction(1), read(0)))
        if power == outputs - 1:
            terms.append((Fraction(1), read(outputs + 1)))
        out.append(_sum(b, terms))
    return out


def filter_transform(b: KernelBuilder, g: Vectors, pairs: Pairs) -> list[ir.Value]:
    """G g for three vectors of taps: m + 2 vectors."""
    return [_sum(b, [(f, v) for f, v in zip(row, g, strict=True) if f]) for row in filter_matrix(pairs)]


def cotangent_transform(b: KernelBuilder, y: Vectors, pairs: Pairs) -> list[ir.Value]:
    """A y for m vectors, cotangents of outputs: the values at the points of a polynomial with these coefficients."""
    out = [y[0]]
    for pair in pairs:
        even = _sum(b, [(pair**power, y[power]) for power in range(0, len(y), 2)])
        odd = _sum(b, [(pair**power, y[power]) for power in range(1, len(y), 2)])
        out += [b.add(even, odd), b.sub(even, odd)]
    return [*out, y[-1]]


def filter_cotangent_transform(b: KernelBuilder, values: Vectors, pairs: Pairs) -> list[ir.Value]:
    """G^T values for m + 2 vectors: the cotangents of three taps."""
    matrix = filter_matrix(pairs)
    plus, minus = values[1:-1:2], values[2:-1:2]
    sums = [b.add(p, q) for p, q in zip(plus, minus, strict=True)]
    differences = [b.sub(p, q) for p, q in zip(plus, minus, strict=True)]
    out = []
    for tap in range(TAPS):
        # Rows of G for +p and -p differ in the sign of odd powers.
        terms = list(zip((row[tap] for row in matrix[1:-1:2]), differences if tap % 2 else sums, strict=True))
        ends = [(row[tap], value) for row, value in ((matrix[0], values[0]), (matrix[-1], values[-1])) if row[tap]]
        out.append(_sum(b, [*terms, *ends]))
    return out


def over_axes(count: int, axes: int, load: Callable, along: Callable) -> list[tuple[int, ir.Value]]:
    """(number, value) of a transform along each axis; load(number): a value of `count` along each axis."""
    if axes == 1:
        return list(enumerate(along([load(i) for i in range(count)])))
    columns = [along([load(i * count + j) for i in range(count)]) for j in range(count)]
    return list(enumerate(value for row in zip(*columns) for value in along(row)))


def _sum(b: KernelBuilder, terms) -> ir.Value:
    """The sum of (factor, vector) pairs; the terms without a multiplication come first."""
    total = None
    for factor, value in sorted(terms, key=lambda term: abs(term[0]) != 1):
        if total is None:
            total = value if factor == 1 else b.mul(value, b.constant_of(value.type, float(factor)))
        elif abs(factor) == 1:
            total = b.add(total, value) if factor == 1 else b.sub(total, value)
        else:
            total = multiply_add(b, value, b.constant_of(value.type, float(factor)), total)
    return total
