"""Copies that bring an operand of a contraction into the form its kernel reads: panels of B, blocks of A.

Both convert to the dtype of the sums on the way. Panels of a weight are made ahead of the calls (`kgraph.ops.packing`,
the same layout); the kernel here makes those of an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.contractions import accumulate_dtype, has_products
from kgraph.codegen.cpu.builder import F64, Int, KernelBuilder, Pointer, compute_dtype, is_float, itemsize
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.transpose import transpose_vectors
from kgraph.ir.dims import ceil_div

STEPS = 16  # rows of B that are packed together: they stay in reach of the prefetchers and of the page tables' cache

__all__ = [
    "PackPlan",
    "accumulate_dtype",
    "batch_offset",
    "copy_run",
    "has_products",
    "render_pack",
    "widen",
]


def widen(b: KernelBuilder, value: ir.Value, dtype: str, wide: str) -> ir.Value:
    """A loaded value of `dtype` in the sum's dtype `wide`."""
    target = b.type(wide, getattr(value.type, "count", 1))
    if value.type == target:
        return value
    if is_float(value):
        return b.ir.fpext(value, target)
    if wide == "float64" and target in (F64,):
        return b.ir.sitofp(value, target)
    return b.ir.zext(value, target) if dtype.startswith("uint") else b.ir.sext(value, target)


def copy_run(
    b: KernelBuilder, destination: Pointer, source: Pointer, count, stride=1, convert: Callable | None = None
) -> None:
    """destination[i] = source[i * stride] for i below `count`, converted to the destination's dtype.

    convert(b, value, dtype): what is stored for a loaded value of `dtype`, where that is not the same number, widened.
    """
    unit = isinstance(stride, int) and stride == 1
    lanes = b.target.vector_bytes // itemsize(destination.dtype) if unit else 1
    raw = source.dtype == destination.dtype and convert is None

    def copy(i, mask, lanes: int) -> None:
        value = b.load(source, i if unit else i * stride, lanes, mask, raw=raw)
        if not raw:
            value = convert(b, value, source.dtype) if convert else widen(b, value, source.dtype, destination.dtype)
        b.store(destination, i, value, mask, raw=raw)

    # Loads of narrow elements under a mask take instructions that only the widest vectors have.
    masked = itemsize(source.dtype) >= 4 or b.target.vector_bytes == 64
    body = lambda i, mask, slot: copy(i, mask, lanes)
    b.vector_loop(0, count, lanes, body, unroll=4 if unit else 1, tail=masked)
    if not masked and lanes > 1:
        with b.loop(count // lanes * lanes, count) as i:
            copy(i, None, 1)


class PackPlan(NamedTuple):
    """Params of `render_pack`. Strides in elements. Sizes are those of run time, so that one kernel packs many shapes.

    batch: sizes of the batch axes; batch_strides: theirs in the source. depth, columns: K and N. padded: N with the
    columns that fill up the last panel. k_stride, n_stride: in the source, an `int` where it is 1. dtype, accumulate:
    of the source, of the panels. width, lanes: of a panel and of a vector. whole: whether there may be panels without
    padding. tail_vectors: of the last panel, where it may be another one; else 0. scaled: whether there is a factor for
    each column, a second operand; not where `transposed`.
    """

    batch: tuple
    batch_strides: tuple
    depth: tuple
    columns: tuple
    padded: tuple
    k_stride: int | tuple
    n_stride: int | tuple
    dtype: str
    accumulate: str
    width: int
    lanes: int
    whole: bool
    tail_vectors: int
    scaled: bool

    @property
    def transposed(self) -> bool:
        """Whether B is contiguous along K: a unit is a panel then, else STEPS rows of all panels."""
        return self.k_stride == 1 and self.n_stride != 1

    def units(self, depth, columns):
        """Units of work for one batch entry."""
        return ceil_div(columns, self.width) if self.transposed else ceil_div(depth, STEPS)


def batch_offset(b: KernelBuilder, index, sizes: list, strides: list):
    """Offset in elements of batch entry number `index` (row-major over `sizes`)."""
    offset = 0
    for axis in range(len(sizes) - 1, -1, -1):
        here = index if axis == 0 else index % sizes[axis]
        index = index if axis == 0 else index // sizes[axis]
        offset = here * strides[axis] + offset
    return offset


def render_pack(params: tuple, target) -> str:
    """Kernel (source, factors where `scaled`) -> (panels); see `PackPlan.transposed` for its units."""
    plan = PackPlan(*params)
    b = KernelBuilder("pack", target)
    source, out = b.operand(0, plan.dtype), b.operand(1 + plan.scaled, plan.accumulate)
    scale = b.operand(1, plan.dtype) if plan.scaled else None
    depth, columns = resolve(b, plan.depth), resolve(b, plan.columns)
    k_stride, n_stride = resolve(b, plan.k_stride), resolve(b, plan.n_stride)
    batch, strides = resolve_all(b, plan.batch), resolve_all(b, plan.batch_strides)
    padded, lanes = resolve(b, plan.padded), plan.lanes
    whole = columns // plan.width if plan.tail_vectors else b.ceil_div(columns, plan.width)

    def rows(entry, panel, begin, end, vectors: int, masked: bool) -> None:
        """The steps [begin, end) of one panel."""
        first = panel * plan.width
        at = source + (batch_offset(b, entry, batch, strides) + first * n_stride)
        to = out + (entry * (depth * padded) + panel * (depth * plan.width))
        remaining = columns - first
        if plan.transposed:
            _transposed_panel(b, plan, to, at, depth, n_stride, vectors, remaining if masked else None)
            return
        masks = [b.tail_mask(remaining - j * lanes, lanes) if masked else None for j in range(vectors)]
        factors = [b.load(scale, first + j * lanes, lanes, masks[j]) for j in range(vectors)] if scale else []
        with b.loop(begin, end) as k:
            for j in range(vectors):
                value = _column_vector(b, at + (k * k_stride + (j * lanes) * n_stride), n_stride, lanes, masks[j])
                if factors:
                    value = b.mul(value, factors[j])
                b.store(to, k * (vectors * lanes) + j * lanes, widen(b, value, plan.dtype, plan.accumulate))

    with b.loop(b.begin, b.end) as unit:
        if plan.transposed:
            panels = b.ceil_div(columns, plan.width)
            panel, entry = unit % panels, unit // panels
            if plan.tail_vectors:
                with b.if_then(panel >= whole):
                    rows(entry, panel, 0, depth, plan.tail_vectors, True)
            if plan.whole:
                with b.if_then(panel < whole):
                    rows(entry, panel, 0, depth, plan.width // lanes, False)
        else:
            blocks = b.ceil_div(depth, STEPS)
            begin, entry = unit % blocks * STEPS, unit // blocks
            end = b.min(begin + STEPS, depth)
            if plan.whole:
                with b.loop(0, whole) as panel:
                    rows(entry, panel, begin, end, plan.width // lanes, False)
            if plan.tail_vectors:
                with b.if_then(whole * plan.width < columns):
                    rows(entry, whole, begin, end, plan.tail_vectors, True)
    return b.ir_text()


def _transposed_panel(b: KernelBuilder, plan: PackPlan, to: Pointer, at: Pointer, depth, n_stride, vectors, remaining):
    """A panel of a B whose columns are contiguous: squares of `lanes` columns go through registers.

    remaining: columns of B from the panel's first on, where they may be fewer than the panel's; else None. The columns
    that pad the panel repeat the last one: kernels do not store what comes of them.
    """
    lanes = plan.lanes
    width = vectors * lanes
    whole = depth // lanes * lanes

    def square(j, k, rows, mask) -> None:
        columns = []
        for lane in range(lanes):
            column = j * lanes + lane
            if remaining is not None:
                column = b.min(column, remaining - 1)
            value = b.load(at + column * n_stride, k, lanes, mask)
            columns.append(widen(b, value, plan.dtype, plan.accumulate))
        for row, value in enumerate(transpose_vectors(b, columns)):
            if mask is None:
                b.store(to, (k + row) * width + j * lanes, value)
            else:
                with b.if_then(rows > row):
                    b.store(to, (k + row) * width + j * lanes, value)

    with b.loop(0, vectors) as j:
        with b.loop(0, whole, lanes) as k:
            square(j, k, lanes, None)
        rest = depth - whole
        with b.if_then(rest > 0):
            square(j, whole, rest, b.tail_mask(rest, lanes))


def _column_vector(b: KernelBuilder, at: Pointer, n_stride, lanes: int, mask) -> ir.Value:
    """`lanes` elements that lie `n_stride` apart; lanes off in the mask give zero."""
    if isinstance(n_stride, int) and n_stride == 1:
        return b.load(at, 0, lanes, mask)
    if compute_dtype(at.dtype) == at.dtype and at.dtype in ("float32", "float64", "int32", "int64"):
        numbers = b.lane_numbers("int64", lanes)
        indices = b.mul(numbers, b.broadcast(b.i64(n_stride), lanes))
        return b.gather(at, indices, mask)
    scalars = []
    for lane in range(lanes):
        index = lane * n_stride
        if mask is not None:  # an absent lane reads element 0 instead of memory that may not exist
            present = b.lane(mask, lane)
            index = Int(b, b.ir.select(present, b.i64(index), b.i64(0)))
        value = b.load(at, index)
        if mask is not None:
            value = b.select(present, value, 0)
        scalars.append(value)
    return b.vector(scalars)
