"""Transposes in register tiles: the source runs along one axis, the destination along another.

After `strided.collapse` every permutation that moves the last axis is a batch of 2-D transposes between an axis I,
contiguous in the source, and an axis J, contiguous in the destination. Three schedules:

- tiles: T x T elements through registers, T loads and T stores of full vectors; a unit walks along J, or along I
  where that is long and the destination's rows are few whole lines;
- deinterleave: I is short and the source dense in (J, I), as in NHWC -> NCHW of images with 3 channels;
- interleave: J is short and the destination dense in (I, J), the way back.

The last tile of an axis overlaps the one before it, so nothing is masked; axes shorter than a tile run scalar loops.
"""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.cpu.builder import Int, KernelBuilder
from kgraph.codegen.cpu.strided import Odometer, SizeTable, resolve
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir import Dim
from kgraph.ir.dims import ceil_div, product

TILES_PER_UNIT = 64  # of the short schedules: long enough to hide the odometer


def lower_transpose(name, operands, dtype: str, item_bytes: int, axes, target) -> list[KernelCall]:
    """A call for axes (size, source stride, destination stride), of which one has source stride 1, the last not.

    The destination is dense over `axes`; `operands` are the source and the destination.
    """
    contiguous = next(k for k, (_, stride, _) in enumerate(axes) if not isinstance(stride, Dim) and stride == 1)
    i_size, _, i_out = axes[contiguous]
    j_size, j_in, _ = axes[-1]
    outer = [axis for k, axis in enumerate(axes[:-1]) if k != contiguous]
    lanes = target.vector_bytes // item_bytes
    schedule, tile = _schedule(i_size, i_out, j_size, j_in, lanes)
    table = SizeTable()
    if schedule == "tiles":
        blocks = ceil_div(i_size, tile)
    elif schedule == "tiles_along_i":
        blocks = ceil_div(j_size, tile)
    else:
        blocks = ceil_div(j_size if schedule == "deinterleave" else i_size, tile * TILES_PER_UNIT)
    # The outermost size is never read, so it stays out of the kernel's identity.
    sizes = [a[0] for a in outer] + [blocks]
    params = (
        dtype,
        schedule,
        tile,
        (0, *table.all(sizes[1:])),
        table.all(a[1] for a in outer),
        table.all(a[2] for a in outer),
        *_axis_params(schedule, table, i_size, i_out, j_size, j_in),
        all(isinstance(size, int) and size >= tile for size in (i_size, j_size)),
    )
    elements = product(a[0] for a in axes)
    spec = KernelSpec(name, "transpose:render_transpose", params)
    return [
        KernelCall(
            spec,
            operands,
            outputs=1,
            sizes=table.values,
            extent=product(sizes),
            flops=0,
            bytes=elements * (2 * item_bytes),
        )
    ]


def _axis_params(schedule: str, table: SizeTable, i_size, i_out, j_size, j_in) -> tuple[tuple, tuple]:
    """(size, distance of its elements on the other side) of I and J. The code of tiles holds none of these numbers."""
    entry = table.run_time if schedule.startswith("tiles") else table
    return (entry(i_size), entry(i_out)), (entry(j_size), entry(j_in))


def _schedule(i_size, i_out, j_size, j_in, lanes: int) -> tuple[str, int]:
    def short(size):
        return not isinstance(size, Dim) and size <= 8

    if short(i_size) and j_in == i_size:
        return "deinterleave", lanes
    if short(j_size) and i_out == j_size:
        return "interleave", lanes
    tile = min(16, lanes)
    for size in (i_size, j_size):
        while not isinstance(size, Dim) and tile > max(size, 2):
            tile //= 2
    whole_lines = not isinstance(j_size, Dim) and j_size % tile == 0
    along_i = whole_lines and (isinstance(i_size, Dim) or i_size >= 4 * j_size)
    return "tiles_along_i" if along_i else "tiles", tile


def render_transpose(params, target) -> str:
    dtype, schedule, tile, sizes, source_strides, destination_strides, i_axis, j_axis, roomy = params
    b = KernelBuilder("transpose", target)
    source, destination = b.operand(0, dtype), b.operand(1, dtype)
    i_size, i_out = (resolve(b, e) for e in i_axis)
    j_size, j_in = (resolve(b, e) for e in j_axis)
    walk = Odometer(
        b,
        [resolve(b, e) for e in sizes],
        [[*(resolve(b, e) for e in strides), 0] for strides in (source_strides, destination_strides)],
    )
    walk.seek(b.begin)
    with b.loop(b.begin, b.end):
        src, dst = source + walk.offset(0), destination + walk.offset(1)
        block = walk.index(len(sizes) - 1)
        if schedule.startswith("tiles"):
            _tile_row(b, src, dst, schedule, tile, roomy, block, i_size, i_out, j_size, j_in)
        elif schedule == "deinterleave":
            _interleaving_block(
                b, tile, block, j_size, lambda at: _deinterleave(b, src, dst, tile, at, i_axis[0], i_out)
            )
            _short_rest(
                b, tile, block, j_size, i_axis[0], lambda j, i: _move(b, src, j * i_size + i, dst, i * i_out + j)
            )
        else:
            _interleaving_block(b, tile, block, i_size, lambda at: _interleave(b, src, dst, tile, at, j_axis[0], j_in))
            _short_rest(
                b, tile, block, i_size, j_axis[0], lambda i, j: _move(b, src, j * j_in + i, dst, i * j_size + j)
            )
        walk.advance()
    return b.ir_text()


def _move(b: KernelBuilder, source, at, destination, to) -> None:
    b.store(destination, to, b.load(source, at, raw=True), raw=True)


def _tile_row(b, src, dst, schedule, tile, roomy, block, i_size, i_out, j_size, j_in) -> None:
    """All tiles of `tile` values of I (destination rows in full), or of J. roomy: both are known to fill a tile."""
    along_i = schedule == "tiles_along_i"
    fixed, walked = (j_size, i_size) if along_i else (i_size, j_size)

    def tiles() -> None:
        first = b.min(block * tile, fixed - tile)
        with b.loop(0, walked, tile) as step:
            second = b.min(step, walked - tile)
            i, j = (second, first) if along_i else (first, second)
            rows = [b.load(src, (j + k) * j_in + i, tile, raw=True) for k in range(tile)]
            for k, column in enumerate(transpose_vectors(b, rows)):
                b.store(dst, (i + k) * i_out + j, column, raw=True)

    if roomy:
        tiles()
        return
    with b.if_else(b.ir.and_(i_size >= tile, j_size >= tile)) as (tiled, scalar):
        with tiled:
            tiles()
        with scalar, b.loop(block * tile, b.min((block + 1) * tile, fixed)) as first, b.loop(0, walked) as second:
            i, j = (second, first) if along_i else (first, second)
            _move(b, src, j * j_in + i, dst, i * i_out + j)


def _at_least(b: KernelBuilder, size: int | Int, least: int) -> ir.Value:
    return ir.Constant(ir.IntType(1), size >= least) if isinstance(size, int) else size >= least


def transpose_vectors(b: KernelBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of n vectors of n lanes, n a power of two, in n log2(n) shuffles.

    Each stage exchanges the off-diagonal blocks of every 2s x 2s block.
    """
    n = len(rows)
    stride = n // 2
    while stride:
        out = list(rows)
        low = [n + k - stride if k & stride else k for k in range(n)]
        high = [n + k if k & stride else k + stride for k in range(n)]
        for k in range(n):
            if not k & stride:
                out[k] = b.shuffle(rows[k], rows[k + stride], low)
                out[k + stride] = b.shuffle(rows[k], rows[k + stride], high)
        rows = out
        stride //= 2
    return rows


def _interleaving_block(b: KernelBuilder, tile: int, block, long, body) -> None:
    """Calls `body(start)` for the tiles of one block of the long axis, where that axis fills a tile."""
    with b.if_then(_at_least(b, long, tile)):
        first = block * (tile * TILES_PER_UNIT)
        with b.loop(first, b.min(first + tile * TILES_PER_UNIT, long), tile) as step:
            body(b.min(step, long - tile))


def _short_rest(b: KernelBuilder, tile: int, block, long, short: int, move) -> None:
    """Element by element where the long axis is shorter than a tile."""
    if isinstance(long, int) and long >= tile:
        return
    with b.if_then(b.int(long) < tile), b.loop(0, long) as at:
        for k in range(short):
            move(at, k)


def _deinterleave(b, src, dst, tile, at, count: int, i_out) -> None:
    """destination[i][at..] = source[at..][i] for i below `count`; the source is dense."""
    vectors = [b.load(src, at * count + k * tile, tile, raw=True) for k in range(count)]
    for i in range(count):
        out = _pick(b, vectors, [lane * count + i for lane in range(tile)])
        b.store(dst, at + i * i_out, out, raw=True)


def _interleave(b, src, dst, tile, at, count: int, j_in) -> None:
    """destination[at..][j] = source[j][at..] for j below `count`; the destination is dense."""
    vectors = [b.load(src, at + j * j_in, tile, raw=True) for j in range(count)]
    for part in range(count):
        places = [divmod(part * tile + lane, count) for lane in range(tile)]
        out = _pick(b, vectors, [j * tile + i for i, j in places])
        b.store(dst, at * count + part * tile, out, raw=True)


def _pick(b: KernelBuilder, vectors: list[ir.Value], places: list[int]) -> ir.Value:
    """The elements `places` of the concatenated vectors, gathered by two-source shuffles."""
    lanes = len(places)
    out = None
    for number, vector in enumerate(vectors):
        here = [place // lanes == number for place in places]
        if not any(here):
            continue
        if out is None:
            out = b.shuffle(vector, None, [p % lanes if own else 0 for p, own in zip(places, here, strict=True)])
        else:
            mask = [lanes + p % lanes if own else k for k, (p, own) in enumerate(zip(places, here, strict=True))]
            out = b.shuffle(out, vector, mask)
    return out
