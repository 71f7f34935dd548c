"""Runs passes in order: the only place that calls one. Dumps, verification and bisecting hang here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kgraph.decisions import Decision
from kgraph.ir import Graph


@dataclass
class PassContext:
    """What passes share.

    accepts: asks the code generator whether it has a kernel for a node; None, or the reason why not.
    packing: asks it how a node wants its weights laid out; a list of (operand index, layout), or None.
    passes: those that run, for the bodies within a graph.
    """

    accepts: Callable = lambda node: None
    packing: Callable = lambda node: None
    passes: Sequence[Pass] = ()
    decisions: list[Decision] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


Pass = Callable[[Graph, PassContext], Graph]


def run_passes(graph: Graph, passes: Sequence[Pass], context: PassContext) -> Graph:
    """Apply `passes` in order and give the last graph.

    KGRAPH_DUMP=dir writes the text of every stage (`003_fuse.txt`), KGRAPH_STOP_AFTER=name ends after that pass (after
    its first run; `6_canonicalise` names a later one; bodies of control flow go as far), KGRAPH_VERIFY=1 verifies after
    each one (the tests set it).
    Raises ValueError for a KGRAPH_STOP_AFTER that is no pass.
    """
    dump = os.environ.get("KGRAPH_DUMP")
    stop_after = os.environ.get("KGRAPH_STOP_AFTER")
    verify_each = os.environ.get("KGRAPH_VERIFY") == "1"
    labels = [{pass_.__name__, f"{number}_{pass_.__name__}"} for number, pass_ in enumerate(passes, start=1)]
    if stop_after and not any(stop_after in both for both in labels):
        known = ", ".join(f"{number}_{pass_.__name__}" for number, pass_ in enumerate(passes, start=1))
        raise ValueError(f"KGRAPH_STOP_AFTER={stop_after!r} is no pass; passes: {known}")
    context.passes = passes
    stopped = False
    if dump:
        _dump(graph, dump, 0, "captured")
    for number, pass_ in enumerate(passes, start=1):
        if stopped and pass_.__name__ != "optimise_bodies":
            continue
        start = time.perf_counter()
        graph = pass_(graph, context)
        name = pass_.__name__
        context.seconds[name] = context.seconds.get(name, 0.0) + time.perf_counter() - start
        if verify_each:
            from kgraph.ir.verifier import verify

            verify(graph, after=name)
        if dump:
            _dump(graph, dump, number, name)
        stopped = stopped or stop_after in labels[number - 1]
    return graph


def _dump(graph: Graph, folder: str, number: int, name: str) -> None:
    directory = Path(folder) / graph.name.replace("/", "_")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{number:03d}_{name}.txt").write_text(str(graph) + "\n")
