"""Matrix products: `dot_general` of any layout, reduced to batches of A[M, K] x B[K, N], with a fused epilogue.

One unit of work is a block of rows times a few panels of columns. B is read in packed panels: made ahead of the calls
where it is a weight (`packing_for` names the layout, `kgraph.ops.packing` does it), by a kernel of its own where it is
an activation with enough rows to pay for it, else in place. A is read where it lies if its rows are contiguous and
their distance is known and harmless to the caches; otherwise each unit copies its block of A to scratch first, which
also converts and transposes it. M, N, K and the batch may all be symbolic.

Interface for the layout pass: for a node whose second operand is a weight, `packing_for(node, target)` gives
`((operand_index, layout), ...)` or None. The pass replaces operand `operand_index` of a `fusion` node (a plain
`dot_general` is first wrapped into one of kind "dot") by `pack(operand, layout=layout)` and sets the node's attribute
`packed` to those pairs; the node's body keeps the unpacked types. `lower` takes it from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kgraph.codegen.contractions import Axes
from kgraph.codegen.cpu.builder import itemsize
from kgraph.codegen.cpu.epilogue import Parts, take_apart
from kgraph.codegen.cpu.gemm_kernel import GemmPlan
from kgraph.codegen.cpu.microkernel import TileRange, register_tile
from kgraph.codegen.cpu.pack import PackPlan, accumulate_dtype, has_products
from kgraph.codegen.cpu.products import Product, packed_product, plain
from kgraph.codegen.cpu.strided import SizeTable, collapse, dense_strides
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value, make_node
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.packing import panels_layout

KC = 1024  # steps of k in a block, where K is cut: a panel of B of this depth stays in the second-level cache
RUNTIME_KC = 512
BLOCK_BYTES = 384 << 10  # of A that a unit keeps in the second-level cache, at most
BLOCK_ROWS = 112  # of A in a unit, about, at most: every block reads all of B
GROUP_COLUMNS = 256  # of a unit whose block of A is copied chunk by chunk
UNITS = 48  # of work, at least, so that many threads balance
COPIED_ROWS, COPIED_UNITS = 132, 8  # the same where blocks of A are transposed and every unit reads much of B again
FEWEST_GROUPS = 4  # of panels that a single row is multiplied with at once, so that threads have something to share
# Fewer rows are multiplied with a panel faster than it comes from memory. Of a weight of less than this part of the
# second-level cache, little is gained. What the last of many tiles asks for would come too late.
FEWEST_REQUESTING_ROWS, REQUESTED_SHARE, REQUESTING_TILES = 4, 4, 2
ROWS_TO_PACK = 16  # fewer rows than this do not pay for packing an activation


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node, "dot_general")
    if isinstance(parts, str):
        return parts
    if not has_products(parts.node.inputs[0].dtype):
        return f"no products of {parts.node.inputs[0].dtype}"
    return None


def packing_for(node: Node, target) -> tuple | None:
    """((operand index, layout),) in which `lower` wants the second operand if it is a weight; None to leave it."""
    parts = take_apart(node, "dot_general")
    if isinstance(parts, str) or any(parts.packed):
        return None
    lhs, rhs = parts.node.inputs
    if not rhs.type.is_static or 0 in rhs.shape:
        return None
    axes = Axes(parts.node)
    product = packed_product(lhs.dtype, parts.result.dtype, target)
    layout = layout_for(rhs.shape, axes.rhs_batch, axes.rhs_contract, axes.rhs_free, product, target)
    return ((node.inputs.index(parts.operands[1]), layout),)


def layout_for(shape: tuple, batch: tuple, contract: tuple, free: tuple, product: Product, target) -> tuple:
    """The layout of a weight of `shape` whose axes form batch, K and N, for kernels that multiply by `product`."""
    lanes = target.vector_bytes // itemsize(product.accumulate)
    panel = register_tile(target)[1] * lanes
    how = product.b, product.steps, product.offset, product.name == "halves"
    return panels_layout(shape, batch, contract, free, 1, panel, lanes, *how)


@dataclass
class MatrixView:
    """An operand as matrices [batch, outer, inner]: the value and its strides in elements.

    batch: strides of the batch axes. outer, inner: strides of the collapsed axes.
    """

    value: Value
    batch: tuple
    outer: int | Dim
    inner: int | Dim


def _view(value: Value, batch: tuple, outer: tuple, inner: tuple, target) -> tuple[list[KernelCall], MatrixView]:
    """The operand seen as matrices; calls that transpose it first where its axes do not collapse in place."""
    strides = dense_strides(value.shape)
    single = []
    for axes in (outer, inner):
        left = collapse((value.shape[a], strides[a]) for a in axes)
        if len(left) > 1:
            return _transposed(value, batch, outer, inner, target)
        single.append(left[0][1] if left else 1)
    return [], MatrixView(value, tuple(strides[a] for a in batch), *single)


def _transposed(value: Value, batch: tuple, outer: tuple, inner: tuple, target) -> tuple[list[KernelCall], MatrixView]:
    from kgraph.codegen import families

    node = make_node(PRIMITIVES["transpose"], (value,), {"permutation": (*batch, *outer, *inner)})
    calls = families.lower(node, target)
    count, rows = len(batch), len(outer)
    order = tuple(range(value.type.rank))
    _, view = _view(node.output, order[:count], order[count : count + rows], order[count + rows :], target)
    return calls, view


def lower(node: Node, target) -> list[KernelCall]:
    """The calls that compute the node: perhaps a transposition, perhaps packing of B, the product."""
    parts = take_apart(node, "dot_general")
    if isinstance(parts, str):
        raise ValueError(parts)
    axes = Axes(parts.node)
    lhs, rhs = parts.node.inputs
    batch = tuple(lhs.shape[a] for a in axes.lhs_batch)
    rows = product(lhs.shape[a] for a in axes.lhs_free)
    depth = product(lhs.shape[a] for a in axes.lhs_contract)
    columns = product(rhs.shape[a] for a in axes.rhs_free)
    b: Value | MatrixView
    calls, a = _view(parts.operands[0], axes.lhs_batch, axes.lhs_free, axes.lhs_contract, target)
    if parts.packed[1] is not None:
        b = parts.operands[1]
    else:
        more, b = _view(parts.operands[1], axes.rhs_batch, axes.rhs_contract, axes.rhs_free, target)
        calls = calls + more
    return calls + product_calls(parts, a, b, batch, rows, columns, depth, target)


def product_calls(parts: Parts, a: MatrixView, b, batch: tuple, rows, columns, depth, target) -> list[KernelCall]:
    """Calls for A x B. b: the packed Value, or the MatrixView (outer = K, inner = N) of an unpacked one."""
    accumulate = accumulate_dtype(a.value.dtype, parts.result.dtype)
    lanes = target.vector_bytes // itemsize(accumulate)
    tile, vectors = register_tile(target)
    way = plain(accumulate)
    calls: list[KernelCall] = []
    in_place = None
    b_value: Value | Temporary
    if isinstance(b, MatrixView):
        unit = not isinstance(b.inner, Dim) and (b.inner == 1 or columns == 1)
        few = not isinstance(rows, Dim) and rows < ROWS_TO_PACK
        if unit and few and b.value.dtype == accumulate:
            in_place, b_value = b, b.value
        else:
            calls.append(pack_call(b, batch, depth, columns, accumulate, lanes, vectors))
            b_value = calls[-1].operands[1]
    else:
        b_value, way = b, packed_product(a.value.dtype, parts.result.dtype, target)

    copy = _copy_mode(a, rows, columns, depth, way, tile)
    chunk = _chunk(depth)
    block, group = _blocking(batch, rows, columns, depth, chunk, copy, tile, vectors * lanes, itemsize(way.a))
    row_tiles = _row_tiles(rows, block, tile, copy)
    beside = _panels_beside(rows, columns, depth, vectors * lanes)
    group = max(group, beside)
    table = SizeTable()
    epilogue = parts.epilogue(accumulate, table(columns), 2)
    entry: Callable = lambda count: count
    if isinstance(rows, Dim) and not copy and not isinstance(depth, Dim) and depth <= chunk:
        entry = table.run_time
    plan = GemmPlan(
        product=tuple(way),
        a_dtype=a.value.dtype,
        batch=table.all(batch),
        a_batch=table.all(a.batch),
        b_batch=table.all(in_place.batch) if in_place else (),
        rows=table(rows),
        columns=table(columns),
        depth=table(depth),
        a_row=table(a.outer),
        a_step=table(a.inner),
        b_step=table(in_place.outer) if in_place else None,
        copy=copy,
        block=entry(block),
        even=isinstance(rows, Dim) and not _whole_blocks(rows, block),
        chunk=chunk,
        group=group,
        lanes=lanes,
        row_tiles=(row_tiles.sizes, entry(row_tiles.first) if row_tiles.first else 0),
        vectors=vectors,
        beside=beside,
        requests=0 if isinstance(b, MatrixView) or group > 1 else _requests(rows, block, b, tile, target),
        epilogue=tuple(epilogue),
    )
    narrow = "" if way.b == accumulate else f"_{way.b}"
    entries = product(batch)
    panels = ceil_div(columns, vectors * lanes)
    flops = 2 * entries * rows * columns * depth
    calls.append(
        KernelCall(
            spec=KernelSpec(f"gemm{narrow}{parts.name}", "kgraph.codegen.cpu.gemm_kernel:render", tuple(plan)),
            operands=[a.value, b_value, *(v for _, v in parts.extras), *parts.outputs],
            outputs=len(parts.outputs),
            sizes=list(table.values),
            extent=entries * ceil_div(rows, block) * ceil_div(panels, group),
            flops=flops,
            bytes=a.value.type.nbytes + b_value.type.nbytes + sum(v.type.nbytes for v in parts.outputs),
            scratch_bytes=plan.copy_bytes + plan.sums_bytes,
            notes={"algorithm": "gemm", "inplace": parts.inplace(2)},
        )
    )
    return calls


def pack_call(
    b: MatrixView, batch, depth, columns, accumulate: str, lanes: int, vectors: int, scale: Value | None = None
) -> KernelCall:
    """The call that packs B into a Temporary. scale: [columns], factors for the columns of B; see `PackPlan.scaled`."""
    table = SizeTable()
    width = vectors * lanes
    padded = ceil_div(columns, width) * width if isinstance(columns, Dim) else ceil_div(columns, lanes) * lanes
    rest = width if isinstance(columns, Dim) else columns % width
    stride = lambda step: 1 if isinstance(step, int) and step == 1 else table.run_time(step)
    plan = PackPlan(
        batch=tuple(map(table.run_time, batch)),
        batch_strides=tuple(map(table.run_time, b.batch)),
        depth=table.run_time(depth),
        columns=table.run_time(columns),
        padded=table.run_time(padded),
        k_stride=stride(b.outer),
        n_stride=stride(b.inner),
        dtype=b.value.dtype,
        accumulate=accumulate,
        width=width,
        lanes=lanes,
        whole=isinstance(columns, Dim) or columns >= width,
        tail_vectors=-(-rest // lanes),
        scaled=scale is not None,
    )
    out = Temporary(TensorType((*batch, depth, padded), accumulate))
    return KernelCall(
        spec=KernelSpec("pack_panels", "kgraph.codegen.cpu.pack:render_pack", tuple(plan)),
        operands=[b.value, out] if scale is None else [b.value, scale, out],
        outputs=1,
        sizes=list(table.values),
        extent=product(batch) * plan.units(depth, columns),
        flops=0,
        bytes=b.value.type.nbytes + out.type.nbytes,
        notes={"algorithm": "pack"},
    )


def _chunk(depth) -> int:
    """Steps of k in one block: all of them unless there are many."""
    if isinstance(depth, Dim):
        return RUNTIME_KC
    if depth <= 2 * KC:
        return max(depth, 1)
    count = -(-depth // KC)
    return -(-depth // (16 * count)) * 16


def _copy_mode(a: MatrixView, rows, columns, depth, way: Product, tile: int) -> str:
    """Whether blocks of A are copied before they are multiplied, and in which direction."""
    contiguous = not isinstance(a.inner, Dim) and (a.inner == 1 or depth == 1)
    if way.steps > 1:
        return "rows"
    if not contiguous and not isinstance(a.outer, Dim) and a.outer == 1:
        return "columns"
    if not contiguous or a.value.dtype != way.a or isinstance(a.outer, Dim):
        return "rows"
    few = not isinstance(rows, Dim) and rows <= 4
    narrow = not isinstance(columns, Dim) and columns <= 32
    # Rows a multiple of 2 KiB apart fall into the same few sets of the first-level cache, of 8 lines or more each.
    crowded = tile > 8 and a.outer * itemsize(way.a) % 2048 == 0
    return "rows" if not few and not narrow and crowded else ""


def _blocking(batch, rows, columns, depth, chunk, copy, tile, width, size) -> tuple[int, int]:
    """(rows, panels) of one unit of work. size: bytes of an element of A as tiles read it."""
    chunked = isinstance(depth, Dim) or depth > chunk
    resident = chunk if chunked and (copy or isinstance(depth, Dim)) else depth
    most = max(BLOCK_BYTES // (resident * size), 1) if resident else tile
    most, least_units = min(most, BLOCK_ROWS), UNITS
    if copy == "columns":
        # Every block reads B from the last cache, and here B is as large as A and C: the cotangent of a weight.
        most, least_units = COPIED_ROWS, COPIED_UNITS
    block = max(most // tile, 1) * tile
    panels = None if isinstance(columns, Dim) else -(-columns // width)
    # A copied block is copied again by every unit that needs it unless units are consecutive and K is in one chunk.
    most_panels = max(GROUP_COLUMNS // width, 1)
    group = min(panels or most_panels, most_panels) if copy and chunked else 1
    if isinstance(rows, Dim):
        return _even_block(rows, block, tile), group
    entries = 1 if any(isinstance(s, Dim) for s in batch) else product(batch)
    units = lambda: entries * -(-rows // block) * -(-(panels or 8) // group)
    while group > 2 and units() < least_units:
        group -= 1
    while block > tile and units() < least_units:
        block -= tile
    count = max(-(-rows // block), 1)
    return max(-(-rows // (count * tile)) * tile, tile), group


def _panels_beside(rows, columns, depth, width: int) -> int:
    """Panels that a single row is multiplied with at once: up to 8 sums in flight hide the latency of multiply-add."""
    single = math.gcd(*(coefficient for _, coefficient in rows.terms)) == 1 if isinstance(rows, Dim) else rows == 1
    if not single or isinstance(columns, Dim) or isinstance(depth, Dim):
        return 1
    return next((n for n in (4, 2) if columns // width >= n * FEWEST_GROUPS), 1)


def _requests(rows, block: int, b: Value, tile: int, target) -> int:
    """Tiles that ask, between them, for what they read next of a packed B; 0 where B is small or rows are too few."""
    fewest = math.gcd(*(coefficient for _, coefficient in rows.terms)) if isinstance(rows, Dim) else rows
    if fewest < FEWEST_REQUESTING_ROWS or not is_requested(b, target):
        return 0
    return min(-(-min(fewest, block) // tile), REQUESTING_TILES)


def is_requested(b: Value | Temporary, target) -> bool:
    """Whether a packed weight is so large that tiles ask for what they read next of it while they multiply."""
    return b.type.nbytes * REQUESTED_SHARE >= target.l2_bytes


def _even_block(rows: Dim, most: int, tile: int) -> int:
    """Rows of a unit where M is symbolic: if all M are multiples of some number, a block that divides it, so that the
    rows beyond whole tiles are known. Of those the one with the fewest rows beyond whole tiles, then the largest."""
    factor = math.gcd(*(coefficient for _, coefficient in rows.terms))
    divisors = [d for d in range(min(most, factor), tile - 1, -1) if factor % d == 0]
    return min(divisors, key=lambda d: (d % tile / d, -d), default=most)


def _row_tiles(rows, block: int, tile: int, copy: str) -> TileRange:
    """The tiles that a unit is made of."""
    # Where rows are copied in panels, every tile begins one.
    divide = TileRange.static if copy == "columns" else TileRange.even
    if not isinstance(rows, Dim):
        return divide(rows, tile) if 0 < rows <= block else TileRange.static(rows, tile)
    return divide(block, tile) if _whole_blocks(rows, block) else TileRange.dynamic(tile)


def _whole_blocks(rows: Dim, block: int) -> bool:
    """Whether any number of rows is one of whole blocks."""
    return all(coefficient % block == 0 for _, coefficient in rows.terms)
