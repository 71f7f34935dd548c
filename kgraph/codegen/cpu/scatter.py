"""scatter_nd and scatter_along_axis, with every reduction.

Updates of one place are applied in order by one thread, so results do not depend on the number of threads: threads own
columns of the rows that the updates write, or, where rows are short, ranges of the rows themselves (each thread then
reads all indices and applies those of its range).
"""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.cpu.builder import I1, MEMORY_TYPES, Int, KernelBuilder, Pointer, compute_dtype
from kgraph.codegen.cpu.scalar_ops import EMITTERS
from kgraph.codegen.cpu.strided import (
    SizeTable,
    copy_span,
    dense_strides,
    lanes_for,
    load_index,
    resolve,
    resolve_all,
    word,
)
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

COMBINE = {"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}
BLOCK = 64  # columns of a unit
RANGES = 16  # units where rows are short
LONG_ROW = 16


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in ("scatter_nd", "scatter_along_axis"):
        return f"{node.name} is no scatter"
    dtype = node.output.dtype
    if node.output.type.itemsize > 8:
        return f"no native kernels for {dtype}"
    if node.attrs["reduction"] != "update" and (dtype not in MEMORY_TYPES or dtype == "bool"):
        return f"no scatter with {node.attrs['reduction']!r} for {dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a scatter."""
    return [(_lower_nd if node.name == "scatter_nd" else _lower_along)(node)]


def _call(node: Node, template: str, params: tuple, table: SizeTable, extent) -> KernelCall:
    base, indices, updates = node.inputs
    return KernelCall(
        KernelSpec(f"{node.name}_{node.attrs['reduction']}", f"scatter:{template}", params),
        [base, indices, updates, node.output],
        outputs=1,
        sizes=table.values,
        extent=extent,
        flops=updates.type.size,
        bytes=base.type.nbytes * 2 + updates.type.nbytes * 2 + indices.type.nbytes,
    )


def _element(node: Node) -> str:
    """The dtype in which elements are read and written."""
    return word(node.output.type) if node.attrs["reduction"] == "update" else node.output.dtype


def apply(b: KernelBuilder, to: Pointer, at, value: ir.Value, reduction: str, mask=None) -> None:
    """to[at] = reduction(to[at], value), on scalars or vectors."""
    if reduction == "update":
        b.store(to, at, value, mask)
        return
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
    compute = compute_dtype(to.dtype)
    before = b.load(to, at, lanes, mask)
    b.store(to, at, EMITTERS[COMBINE[reduction]](b, [before, value], [compute] * 2, compute), mask)


# -- scatter_nd -------------------------------------------------------------------------------------------------------
def _lower_nd(node: Node) -> KernelCall:
    base, indices, _ = node.inputs
    depth = indices.shape[-1]
    sizes, row = base.shape[:depth], product(base.shape[depth:])
    rows, count = product(sizes), product(indices.shape[:-1])
    long = isinstance(row, Dim) or row >= LONG_ROW
    table = SizeTable()
    params = (
        _element(node),
        indices.dtype,
        node.attrs["reduction"],
        long,
        table.all(sizes),
        table.all(dense_strides(sizes)),
        table(row),
        table(rows),
        table(count),
    )
    return _call(node, "render_nd", params, table, ceil_div(row, BLOCK) if long else RANGES)


def render_nd(params, target) -> str:
    """base[rows, row], index tuples [count, k], updates[count, row]; units are blocks of columns or ranges of rows."""
    dtype, index_dtype, reduction, long, sizes, strides, row, rows, count = params
    b = KernelBuilder(f"scatter_nd_{reduction}", target)
    base, indices, updates, out = (b.operand(k, d) for k, d in enumerate((dtype, index_dtype, dtype, dtype)))
    sizes, strides = resolve_all(b, sizes), resolve_all(b, strides)
    row, rows, count = resolve(b, row), resolve(b, rows), resolve(b, count)
    if long:
        first_row, last_row = 0, rows
        first, last = b.begin * BLOCK, b.min(b.end * BLOCK, row)
        with b.loop(0, rows) as r:
            copy_span(b, out + (r * row + first), base + (r * row + first), last - first)
    else:
        first_row, last_row = b.begin * rows // RANGES, b.end * rows // RANGES
        first, last = 0, row
        copy_span(b, out + first_row * row, base + first_row * row, (last_row - first_row) * row)
    lanes = lanes_for(b, dtype) if reduction == "update" else min(16, target.lanes(compute_dtype(dtype)))
    with b.loop(0, count) as i:
        place, inside = _place(b, indices + i * len(sizes), sizes, strides, first_row, last_row)
        with b.if_then(inside):
            to, update = out + place * row, updates + i * row
            if long:
                b.vector_loop(
                    first,
                    last,
                    lanes,
                    lambda c, mask, slot, to=to, update=update: apply(
                        b, to, c, b.load(update, c, lanes, mask), reduction, mask
                    ),
                )
            else:
                with b.loop(0, row) as c:
                    apply(b, to, c, b.load(update, c), reduction)
    return b.ir_text()


def _place(b: KernelBuilder, indices: Pointer, sizes, strides, first, last) -> tuple[Int, ir.Value]:
    """The row that an index tuple addresses, and whether it exists and lies in [first, last)."""
    place: int | Int = 0
    inside: ir.Value = ir.Constant(I1, True)
    for k, (n, stride) in enumerate(zip(sizes, strides, strict=True)):
        index = from_end(b, load_index(b, indices, k), n)
        inside = b.ir.and_(inside, b.ir.and_(index >= 0, index < n))
        place = place + index * stride
    place = b.int(place)
    return place, b.ir.and_(inside, b.ir.and_(place >= first, place < last))


def from_end(b: KernelBuilder, index: Int, size) -> Int:
    """A negative index counted from the end."""
    return Int(b, b.ir.select(index < 0, b.i64(index + size), index.value))


# -- scatter_along_axis -----------------------------------------------------------------------------------------------
def _lower_along(node: Node) -> KernelCall:
    base, indices, _ = node.inputs
    axis = node.attrs["axis"]
    outer, inner = product(base.shape[:axis]), product(base.shape[axis + 1 :])
    table = SizeTable()
    params = (
        _element(node),
        indices.dtype,
        node.attrs["reduction"],
        table(base.shape[axis]),
        table(indices.shape[axis]),
        table(inner),
    )
    return _call(node, "render_along", params, table, outer * ceil_div(inner, BLOCK))


def render_along(params, target) -> str:
    """base[outer, n, inner], indices and updates[outer, count, inner]; a unit is a block of columns of an outer row."""
    dtype, index_dtype, reduction, n, count, inner = params
    b = KernelBuilder(f"scatter_along_axis_{reduction}", target)
    base, indices, updates, out = (b.operand(k, d) for k, d in enumerate((dtype, index_dtype, dtype, dtype)))
    n, count, inner = resolve(b, n), resolve(b, count), resolve(b, inner)
    blocks = b.ceil_div(inner, BLOCK)
    with b.loop(b.begin, b.end) as unit:
        outer, first = unit // blocks, unit % blocks * BLOCK
        width = b.min(inner - first, BLOCK)
        rows = outer * (n * inner) + first
        if isinstance(inner, int) and inner == 1:
            copy_span(b, out + rows, base + rows, n)
        else:
            with b.loop(0, n) as r:
                copy_span(b, out + (rows + r * inner), base + (rows + r * inner), width)
        source = outer * (count * inner) + first
        with b.loop(0, count) as i, b.loop(0, width) as c:
            at = source + (i * inner + c)
            index = from_end(b, load_index(b, indices, at), n)
            with b.if_then(b.ir.and_(index >= 0, index < n)):
                apply(b, out + rows, index * inner + c, b.load(updates, at), reduction)
    return b.ir_text()
