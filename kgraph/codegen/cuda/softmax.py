"""softmax, log_softmax and logsumexp, alone or in fused nodes of kind "softmax".

Largest element and sum of exponentials are found in one look at the row: the sum is rescaled when the largest element
so far grows. What is subtracted before the exponential is always finite, so that rows of -inf and rows with +inf need
no code of their own until the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.codegen.cuda import rows
from kgraph.codegen.cuda.accumulators import Accumulator
from kgraph.codegen.cuda.scalar_ops import suffix
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.normalisations import take_apart_softmax
from kgraph.ir import Node

TEMPLATE = "kgraph.codegen.cuda.softmax:render"


def accepts(node: Node) -> str | None:
    """None where the node is softmax or a relative of it with scalar code around it."""
    parts = take_apart_softmax(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call; see rows.py."""
    parts = take_apart_softmax(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    return rows.lower_parts(parts, TEMPLATE, (parts.core.name,), target, parts.core.name)


class Exponentials(Accumulator):
    """The largest element, brought into the finite range, and the sum of exp(element - largest)."""

    def __init__(self, k: KernelSource, dtype: str):
        super().__init__(k, "exponentials", dtype)
        self.names = [k.fresh("largest"), k.fresh("total")]
        self.dtypes = [self.dtype] * 2
        self.most = float(np.finfo(self.dtype).max)

    def exp(self, text: str) -> str:
        return f"exp{suffix(self.dtype)}({text})"

    def reset(self) -> None:
        k, (largest, total) = self.k, self.names
        k.line(f"{largest} = {k.literal(-self.most, self.dtype)}")
        k.line(f"{total} = {k.literal(0, self.dtype)}")

    def finite(self, value: str) -> str:
        """A value that is greater than `largest`, at most the greatest finite number."""
        most = self.k.literal(self.most, self.dtype)
        return self.k.let(f"({value} if {value} < {most} else {most})")

    def raise_to(self, value: str) -> None:
        """Let the largest element be at least `value`, before the first exponential is added. NaN changes nothing."""
        k, (largest, _) = self.k, self.names
        with k.suite(f"if {value} > {largest}:"):
            k.line(f"{largest} = {self.finite(value)}")

    def add(self, exponential: str) -> None:
        """Add an exponential relative to `largest`."""
        (_, total) = self.names
        self.k.line(f"{total} = {total} + {exponential}")

    def step(self, values: Sequence[str], position: str) -> None:
        k, (largest, total), (value,) = self.k, self.names, values
        with k.suite(f"if {value} > {largest}:"):
            high = self.finite(value)
            k.line(f"{total} = {total} * {self.exp(f'{largest} - {high}')} + {self.exp(f'{value} - {high}')}")
            k.line(f"{largest} = {high}")
        with k.suite("else:"):
            self.add(self.exp(f"{value} - {largest}"))

    def merge(self, others: Sequence[str]) -> None:
        k, (largest, total), (other, more) = self.k, self.names, others
        high = k.let(f"({largest} if {largest} > {other} else {other})")
        k.line(f"{total} = {total} * {self.exp(f'{largest} - {high}')} + {more} * {self.exp(f'{other} - {high}')}")
        k.line(f"{largest} = {high}")


def render(params: tuple, target) -> str:
    kernel = rows.RowKernel(params, target)
    (core,) = kernel.algorithm
    sums = Exponentials(kernel.k, kernel.dtype)
    return kernel.for_each_row(lambda row: _ROWS[core](row, sums))


def _softmax(row: rows.RowKernel, sums: Exponentials) -> None:
    k = row.k
    largest, total = sums.names
    row.read()
    if not row.kept:
        row.accumulate([sums])
        scale = _inverse(row, total)
        row.write(lambda value, spot: f"({sums.exp(f'{value} - {largest}')} * {scale})")
        return
    own = _own_exponentials(row, sums, keep=True)
    row.merge([sums])
    scale = k.let(f"({sums.exp(f'{own} - {largest}')} * {_inverse(row, total)})")
    row.write(lambda value, spot: f"({value} * {scale})")


def _log_softmax(row: rows.RowKernel, sums: Exponentials) -> None:
    largest, total = sums.names
    _total(row, sums)
    logarithm = row.k.let(_or_nan(row, total, f"log{suffix(row.dtype)}({total})"))
    row.write(lambda value, spot: f"(({value} - {largest}) - {logarithm})")


def _logsumexp(row: rows.RowKernel, sums: Exponentials) -> None:
    largest, total = sums.names
    _total(row, sums)
    row.write_statistic(row.k.let(f"({largest} + log{suffix(row.dtype)}({total}))"))


_ROWS = {"softmax": _softmax, "log_softmax": _log_softmax, "logsumexp": _logsumexp}


def _total(row: rows.RowKernel, sums: Exponentials) -> None:
    row.read()
    if row.kept:
        _own_exponentials(row, sums, keep=False)
        row.merge([sums])
    else:
        row.accumulate([sums])


def _own_exponentials(row: rows.RowKernel, sums: Exponentials, keep: bool) -> str:
    """Sums up the lane's elements, in whose place their exponentials are kept if wanted; gives the lane's largest."""
    k = row.k
    sums.reset()
    row.each(lambda value, spot: sums.raise_to(row.masked(value, spot, -np.inf)))
    largest, _ = sums.names

    def exponential(value: str, spot: rows.Spot) -> str | None:
        term = k.let(sums.exp(f"{row.masked(value, spot, -np.inf)} - {largest}"))
        sums.add(term)
        return term if keep else None

    row.each(exponential)
    own = k.fresh("own")
    k.line(f"{own} = {largest}")  # merging changes it
    return own


def _inverse(row: rows.RowKernel, total: str) -> str:
    return row.k.let(_or_nan(row, total, f"{row.c(1)} / {total}"))


def _or_nan(row: rows.RowKernel, total: str, text: str) -> str:
    """The text's value, but NaN where +inf is in the row."""
    return f"({row.c(float('nan'))} if {total} == {row.c(float('inf'))} else {text})"
