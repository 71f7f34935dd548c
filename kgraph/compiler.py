"""From a captured graph to a program that runs: passes, lowering, kernels, and the preparation of weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kgraph.codegen import eager, families
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.cpu.executor import EXECUTOR
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.lower import lower
from kgraph.codegen.target import Target, host_target
from kgraph.codegen.updates import arrange_updates
from kgraph.decisions import Decision
from kgraph.ir import Graph, Node, copy_graph
from kgraph.passes.manager import Pass, PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE, for_bodies
from kgraph.passes.prologue import split_prologue
from kgraph.preparation import Preparation
from kgraph.program_cache import ProgramCache
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.cuda.program import CudaProgram
from kgraph.runtime.plan import Program


@dataclass
class CompiledGraph:
    """A program with what is needed to feed it and to explain it.

    captured: the graph as it was captured. optimised: after all passes, without the prologue.
    prologue: params -> prepared weights; preparation evaluates it. nodes: the node behind each step of the program.
    """

    captured: Graph
    optimised: Graph
    prologue: Graph
    preparation: Preparation
    program: Program
    nodes: list[Node]
    decisions: list[Decision]
    seconds: dict[str, float] = field(default_factory=dict)

    def set_params(self, arrays: Sequence[np.ndarray], changed: Sequence[int] | None = None) -> None:
        """Prepare weights and hand them to the program.

        arrays: the value of every param of `captured`, in order. changed: numbers of those that differ from the last
        call; None means all. Only prepared weights that depend on a changed one are computed again.
        """
        self.program.set_params(self.preparation(arrays, changed))


def optimise(graph: Graph, target, passes: Sequence[Pass] = INFERENCE) -> tuple[Graph, PassContext]:
    """Run the passes for a target; gives the graph and the passes' decisions and times."""
    kernels = families.for_target(target)
    context = PassContext(accepts=kernels.accepts, packing=lambda node: kernels.packing_for(node, target))
    return run_passes(graph, passes, context), context


def compile_graph(
    graph: Graph,
    progress=None,
    passes: Sequence[Pass] = INFERENCE,
    donations: Sequence[tuple[int, int]] = (),
    target: Target | CudaTarget | None = None,
) -> CompiledGraph:
    """Compile a captured graph for this machine, or for `target`.

    progress: called as `progress(done, total)` while kernels are compiled.
    passes: `pipeline.INFERENCE`, or `pipeline.TRAINING` for a graph with a backward part.
    donations: pairs (input number, output number): the program may write the output into the input's array.
    Raises DeviceError where the target is a GPU that cannot be used.
    """
    target = target or host_target()
    start = time.perf_counter()
    fields: dict[str, Any] = {"input_names": tuple(v.name for v in graph.inputs), "donations": donations}
    cache = ProgramCache(graph, passes, donations, target)
    seconds: dict[str, float] = {}
    entry = cache.load()
    if entry is not None:
        split, lowered, decisions = entry
        split.assign_names(graph)
        passes_done = lowering_done = time.perf_counter()
    else:
        # On a copy, since passes join the provenance of equal nodes: the captured graph stays as it is.
        optimised, context = optimise(copy_graph(graph), target, passes)
        decisions = context.decisions
        seconds = {f"pass {name}": t for name, t in context.seconds.items()}
        split = split_prologue(optimised)
        passes_done = time.perf_counter()
        lowered = lower(split.main, target, decisions, lambda body: optimise(body, target, for_bodies(passes))[0])
        arrange_updates(lowered, donations, target)
        split.assign_names(graph)
        cache.store(split, lowered, decisions)
        lowering_done = time.perf_counter()
    specs = list(lowered.all_specs().values())
    preparation = Preparation(split.prologue, graph.params)
    if isinstance(target, Target):
        # The executor is compiled beside the kernels the first time.
        own = preparation.specs() if target == host_target() else []
        objects = compile_specs([EXECUTOR, *specs, *own], progress=progress, target=target)
        eager.load(own, objects)
        kernels_done = time.perf_counter()
        make: Callable[..., Program] = functools.partial(Program, executor=objects[spec_key(EXECUTOR, target)])
        fields["foreign"] = target.machine != host_target().machine
    else:
        objects = compile_specs(specs, progress=progress, target=target)
        kernels_done = time.perf_counter()
        make = functools.partial(CudaProgram, device=device_for(target.device))
    program = lowered.program(graph.name, objects, make, **fields)
    seconds |= {
        "passes": passes_done - start,
        "lowering": lowering_done - passes_done,
        "kernels": kernels_done - lowering_done,
        "loading": time.perf_counter() - kernels_done,
    }
    return CompiledGraph(
        graph, split.main, split.prologue, preparation, program, lowered.step_nodes, decisions, seconds
    )
