"""The transforms of Winograd convolutions on registers; `kgraph.ops.winograd` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from llvmlite import ir

from kgraph.codegen.cpu.builder import KernelBuilder
from kgraph.codegen.cpu.products import multiply_add
from kgraph.ops.winograd import TAPS, Pairs, even_polynomial, filter_matrix

Vectors = Sequence[ir.Value]


def input_transform(b: KernelBuilder, x: Vectors, pairs: Pairs) -> list[ir.Value]:
    """B^T x for m + 2 vectors: the values at the points, in the order of `winograd.points`, then infinity.

    The value at a point is that of all inputs as coefficients, weighted by the product over all other points.
    """
    whole = even_polynomial(pairs)
    out = [_sum(b, zip(whole, x[::2]))]
    for pair in pairs:
        others = even_polynomial(tuple(p for p in pairs if p != pair))
        even, odd = _sum(b, zip(others, x[2::2])), _sum(b, zip(others, x[1::2]))
        out += [_sum(b, [(Fraction(1), even), (sign * pair, odd)]) for sign in (1, -1)]
    return [*out, _sum(b, zip(whole, x[1::2]))]


def output_transform(b: KernelBuilder, values: Vectors, pairs: Pairs) -> list[ir.Value]:
    """A^T values for m + 2 vectors: the m outputs."""
    outputs = len(values) - 2
    plus, minus = values[1:-1:2], values[2:-1:2]
    sums = [b.add(p, q) for p, q in zip(plus, minus, strict=True)]
    differences = [b.sub(p, q) for p, q in zip(plus, minus, strict=True)]
    out = []
    for power in range(outputs):
        terms = [(p**power, v) for p, v in zip(pairs, differences if power % 2 else sums, strict=True)]
        if power == 0:
            terms.append((Fraction(1), values[0]))
        if power == outputs - 1:
            terms.append((Fraction(1), values[-1]))
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
