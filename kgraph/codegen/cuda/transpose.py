"""Transposes in tiles through shared memory.

After `strided.collapse` every permutation that moves the last axis is a batch of 2-D transposes between an axis I,
contiguous in the source, and an axis J, contiguous in the destination. A block reads a tile of both along I and writes
it along J, so that neighbouring threads touch neighbouring elements on both sides. Rows of the tile are one element
longer than they need to be: a column of it lies in different banks then.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.strided import dense_strides
from kgraph.ir import Dim
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cuda.transpose:render"
TILE = 32  # a row of 4-byte elements is a line of the cache
SHORT = 8  # axes up to which most of a tile would be empty; the cache serves such rows


def wants_tiles(axes: Sequence[tuple]) -> bool:
    """Whether axes (size, source stride) are a transpose of two axes that are both long enough for tiles."""
    size, stride = axes[-1]
    contiguous = [n for n, t in axes[:-1] if not isinstance(t, Dim) and t == 1]
    return bool(contiguous) and (isinstance(stride, Dim) or stride > 1) and _is_long(size) and _is_long(contiguous[0])


def _is_long(size) -> bool:
    return isinstance(size, Dim) or size > SHORT


def lower(name: str, operands: Sequence, dtype: str, axes: Sequence[tuple], target) -> list[KernelCall]:
    """The call for axes (size, source stride), of which one has stride 1 and the last does not.

    operands: the source and the result, which is dense over the axes. dtype: the word in which elements move.
    """
    tile = 4 if target.simulator else TILE * (2 if dtype in ("uint8", "uint16") else 1)
    contiguous = next(k for k, (_, t) in enumerate(axes) if not isinstance(t, Dim) and t == 1)
    strides = dense_strides([n for n, _ in axes])
    outer = [(n, t, strides[k]) for k, (n, t) in enumerate(axes[:-1]) if k != contiguous]
    i_size, i_out = axes[contiguous][0], strides[contiguous]
    j_size, j_in = axes[-1]
    total = product(n for n, _ in axes)
    tiles = [ceil_div(i_size, tile), ceil_div(j_size, tile)]
    params = (name, dtype, tile, len(outer), index_type([total]))
    return [
        KernelCall(
            KernelSpec(name, TEMPLATE, params),
            operands,
            outputs=1,
            sizes=[i_size, i_out, j_size, j_in, *(x for axis in outer for x in axis)],
            extent=product([n for n, _, _ in outer] + tiles),
            flops=0,
            bytes=operands[-1].type.nbytes * 2,
            launch=Launch(target.block),
        )
    ]


def render(params: tuple, target) -> str:
    name, dtype, tile, rank, index = params
    k = KernelSource(name, target, target.block, index)
    source, out = k.operand(dtype), k.operand(dtype)
    i_size, i_out, j_size, j_in = (k.size() for _ in range(4))
    outer = [[k.size() for _ in range(3)] for _ in range(rank)]
    kept = k.shared(dtype, tile * (tile + 1))
    thread = k.thread()
    width = min(tile, target.block)
    across, row = k.let(k.mod(thread, width), "across"), k.let(k.div(thread, width), "row")
    rows = target.block // width
    tiles = k.let(k.ceil_div(i_size, tile), "tiles"), k.let(k.ceil_div(j_size, tile), "tiles")
    sizes = [axis[0] for axis in outer]
    total = k.let(k.product([*sizes, *tiles]), "total")
    with k.block_stride(total) as number:
        *at, i_tile, j_tile = k.coordinates(number, [*sizes, *tiles])
        read, written = k.i(0), k.i(0)
        for place, (_, t, d) in zip(at, outer, strict=True):
            read, written = k.add(read, k.mul(place, t)), k.add(written, k.mul(place, d))
        read, written = k.let(read, "read"), k.let(written, "written")
        first_i, first_j = k.let(k.mul(i_tile, tile), "first"), k.let(k.mul(j_tile, tile), "first")
        with k.range(row, k.i(tile), rows) as r, k.range(across, k.i(tile), width) as c:
            i, j = k.let(k.add(first_i, c)), k.let(k.add(first_j, r))
            with k.suite(f"if {i} < {i_size} and {j} < {j_size}:"):
                value = k.load(source, k.add(read, k.add(k.mul(j, j_in), i)))
                k.store(kept, k.add(k.mul(r, tile + 1), c), value)
        k.synchronise()
        with k.range(row, k.i(tile), rows) as r, k.range(across, k.i(tile), width) as c:
            i, j = k.let(k.add(first_i, r)), k.let(k.add(first_j, c))
            with k.suite(f"if {i} < {i_size} and {j} < {j_size}:"):
                value = k.load(kept, k.add(k.mul(c, tile + 1), r))
                k.store(out, k.add(written, k.add(k.mul(i, i_out), j)), value)
        k.synchronise()  # before the next tile takes its place
    return k.text()
