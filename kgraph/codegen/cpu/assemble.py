"""Results put together from pieces: concatenate, pad, pad_mirror, dynamic_update_slice.

pad and dynamic_update_slice are one kernel: a foreground placed on a background that is one value, or an array of the
result's shape. Every row of the result is written once, piece by piece.
"""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer
from kgraph.codegen.cpu.strided import (
    Odometer,
    SizeTable,
    clamped_start,
    copy_row,
    copy_span,
    dense_strides,
    fill_row,
    resolve,
    resolve_all,
    split_rows,
    word,
)
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.views import mirror_axes, pad_axes, update_axes
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

SHORT_ROW_BYTES = 8192  # rows up to this length are written whole; longer ones are cut for the threads

LEAST_ROW_BYTES = 512  # from this length on, code gains nothing from knowing how long a row is


# -- concatenate ------------------------------------------------------------------------------------------------------
def _lower_concatenate(node: Node) -> KernelCall:
    out = node.output
    axis = node.attrs["axis"] % out.type.rank
    outer, inner = product(out.shape[:axis]), product(out.shape[axis + 1 :])
    pieces = [x.shape[axis] * inner for x in node.inputs]
    row = product(out.shape[axis:])
    whole = not isinstance(row, Dim) and row * out.type.itemsize <= SHORT_ROW_BYTES
    chunk = 0 if whole else 2 * SHORT_ROW_BYTES // out.type.itemsize
    table = SizeTable()
    entries = [_entry(table, piece, out.type.itemsize) for piece in pieces]
    params = (word(out.type), tuple(entries), _entry(table, row, out.type.itemsize), chunk)
    extent = outer * ceil_div(row, chunk) if chunk else outer
    return _call("concatenate", "assemble:render_concatenate", params, [*node.inputs, out], table, extent)


def _entry(table: SizeTable, count, itemsize: int):
    """The entry of a number of elements: known at run time alone where they are many, so that one kernel serves all."""
    many = isinstance(count, int) and count * itemsize >= LEAST_ROW_BYTES
    return table.run_time(count) if many else table(count)


def _call(name: str, template: str, params: tuple, operands: list, table: SizeTable, extent) -> KernelCall:
    return KernelCall(
        KernelSpec(name, template, params),
        operands,
        outputs=1,
        sizes=table.values,
        extent=extent,
        flops=0,
        bytes=operands[-1].type.nbytes * 2,
    )


def render_concatenate(params, target) -> str:
    """A unit is a row of the result (all axes from the concatenated one on), or a chunk of it."""
    dtype, pieces, row, chunk = params
    b = KernelBuilder("concatenate", target)
    sources = [b.operand(k, dtype) for k in range(len(pieces))]
    destination = b.operand(len(pieces), dtype)
    pieces, row = resolve_all(b, pieces), resolve(b, row)
    with b.loop(b.begin, b.end) as unit:
        if chunk:
            _concatenate_chunk(b, destination, sources, pieces, row, unit, chunk)
        else:
            at = unit * row
            for source, count in zip(sources, pieces, strict=True):
                copy_row(b, destination + at, source + unit * count, count)
                at = at + count
    return b.ir_text()


def _concatenate_chunk(b: KernelBuilder, destination, sources, pieces, row, unit, chunk: int) -> None:
    chunks = b.ceil_div(row, chunk)
    number, start = unit // chunks, (unit % chunks) * chunk
    stop = b.min(start + chunk, row)
    offset: int | Int = 0
    for source, count in zip(sources, pieces, strict=True):
        first, last = b.int(b.max(start, offset)), b.int(b.min(stop, offset + count))
        with b.if_then(first < last):
            copy_span(b, destination + (number * row + first), source + (number * count + first - offset), last - first)
        offset = offset + count


# -- pad and dynamic_update_slice: a foreground over a background -----------------------------------------------------
def _lower_pad(node: Node) -> KernelCall:
    return _lower_overlay("pad", pad_axes(node), [*node.inputs, node.output], background="value")


def _lower_update(node: Node) -> KernelCall:
    x, update, *starts = node.inputs
    return _lower_overlay(
        "dynamic_update_slice", update_axes(node), [update, x, *starts, node.output], background="array"
    )


def _lower_overlay(name: str, axes, operands: list, background: str) -> KernelCall:
    out = operands[-1]
    size, _, _, interior = axes[-1]
    chunk = 0 if interior else split_rows(size, out.type.itemsize)
    table = SizeTable()

    def start_entry(start):
        if not isinstance(start, tuple):
            return table(start)
        _, operand, limit, scale = start
        return ("start", operand, operands[operand].dtype, table(limit), table(scale))

    outer = [n for n, _, _, _ in axes[:-1]] + ([ceil_div(size, chunk)] if chunk else [])
    params = (
        word(out.type),
        tuple((table(n), table(m), start_entry(s), i) for n, m, s, i in axes),
        table.all(dense_strides([m for _, m, _, _ in axes])),
        (0, *table.all(outer[1:])) if outer else (),
        chunk,
        background,
        len(operands) - 1,
    )
    call = _call(name, "assemble:render_overlay", params, operands, table, product(outer))
    if background == "array":
        call.notes["inplace"] = ((len(operands) - 1, 1),)
    return call


def render_overlay(params, target) -> str:
    """A unit is a row of the result, or a chunk of it: background, foreground, background.

    Where the result is the background itself, the foreground alone is written.
    """
    dtype, axes, strides, outer_sizes, chunk, background, out_operand = params
    b = KernelBuilder("overlay", target)
    foreground, back, destination = (b.operand(k, dtype) for k in (0, 1, out_operand))
    axes = [(resolve(b, n), resolve(b, m), _resolve_start(b, s), i) for n, m, s, i in axes]
    strides, size = resolve_all(b, strides), axes[-1][0]
    row_strides = dense_strides([n for n, _, _, _ in axes])
    streams = [*row_strides[:-1], chunk] if chunk else row_strides[:-1]
    walk = Odometer(b, resolve_all(b, outer_sizes), [streams])
    walk.seek(b.begin)
    value = b.load(back, 0, raw=True) if background == "value" else None

    def write_background(to: Pointer, at, count) -> None:
        if value is not None:
            fill_row(b, to, value, count)
        else:
            copy_row(b, to, back + at, count)

    if background == "array":
        same = b.ir.icmp_unsigned("==", destination.value, back.value)
        with b.if_then(same):
            _write_foreground(b, destination, foreground, axes, row_strides, chunk)
            b.ir.ret_void()
    with b.loop(b.begin, b.end):
        at = walk.offset()
        start = walk.index(len(outer_sizes) - 1) * chunk if chunk else 0
        count = b.min(chunk, size - start) if chunk else size
        inside, offset = _foreground_row(b, walk, axes[:-1], strides)
        with b.if_else(inside) as (then, otherwise):
            with then:
                _write_row(b, destination, foreground + offset, at, start, count, axes[-1], write_background)
            with otherwise:
                write_background(destination + at, at, count)
        walk.advance()
    return b.ir_text()


def _write_foreground(b: KernelBuilder, destination: Pointer, foreground: Pointer, axes, row_strides, chunk) -> None:
    """The part of the foreground that lies in the units of this call."""
    size, own, low, _ = axes[-1]

    def first_element(unit: Int) -> Int:
        if not chunk:
            return unit * size
        chunks = b.ceil_div(size, chunk)
        return (unit // chunks) * size + (unit % chunks) * chunk

    begin, end = first_element(b.begin), first_element(b.end)
    for (_, _, start, _), stride in zip(axes[:-1], row_strides):
        low = low + start * stride
    rows = [m for _, m, _, _ in axes[:-1]]
    walk = Odometer(b, rows or [1], [row_strides[:-1] or [0]])
    walk.seek(b.int(0))
    with b.loop(0, product(rows)) as row:
        at = walk.offset() + low
        first, last = b.int(b.max(at, begin)), b.int(b.min(at + own, end))
        with b.if_then(first < last):
            copy_row(b, destination + first, foreground + (row * own + (first - at)), last - first)
        walk.advance()


def _resolve_start(b: KernelBuilder, start):
    if isinstance(start, tuple) and start[0] == "start":
        _, operand, dtype, limit, scale = start
        return clamped_start(b, operand, dtype, resolve(b, limit)) * resolve(b, scale)
    return resolve(b, start)


def _foreground_row(b: KernelBuilder, walk: Odometer, axes, strides):
    """Whether the odometer's row crosses the foreground, and the offset of the row there."""
    inside: ir.Value = ir.Constant(ir.IntType(1), True)
    offset: int | Int = 0
    for axis, (size, own, start, interior) in enumerate(axes):
        if _is_int(start, 0) and interior == 0 and _is_same(size, own):
            offset = offset + walk.index(axis) * strides[axis]
            continue
        place = walk.index(axis) - start
        inside = b.ir.and_(inside, place >= 0)
        step = interior + 1
        if interior:
            inside = b.ir.and_(inside, b.int(b.int(place) % step).equals(0))
            place = place // step
        inside = b.ir.and_(inside, place < own)
        offset = offset + place * strides[axis]
    return inside, offset


def _is_int(x, value: int) -> bool:
    return isinstance(x, int) and x == value


def _is_same(x, y) -> bool:
    """Whether two sizes are the same number or the same run-time value."""
    if isinstance(x, Int) and isinstance(y, Int):
        return x.value is y.value
    return isinstance(x, int) and isinstance(y, int) and x == y


def _write_row(b: KernelBuilder, destination, row, at, start, count, axis, write_background) -> None:
    """One row (or the chunk from `start` on) that crosses the foreground; `at` is where it lies in the result."""
    size, own, low, interior = axis
    if interior:
        write_background(destination + at, at, count)
        step = interior + 1
        with b.loop(0, own, unroll=2) as i:
            place = low + i * step
            with b.if_then(b.ir.and_(place >= 0, place < size)):
                b.store(destination, at + place, b.load(row, i, raw=True), raw=True)
        return
    stop = start + count
    first = b.min(b.max(low, start), stop)
    last = b.max(b.min(low + own, stop), first)
    if not _is_same(first, start):
        write_background(destination + at, at, first - start)
    copy_row(b, destination + (at + (first - start)), row + (first - low), last - first)
    if not _is_same(last, stop):
        rest = last - start
        write_background(destination + (at + rest), at + rest, stop - last)


# -- pad_mirror -------------------------------------------------------------------------------------------------------
def _lower_mirror(node: Node) -> KernelCall:
    x, out = node.inputs[0], node.output
    axes = mirror_axes(node)
    table = SizeTable()
    params = (
        word(out.type),
        node.attrs["mode"],
        tuple((table(n), table(m), table(s), plain) for n, m, s, plain in axes),
        table.all(dense_strides([m for _, m, _, _ in axes])),
    )
    extent = product(n for n, _, _, _ in axes[:-1])
    return _call("pad_mirror", "assemble:render_mirror", params, [x, out], table, extent)


def render_mirror(params, target) -> str:
    """A unit is a row of the result."""
    dtype, mode, axes, strides = params
    b = KernelBuilder("pad_mirror", target)
    source, destination = b.operand(0, dtype), b.operand(1, dtype)
    axes = [(resolve(b, n), resolve(b, m), resolve(b, s), plain) for n, m, s, plain in axes]
    strides = resolve_all(b, strides)
    size, own, low, plain = axes[-1]
    walk = Odometer(b, [n for n, _, _, _ in axes[:-1]], [dense_strides([n for n, _, _, _ in axes])[:-1]])
    walk.seek(b.begin)
    with b.loop(b.begin, b.end):
        row = source
        for axis, (_, extent, before, kept) in enumerate(axes[:-1]):
            index = walk.index(axis)
            row = row + (index if kept else mirrored(b, mode, index - before, extent)) * strides[axis]
        to = destination + walk.offset()
        if plain:
            copy_row(b, to, row, size)
        else:
            copy_row(b, to + low, row, own)
            for first, last in ((0, low), (low + own, size)):
                with b.loop(first, last) as i:
                    place = mirrored(b, mode, i - low, own)
                    b.store(to, i, b.load(row, place, raw=True), raw=True)
        walk.advance()
    return b.ir_text()


def mirrored(b: KernelBuilder, mode: str, place: Int, size) -> Int:
    """Where position `place` (may lie outside [0, size)) reads from; the conventions are NumPy's."""
    if mode == "edge":
        return b.max(b.min(place, size - 1), 0)
    period = b.int(b.max({"reflect": 2 * size - 2, "symmetric": 2 * size, "wrap": size}[mode], 1))
    rest = Int(b, b.ir.srem(place.value, period.value))
    rest = Int(b, b.ir.select(rest < 0, b.i64(rest + period), rest.value))
    if mode == "wrap":
        return rest
    turned = period - rest if mode == "reflect" else period - 1 - rest
    return b.min(rest, turned)


LOWERINGS = {
    "concatenate": _lower_concatenate,
    "pad": _lower_pad,
    "pad_mirror": _lower_mirror,
    "dynamic_update_slice": _lower_update,
}
