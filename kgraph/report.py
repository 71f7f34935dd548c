"""What a compiled model says about itself: `explain` and `profile`."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kgraph.decisions import Decision
from kgraph.dims import Dim
from kgraph.runtime.steps import HostStep, NativeStep

if TYPE_CHECKING:
    from kgraph.compiler import CompiledGraph
    from kgraph.ir import Node
    from kgraph.runtime.plan import Program


@dataclass
class KernelRow:
    """One step of the plan."""

    label: str
    layers: tuple[str, ...]
    members: tuple[str, ...]
    output: str
    flops: int | Dim
    bytes: int | Dim
    host: bool
    reason: str = ""
    microseconds: float | None = None
    threads: int = 0


def _layer_names(provenance) -> tuple[str, ...]:
    """Keras layer paths out of provenance entries `layer/path:function`."""
    return tuple(sorted({p.rsplit(":", 1)[0] for p in provenance if p.rsplit(":", 1)[0]}))


def _members(node: Node) -> tuple[str, ...]:
    if node.name != "fusion":
        return (node.name,)
    return tuple(n.name for n in node.attrs["body"].nodes if n.name != "constant")


def kernel_rows(compiled: CompiledGraph) -> list[KernelRow]:
    """One row per step of the program."""
    rows = []
    for step, node in zip(compiled.program.steps, compiled.nodes):
        rows.append(
            KernelRow(
                label=step.label,
                layers=_layer_names(node.provenance),
                members=_members(node),
                output=", ".join(str(o.type) for o in node.outputs),
                flops=step.flops if isinstance(step, NativeStep) else 0,
                bytes=step.bytes if isinstance(step, NativeStep) else 0,
                host=isinstance(step, HostStep),
                reason=step.reason if isinstance(step, HostStep) else "",
            )
        )
    return rows


@dataclass
class Explanation:
    """Kernels with what was fused into each, the decisions against fusing, and the host steps with their reasons.

    `kernels`: one row per step. `decisions`: what passes refused, and why, and a GPU's library at the sizes of calls so
    far. Prints as a table.
    """

    name: str
    kernels: list[KernelRow]
    decisions: list[Decision]
    specialised: str | None = None
    precision: str | None = None

    @property
    def host_steps(self) -> list[KernelRow]:
        """Steps that run on NumPy instead of a kernel."""
        return [k for k in self.kernels if k.host]

    def layers(self) -> dict[str, list[KernelRow]]:
        """The kernels in which each Keras layer takes part."""
        out: dict[str, list[KernelRow]] = {}
        for row in self.kernels:
            for layer in row.layers or ("(no layer)",):
                out.setdefault(layer, []).append(row)
        return out

    def __str__(self) -> str:
        rows = [
            [
                str(number),
                f"host: {row.label}" if row.host else row.label,
                " ".join(row.members),
                row.output,
                str(row.flops),
                str(row.bytes),
                " ".join(row.layers),
            ]
            for number, row in enumerate(self.kernels)
        ]
        title = f"{self.name}: {len(self.kernels)} steps, {len(self.host_steps)} of them on the host"
        text = _table(title, ("#", "kernel", "fused", "result", "flops", "bytes", "layers"), rows)
        for row in self.host_steps:
            text += f"host step {row.label} ({' '.join(row.layers)}): {row.reason}\n"
        if self.precision:
            text += f"precision {self.precision}\n"
        if self.specialised:
            text += f"specialised on concrete sizes: {self.specialised}\n"
        refusals: dict[tuple[str, str, str], int] = {}
        for decision in self.decisions:
            if decision.outcome != "host step":
                key = (decision.subject, decision.outcome, decision.reason)
                refusals[key] = refusals.get(key, 0) + 1
        for (subject, outcome, reason), count in refusals.items():
            text += f"{subject}: {outcome}, {reason}" + (f" ({count} times)" if count > 1 else "") + "\n"
        return text

    __repr__ = __str__


@dataclass
class Profile:
    """Kernel times of a call. `milliseconds`: sum over steps; `flops`, `bytes`: totals at these sizes."""

    name: str
    kernels: list[KernelRow]
    milliseconds: float
    flops: int
    bytes: int
    layers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = []
        total = max(self.milliseconds * 1e3, 1e-9)
        for row in sorted(self.kernels, key=lambda r: -(r.microseconds or 0)):
            us = max(row.microseconds or 0.0, 1e-3)
            rows.append(
                [
                    f"host: {row.label}" if row.host else row.label,
                    f"{us:.1f}",
                    f"{100 * us / total:.1f}",
                    f"{row.flops / us / 1e3:.1f}",
                    f"{row.bytes / us / 1e3:.1f}",
                    str(row.threads),
                    row.output,
                    " ".join(row.layers),
                ]
            )
        title = f"{self.name}: {self.milliseconds:.3f} ms in kernels"
        text = _table(title, ("kernel", "us", "%", "GFLOP/s", "GB/s", "threads", "result", "layers"), rows)
        for layer, microseconds in sorted(self.layers.items(), key=lambda item: -item[1]):
            text += f"{microseconds:10.1f} us  {layer}\n"
        return text

    __repr__ = __str__


def _table(title: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    """A table as text, without frames where the package `rich` is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (columns, *rows)]
        return "\n".join([title, *lines, ""])
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


def explain(name: str, compiled: CompiledGraph, specialised: str | None = None) -> Explanation:
    """The explanation of a compiled graph."""
    decisions = [*compiled.decisions, *compiled.program.decisions()]
    return Explanation(name, kernel_rows(compiled), decisions, specialised)


def profile_of(name: str, rows: Sequence[KernelRow], program: Program, arrays, repeats: int) -> Profile:
    """Median time per step over `repeats` calls; rows: one per step."""
    _, steps = program.profile(arrays, max(repeats, 1))
    rows = [copy.copy(row) for row in rows]
    layers: dict[str, float] = {}
    for number, row in enumerate(rows):
        step = steps[number]
        row.microseconds = step.nanoseconds / 1e3
        row.flops, row.bytes, row.threads = step.flops, step.bytes, step.threads
        # A kernel of several layers counts for each in equal shares.
        for layer in row.layers or ("(no layer)",):
            layers[layer] = layers.get(layer, 0.0) + row.microseconds / max(len(row.layers), 1)
    total = sum(row.microseconds or 0.0 for row in rows) / 1e3
    return Profile(name, rows, total, sum(s.flops for s in steps), sum(s.bytes for s in steps), layers)
