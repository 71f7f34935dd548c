"""Reads at run-time indices: take, take_along_axis, gather_nd.

Every result row is a contiguous copy out of the source (an embedding is the plain case). A negative index counts from
the end, once; what is still out of range is clamped, or follows the mode of `take`. No index reads outside of the
source.
"""

from __future__ import annotations

from kgraph.codegen.cpu.builder import Int, KernelBuilder
from kgraph.codegen.cpu.strided import (
    Odometer,
    SizeTable,
    collapse_streams,
    copy_row,
    dense_strides,
    fill_row,
    load_index,
    resolve,
    resolve_all,
    word,
)
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.strided import FILL_BITS
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

PRIMITIVES = frozenset({"take", "take_along_axis", "gather_nd"})
CHUNK_BYTES = 8192


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in PRIMITIVES:
        return f"{node.name} is no gather"
    if node.output.type.itemsize > 8:
        return f"no native kernels for {node.output.dtype}"
    if node.name == "take" and node.attrs["mode"] == "fill" and node.output.dtype not in FILL_BITS:
        return f"take has no fill value for {node.output.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The call that computes `node`."""
    return [{"take": _lower_take, "take_along_axis": _lower_along, "gather_nd": _lower_gather_nd}[node.name](node)]


def _call(node: Node, template: str, params: tuple, table: SizeTable, extent) -> KernelCall:
    out = node.output
    return KernelCall(
        KernelSpec(node.name, f"gather:{template}", params),
        [*node.inputs, out],
        outputs=1,
        sizes=table.values,
        extent=extent,
        flops=0,
        bytes=out.type.nbytes * 2 + node.inputs[1].type.nbytes,
    )


def _rows_per_unit(row, itemsize: int) -> int:
    return 1 if isinstance(row, Dim) else max(1, CHUNK_BYTES // max(row * itemsize, 1))


def checked_index(b: KernelBuilder, index: Int, size, mode: str = "clip") -> Int:
    """`index` brought into [0, size) by a mode; for "fill" it is returned as counted from the end, unchecked."""
    if mode == "wrap":
        rest = Int(b, b.ir.srem(index.value, b.i64(size)))
        return Int(b, b.ir.select(rest < 0, b.i64(rest + size), rest.value))
    index = Int(b, b.ir.select(index < 0, b.i64(index + size), index.value))
    return index if mode == "fill" else b.max(b.min(index, size - 1), 0)


# -- take -------------------------------------------------------------------------------------------------------------
def _lower_take(node: Node) -> KernelCall:
    x, indices = node.inputs
    axis = node.attrs["axis"]
    outer, n, row = product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])
    count = indices.type.size
    chunk = _rows_per_unit(row, x.type.itemsize)
    mode = node.attrs["mode"]
    fill = FILL_BITS[x.dtype] if mode == "fill" else None
    table = SizeTable()
    params = (word(x.type), indices.dtype, mode, fill, table(n), table(row), table(count), chunk)
    return _call(node, "render_take", params, table, outer * ceil_div(count, chunk))


def render_take(params, target) -> str:
    """A unit is `chunk` indices of one outer row: x[outer, n, row], indices[count] -> [outer, count, row]."""
    dtype, index_dtype, mode, fill, n, row, count, chunk = params
    b = KernelBuilder("take", target)
    x, indices, out = b.operand(0, dtype), b.operand(1, index_dtype), b.operand(2, dtype)
    n, row, count = resolve(b, n), resolve(b, row), resolve(b, count)
    chunks = b.ceil_div(count, chunk)
    with b.loop(b.begin, b.end) as unit:
        outer, first = unit // chunks, (unit % chunks) * chunk
        source, target_row = x + outer * n * row, out + (outer * count + first) * row
        with b.loop(0, b.min(chunk, count - first)) as j:
            at = checked_index(b, load_index(b, indices, first + j), n, mode)
            to = target_row + j * row
            if mode == "fill":
                with b.if_else(b.ir.and_(at >= 0, at < n), likely=True) as (then, otherwise):
                    with then:
                        copy_row(b, to, source + at * row, row)
                    with otherwise:
                        fill_row(b, to, b.constant(fill, dtype), row)
            else:
                copy_row(b, to, source + at * row, row)
    return b.ir_text()


# -- take_along_axis --------------------------------------------------------------------------------------------------
def _lower_along(node: Node) -> KernelCall:
    x, indices = node.inputs
    axis, out = node.attrs["axis"], node.output
    axes = []
    strides = zip(dense_strides(x.shape), dense_strides(indices.shape), strict=True)
    for k, (size, (own, of_index)) in enumerate(zip(out.shape, strides, strict=True)):
        own = 0 if k == axis or _is_one(x.shape[k]) else own
        axes.append((size, (own, 0 if _is_one(indices.shape[k]) else of_index)))
    axes = collapse_streams(axes) or [(1, (0, 0))]
    table = SizeTable()
    size, inner = axes[-1]
    outer = axes[:-1]
    params = (
        word(x.type),
        indices.dtype,
        (0, *table.all(n for n, _ in outer[1:])) if outer else (),
        tuple(table.all(s[k] for _, s in outer) for k in range(2)),
        table(size),
        table.all(inner),
        table(x.shape[axis]),
        table(dense_strides(x.shape)[axis]),
    )
    return _call(node, "render_along", params, table, product(n for n, _ in outer))


def _is_one(size) -> bool:
    return not isinstance(size, Dim) and size == 1


def render_along(params, target) -> str:
    """A unit is one row of the result along its last (collapsed) axis."""
    dtype, index_dtype, sizes, streams, size, inner, n, stride = params
    b = KernelBuilder("take_along_axis", target)
    x, indices, out = b.operand(0, dtype), b.operand(1, index_dtype), b.operand(2, dtype)
    size, n, stride = resolve(b, size), resolve(b, n), resolve(b, stride)
    step, index_step = resolve_all(b, inner)
    walk = Odometer(b, resolve_all(b, sizes), [resolve_all(b, s) for s in streams])
    walk.seek(b.begin)
    with b.loop(b.begin, b.end) as unit:
        row, places = x + walk.offset(0), indices + walk.offset(1)
        with b.loop(0, size) as i:
            at = checked_index(b, load_index(b, places, i * index_step), n)
            b.store(out, unit * size + i, b.load(row, at * stride + i * step, raw=True), raw=True)
        walk.advance()
    return b.ir_text()


# -- gather_nd --------------------------------------------------------------------------------------------------------
def _lower_gather_nd(node: Node) -> KernelCall:
    x, indices = node.inputs
    depth = indices.shape[-1]
    row, count = product(x.shape[depth:]), product(indices.shape[:-1])
    chunk = _rows_per_unit(row, x.type.itemsize)
    table = SizeTable()
    sizes, strides = table.all(x.shape[:depth]), table.all(dense_strides(x.shape)[:depth])
    params = (word(x.type), indices.dtype, sizes, strides, table(row), table(count), chunk)
    return _call(node, "render_gather_nd", params, table, ceil_div(count, chunk))


def render_gather_nd(params, target) -> str:
    """A unit is `chunk` index tuples."""
    dtype, index_dtype, sizes, strides, row, count, chunk = params
    b = KernelBuilder("gather_nd", target)
    x, indices, out = b.operand(0, dtype), b.operand(1, index_dtype), b.operand(2, dtype)
    row, count = resolve(b, row), resolve(b, count)
    sizes, strides = resolve_all(b, sizes), resolve_all(b, strides)
    with b.loop(b.begin * chunk, b.min(b.end * chunk, count)) as i:
        at: int | Int = 0
        for k, (n, stride) in enumerate(zip(sizes, strides, strict=True)):
            at = at + checked_index(b, load_index(b, indices, i * len(sizes) + k), n) * stride
        copy_row(b, out + i * row, x + at, row)
    return b.ir_text()
