"""From a captured graph to a program that runs: passes, lowering, kernels, and the preparation of weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.cpu.executor import EXECUTOR
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.eager import load
from kgraph.codegen.target import Target, host_target
from kgraph.decisions import Decision
from kgraph.ir import Graph, Node
from kgraph.ir.printer import assign_names
from kgraph.preparation import Preparation
from kgraph.prepared import Source
from kgraph.program_cache import Graphs, ProgramCache
from kgraph.reserve import Reserve
from kgraph.runtime.plan import Program

if TYPE_CHECKING:
    from kgraph.passes.manager import Pass


@dataclass
class CompiledGraph:
    """A program with what is needed to feed it and to explain it.

    captured: the graph as it was captured. preparation: params -> prepared weights.
    """

    captured: Graph
    preparation: Preparation
    program: Program
    decisions: list[Decision]
    graphs: Graphs
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def optimised(self) -> Graph:
        """The graph after all passes, without the prologue."""
        return self.graphs.split.main

    @property
    def prologue(self) -> Graph:
        """What `preparation` evaluates, as a graph."""
        return self.graphs.split.prologue

    @property
    def nodes(self) -> list[Node]:
        """The node behind each step of the program."""
        return self.graphs.nodes

    def set_params(
        self,
        arrays: Sequence[np.ndarray],
        changed: Sequence[int] | None = None,
        reserve: Reserve | None = None,
        sources: Sequence[Source] | None = None,
    ) -> None:
        """Prepare weights and hand them to the program.

        arrays: the value of every param of `captured`, in order. changed: numbers of those that differ from the last
        call; None means all. Only prepared weights that depend on a changed one are computed again. reserve: memory for
        all of them. sources: where each value comes from; what is prepared of the same already is shared.
        """
        self.program.set_params(self.preparation(arrays, changed, reserve, sources))


def compile_graph(
    graph: Graph,
    progress=None,
    passes: str | Sequence[Pass] = "inference",
    donations: Sequence[tuple[int, int]] = (),
    target: Target | CudaTarget | None = None,
) -> CompiledGraph:
    """Compile a captured graph for this machine, or for `target`.

    progress: called as `progress(done, total)` while kernels are compiled.
    passes: "training" for a graph with a backward part; or the passes themselves.
    donations: pairs (input number, output number): the program may write the output into the input's array.
    Raises DeviceError where the target is a GPU that cannot be used.
    """
    target = target or host_target()
    start = time.perf_counter()
    fields: dict[str, Any] = {"input_names": tuple(v.name for v in graph.inputs), "donations": donations}
    cache = ProgramCache(graph, passes, donations, target)
    entry = cache.load()
    if entry is not None:
        assign_names(Graph(graph.inputs, graph.params))  # as all graphs of this compile will print them
        seconds = {"cache": time.perf_counter() - start}
    else:
        from kgraph.translation import translate

        entry, seconds = translate(graph, passes, donations, target)
        cache.store(entry)
    start = time.perf_counter()
    lowered, preparation = entry.lowered, entry.preparation
    specs = list(lowered.all_specs().values())
    if isinstance(target, Target):
        # The executor is compiled beside the kernels the first time.
        own = preparation.specs() if target == host_target() else []
        objects = compile_specs([EXECUTOR, *specs, *own], progress=progress, target=target)
        load(own, objects)
        make: Callable[..., Program] = functools.partial(Program, executor=objects[spec_key(EXECUTOR, target)])
        fields["foreign"] = target.machine != host_target().machine
        fields["rows"], fields["part_bytes"] = lowered.rows, target.l3_bytes * 3 // 8  # the rest is for weights
    else:
        from kgraph.runtime.cuda.device import device_for
        from kgraph.runtime.cuda.program import CudaProgram

        objects = compile_specs(specs, progress=progress, target=target)
        make = functools.partial(CudaProgram, device=device_for(target.device))
    seconds["kernels"] = time.perf_counter() - start
    start = time.perf_counter()
    program = lowered.program(graph.name, objects, make, **fields)
    seconds["loading"] = time.perf_counter() - start
    return CompiledGraph(graph, preparation, program, entry.decisions, entry.graphs, seconds)
