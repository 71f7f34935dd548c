"""One kernel for many small elementwise updates of one form, such as an optimizer's step over all biases of a model.

The members are calls of `loop` over one merged axis with one expression. A block takes chunks of members; which member
a chunk belongs to is told by where the members' chunks begin. Pointers are parameters of a kernel, of which there is
room for `PARAMETERS`: more members take several kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda import loop
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.codegen.kernel import KernelSpec

TEMPLATE = "kgraph.codegen.cuda.loop_group:render"
CHUNK = 1024  # elements that a block takes at once
PARAMETERS = 500  # of 8 bytes; devices take 4 KiB
MOST_MEMBERS = 32


def group_key(spec: KernelSpec) -> tuple | None:
    """Specs with equal keys can be members of one group; None for what has several axes, or draws random numbers."""
    if spec.template != loop.TEMPLATE:
        return None
    name, expression, described, dtypes, rank, index, _ = spec.params
    if rank != 1 or index != "uint32" or any(stream >= 0 for *_, stream in described):
        return None
    return name, expression, described, dtypes


def largest_group(spec: KernelSpec) -> int:
    """Members that one kernel has at most."""
    _, _, described, dtypes, *_ = spec.params
    return max(1, min(MOST_MEMBERS, PARAMETERS // (len(described) + len(dtypes) + 2)))


def group_spec(specs: Sequence[KernelSpec]) -> KernelSpec:
    """The kernel for members of one `group_key`."""
    name, expression, described, dtypes, *_ = specs[0].params
    leaves = tuple(leaf[:3] for leaf in described)
    return KernelSpec(f"{name}_group", TEMPLATE, (f"{name}_group", expression, leaves, dtypes, len(specs)))


def group_sizes(elements: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(sizes, extent) of a call over members of so many elements each.

    sizes: for each member the first chunk of the next one, and its elements.
    """
    sizes: list[int] = []
    chunks = 0
    for count in elements:
        chunks += -(-count // CHUNK)
        sizes += [chunks, count]
    return tuple(sizes), chunks


def render(params: tuple, target) -> str:
    """Operands: the inputs of each member in turn, then the outputs of each member in turn."""
    name, expression, described, dtypes, members = params
    k = KernelSource(name, target, target.block)
    read = [dtype for dtype, _, is_coordinate in described if not is_coordinate]
    inputs = [[k.operand(dtype) for dtype in read] for _ in range(members)]
    outputs = [[k.operand(dtype) for dtype in dtypes] for _ in range(members)]
    sizes = [(k.size(), k.size()) for _ in range(members)]
    ours = [Operand(k.fresh("mine"), dtype) for dtype in (*read, *dtypes)]
    start, count = k.fresh("start"), k.fresh("count")
    with k.block_stride(sizes[-1][0]) as number:
        for member, (following, elements) in enumerate(sizes):
            condition = "else:" if member == members - 1 else f"elif {number} < {following}:"
            with k.suite(condition if member else f"if {number} < {following}:"):
                for own, operand in zip(ours, (*inputs[member], *outputs[member])):
                    k.line(f"{own.name} = {operand.name}")
                k.line(f"{start} = {sizes[member - 1][0] if member else k.i(0)}")
                k.line(f"{count} = {elements}")
        first = k.let(k.mul(k.sub(number, start), CHUNK))
        end = k.add(first, CHUNK)
        stop = k.let(f"({end} if {end} < {count} else {count})", "stop")
        with k.range(k.add(first, k.i("cuda.threadIdx.x")), stop, k.block) as i:
            rest = iter(ours)
            values = [
                loop.leaf_value(k, None if is_coordinate else next(rest), dtype, spans, i, [i], [count])
                for dtype, spans, is_coordinate in described
            ]
            for output, value in zip(ours[len(read) :], k.emit(expression, values)):
                k.store(output, i, value)
    return k.text()
