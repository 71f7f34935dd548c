"""Cotangents of the weights of convolutions: implicit products whose depth is the output positions of all images.

Rows are taps times channels, columns the filters of a group. Few results are sums over many positions, so positions are
cut into pieces whose number the target decides: a first kernel leaves the sums of each piece, a reduction adds them in
order. Where positions lie is computed for as many of them at a time as the block has threads, and kept in shared
memory. Those with one channel per group go to `conv_filter_depthwise`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kgraph.codegen.contractions import accumulate_dtype, has_products
from kgraph.codegen.cuda import conv_filter_depthwise, conv_library, reduce, scalar_ops
from kgraph.codegen.cuda.conv_geometry import axis_sizes, inside, read_axes
from kgraph.codegen.cuda.library import offer
from kgraph.codegen.cuda.mma import instruction_for
from kgraph.codegen.cuda.pieces import sum_of_pieces
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.cuda.tensor_cores import tile_product
from kgraph.codegen.cuda.tiles import SMALL_TILE, Side, Tile, choose_tile, group_of
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product

WAVES = 2  # blocks of usual size per multiprocessor that positions are cut for
CHUNKS = 16  # of a tile's depth that a piece has at least, where sizes are known; 2 in the simulator


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "conv_filter_gradient":
        return f"{node.name} is not the cotangent of a convolution's weight"
    if not has_products(node.inputs[0].dtype):
        return f"no convolutions of {node.inputs[0].dtype}"
    if any(isinstance(n, Dim) for n in node.output.shape):
        return "channels or a window of symbolic size"
    if 0 in node.output.shape:
        return "the weight is empty"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """One call that sums pieces of the positions, and those that add the pieces' sums where there are several."""
    x, cotangent, out = *node.inputs, node.output
    accumulate = accumulate_dtype(x.dtype, out.dtype)
    depthwise = conv_filter_depthwise.takes(node)
    make = conv_filter_depthwise.Plan.make if depthwise else FilterPlan.make
    plan, tiles, positions, depth, block = make(node, accumulate, target)
    least = depth * (2 if target.simulator else plan.chunks(CHUNKS))
    pieces = _pieces(positions, tiles, least, WAVES * target.num_sms * max(target.block // block, 1))
    partial = Temporary(TensorType((pieces, *out.shape), accumulate))
    single = pieces == 1 and accumulate == compute_dtype(out.dtype)
    plan = plan._replace(output=out.dtype if single else accumulate)
    window, groups = node.attrs["window"], node.attrs["feature_groups"]
    sizes = [x.shape[0], out.shape[-2], out.shape[-1] // groups, groups, *cotangent.shape[1:-1]]
    sums = KernelCall(
        spec=KernelSpec(plan.name, plan.template, tuple(plan)),
        operands=[x, cotangent, out if single else partial],
        outputs=1,
        sizes=[*sizes, *axis_sizes(node, window), pieces, ceil_div(positions, pieces * depth) * depth],
        extent=pieces * tiles,
        flops=2 * product(cotangent.shape) * out.shape[-2] * product(window),
        bytes=x.type.nbytes + cotangent.type.nbytes + partial.type.nbytes,
        notes={"algorithm": "depthwise" if depthwise else "implicit_product"},
        launch=Launch(block),
    )
    calls = [sums] if single else [sums, *reduce.lower_parts(sum_of_pieces(partial, out.dtype, [out]), target)]
    library = None if depthwise else conv_library.filter_gradient(node, target)
    return calls if library is None else offer(calls, library)


def _pieces(positions, tiles: int, least: int, blocks: int) -> int:
    """Into how many pieces of at least so many positions they are cut, such that there are about so many blocks; sizes
    that are not known count as many."""
    pieces = blocks // tiles
    if isinstance(positions, int):
        pieces = min(pieces, positions // least)
    return max(pieces, 1)


class FilterPlan(NamedTuple):
    """Params of `render_filter`. rank: spatial axes. tensor: instruction of tensor cores, or "". groups: how many
    channels of the image and of the cotangent are fetched together. output: dtype of what is stored.

    Sizes of the kernel: images, channels and filters of a group, groups, the cotangent's spatial sizes, `axis_sizes`,
    the number of pieces, the positions of a piece.
    """

    name: str
    dtype: str
    accumulate: str
    rank: int
    tile: Tile
    tensor: str
    indices: str
    groups: tuple[int, int]
    output: str = ""

    @property
    def template(self) -> str:
        return "kgraph.codegen.cuda.conv_filter:render_filter"

    def chunks(self, most: int) -> int:
        """Of a piece, at least; see `CHUNKS`."""
        return most

    @staticmethod
    def make(node: Node, accumulate: str, target) -> tuple[FilterPlan, int, Any, int, int]:
        """(plan, tiles of the result, positions, how many of them a chunk has, threads of a block)."""
        x, cotangent = node.inputs
        groups, window = node.attrs["feature_groups"], node.attrs["window"]
        rows, columns = product(window) * node.output.shape[-2], node.output.shape[-1] // groups
        tensor = instruction_for(x.dtype, accumulate, target)
        tile = choose_tile(rows, columns, target.num_sms, accumulate, target, tensor)
        if rows <= SMALL_TILE.rows and not target.simulator:
            tile = SMALL_TILE
        index = index_type([x.type.size, cotangent.type.size, node.output.type.size])
        together = group_of(x.dtype, node.output.shape[-2]), group_of(cotangent.dtype, columns)
        plan = FilterPlan("conv_filter_gradient", x.dtype, accumulate, len(window), tile, tensor, index, together)
        tiles = groups * -(-rows // tile.rows) * -(-columns // tile.columns)
        return plan, tiles, product(cotangent.shape[:-1]), tile.depth, tile.block


def render_filter(params: tuple, target) -> str:
    plan = FilterPlan(*params)
    tile = Tile(*plan.tile)
    k = KernelSource(plan.name, target, tile.block, plan.indices)
    x, cotangent, out = k.operand(plan.dtype), k.operand(plan.dtype), k.operand(plan.output)
    images, channels, filters, groups = (k.size() for _ in range(4))
    axes = read_axes(k, False, [k.size() for _ in range(plan.rank)])
    pieces, piece = k.size(), k.size()
    sizes, outs = [axis.size for axis in axes], [axis.out for axis in axes]
    windows, spanned = [axis.window for axis in axes], [True] * len(axes)
    all_channels, all_filters = k.let(k.mul(channels, groups)), k.let(k.mul(filters, groups))
    positions = k.let(k.product([images, *outs]), "positions")
    rows = k.let(k.mul(k.product(windows), channels), "rows")
    left_group, right_group = plan.groups
    sums = tile_product(k, tile, plan.accumulate, plan.tensor, Side(True, left_group), Side(True, right_group))
    sums.left_panel.read(x)
    sums.right_panel.read(cotangent)
    # Of the next positions, one for each thread: the element of tap 0, and its places along the axes.
    offset, *kept = [k.shared(plan.indices, tile.block) for _ in range(len(axes) + 1)]
    row_tiles, column_tiles = k.let(k.ceil_div(rows, tile.rows)), k.let(k.ceil_div(filters, tile.columns))
    tiles = [pieces, groups, row_tiles, column_tiles]
    with k.block_stride(k.let(k.product(tiles), "total")) as item:
        number, group, row_tile, column_tile = k.coordinates(item, tiles)
        first_row = k.let(k.mul(row_tile, tile.rows), "first_row")
        first_column = k.let(k.mul(column_tile, tile.columns), "first_column")
        start = k.fresh("start")
        k.line(f"{start} = {k.mul(number, piece)}")
        end = k.add(start, piece)
        end = k.let(f"({end} if {end} < {positions} else {positions})", "end")
        chunks = k.let(f"({k.ceil_div(k.sub(end, start), tile.depth)} if {start} < {end} else {k.i(0)})", "chunks")
        # What each of the thread's rows adds to the places: one row only where a line of the panel is one turn.
        left, right = sums.left_panel, sums.right_panel
        away, *reaches = [k.local(plan.indices, left.count) for _ in range(len(axes) + 1)]
        with left.each() as (n, row, _):
            row = k.let(k.add(first_row, row), "row")
            tap, channel = k.let(k.div(row, channels), "tap"), k.let(k.mod(row, channels), "channel")
            steps = [k.let(k.mul(t, a.reach)) for t, a in zip(k.coordinates(tap, windows), axes)]
            for array, step in zip(reaches, steps):
                k.store(array, n, step)
            distance = k.mul(k.offset(steps, sizes, spanned), all_channels)
            k.store(away, n, k.add(distance, k.add(k.mul(group, channels), channel)))
        ready = k.fresh("ready")
        k.line(f"{ready} = {k.i(tile.block)}")

        def fetch() -> None:
            with k.suite(f"if {ready} == {k.i(tile.block)}:"):
                k.line(f"{ready} = {k.i(0)}")
                k.synchronise()
                at = k.let(k.add(start, sums.thread), "at")
                image, *qs = k.coordinates(at, [images, *outs])
                places = [k.let(k.add(k.mul(q, a.stride), a.start), "place") for q, a in zip(qs, axes)]
                for array, place in zip(kept, places):
                    k.store(array, sums.thread, place)
                element = k.offset([image, *places], [images, *sizes], [True, *spanned])
                k.store(offset, sums.thread, k.mul(element, all_channels))
                k.synchronise()
            with left.each() as (n, row, depth):
                at = k.let(k.add(ready, depth), "at")
                met = [k.let(k.add(k.load(p, at), k.load(r, n)), "place") for p, r in zip(kept, reaches)]
                conditions = [f"{k.add(first_row, row)} < {rows}", f"{k.add(start, depth)} < {end}"]
                conditions += [inside(k, place, size) for place, size in zip(met, sizes)]
                left.fetch(n, conditions, x, lambda: k.add(k.load(offset, at), k.load(away, n)))
            with right.each() as (n, depth, column):
                at = k.let(k.add(start, depth), "at")
                column = k.let(k.add(first_column, column), "column")
                index = lambda: k.add(k.mul(at, all_filters), k.add(k.mul(group, filters), column))
                right.fetch(n, [f"{at} < {end}", f"{column} < {filters}"], cotangent, index)
            k.line(f"{start} = {k.add(start, tile.depth)}")
            k.line(f"{ready} = {k.add(ready, tile.depth)}")

        sums.run(chunks, fetch)

        def visit(row: str, column: str, value: str) -> None:
            row, column = k.let(k.add(first_row, row), "row"), k.let(k.add(first_column, column), "column")
            with k.suite(f"if {row} < {rows} and {column} < {filters}:"):
                line = k.mul(k.add(k.mul(number, rows), row), all_filters)
                value = k.let(scalar_ops.convert(k, value, plan.accumulate, compute_dtype(plan.output)))
                k.store(out, k.add(line, k.add(k.mul(group, filters), column)), value)

        sums.results(visit)
    return k.text()
