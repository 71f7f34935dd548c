"""Copies between dense layouts: transpose, slice, rev, dynamic_slice; and, by way of `assemble`, concatenate, pad,
pad_mirror and dynamic_update_slice.

Each of the first four reads `source[base + sum(index[k] * stride[k])]` into a dense destination; a thread an element.
Indices may be negative on the way: they wrap, the sum is right again. Transposes of long axes go to `transpose`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda import assemble, transpose
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.codegen.strided import collapse, word
from kgraph.codegen.views import MIRROR_MODES, VIEWS, starts_of
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import ceil_div

TEMPLATE = "kgraph.codegen.cuda.data_movement:render"
PRIMITIVES = (VIEWS.keys() - {"broadcast_to"}) | assemble.LOWERINGS.keys()


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in PRIMITIVES:
        return f"{node.name} is no data movement"
    if node.name == "pad_mirror" and node.attrs["mode"] not in MIRROR_MODES:
        return f"pad_mirror has no kernel for mode {node.attrs['mode']!r}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The call that computes `node`."""
    if node.name in assemble.LOWERINGS:
        return [assemble.LOWERINGS[node.name](node, target)]
    base, axes = VIEWS[node.name](node)
    return lower_view(node.name, node.inputs[0], node.output, base, axes, target, starts=starts_of(node))


def lower_view(
    name: str, source: Value | Temporary, out: Value | Temporary, base, axes, target, starts: Sequence[tuple] = ()
) -> list[KernelCall]:
    """The call that copies `source[base + starts + view]` into the dense `out`."""
    axes = collapse(axes) or [(1, 1)]
    if not starts and not isinstance(base, Dim) and base == 0 and transpose.wants_tiles(axes):
        return transpose.lower(name, [source, out], word(out.type), axes, target)
    index = index_type([source.type.size, out.type.size])
    params = (name, word(out.type), len(axes), tuple(v.dtype for v, _, _ in starts), index)
    total = out.type.size
    return [
        KernelCall(
            KernelSpec(name, TEMPLATE, params),
            [source, *(v for v, _, _ in starts), out],
            outputs=1,
            sizes=[base, *(x for axis in axes for x in axis), *(x for _, limit, t in starts for x in (limit, t))],
            extent=ceil_div(total, target.block),
            flops=0,
            bytes=out.type.nbytes * 2,
            launch=Launch(target.block),
        )
    ]


def render(params: tuple, target) -> str:
    name, dtype, rank, starts, index = params
    k = KernelSource(name, target, target.block, index)
    source = k.operand(dtype)
    places = [k.operand(kind) for kind in starts]
    out = k.operand(dtype)
    base = k.size()
    axes = [(k.size(), k.size()) for _ in range(rank)]
    limits = [(k.size(), k.size()) for _ in starts]
    for start, (limit, stride) in zip(places, limits, strict=True):
        base = k.add(base, k.mul(assemble.clamped_start(k, start, limit), stride))
    base = k.let(base, "base")
    sizes = [n for n, _ in axes]
    total = k.let(k.product(sizes), "total")
    with k.grid_stride(total) as i:
        at = base
        for place, (_, stride) in zip(k.coordinates(i, sizes), axes, strict=True):
            at = k.add(at, k.mul(place, stride))
        k.store(out, i, k.load(source, at))
    return k.text()
