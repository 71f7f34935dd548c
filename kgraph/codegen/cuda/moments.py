"""Mean and variance of an operand over axes in one pass over memory: nodes `moments`, with an elementwise prologue.

They are a reduction like those of reduce.py, whose threads keep the moments of what they saw (`accumulators.Moments`).
Where the reduced axes are cut into chunks, a second kernel combines the chunks' moments in their order.
"""

from __future__ import annotations

from dataclasses import replace

from kgraph.codegen import regions
from kgraph.codegen.cuda import reduce
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.reductions import in_stages, take_apart_moments, walk
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product


def accepts(node: Node) -> str | None:
    """None where the node is one `moments` behind elementwise nodes with scalar code."""
    parts = take_apart_moments(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call, or two for few results of many operands."""
    parts = take_apart_moments(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    over = walk(parts)
    shape = reduce.BlockShape.choose(over, target)
    chunk = reduce.chunk_of(parts, over, shape, target)
    name = regions.kernel_name("", parts.prologue, "moments")
    ((kind, dtype, wide),) = (("sum", parts.reductions[0][1], compute_dtype(parts.reductions[0][1])),)
    # The dtypes of the outputs are those of the stores.
    stored = (tuple(o.dtype for o in parts.outputs), (), (0, 1)), parts.outputs
    if not chunk:
        moments = (("moments", dtype, wide),)
        return [reduce.call(over, shape, parts.prologue, moments, [], *stored, 0, target, name)]
    numbers = replace(parts, reductions=((kind, dtype, wide),) * 4)
    stages = in_stages(numbers, over, ceil_div(product(over.reduced_sizes), chunk))
    parted = (("chunk_moments", dtype, wide),)
    first = reduce.call(over, shape, parts.prologue, parted, [], stages.untouched, stages.partials, chunk, target, name)
    merged = (("merge_moments", wide, wide),)
    shape = reduce.BlockShape.choose(stages.walk, target)
    return [first, reduce.call(stages.walk, shape, stages.untouched, merged, [], *stored, 0, target, "combine_moments")]
