"""Convolutions with windows of 3, or 3x3, by Winograd's algorithm: when it is the faster one, and how its work is cut.

A tile of m x m outputs takes (m + 2)^2 products per channel and filter in place of 9 m^2: 2.25 times fewer for m = 2,
4 times fewer for m = 4; along one axis, m + 2 in place of 3 m, 1.5 and 2 times fewer. Against that stand the
transforms, outputs beyond the image in the last tiles, and filters that take (m + 2)^2 / 9 times the memory.
`schedule` weighs them for a shape. Where a window is dilated, the outputs of a tile lie as far apart as its taps. m =
6 would save another 10 to 20 % of the products of large images, at ten times the error of a direct convolution (m = 4:
twice, m = 2: less than once).

`KGRAPH_WINOGRAD=0` switches the algorithm off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kgraph.codegen import tuning
from kgraph.codegen.cpu.builder import itemsize
from kgraph.codegen.cpu.epilogue import Parts, take_apart
from kgraph.codegen.cpu.microkernel import register_tile
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.cpu.winograd_chunk import chunk_of
from kgraph.codegen.cpu.winograd_filters import filters_call
from kgraph.codegen.cpu.winograd_plan import DTYPE, WinogradPlan, odd_lines
from kgraph.codegen.eager import run_call
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, TensorType, Value, make_node
from kgraph.ir.dims import ceil_div, evaluate, product
from kgraph.ops.packing import matrix_sizes, padded_columns, panels_layout, winograd_layout
from kgraph.ops.winograd import PAIRS, TAPS

OFF = "switched off by KGRAPH_WINOGRAD"
LEAST_PRODUCTS = 1 << 20  # of a direct convolution: smaller ones are not worth the longer compile
SHARED_PRODUCTS = 1 << 24  # from which on a kernel ahead transforms inputs for all units
LEAST_GAIN = 1.1  # of the estimates, which are at most so much too good; below it, the convolution stays direct
MOST_MEASURED = 1 << 30  # of the same: of larger ones, a search runs those with few images only
ASSUMED_IMAGES = (1, 8)  # where their number is symbolic
ASSUMED_SIZE = 56  # of an image, where it is symbolic
LEAST_CHUNKED = 4 << 20  # bytes of transformed filters: fewer ones are transformed ahead
LEAST_CHUNK = 16  # channels
CHUNKED_WORTH = 1.13  # of the estimate of filters that are not there twice, in memory and as what was made of them
LEAST_TILE = 4  # of a register tile, whose sums hide the latency of multiply-add
LARGEST_BLOCK = 64  # tiles
SHARERS = 2  # threads that the units of an image should occupy evenly: more have less to gain
FEWEST_UNITS = 8  # of one image: filters are cut into groups until threads have something to share

# Estimates, in the time of one multiply-add of vectors. Bytes of filters arrive while products are made.
# Of one vector of channels, or of filters, of a tile, and of one vector of filters; by axes and m.
TRANSFORM = {(1, 2): 25, (1, 4): 40, (2, 2): 95, (2, 4): 240}
FILTER_TRANSFORM = {(1, 2): 10, (1, 4): 15, (2, 2): 40, (2, 4): 80}
CHUNK_TRANSFORM = {(1, 2): 20, (1, 4): 40, (2, 2): 80, (2, 4): 360}
SUM = 2  # of a vector of sums: it is written
CHUNKED_SUM = 3  # of a vector of sums that is read and written once more
# Of a vector of a transform's matrix, by axes, where a unit's matrices and images take SPREAD_SHARE of the second-level
# cache or more; in proportion where they take less.
SPREAD = {1: 1, 2: 6}
SPREAD_SHARE = 0.7
SHORT_TILE = 2.4  # pixels; its fourth power by that of a register tile's pixels is the latency that the tile shows
DIRECT_OVERHEAD = 0.08  # of the products of a direct convolution
# Bytes per lane that arrive from memory, which cores share, and from the third-level cache; that are written to it or
# come back, in many streams at once.
MEMORY_BYTES, CACHE_BYTES, SPILLED_BYTES = 0.3, 1.0, 0.3
OVERLAP = 0.7  # of the shorter of products and arrival that the longer one hides


class Schedule(NamedTuple):
    """How a convolution is computed: m, tiles of a register tile and of a unit, panels of a unit, channels whose
    filters the kernel transforms at once (0 where that is done ahead); the estimate, as a fraction of the direct
    convolution's; what was measured, if anything."""

    outputs: int
    tile: int
    block: int
    group: int
    chunk: int
    cost: float
    measured: str = ""

    @property
    def reason(self) -> str:
        """Why, for `explain`."""
        found = f"measured: {self.measured}" if self.measured else _estimate(self.cost)
        where = ", filters transformed by the kernel" if self.chunk else ""
        return f"{self.outputs} outputs along an axis{where}, {found}"


def _estimate(cost: float) -> str:
    return f"estimated at {cost:.2f} times the direct convolution"


class _Problem(NamedTuple):
    """The sizes of a convolution, symbolic ones replaced.

    axes: of an image; where there is one, `high` is 1. dilations: of the window. prepared: whether filters are
    transformed ahead of calls.
    """

    axes: int
    dilations: tuple[int, ...]
    images: int
    high: int
    wide: int
    channels: int
    filters: int
    prepared: bool

    @property
    def direct_products(self) -> int:
        """Scalar multiply-adds of a direct convolution."""
        return self.images * self.high * self.wide * self.channels * self.filters * self.window

    @property
    def window(self) -> int:
        """Taps of a window."""
        return TAPS**self.axes


def refusal(node: Node) -> str | None:
    """Why a conv node is none that Winograd's algorithm can compute; None if it is one."""
    x, w = node.inputs
    attrs = node.attrs
    if w.type.rank not in (3, 4) or set(w.shape[:-2]) != {TAPS}:
        return "the window is not 3 or 3x3"
    if any(n != 1 for key in ("strides", "lhs_dilation") for n in attrs[key]):
        return "strides or dilated inputs"
    if attrs["feature_groups"] != 1:
        return "several groups"
    if any(isinstance(n, Dim) for n in w.shape) or 0 in w.shape:
        return "channels of symbolic size, or none"
    if x.dtype != DTYPE or node.output.dtype != DTYPE:
        return f"its error is bounded for float32, not {x.dtype}"
    return OFF if is_off() else None


def is_off() -> bool:
    """Whether the environment switches the algorithm off."""
    return os.environ.get("KGRAPH_WINOGRAD") == "0"


def schedule(
    node: Node, target, prepared: bool, outputs: int | None = None, chunked: bool | None = None
) -> Schedule | str:
    """How to compute a conv node, or why not to.

    prepared: whether its filters are laid out ahead of calls. outputs: the m that the filters are transformed for; None
    considers all, and the direct convolution. chunked: whether the kernel transforms them; None considers both.
    """
    reason = refusal(node) if outputs is None else None
    if reason is not None:
        return reason
    problems = _problems(node, prepared)
    if outputs is None and problems[0].direct_products < LEAST_PRODUCTS:
        return "too few products"
    if outputs is not None:
        return _schedule(outputs, problems, target, chunked)
    best = min((_schedule(m, problems, target, chunked) for m in PAIRS), key=lambda s: s.cost)
    estimated = "direct" if best.cost * LEAST_GAIN > 1 else str(best.outputs)
    names = "direct", *map(str, PAIRS)
    candidates = {name: functools.partial(_candidate, node, target, problems, name) for name in names}
    chosen, measured = tuning.decide(("conv of 3 taps", *problems), target, estimated, candidates)
    if chosen != "direct":
        return _schedule(int(chosen), problems, target, chunked)._replace(measured=measured)
    return f"measured: {measured}" if measured else _estimate(best.cost)


def _candidate(node: Node, target, problems: tuple[_Problem, ...], name: str) -> Callable[[], None]:
    """What runs a way to compute a conv node once, on random operands, as often for few images as for many."""
    from kgraph.codegen.cpu import conv

    rng = np.random.default_rng(0)
    runs: list[tuple[int, list[KernelCall], dict[Value | Temporary, np.ndarray]]] = []
    problems = tuple(p for p in problems if p.direct_products <= MOST_MEASURED) or problems[:1]
    most = max(problem.images for problem in problems)
    for problem in problems:
        sizes = (problem.high, problem.wide)[-problem.axes :]
        beyond = [(TAPS - 1) * d - sum(p) for d, p in zip(problem.dilations, node.attrs["padding"], strict=True)]
        size = [n + more for n, more in zip(sizes, beyond, strict=True)]
        window = [TAPS] * problem.axes
        shapes = (problem.images, *size, problem.channels), (*window, problem.channels, problem.filters)
        one = make_node(node.primitive, [Value(TensorType(shape, DTYPE)) for shape in shapes], node.attrs)
        parts = take_apart(one, "conv")
        assert isinstance(parts, Parts)
        calls = conv.lower_implicit(parts, target) if name == "direct" else lower_parts(parts, target, int(name))
        operands = dict.fromkeys(operand for call in calls for operand in call.operands)
        arrays = {o: rng.standard_normal(o.type.shape).astype(o.type.np_dtype) for o in operands}
        runs.append((-(-most // problem.images), calls[1:] if problem.prepared else calls, arrays))

    def run() -> None:
        for times, calls, arrays in runs:
            for call in calls * times:
                run_call(call, [arrays[o] for o in call.operands[:-1]], out=arrays[call.operands[-1]])

    return run


def layout_for(node: Node, target, prepared: bool = True, outputs: int | None = None) -> tuple:
    """The layout in which the kernel reads filters; outputs: m, if it is to be that."""
    how = schedule(node, target, prepared, outputs)
    if isinstance(how, str):
        raise ValueError(how)
    lanes, shape = target.lanes(DTYPE), node.inputs[1].shape
    panel = register_tile(target)[1] * lanes
    if how.chunk:
        axes = tuple(range(len(shape)))
        return panels_layout(shape, (), axes[:-1], axes[-1:], 1, panel, lanes, DTYPE)
    return winograd_layout(shape, how.outputs, panel, lanes, DTYPE)


def _problems(node: Node, prepared: bool) -> tuple[_Problem, ...]:
    """The node for each assumed number of images."""
    sizes = [ASSUMED_SIZE if isinstance(n, Dim) else n for n in node.output.shape[1:-1]]
    high, wide = sizes if len(sizes) == 2 else (1, *sizes)
    images = node.inputs[0].shape[0]
    counts = [images]
    if isinstance(images, Dim):
        counts = [evaluate(images, dict.fromkeys(images.symbols(), n)) for n in ASSUMED_IMAGES]
    channels, filters = node.inputs[1].shape[-2:]
    fixed = (channels, filters, prepared)
    return tuple(_Problem(len(sizes), tuple(node.attrs["rhs_dilation"]), max(n, 1), high, wide, *fixed) for n in counts)


@functools.cache
def _schedule(outputs: int, problems: tuple[_Problem, ...], target, chunked: bool | None = None) -> Schedule:
    """The best schedule for m = `outputs`, by the mean of the problems' costs."""
    most, vectors = register_tile(target)
    first = problems[0]
    width = vectors * target.lanes(DTYPE)
    panels = -(-first.filters // width)
    direct = [_direct_cost(p, target) for p in problems]
    counts = [_tiles(p, outputs) for p in problems]
    points = (outputs + TAPS - 1) ** first.axes
    chunk = chunk_of(first.channels, points, width, target) if first.prepared else 0
    small = points * first.channels * first.filters * itemsize(DTYPE) < LEAST_CHUNKED
    ways = {0} if chunked is False or small or chunk < LEAST_CHUNK else {chunk} if chunked else {0, chunk}
    best: dict[int, Schedule] = {}
    for way in ways:
        for tile in range(LEAST_TILE, most + 1):
            for block in range(tile, max(LARGEST_BLOCK, tile) + 1, tile):
                blocks = -(-counts[0] // block)
                group = max(panels * min(blocks, FEWEST_UNITS) // FEWEST_UNITS, 1)
                how = Schedule(outputs, tile, block, group, way, 0.0)
                costs = [
                    _cost(p, how, n, group * width, target) * _unevenness(-(-n // block) * -(-panels // group))
                    for p, n in zip(problems, counts)
                ]
                cost = sum(c / d for c, d in zip(costs, direct)) / len(problems)
                if way not in best or cost < best[way].cost:
                    best[way] = how._replace(cost=cost)
    return min(best.values(), key=lambda how: how.cost / (CHUNKED_WORTH if how.chunk else 1))


def _unevenness(units: int) -> float:
    """How much longer the thread with most units takes than with an even share."""
    return -(-units // SHARERS) * SHARERS / units if units else 1.0


def _is_shared(problem: _Problem, how: Schedule) -> bool:
    """Whether units share transformed inputs: those of one block do, where they are worth a step of their own."""
    return _tiles(problem, how.outputs) <= how.block and problem.direct_products >= SHARED_PRODUCTS


def _tiles(problem: _Problem, outputs: int) -> int:
    sizes = (problem.high, problem.wide)[-problem.axes :]
    return problem.images * product(tiles_along(n, outputs, d) for n, d in zip(sizes, problem.dilations, strict=True))


def tiles_along(size, outputs: int, dilation: int):
    """Tiles along an axis: those that begin with the first outputs, as many as there are gaps, then the next ones."""
    return dilation * ceil_div(ceil_div(size, dilation), outputs)


def _both(products: float, arrival: float) -> float:
    """The time of products whose filters arrive meanwhile."""
    return max(products, arrival) + (1 - OVERLAP) * min(products, arrival)


def _first_arrival(problem: _Problem, target) -> float:
    """Bytes per lane at which filters arrive: small weights are those of small models, which caches hold."""
    weight = problem.window * problem.channels * problem.filters * itemsize(DTYPE)
    return CACHE_BYTES if weight < target.l2_bytes else MEMORY_BYTES


def _direct_cost(problem: _Problem, target) -> float:
    lanes = target.lanes(DTYPE)
    vectors = -(-problem.filters // lanes)
    pixels = problem.images * problem.high * problem.wide
    weight = problem.window * problem.channels * problem.filters * itemsize(DTYPE)
    arrival = weight / (_first_arrival(problem, target) * lanes)
    return _both(pixels * problem.window * problem.channels * vectors * (1 + DIRECT_OVERHEAD), arrival)


def _cost(problem: _Problem, how: Schedule, tiles: int, group: int, target) -> float:
    """The estimate for one problem; tiles: of all images. group: filters of a unit."""
    lanes, size = target.lanes(DTYPE), itemsize(DTYPE)
    outputs, tile, block = how.outputs, how.tile, how.block
    points = (outputs + TAPS - 1) ** problem.axes
    channel_vectors, vectors = -(-problem.channels // lanes), -(-problem.filters // lanes)
    rounded = -(-tiles // tile)
    filters = (problem.window if how.chunk else points) * problem.channels * problem.filters * size
    blocks = -(-tiles // block)
    # Threads share units: one in the last block counts for half of a whole one even where it has little to do.
    shared = (rounded + blocks * min(block // tile, rounded)) / 2
    products = points * shared * tile * ((1 + (SHORT_TILE / tile) ** 4) * problem.channels + SUM) * vectors
    pixels = (
        min(block, rounded * tile) * (problem.channels + min(group, problem.filters)) * size
    )  # bytes, one of a tile
    held, asked = points * pixels, outputs**2 * pixels if problem.axes == 2 else 0
    again = CACHE_BYTES if filters < target.l3_bytes // 4 else MEMORY_BYTES
    if filters + held + asked < target.l2_bytes // 2:
        again = 8 * CACHE_BYTES
    arrival = (filters / _first_arrival(problem, target) + filters * (blocks - 1) / again) / lanes
    # What the second-level cache does not hold is written to the third and read again.
    spilled = max(held - 0.75 * target.l2_bytes, 0) * blocks * 2 / (SPILLED_BYTES * lanes)
    cost = _both(products, arrival) + spilled
    way = problem.axes, outputs
    spread = points * SPREAD[problem.axes] * min((held + asked) / (SPREAD_SHARE * target.l2_bytes), 1)
    cost += (rounded * tile * channel_vectors + tiles * vectors) * (TRANSFORM[way] + spread)
    if how.chunk:
        sums = points * tiles * (problem.channels // how.chunk) * vectors * CHUNKED_SUM
        cost += blocks * problem.channels * vectors * CHUNK_TRANSFORM[way] + sums
    elif not problem.prepared:
        cost += problem.channels * vectors * FILTER_TRANSFORM[way] + filters / (MEMORY_BYTES * lanes)
    return cost


def lower_parts(parts: Parts, target, outputs: int | None = None) -> list[KernelCall]:
    """The calls that compute the node: perhaps the transform of filters that are not laid out by `layout_for`.

    outputs: m, if it is to be that.
    """
    node = parts.node
    x, w = node.inputs
    calls: list[KernelCall] = []
    transformed: Value | Temporary = parts.operands[1]
    layout, apart = parts.packed[1], 0
    if layout is None:
        layout = layout_for(node, target, prepared=False, outputs=outputs)
        apart = odd_lines(taken := matrix_sizes(layout)[1] * padded_columns(layout)) - taken
        calls.append(filters_call(parts.operands[1], layout, apart=apart))
        transformed = calls[-1].operands[1]
    chunked = layout[0] == "panels"
    how = schedule(node, target, parts.packed[1] is not None, outputs if chunked else layout[2], chunked)
    assert isinstance(how, Schedule)
    assert (how.chunk > 0) == chunked
    out_sizes = tuple(parts.result.shape[1:-1])
    dilations = tuple(node.attrs["rhs_dilation"])
    row_pitch = out_sizes[-1] * dilations[0] if len(dilations) == 2 else 1
    tiles = tuple(tiles_along(n, how.outputs, d) for n, d in zip(out_sizes, dilations, strict=True))
    count = x.shape[0] * product(tiles)
    vectors, lanes = register_tile(target)[1], target.lanes(DTYPE)
    channels, filters = w.shape[-2:]
    panels = -(-filters // (vectors * lanes))
    table = SizeTable()
    plan = WinogradPlan(
        pairs=tuple(float(p) for p in PAIRS[how.outputs]),
        outputs=how.outputs,
        dilations=dilations,
        images=table(x.shape[0]),
        tiles=table.all(tiles),
        sizes=table.all(x.shape[1:-1]),
        out_sizes=table.all(out_sizes),
        out_pitches=(table(row_pitch), dilations[-1]),
        origins=table.all(-low for low, _ in node.attrs["padding"]),
        channels=channels,
        filters=filters,
        tile=how.tile,
        block=how.block,
        group=how.group,
        shared=how.group < panels and _is_shared(_problems(node, True)[0], how),
        chunk=how.chunk,
        apart=apart,
        lanes=lanes,
        vectors=vectors,
        epilogue=tuple(parts.epilogue(DTYPE, filters, 2)),
    )
    inputs: Value | Temporary = parts.operands[0]
    if plan.shared:
        calls.append(_inputs_call(inputs, plan, table, count))
        inputs = calls[-1].operands[1]
    return [
        *calls,
        KernelCall(
            spec=KernelSpec("winograd" + parts.name, "kgraph.codegen.cpu.winograd_kernel:render_winograd", tuple(plan)),
            operands=[inputs, transformed, *(v for _, v in parts.extras), *parts.outputs],
            outputs=len(parts.outputs),
            sizes=list(table.values),
            extent=ceil_div(count, how.block) * -(-panels // how.group),
            flops=2 * plan.points * count * plan.channels * plan.filters,
            bytes=x.type.nbytes + transformed.type.nbytes + sum(v.type.nbytes for v in parts.outputs),
            scratch_bytes=plan.scratch()["end"],
            # The groups of a block share its transformed inputs, unless all units do.
            notes={"inplace": parts.inplace(2), "grain": 1 if plan.shared else -(-panels // how.group)},
        ),
    ]


def _inputs_call(x: Value | Temporary, plan: WinogradPlan, table: SizeTable, tiles) -> KernelCall:
    """The call that transforms the inputs of all tiles into a Temporary. Those of all filters share its kernel."""
    params = tuple(plan._replace(filters=0, group=0, chunk=0, vectors=0, epilogue=()))
    out = Temporary(TensorType((ceil_div(tiles, plan.block), plan.inputs_block), DTYPE))
    return KernelCall(
        spec=KernelSpec("winograd_inputs", "kgraph.codegen.cpu.winograd_inputs:render_inputs", params),
        operands=[x, out],
        outputs=1,
        sizes=list(table.values),
        extent=ceil_div(tiles, plan.tile),
        flops=4 * plan.points * tiles * plan.channels,
        bytes=x.type.nbytes + out.type.nbytes,
        scratch_bytes=plan.input_scratch()["end"],
        notes={"algorithm": "winograd inputs"},
    )
