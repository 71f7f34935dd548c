"""From a captured graph to the steps of a program, by passes and lowering: what the program cache spares a compile.

Nothing of this is imported where the cache has an entry.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kgraph.codegen import families
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.lower import lower
from kgraph.codegen.target import Target
from kgraph.codegen.updates import arrange_updates
from kgraph.ir import Graph, copy_graph
from kgraph.passes.independent_rows import independent_rows
from kgraph.passes.manager import Pass, PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE, PIPELINES
from kgraph.passes.prologue import split_prologue
from kgraph.preparation import Preparation
from kgraph.program_cache import Entry, Graphs


def optimise(graph: Graph, target, passes: Sequence[Pass] = INFERENCE) -> tuple[Graph, PassContext]:
    """Run the passes for a target; gives the graph and the passes' decisions and times."""
    kernels = families.for_target(target)
    context = PassContext(accepts=kernels.accepts, packing=lambda node: kernels.packing_for(node, target))
    return run_passes(graph, passes, context), context


def translate(
    graph: Graph,
    passes: str | Sequence[Pass],
    donations: Sequence[tuple[int, int]],
    target: Target | CudaTarget,
) -> tuple[Entry, dict[str, float]]:
    """What an entry of the cache holds for a graph, and the seconds that each part took; arguments as `compile_graph`
    takes them. The graph stays as it is."""
    if isinstance(passes, str):
        passes = PIPELINES[passes]
    start = time.perf_counter()
    # On a copy, since passes join the provenance of equal nodes.
    optimised, context = optimise(copy_graph(graph), target, passes)
    seconds = {f"pass {name}": t for name, t in context.seconds.items()}
    split = split_prologue(optimised)
    seconds["passes"] = time.perf_counter() - start
    start = time.perf_counter()
    lowered = lower(split.main, target, context.decisions)
    arrange_updates(lowered, donations, target)
    lowered.rows, _ = independent_rows(graph)
    preparation = Preparation.of(split.prologue, graph.params)
    split.assign_names(graph)
    seconds["lowering"] = time.perf_counter() - start
    graphs = Graphs(lambda: (split, lowered.step_nodes))
    return Entry(lowered, preparation, context.decisions, graphs), seconds
