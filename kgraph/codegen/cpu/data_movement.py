"""Copies between dense layouts: transpose, slice, rev, broadcast_to, dynamic_slice; and, by way of `assemble`,
concatenate, pad, pad_mirror and dynamic_update_slice.

Each of the first five reads `source[base + sum(index[k] * stride[k])]` into a dense destination. Collapsing the axes
leaves few cases: rows that are contiguous, reversed, constant or strided in the source, or a transpose.
"""

from __future__ import annotations

from kgraph.codegen.cpu import assemble
from kgraph.codegen.cpu.builder import KernelBuilder
from kgraph.codegen.cpu.strided import (
    Odometer,
    SizeTable,
    clamped_start,
    collapse,
    copy_row,
    dense_strides,
    fill_row,
    resolve,
    resolve_all,
    reverse_row,
    split_rows,
    word,
)
from kgraph.codegen.cpu.transpose import lower_transpose
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.views import MIRROR_MODES, VIEWS, starts_of
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import ceil_div, product

LONG_ROW_BYTES = 256
PRIMITIVES = VIEWS.keys() | assemble.LOWERINGS.keys()


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in PRIMITIVES:
        return f"{node.name} is no data movement"
    if node.output.type.itemsize > 8:
        return f"no native kernels for {node.output.dtype}"
    if node.name == "pad_mirror" and node.attrs["mode"] not in MIRROR_MODES:
        return f"pad_mirror has no kernel for mode {node.attrs['mode']!r}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The calls that compute `node`."""
    if node.name in assemble.LOWERINGS:
        return [assemble.LOWERINGS[node.name](node)]
    base, axes = VIEWS[node.name](node)
    return lower_view(node.name, node.inputs[0], node.output, base, axes, target, starts=starts_of(node))


def lower_view(name: str, source: Value, out: Value, base, axes, target, starts=()) -> list[KernelCall]:
    """The call that copies `source[base + starts + view]` into the dense `out`."""
    dtype, item_bytes = word(out.type), out.type.itemsize
    axes = collapse(axes) or [(1, 1)]
    size, stride = axes[-1]
    if not starts and _is_zero(base) and _wants_tiles(axes):
        strides = dense_strides([n for n, _ in axes])
        tiled = [(n, s, d) for (n, s), d in zip(axes, strides, strict=True)]
        return lower_transpose(name, [source, out], dtype, item_bytes, tiled, target)
    table = SizeTable()
    # What a long row's copy takes is decided by its length, which therefore need not be part of the code.
    long = isinstance(size, int) and size * item_bytes >= LONG_ROW_BYTES
    number = table.run_time if long else table
    chunk = split_rows(size, item_bytes)
    outer = list(axes[:-1])
    row = [(n, d * size) for (n, _), d in zip(outer, dense_strides([n for n, _ in outer]), strict=True)]
    if chunk:
        outer.append((ceil_div(size, chunk), stride * chunk))
        row.append((outer[-1][0], chunk))
    params = (
        dtype,
        (0, *(number(n) for n, _ in outer[1:])) if outer else (),
        tuple(number(t) for _, t in outer),
        tuple(number(t) for _, t in row),
        (number(size), table(stride)),
        chunk,
        number(base),
        tuple((v.dtype, table(limit), table(t)) for v, limit, t in starts),
    )
    read = out.type.nbytes if not _is_zero(stride) else 0
    return [
        KernelCall(
            KernelSpec(name, "data_movement:render_strided_copy", params),
            [source, *(v for v, _, _ in starts), out],
            outputs=1,
            sizes=table.values,
            extent=product(n for n, _ in outer),
            flops=0,
            bytes=out.type.nbytes + read,
        )
    ]


def _is_zero(x) -> bool:
    return not isinstance(x, Dim) and x == 0


def _wants_tiles(axes) -> bool:
    """Whether the last axis strides through the source while another one runs along it."""
    last = axes[-1][1]
    return (isinstance(last, Dim) or last > 1) and any(not isinstance(t, Dim) and t == 1 for _, t in axes)


def render_strided_copy(params, target) -> str:
    """Rows of a strided view, one after the other; a unit of the extent is a row, or a chunk of one."""
    dtype, sizes, strides, row_strides, (size, stride), chunk, base, starts = params
    b = KernelBuilder("strided_copy", target)
    source, destination = b.operand(0, dtype), b.operand(len(starts) + 1, dtype)
    source = source + resolve(b, base)
    for number, (start_dtype, limit, step) in enumerate(starts):
        source = source + clamped_start(b, number + 1, start_dtype, resolve(b, limit)) * resolve(b, step)
    size, stride = resolve(b, size), resolve(b, stride)
    walk = Odometer(b, resolve_all(b, sizes), [resolve_all(b, strides), resolve_all(b, row_strides)])
    walk.seek(b.begin)
    with b.loop(b.begin, b.end):
        count = b.min(chunk, size - walk.index(len(sizes) - 1) * chunk) if chunk else size
        _write_view_row(b, destination + walk.offset(1), source + walk.offset(0), count, stride)
        walk.advance()
    return b.ir_text()


def _write_view_row(b: KernelBuilder, destination, source, count, stride) -> None:
    if isinstance(stride, int) and stride == 1:
        copy_row(b, destination, source, count)
    elif isinstance(stride, int) and stride == 0:
        fill_row(b, destination, b.load(source, 0, raw=True), count)
    elif isinstance(stride, int) and stride == -1:
        reverse_row(b, destination, source, count)
    else:
        with b.loop(0, count, unroll=4) as i:
            b.store(destination, i, b.load(source, i * stride, raw=True), raw=True)
