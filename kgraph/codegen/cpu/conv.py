"""Convolutions as implicit matrix products over channels-last images, with a fused epilogue.

One unit of work is a block of output positions of one image (some rows and columns) times some panels of filters. The
part of the input that the block meets is copied to scratch, where padding is zeros and every distance is known when the
kernel is generated; then tiles of output positions run over taps and channels as over the k of a matrix product. The
copy is small against the products, lies in the second-level cache, and serves all panels of a thread's consecutive
units. Sizes of images may be symbolic: only the loops around blocks and the borders of the copy depend on them.

A 1x1 convolution that reads every pixel is a plain product (`gemm`); one with a group per channel goes to `depthwise`;
windows of 3 or 3x3 taps and stride 1 go to `winograd` where that is estimated to be faster; what neither this nor those
take is left to `conv_direct`. `choose` says which and why.

Interface for the layout pass: as in `gemm`, `packing_for(node, target)` names the layout of the weight operand.
"""

from __future__ import annotations

import itertools

from kgraph.codegen.cpu import conv_direct, depthwise, gemm, winograd
from kgraph.codegen.cpu.builder import itemsize
from kgraph.codegen.cpu.conv_geometry import AxisPhase, axis_phases
from kgraph.codegen.cpu.conv_kernel import ConvPlan, Section, copy_bytes, sums_bytes
from kgraph.codegen.cpu.epilogue import Parts, take_apart
from kgraph.codegen.cpu.microkernel import TileRange, register_tile
from kgraph.codegen.cpu.pack import accumulate_dtype, has_products
from kgraph.codegen.cpu.products import packed_product
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.packing import panels_layout

PATCH_BYTES = 400 << 10  # of input that a unit keeps in the second-level cache
PIXELS = 196  # output positions of a unit, about
MOST_PHASES = 16
FEWEST_UNITS = 16  # below, blocks are halved, although each half copies its border of the input again


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        return parts
    if not has_products(parts.node.inputs[0].dtype):
        return f"no convolutions of {parts.node.inputs[0].dtype}"
    return None


def choose(node: Node, target, prepared: bool = False) -> tuple[str, str]:
    """(algorithm, reason) for a conv node: "product", "depthwise", "winograd", "implicit_product" or "direct".

    prepared: whether the weight is prepared ahead of calls.
    """
    x, w = node.inputs
    attrs = node.attrs
    groups, window = attrs["feature_groups"], w.shape[:-2]
    low = [p[0] for p in attrs["padding"]]
    if any(isinstance(s, Dim) for s in w.shape) or isinstance(x.shape[-1], Dim):
        return "direct", "the window or the channels are symbolic"
    if 0 in w.shape:
        return "direct", "there is nothing to multiply"
    if groups > 1 and depthwise.takes(node):
        return "depthwise", "one channel per group"
    dilated = any(d != 1 for d in attrs["lhs_dilation"])
    if dilated and any(isinstance(p, Dim) for p in low):
        return "direct", "input dilation with a symbolic padding"
    plain = not dilated and all(s == 1 for s in attrs["strides"]) and all(p == (0, 0) for p in attrs["padding"])
    if groups == 1 and plain and all(k == 1 for k in window):
        return "product", "a 1x1 window that meets every pixel"
    if product(len(p) for p in _phases(node)) > MOST_PHASES:
        return "direct", "input dilation makes many phases"
    how = winograd.schedule(node, target, prepared)
    if isinstance(how, str):
        return "implicit_product", how
    return "winograd", how.reason


def packing_for(node: Node, target) -> tuple | None:
    """((operand index, layout),) in which `lower` wants the weight; None to leave it as it is."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str) or any(parts.packed):
        return None
    position = node.inputs.index(parts.operands[1])
    algorithm, _ = choose(parts.node, target, prepared=True)
    if algorithm == "winograd":
        return ((position, winograd.layout_for(parts.node, target)),)
    if algorithm not in ("product", "implicit_product"):
        return None
    x, w = parts.node.inputs
    axes = tuple(range(w.type.rank))
    if algorithm == "product":
        way = packed_product(x.dtype, parts.result.dtype, target)
        return ((position, gemm.layout_for(w.shape, (), axes[:-1], axes[-1:], way, target)),)
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    lanes = target.vector_bytes // itemsize(accumulate)
    groups = parts.node.attrs["feature_groups"]
    panel = register_tile(target)[1] * lanes
    layout = panels_layout(w.shape, (), axes[:-1], axes[-1:], groups, panel, lanes, accumulate)
    return ((position, layout),)


def lower(node: Node, target) -> list[KernelCall]:
    """The calls that compute the node."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        raise ValueError(parts)
    algorithm, reason = choose(parts.node, target, prepared=parts.packed[1] is not None)
    if algorithm == "winograd":
        calls = winograd.lower_parts(parts, target)
    elif algorithm == "depthwise":
        calls = depthwise.lower_parts(parts, target)
    elif algorithm == "direct":
        calls = conv_direct.lower_parts(parts, target)
    elif algorithm == "product":
        calls = _lower_product(parts, target)
    else:
        calls = lower_implicit(parts, target)
    calls[-1].notes.update(algorithm=algorithm, reason=reason)
    return calls


def _lower_product(parts: Parts, target) -> list[KernelCall]:
    x, w = parts.node.inputs
    channels, filters = w.shape[-2:]
    a = gemm.MatrixView(parts.operands[0], (), channels, 1)
    b = parts.operands[1] if parts.packed[1] else gemm.MatrixView(parts.operands[1], (), filters, 1)
    return gemm.product_calls(parts, a, b, (), product(x.shape[:-1]), filters, channels, target)


def _phases(node: Node) -> list[list[AxisPhase]]:
    """The phases of each spatial axis."""
    w, attrs = node.inputs[1], node.attrs
    lows = [None if isinstance(p[0], Dim) else p[0] for p in attrs["padding"]]
    axes = zip(w.shape[:-2], attrs["strides"], lows, attrs["lhs_dilation"], attrs["rhs_dilation"], strict=True)
    return [axis_phases(*axis) for axis in axes]


def lower_implicit(parts: Parts, target) -> list[KernelCall]:
    """The calls of an implicit product: perhaps packing of the weight, the product."""
    node = parts.node
    x, w = node.inputs
    rank, attrs = x.type.rank - 2, node.attrs
    groups = attrs["feature_groups"]
    channels, filters = w.shape[-2], w.shape[-1] // groups
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    lanes = target.vector_bytes // itemsize(accumulate)
    tile_pixels, vectors = register_tile(target)
    missing = 3 - rank
    window = (1,) * missing + tuple(w.shape[:-2])
    sizes = (1,) * missing + tuple(x.shape[1:-1])
    out_sizes = (1,) * missing + tuple(parts.result.shape[1:-1])
    lows = (0,) * missing + tuple(p[0] for p in attrs["padding"])
    unit = axis_phases(1, 1, 0, 1, 1)
    combinations = list(itertools.product(*([unit] * missing + _phases(node))))

    calls: list[KernelCall] = []
    weight: Value | Temporary = parts.operands[1]
    if parts.packed[1] is None:
        depth = product(window) * channels
        view = gemm.MatrixView(parts.operands[1], (filters,), w.shape[-1], 1)
        calls.append(gemm.pack_call(view, (groups,), depth, filters, accumulate, lanes, vectors))
        weight = calls[-1].operands[1]

    table = SizeTable()
    images = x.shape[0]
    counts = [tuple(_positions(size, p) for size, p in zip(out_sizes, triple)) for triple in combinations]
    pixel_pitch = _pixel_pitch(channels, accumulate)
    tile, block = _blocking(counts[0], combinations[0], pixel_pitch * itemsize(accumulate), tile_pixels)
    panels = -(-filters // (vectors * lanes))
    places = _places(images, groups, counts[0], block)
    while block[0] >= 2 * tile[0] and places * panels < FEWEST_UNITS and block[0] * block[1] >= 4 * tile_pixels:
        block = (-(-block[0] // (2 * tile[0])) * tile[0], block[1])
        places = _places(images, groups, counts[0], block)
    group = max(min(panels, panels * places // gemm.UNITS), 1)
    few = len(combinations) > 1
    plan = ConvPlan(
        accumulate=accumulate,
        dtype=x.dtype,
        images=table(images),
        sizes=table.all(sizes),
        out_sizes=table.all(out_sizes),
        groups=groups,
        channels=channels,
        filters=filters,
        window=window,
        phases=tuple(tuple(tuple(p) for p in triple) for triple in combinations),
        origins=tuple(table(-low) if isinstance(low, Dim) else -low for low in lows),
        counts=tuple(table.all(c) for c in counts),
        block=block,
        group=group,
        row_tiles=tuple(_tile_sizes(c[1], tile[0], few) for c in counts),
        col_tiles=tuple(_tile_sizes(c[2], tile[1], few) for c in counts),
        pixel_pitch=pixel_pitch,
        lanes=lanes,
        vectors=vectors,
        requests=_requests(block, tile, weight, target) if parts.packed[1] is not None and not few else 0,
        epilogue=tuple(parts.epilogue(accumulate, groups * filters, 2)),
    )
    sections = [Section(plan, i) for i in range(len(plan.phases))]
    units = [images * groups * c[0] * ceil_div(c[1], block[0]) * ceil_div(c[2], block[1]) for c in counts]
    flops = sum(2 * images * groups * filters * channels * product(c) * s.taps for c, s in zip(counts, sections))
    calls.append(
        KernelCall(
            spec=KernelSpec("conv" + parts.name, "kgraph.codegen.cpu.conv_kernel:render_conv", tuple(plan)),
            operands=[parts.operands[0], weight, *(v for _, v in parts.extras), *parts.outputs],
            outputs=len(parts.outputs),
            sizes=list(table.values),
            extent=sum(units) * -(-panels // group),
            flops=flops,
            bytes=x.type.nbytes + weight.type.nbytes + sum(v.type.nbytes for v in parts.outputs),
            scratch_bytes=copy_bytes(plan, sections) + sums_bytes(plan, sections),
            notes={"inplace": parts.inplace(2)},
        )
    )
    return calls


def _requests(block: tuple, tile: tuple, weight: Value | Temporary, target) -> int:
    """Tiles of a block that ask, between them, for what they read next of a packed weight; 0 where that is small."""
    tiles = product(-(-n // size) for n, size in zip(block, tile, strict=True))
    return min(tiles, gemm.REQUESTING_TILES) if gemm.is_requested(weight, target) else 0


def _places(images, groups: int, counts: tuple, block: tuple) -> int:
    """Blocks of positions, as far as sizes are known."""
    static = [c if isinstance(c, int) else 1 for c in (images, groups, counts[0])]
    blocks = [-(-c // size) if isinstance(c, int) else 2 for c, size in zip(counts[1:], block)]
    return product(static) * product(blocks)


def _positions(size, phase: AxisPhase):
    """How many positions of a phase an axis of `size` output positions has."""
    count = (size - phase.phase + phase.period - 1) // phase.period
    return count if isinstance(count, Dim) else max(count, 0)


def _pixel_pitch(channels: int, accumulate: str) -> int:
    """Distance of pixels in the copy: padded where pixels would fall into few sets of the first-level cache."""
    return channels + 64 // itemsize(accumulate) if channels * itemsize(accumulate) % 2048 == 0 else channels


def _tile_sizes(count, largest: int, few: bool) -> tuple:
    tiles = TileRange.dynamic(largest, few) if isinstance(count, Dim) else TileRange.static(count, largest)
    return tiles.sizes


def _blocking(counts, phases, pixel_bytes: int, pixels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((rows, columns) of a tile, (rows, columns) of a unit's block of positions)."""
    _, high, wide = counts
    if isinstance(wide, Dim):
        tile = (1, pixels)
        columns = 4 * pixels
    else:
        across = max(-(-wide // pixels), 1)
        columns = max(-(-wide // across), 1)
        rows = 1 if across > 1 or isinstance(high, Dim) else max(min(pixels // columns, high), 1)
        tile = (rows, columns)
        columns = _balanced(wide, columns, max(PIXELS // (rows * columns), 1))
    rows = max(PIXELS // columns // tile[0], 1) * tile[0]

    def fits(rows, columns):
        planes = max(phases[0].taps, 1)
        copied = planes * phases[1].copy_extent(rows) * phases[2].copy_extent(columns)
        return copied * pixel_bytes <= PATCH_BYTES

    while rows > tile[0] and not fits(rows, columns):
        rows -= tile[0]
    while columns > tile[1] and not fits(rows, columns):
        columns -= tile[1]
    if not isinstance(high, Dim):
        rows = _balanced(high, tile[0], rows // tile[0])
    return tile, (rows, columns)


def _balanced(extent: int, tile: int, most: int) -> int:
    """Size of blocks of at most `most` whole tiles that cut `extent` evenly."""
    tiles = max(-(-extent // tile), 1)
    blocks = -(-tiles // most)
    return -(-tiles // blocks) * tile
