"""Cotangents of the weights of convolutions: implicit products whose k are the output positions of all images.

Few results are sums over many positions. So positions are cut into chunks of a fixed length, one unit of work takes one
chunk and a part of the weight, and a second kernel adds the chunks' sums in order: results do not depend on the number
of threads. Chunks are long against the weight, which bounds the memory of their sums by that of the operands.
`choose` tells apart depthwise convolutions (`conv_filter_depthwise`), windows of 3 that gain by Winograd's algorithm
(`conv_filter_winograd`), 1x1 windows that meet every pixel, where images and rows are one long line, and the rest.
"""

from __future__ import annotations

from kgraph.codegen.cpu import conv_filter_depthwise, conv_filter_winograd
from kgraph.codegen.cpu.builder import MEMORY_TYPES, itemsize
from kgraph.codegen.cpu.conv_filter_kernel import FilterPlan, total_call
from kgraph.codegen.cpu.microkernel import register_tile
from kgraph.codegen.cpu.pack import accumulate_dtype
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, TensorType, Value
from kgraph.ir.dims import ceil_div, product

POSITIONS, PIXELS = 128, 96  # of a block, about: operands of a tile stay in the first-level cache
SHORT_TILE = 8  # rows, below which many tiles read the cotangents of a panel
CROWDED_BYTES = 2048  # pixels a multiple of this apart fall into the same few sets of the first-level cache
CHUNK_POSITIONS = 1024  # of a chunk, at least
CHANNELS = (48, 96)  # of a unit, least and most, where there are more and they divide
MANY_BLOCKS = 16
COPY_BYTES = 128 << 10  # of scratch for the input, and for the cotangents, that fits the second-level cache
UNIT_RESULTS = 4096  # of the weight, beyond which rows of taps are units of their own
FEW_ROWS = 28  # of the result, up to which cotangents are read too rarely for a copy to pay


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "conv_filter_gradient":
        return f"{node.name} is not the cotangent of a convolution's weight"
    x, cotangent = node.inputs
    attrs = node.attrs
    if x.type.rank > 5:
        return "more than three spatial axes"
    static = (x.shape[-1], cotangent.shape[-1], *attrs["window"], *attrs["strides"], *attrs["rhs_dilation"])
    if any(isinstance(n, Dim) for n in static):
        return "channels or a window of symbolic size"
    if 0 in node.output.shape:
        return "the weight is empty"
    if x.dtype not in MEMORY_TYPES:
        return f"no convolutions of {x.dtype}"
    return None


def choose(node: Node, target) -> tuple[str, str]:
    """(algorithm, reason) for a conv_filter_gradient node: "depthwise", "pixels", "winograd" or "implicit_product"."""
    attrs = node.attrs
    if conv_filter_depthwise.takes(node):
        return "depthwise", "one filter per channel"
    plain = all(s == 1 for s in attrs["strides"]) and all(p == (0, 0) for p in attrs["padding"])
    if plain and all(k == 1 for k in attrs["window"]):
        return "pixels", "a 1x1 window that meets every pixel"
    how = conv_filter_winograd.schedule(node, target)
    if isinstance(how, str):
        return "implicit_product", f"a window over positions; not Winograd's algorithm: {how}"
    return "winograd", f"{how.outputs} outputs along an axis, estimated at {how.cost:.2f} times the implicit product"


def lower(node: Node, target) -> list[KernelCall]:
    """One call that sums chunks, and one that adds the chunks' sums where there are several."""
    algorithm, reason = choose(node, target)
    if algorithm == "depthwise":
        calls = conv_filter_depthwise.lower(node, target)
    elif algorithm == "winograd":
        calls = conv_filter_winograd.lower(node, target)
    else:
        calls = _lower(node, algorithm, target)
    calls[0].notes.update(algorithm=algorithm, reason=reason)
    return calls


def _lower(node: Node, algorithm: str, target) -> list[KernelCall]:
    x, cotangent = node.inputs
    attrs, missing = node.attrs, 5 - x.type.rank
    accumulate = accumulate_dtype(x.dtype, node.output.dtype)
    channels, filters = node.output.shape[-2], node.output.shape[-1] // attrs["feature_groups"]

    def three(values, fill) -> tuple:
        return (fill,) * missing + tuple(values)

    images, sizes, out_sizes = x.shape[0], three(x.shape[1:-1], 1), three(cotangent.shape[1:-1], 1)
    if algorithm == "pixels":
        images, sizes = 1, (1, 1, product(x.shape[:-1]))
        out_sizes = sizes
    most = PIXELS if algorithm == "pixels" else POSITIONS
    short = register_tile(target)[0] < SHORT_TILE
    table = SizeTable()
    lanes = target.vector_bytes // itemsize(accumulate)
    vectors = min(register_tile(target)[1], -(-filters // lanes))
    window = three(attrs["window"], 1)
    plan = FilterPlan(
        accumulate=accumulate,
        dtype=x.dtype,
        images=table(images),
        sizes=table.all(sizes),
        out_sizes=table.all(out_sizes),
        origins=table.all(three([-low for low, _ in attrs["padding"]], 0)),
        window=window,
        steps=three(attrs["strides"], 1),
        reaches=three(attrs["rhs_dilation"], 1),
        groups=attrs["feature_groups"],
        channels=channels,
        filters=filters,
        piece=_piece(out_sizes[2], most),
        whole=not isinstance(out_sizes[2], Dim) and out_sizes[2] <= most,
        lines=1,
        chunk=1,
        joined=1,
        copies=1,
        channel_block=_channel_block(channels),
        panels=-(-filters // (vectors * lanes)),
        tile=(1, 1),
        copied=algorithm != "pixels" or x.dtype != accumulate or _is_crowded(x),
        packed=algorithm != "pixels" or _is_crowded(cotangent) or (short and filters > vectors * lanes),
        lanes=lanes,
        vectors=vectors,
    )
    plan = _blocking(plan, target)
    lines = images * (out_sizes[0] * out_sizes[1] * ceil_div(out_sizes[2], plan.piece))
    chunks = ceil_div(lines, plan.chunk)
    if isinstance(chunks, int):
        chunks = max(chunks, 1)
    single = isinstance(chunks, int) and chunks == 1 and node.output.dtype == accumulate
    partial = Temporary(TensorType((chunks, *node.output.shape), accumulate))
    tap_groups = window[0] * window[1] // (plan.joined * plan.copies)
    channel_groups = channels // plan.channel_block
    panel_groups = -(-filters // (vectors * lanes * plan.panels))
    sums = KernelCall(
        spec=KernelSpec("conv_filter_gradient", "kgraph.codegen.cpu.conv_filter_kernel:render_filter", tuple(plan)),
        operands=[x, cotangent, node.output if single else partial],
        outputs=1,
        sizes=list(table.values),
        extent=chunks * (plan.groups * tap_groups * channel_groups * panel_groups),
        flops=2 * product(cotangent.shape) * channels * product(window),
        bytes=x.type.nbytes + cotangent.type.nbytes + partial.type.nbytes,
        scratch_bytes=plan.copy_bytes + plan.panel_bytes,
    )
    return [sums] if single else [sums, total_call(partial, node.output, chunks, target)]


def _is_crowded(pixels: Value) -> bool:
    """Whether pixels lie so far apart that what a tile reads of them does not stay in the first-level cache."""
    return pixels.shape[-1] * pixels.type.itemsize % CROWDED_BYTES == 0


def _piece(width, most: int) -> int:
    """Positions of a line."""
    if isinstance(width, Dim) or width <= 0:
        return most
    return -(-width // -(-width // most))


def _channel_block(channels: int) -> int:
    """Channels of a unit: all, or a divisor that leaves a tile's operands close together."""
    least, most = CHANNELS
    if channels <= most:
        return channels
    divisors = [d for d in range(least, most + 1) if channels % d == 0]
    # An odd number of blocks, where there are few, leaves one of two threads without work.
    even = [d for d in divisors if channels // d % 2 == 0 or channels // d > MANY_BLOCKS]
    return max(even or divisors, default=channels)


def _blocking(plan: FilterPlan, target) -> FilterPlan:
    """The plan with its extents of units, blocks and tiles."""
    tile, vectors = register_tile(target)
    most = tile * vectors // plan.vectors
    tap_rows = plan.window[0] * plan.window[1]
    if plan.dense and 2 * plan.segment <= most:
        plan = plan._replace(joined=tap_rows)
    rows = plan.segment * plan.segments
    across = max(min(most // plan.segment, plan.segments), 1)
    plan = plan._replace(
        tile=(_even(plan.segments, across), _even(plan.segment, most)),
        packed=plan.dtype != plan.accumulate or (rows > FEW_ROWS and plan.packed),
    )
    few = tap_rows * plan.window[2] * plan.channels * plan.filters <= UNIT_RESULTS
    return _unit(plan._replace(copies=tap_rows // plan.joined if few else 1))


def _unit(plan: FilterPlan) -> FilterPlan:
    """The plan with as many lines per block, panels per unit and lines per chunk as caches like."""
    lines = max(POSITIONS // plan.piece, 1) if plan.whole else 1
    while lines > 1 and plan._replace(lines=lines).copy_bytes > COPY_BYTES:
        lines -= 1
    plan = plan._replace(lines=lines)
    panels = plan.panels
    while panels > 1 and plan._replace(panels=panels, packed=True).panel_bytes > COPY_BYTES:
        panels = -(-panels // 2)
    results = product(plan.window) * plan.channels * plan.filters
    positions = max(CHUNK_POSITIONS, results // (plan.channels + plan.filters))
    chunk = -(-positions // (plan.piece * lines)) * lines
    return plan._replace(panels=panels, chunk=chunk)


def _even(extent: int, most: int) -> int:
    """Extent of tiles: a divisor close to `most` where there is one, else such that the last one is little smaller."""
    if extent <= most:
        return max(extent, 1)
    divisors = [d for d in range(most, 3 * most // 4, -1) if extent % d == 0]
    return divisors[0] if divisors else -(-extent // -(-extent // most))
