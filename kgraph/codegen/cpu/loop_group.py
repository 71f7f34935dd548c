"""One kernel for many small elementwise updates of one form, such as an optimizer's step over all biases of a model.

The members are calls of flat loops (`loop.render_flat`) with one expression. A unit of the extent is a chunk of one
member; where each member's chunks begin is among the sizes, so that one kernel serves any number of members.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cpu import expressions, regions
from kgraph.codegen.cpu.builder import Int, KernelBuilder
from kgraph.codegen.cpu.loop import CHUNK
from kgraph.codegen.kernel import KernelSpec

FLAT = "kgraph.codegen.cpu.loop:render_flat"
TEMPLATE = "kgraph.codegen.cpu.loop_group:render"


def group_key(spec: KernelSpec) -> tuple | None:
    """Specs with equal keys can be members of one group; None for what is no flat loop, or draws random numbers."""
    if spec.template != FLAT or any(stream >= 0 for *_, stream in spec.params[2]):
        return None
    return spec.params[:4]


def largest_group(spec: KernelSpec) -> int:
    """Members that one kernel has at most: where they begin is data, so there may be any number."""
    return 1 << 31


def group_spec(specs: Sequence[KernelSpec]) -> KernelSpec:
    """The kernel for members of one `group_key`."""
    name, expression, leaves, dtypes, _ = specs[0].params
    described = tuple(leaf[:3] for leaf in leaves)
    lanes = max(spec.params[4][0] for spec in specs)
    return KernelSpec(f"{name}_group", TEMPLATE, (f"{name}_group", expression, described, dtypes, lanes))


def group_sizes(elements: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(sizes, extent) of a call over members of so many elements each.

    sizes: the number of members, the first chunk of each, and the elements of each.
    """
    starts, chunks = [], 0
    for count in elements:
        starts.append(chunks)
        chunks += -(-count // CHUNK)
    return (len(elements), *starts, *elements), chunks


def render(params: tuple, target) -> str:
    """Operands: the inputs of each member in turn, then the outputs of each member in turn."""
    name, expression, described, dtypes, lanes = params
    b = KernelBuilder(name, target)
    num_inputs = sum(not is_coordinate for _, _, is_coordinate in described)
    members = b.size(0)
    unroll = 1 if expressions.is_heavy(expression) or lanes == 1 else 4
    with b.loop(0, members) as member:
        start, count = b.size_at(1 + member), b.size_at(1 + members + member)
        first = b.max(b.begin - start, 0) * CHUNK
        last = b.min((b.end - start) * CHUNK, count)
        with b.if_then(first < last):
            _member(b, params, unroll, member * num_inputs, members * num_inputs + member * len(dtypes), first, last)
    return b.ir_text()


def _member(b: KernelBuilder, params: tuple, unroll: int, inputs: Int, outputs: Int, first, last) -> None:
    """Elements [first, last) of the member whose operands begin at positions `inputs` and `outputs`."""
    _, expression, described, dtypes, lanes = params
    pointers, number = [], 0
    for dtype, _, is_coordinate in described:
        pointers.append(None if is_coordinate else b.operand_at(inputs + number, dtype, f"input{number}"))
        number += not is_coordinate
    results = [b.operand_at(outputs + i, dtype, f"output{i}") for i, dtype in enumerate(dtypes)]
    regions.keep_order(b, described, pointers, results)
    scalars = [
        b.load_broadcast(p, 0, lanes) if p is not None and not spans[0] else None
        for p, (_, spans, _) in zip(pointers, described)
    ]

    def body(i, mask, slot):
        values = []
        for pointer, scalar, (dtype, spans, is_coordinate) in zip(pointers, scalars, described):
            if is_coordinate:
                values.append(regions.coordinate(b, i if spans[0] else 0, dtype, lanes, spans[0]))
            else:
                values.append(b.load(pointer, i, lanes, mask) if scalar is None else scalar)
        for pointer, value in zip(results, expressions.emit_lanes(b, expression, values, lanes), strict=True):
            b.store(pointer, i, value, mask)

    b.vector_loop(first, last, lanes, body, unroll)
