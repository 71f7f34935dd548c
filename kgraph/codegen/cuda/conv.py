"""Convolutions over channels-last images, with a fused epilogue.

Those with one channel per group go to `depthwise`, all others are implicit matrix products (`conv_kernel`).
"""

from __future__ import annotations

from kgraph.codegen.contractions import Parts, accumulate_dtype, has_products, take_apart
from kgraph.codegen.cuda import depthwise
from kgraph.codegen.cuda.conv_geometry import axis_sizes, is_dilated, phase_positions, phases
from kgraph.codegen.cuda.conv_kernel import ConvPlan
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.source import index_type
from kgraph.codegen.cuda.tiles import choose_tile
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

FLAT = 4  # chunks of a tap's channels, up to which chunks that end with the tap would waste too much
SYMBOLIC_FILTERS = 128  # for which tiles are chosen where their number is not known


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        return parts
    if any(parts.packed):
        return "packed operands are for processors"
    if not has_products(parts.node.inputs[0].dtype):
        return f"no convolutions of {parts.node.inputs[0].dtype}"
    return None


def choose(node: Node) -> tuple[str, str]:
    """(algorithm, reason) for a conv node: "depthwise" or "implicit_product"."""
    channels = node.inputs[1].shape[-2]
    if node.attrs["feature_groups"] > 1 and not isinstance(channels, Dim) and channels == 1:
        return "depthwise", "one channel per group"
    return "implicit_product", "a window over channels"


def lower(node: Node, target) -> list[KernelCall]:
    """The calls that compute the node."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        raise ValueError(parts)
    algorithm, reason = choose(parts.node)
    calls = [depthwise.call(parts, target) if algorithm == "depthwise" else _product(parts, target)]
    calls[-1].notes.update(algorithm=algorithm, reason=reason)
    return calls


def _product(parts: Parts, target) -> KernelCall:
    node = parts.node
    x, w = node.inputs
    groups, window, channels = node.attrs["feature_groups"], w.shape[:-2], w.shape[-2]
    filters = w.shape[-1] // groups
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    dilated = is_dilated(node)
    positions, batch = phase_positions(node), groups * phases(node)
    rows = x.shape[0] * positions
    columns = SYMBOLIC_FILTERS if isinstance(filters, Dim) else filters
    tile = choose_tile(rows, columns, batch if isinstance(batch, int) else 1, accumulate, target)
    few = not isinstance(channels, Dim) and channels % tile.depth != 0 and channels < FLAT * tile.depth
    plan = ConvPlan(
        name="conv" + parts.name,
        dtype=x.dtype,
        accumulate=accumulate,
        rank=len(window),
        dilated=dilated,
        flat=few and not dilated,
        tile=tile,
        index=index_type([x.type.size, w.type.size, parts.result.size]),
        finish=Finish.params(parts, accumulate),
    )
    met = x.shape[1:-1] if dilated else parts.result.shape[1:-1]  # positions that meet every tap, about
    return KernelCall(
        spec=KernelSpec(plan.name, "kgraph.codegen.cuda.conv_kernel:render_conv", tuple(plan)),
        operands=[*parts.operands, *(v for _, v in parts.extras), *parts.outputs],
        outputs=len(parts.outputs),
        sizes=[x.shape[0], channels, filters, groups, *parts.result.shape[1:-1], *axis_sizes(node, window)],
        extent=batch * (ceil_div(rows, tile.rows) * ceil_div(filters, tile.columns)),
        flops=2 * x.shape[0] * product(met) * product(window) * channels * w.shape[-1],
        bytes=x.type.nbytes + w.type.nbytes + sum((v.type.nbytes for v in parts.outputs), start=0),
        notes={"inplace": parts.inplace(2)},
        launch=Launch(tile.block),
    )
