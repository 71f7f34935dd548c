"""Precision of compiled models: what is rounded, and the error that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kgraph.ir import Graph
from kgraph.ir.interpreter import evaluate

PRECISIONS = ("float32", "bf16")


def check_precision(precision: str) -> None:
    """Raises ValueError for what is no precision that models can be compiled for."""
    if precision not in PRECISIONS:
        raise ValueError(f"kgraph has no precision {precision!r}; precisions: {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class OutputError:
    """The error of one output.

    rms: root mean square of the differences, as a fraction of that of the exact values. largest: the largest
    difference, as a fraction of the largest exact value. elements: numbers that were compared.
    """

    name: str
    rms: float
    largest: float
    elements: int


@dataclass(frozen=True)
class PrecisionReport:
    """Errors of a compiled model's outputs on given inputs, against the same graph computed in float64 by NumPy.

    There nothing is rounded to float32, bfloat16 or float16; integers, and so the weights and activations of quantised
    layers, are what they are. rms, largest: the worst of the outputs.
    """

    precision: str
    outputs: tuple[OutputError, ...]

    @property
    def rms(self) -> float:
        return max((o.rms for o in self.outputs), default=0.0)

    @property
    def largest(self) -> float:
        return max((o.largest for o in self.outputs), default=0.0)

    def __str__(self) -> str:
        lines = [f"precision {self.precision}, against float64:"]
        lines += [
            f"  {o.name}: rms error {o.rms:.2e}, largest error {o.largest:.2e} ({o.elements} elements)"
            for o in self.outputs
        ]
        return "\n".join(lines)

    __repr__ = __str__


def measure(
    precision: str, graph: Graph, arrays: Sequence, weights: Sequence, results: Sequence, names: Sequence[str]
) -> PrecisionReport:
    """The report for the `results` of a call, the first outputs of the captured `graph`, that are floats."""
    exact = evaluate(graph, arrays, weights, precision="float64")
    outputs = []
    for name, result, wanted in zip(names, results, exact):
        if wanted.dtype.kind == "f" and wanted.size:
            outputs.append(_error(name, np.asarray(result, np.float64), wanted))
    return PrecisionReport(precision, tuple(outputs))


def _error(name: str, result: np.ndarray, wanted: np.ndarray) -> OutputError:
    finite = np.isfinite(wanted)
    result, wanted = result[finite], wanted[finite]
    difference = np.abs(result - wanted)
    share = lambda error, size: float(error / size) if size else float(error)
    root = lambda values: np.sqrt(np.mean(np.square(values))) if values.size else 0.0
    largest = share(difference.max(initial=0.0), np.abs(wanted).max(initial=0.0))
    return OutputError(name, share(root(difference), root(wanted)), largest, int(wanted.size))
