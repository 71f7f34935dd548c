"""Cotangents of filters with windows of 3, or 3x3, by Winograd's algorithm: when it is the faster way, and its plan.

The algorithm is linear in the filter, y = A^T ((G g) * (B^T d)), so that the cotangent of g is
G^T ((B^T d) * (A dy)): inputs are transformed as for the convolution, cotangents of outputs by the transpose of what
transforms outputs, and the sums over all tiles come in between, as products of matrices with tiles as their k. For
m = 4 these are 4 times fewer than those of the implicit product, for m = 2 2.25 times (along one axis 2 and 1.5).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from kgraph.codegen.cpu import winograd
from kgraph.codegen.cpu.builder import itemsize
from kgraph.codegen.cpu.conv_filter_kernel import total_call
from kgraph.codegen.cpu.conv_filter_winograd_kernel import FilterWinogradPlan
from kgraph.codegen.cpu.microkernel import register_tile
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.cpu.winograd_plan import DTYPE
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.winograd import PAIRS, TAPS

LEAST_PRODUCTS = 1 << 20  # of the implicit product, at the assumed sizes: smaller ones are not worth the longer compile
LEAST_GAIN = 1.15  # of the estimates
SUMS_SHARE, OPERANDS_SHARE = 0.6, 0.3  # of the second-level cache
MOST_STEP = 64  # tiles transformed at once
CHUNK_TILES = (64, 256)  # of a unit, least and most
FEWEST_UNITS = 8  # for the larger number of images that is assumed
FEWEST_CHANNELS = 32  # of a unit where channels are divided only so that threads have something to share

# Estimates, in the time of one multiply-add of vectors: of a vector of a tile's channels, of its filters, and of the
# taps of a vector of filters; by axes and m.
INPUT_TRANSFORM = {(1, 2): 20, (1, 4): 35, (2, 2): 100, (2, 4): 240}
COTANGENT_TRANSFORM = {(1, 2): 20, (1, 4): 35, (2, 2): 80, (2, 4): 160}
TAPS_TRANSFORM = {(1, 2): 15, (1, 4): 30, (2, 2): 80, (2, 4): 220}
STEP_OVERHEAD, SUM_OVERHEAD = 0.08, 3.0  # of a product; of a sum that is read and written for each step
BYTE = 0.25  # of the operands, in rows far apart
IMPLICIT_OVERHEAD = 1.2  # of a product of the implicit product


class Schedule(NamedTuple):
    """How the cotangent is computed: m; channels, vectors of filters and tiles of a unit; tiles of a step; the
    estimate, as a fraction of the implicit product's."""

    outputs: int
    channel_block: int
    filter_block: int
    chunk: int
    step: int
    cost: float


class _Problem(NamedTuple):
    """Sizes, symbolic ones replaced."""

    dilations: tuple[int, ...]
    images: int
    sizes: tuple[int, ...]
    channels: int
    filters: int

    def tiles(self, outputs: int) -> int:
        along = (winograd.tiles_along(n, outputs, d) for n, d in zip(self.sizes, self.dilations, strict=True))
        return self.images * product(along)


def schedule(node: Node, target) -> Schedule | str:
    """How to compute a conv_filter_gradient node, or why not to."""
    x, cotangent = node.inputs
    attrs = node.attrs
    if set(attrs["window"]) != {TAPS} or len(attrs["window"]) > 2:
        return "the window is not 3 or 3x3"
    if any(n != 1 for n in attrs["strides"]) or attrs["feature_groups"] != 1:
        return "strides or several groups"
    if x.dtype != DTYPE or node.output.dtype != DTYPE:
        return f"its error is bounded for float32, not {x.dtype}"
    if winograd.is_off():
        return winograd.OFF
    sizes = tuple(winograd.ASSUMED_SIZE if isinstance(n, Dim) else max(n, 1) for n in cotangent.shape[1:-1])
    images = x.shape[0]
    images = winograd.ASSUMED_IMAGES[-1] if isinstance(images, Dim) else max(images, 1)
    problem = _Problem(tuple(attrs["rhs_dilation"]), images, sizes, x.shape[-1], cotangent.shape[-1])
    if images * product(sizes) * problem.channels * problem.filters * product(attrs["window"]) < LEAST_PRODUCTS:
        return "too few products"
    best = min((_schedule(m, problem, target) for m in PAIRS), key=lambda how: how.cost)
    if best.cost * LEAST_GAIN > 1:
        return f"estimated at {best.cost:.2f} times the implicit product"
    return best


@functools.cache
def _schedule(outputs: int, problem: _Problem, target) -> Schedule:
    lanes, size, axes = target.lanes(DTYPE), itemsize(DTYPE), len(problem.sizes)
    points, way = (outputs + TAPS - 1) ** axes, (axes, outputs)
    tiles = problem.tiles(outputs)
    channels, vectors = problem.channels, -(-problem.filters // lanes)
    sums = int(SUMS_SHARE * target.l2_bytes) // (points * size * lanes)  # channels times vectors of filters
    side = max(int((sums * lanes) ** 0.5), lanes)
    filter_block = _part(vectors, max(side // lanes, 1))
    channel_block = _part(channels, max(sums // filter_block, 1))
    filter_block = _part(vectors, max(sums // channel_block, 1))
    blocks = -(-channels // channel_block), -(-vectors // filter_block)
    # Long chunks spare sums, and memory where there are several: not more than the operands take.
    least, most = CHUNK_TILES
    results = TAPS**axes * channels * problem.filters
    bound = results // (channels + problem.filters) // outputs**axes
    chunk = max(min(tiles * product(blocks) // FEWEST_UNITS, most), least, bound)
    while -(-tiles // chunk) * product(blocks) < FEWEST_UNITS and channel_block >= 2 * FEWEST_CHANNELS:
        channel_block = _part(channels, channel_block // 2)
        blocks = -(-channels // channel_block), blocks[1]
    of_tile = points * (-(-channel_block // lanes) * lanes + filter_block * lanes) * size
    step = max(min(int(OPERANDS_SHARE * target.l2_bytes) // of_tile // 8 * 8, MOST_STEP), 8)
    chunk = -(-chunk // step) * step
    made = channels * vectors
    cost = points * tiles * made * (1 + STEP_OVERHEAD + SUM_OVERHEAD / step)
    transforms = (
        -(-channels // lanes) * blocks[1] * INPUT_TRANSFORM[way] + vectors * blocks[0] * COTANGENT_TRANSFORM[way]
    )
    cost += tiles * (transforms + outputs**axes * (channels + problem.filters) * size * BYTE)
    cost += -(-tiles // chunk) * made * TAPS_TRANSFORM[way]
    implicit = problem.images * product(problem.sizes) * TAPS**axes * made * IMPLICIT_OVERHEAD
    return Schedule(outputs, channel_block, filter_block, chunk, step, cost / implicit)


def _part(count: int, most: int) -> int:
    """The size of the fewest equal parts of `count` that are at most `most`."""
    return -(-count // -(-count // most))


def lower(node: Node, target) -> list[KernelCall]:
    """One call that sums chunks, and one that adds the chunks' sums where there are several."""
    how = schedule(node, target)
    if isinstance(how, str):
        raise ValueError(how)
    x, cotangent = node.inputs
    attrs = node.attrs
    channels, filters = node.output.shape[-2:]
    lanes = target.lanes(DTYPE)
    most, vectors = register_tile(target)
    vectors = min(vectors, how.filter_block)
    most = most * register_tile(target)[1] // vectors
    out_sizes, dilations = cotangent.shape[1:-1], attrs["rhs_dilation"]
    tiles = tuple(winograd.tiles_along(n, how.outputs, d) for n, d in zip(out_sizes, dilations, strict=True))
    table = SizeTable()
    plan = FilterWinogradPlan(
        pairs=tuple(float(p) for p in PAIRS[how.outputs]),
        outputs=how.outputs,
        dilations=tuple(dilations),
        images=table(x.shape[0]),
        tiles=table.all(tiles),
        sizes=table.all(x.shape[1:-1]),
        out_sizes=table.all(out_sizes),
        origins=table.all(-low for low, _ in attrs["padding"]),
        channels=channels,
        filters=filters,
        channel_block=how.channel_block,
        filter_block=how.filter_block,
        rows=_part(how.channel_block, most),
        step=how.step,
        chunk=how.chunk,
        lanes=lanes,
        vectors=vectors,
    )
    count = x.shape[0] * product(tiles)
    chunks = ceil_div(count, how.chunk)
    if isinstance(chunks, int):
        chunks = max(chunks, 1)
    single = isinstance(chunks, int) and chunks == 1
    partial = Temporary(TensorType((chunks, *node.output.shape), DTYPE))
    sums = KernelCall(
        spec=KernelSpec(
            "conv_filter_winograd", "kgraph.codegen.cpu.conv_filter_winograd_kernel:render_filter_winograd", tuple(plan)
        ),
        operands=[x, cotangent, node.output if single else partial],
        outputs=1,
        sizes=list(table.values),
        extent=chunks * (plan.channel_blocks * plan.filter_blocks),
        flops=2 * plan.points * count * channels * filters,
        bytes=x.type.nbytes + cotangent.type.nbytes + partial.type.nbytes,
        scratch_bytes=plan.scratch()["end"],
    )
    return [sums] if single else [sums, total_call(partial, node.output, chunks, target)]
