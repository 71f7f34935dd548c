"""From a captured graph to a program that runs: passes, lowering, kernels, and the preparation of weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kgraph.codegen import families
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.cpu.executor import EXECUTOR
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.lower import lower
from kgraph.codegen.target import Target, host_target
from kgraph.codegen.updates import arrange_updates
from kgraph.decisions import Decision
from kgraph.ir import Graph, Node, Value, copy_graph, live_nodes
from kgraph.ir.interpreter import evaluate
from kgraph.passes.manager import Pass, PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE, for_bodies
from kgraph.passes.prologue import split_prologue
from kgraph.program_cache import ProgramCache
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.cuda.program import CudaProgram
from kgraph.runtime.plan import Program


@dataclass
class CompiledGraph:
    """A program with what is needed to feed it and to explain it.

    captured: the graph as it was captured. optimised: after all passes, without the prologue.
    prologue: params -> prepared weights. nodes: the node behind each step of the program.
    """

    captured: Graph
    optimised: Graph
    prologue: Graph
    program: Program
    nodes: list[Node]
    decisions: list[Decision]
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self._parts = _prologue_parts(self.prologue)

    def set_params(self, arrays: Sequence[np.ndarray], changed: Sequence[int] | None = None) -> None:
        """Prepare weights and hand them to the program.

        arrays: the value of every param of `captured`, in order. changed: numbers of those that differ from the last
        call; None means all. Only prepared weights that depend on a changed one are computed again.
        """
        position = {id(p): i for i, p in enumerate(self.captured.params)}
        dirty = None if changed is None else set(changed)
        values: dict[int, np.ndarray] = {}
        for part in self._parts:
            numbers = [position[id(p)] for p in part.graph.params]
            if dirty is not None and not dirty.intersection(numbers):
                continue
            results = evaluate(part.graph, [], [arrays[n] for n in numbers])
            values.update(zip(part.numbers, results))
        self.program.set_params(values)


@dataclass
class _Part:
    """The piece of the prologue that makes some of its outputs (`numbers`), with just the params that it reads."""

    graph: Graph
    numbers: list[int]


def _prologue_parts(prologue: Graph) -> list[_Part]:
    """Cut the prologue into pieces that share no param, so that a changed weight costs only its own piece."""
    owner: dict[Value, int] = {}
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def new() -> int:
        parent.append(len(parent))
        return parent[-1]

    for p in prologue.params:
        owner[p] = new()
    for node in prologue.nodes:
        groups = [find(owner[v]) for v in node.inputs if not _is_constant(v)] or [new()]
        for g in groups[1:]:
            parent[find(g)] = find(groups[0])
        for o in node.outputs:
            owner[o] = groups[0]
    parts: dict[int, _Part] = {}
    for number, value in enumerate(prologue.outputs):
        part = parts.setdefault(find(owner[value]), _Part(Graph(name=prologue.name), []))
        part.numbers.append(number)
        part.graph.outputs.append(value)
    for p in prologue.params:
        if (group := find(owner[p])) in parts:
            parts[group].graph.params.append(p)
    for node in prologue.nodes:
        group = find(owner[node.outputs[0]])
        if _is_constant(node.outputs[0]):
            for part in parts.values():
                part.graph.nodes.append(node)
        elif group in parts:
            parts[group].graph.nodes.append(node)
    for part in parts.values():
        part.graph.nodes = live_nodes(part.graph.nodes, part.graph.outputs)
    return list(parts.values())


def _is_constant(value: Value) -> bool:
    return value.node is not None and not value.node.inputs


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
    if isinstance(target, Target):
        # The executor is compiled beside the kernels the first time.
        objects = compile_specs([EXECUTOR, *specs], progress=progress, target=target)
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
    return CompiledGraph(graph, split.main, split.prologue, program, lowered.step_nodes, decisions, seconds)
