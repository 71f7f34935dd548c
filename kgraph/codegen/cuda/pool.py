"""reduce_window: maxima, minima and sums over sliding windows, with a fused elementwise epilogue (kind "pool").

Axes that no window touches merge into a batch ahead of the windowed ones and into channels behind them. A thread has a
tile of positions (`strips`), or one element of the result where the window is too large for that; neighbours have
neighbouring channels. Windows are part of the code, sizes are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from kgraph.codegen import expressions
from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.conv_geometry import inside
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.strips import Strip, Tile, at_least_1, block_of, choose_strips, threads_of
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.reductions import neutral
from kgraph.codegen.windows import COMBINE, extra_strides, groups_of, refuses, refuses_extras, take_apart
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cuda.pool:render_pool"


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node)
    if isinstance(parts, str):
        return parts
    return refuses(parts.node) or refuses_extras(parts)


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a plain reduce_window or of a fused node around one."""
    parts = take_apart(node)
    if isinstance(parts, str):
        raise ValueError(parts)
    core, x, out = parts.node, parts.source, parts.node.output
    groups = groups_of(core)
    kind = core.attrs["kind"]
    strides = [extra_strides(v, out.shape, groups) or () for v in parts.extras]
    extras = tuple(
        (v.dtype, tuple(isinstance(n, int) and n == 0 for n in s)) for v, s in zip(parts.extras, strides, strict=True)
    )
    name = "_".join(filter(None, (f"pool_{kind}", expressions.name(parts.expression))))
    sizes = sizes_of(core, x.shape, out.shape)
    windows = windows_of(core)
    shape = [sizes[0], *sizes[2:-1:2], sizes[-1]]
    geometry = [(window, stride, reach, dilation, low) for window, stride, low, reach, dilation in windows]
    strips = choose_strips(geometry, shape, compute_dtype(x.dtype), target)
    block = target.block if strips is None else block_of(target)
    params = (
        name,
        kind,
        x.dtype,
        windows,
        strips,
        extras,
        tuple(v.dtype for v in parts.outputs),
        parts.expression,
        index_type([x.type.size, out.type.size]),
    )
    return [
        KernelCall(
            KernelSpec(name, TEMPLATE, params),
            [x, *parts.extras, *parts.outputs],
            outputs=len(parts.outputs),
            sizes=sizes,
            extent=ceil_div(out.type.size if strips is None else threads_of(shape, strips), block),
            flops=out.type.size * (product(core.attrs["window"]) + expressions.flops(parts.expression)),
            bytes=x.type.nbytes + sum((v.type.nbytes for v in (*parts.extras, *parts.outputs)), start=0),
            launch=Launch(block),
        )
    ]


def windows_of(node: Node) -> tuple:
    """(window, stride, low padding, window dilation, base dilation) of each windowed axis."""
    attrs = node.attrs
    return tuple(
        (
            attrs["window"][n],
            attrs["strides"][n],
            attrs["padding"][n][0],
            attrs["window_dilation"][n],
            attrs["base_dilation"][n],
        )
        for n in range(*groups_of(node))
    )


def sizes_of(node: Node, source: Sequence, result: Sequence) -> list:
    """The run-time sizes: of the batch, of each windowed axis before and after, of the channels."""
    first, last = groups_of(node)
    pairs = [size for n in range(first, last) for size in (source[n], result[n])]
    return [product(source[:first]), *pairs, product(source[last:])]


@dataclass
class WindowAxis:
    """A windowed axis in a kernel. size, out: texts of its sizes before and after. Else as in `windows_of`."""

    size: str
    out: str
    window: int
    stride: int
    low: int
    window_dilation: int
    base_dilation: int

    def start(self, k: KernelSource, position: str) -> str:
        """The place of the first tap, in an axis that is dilated; it may wrap below 0."""
        at = k.mul(position, self.stride)
        return k.let(k.sub(at, self.low) if self.low >= 0 else k.add(at, -self.low), "start")

    def first(self, k: KernelSource) -> str:
        """The element that lies where the first window starts, or the last one before it; below 0 it has wrapped."""
        first = -self.low // self.base_dilation
        return k.i(first % (1 << 32) if k.index == "uint32" else first)

    @contextmanager
    def taps(self, k: KernelSource, start: str) -> Iterator[tuple[str, str]]:
        """A loop over the taps that meet an element: (tap, place of the element)."""
        with ExitStack() as loops:
            tap = k.i(0) if self.window == 1 else loops.enter_context(k.range(0, k.i(self.window), 1))
            place = start if self.window == 1 else k.let(k.add(start, k.mul(tap, self.window_dilation)), "place")
            if self.base_dilation > 1:
                extent = k.add(k.mul(k.sub(self.size, 1), self.base_dilation), 1)
                rest = k.mod(place, self.base_dilation)
                loops.enter_context(k.suite(f"if {inside(k, place, extent)} and {rest} == {k.i(0)}:"))
                place = k.let(k.div(place, self.base_dilation), "place")
            else:
                loops.enter_context(k.suite(f"if {inside(k, place, self.size)}:"))
            yield tap, place


def read_sizes(k: KernelSource, windows: Sequence) -> tuple[str, list[WindowAxis], str]:
    """(batch, axes, channels) from the sizes of a kernel."""
    batch = k.size()
    axes = [WindowAxis(k.size(), k.size(), *window) for window in windows]
    return batch, axes, k.size()


@contextmanager
def walk_window(k: KernelSource, axes: Sequence[WindowAxis], starts: Sequence[str]) -> Iterator[tuple[list, list]]:
    """Loops over the taps of a window that meet elements: (tap along each axis, place of the element)."""
    with ExitStack() as loops:
        met = [loops.enter_context(axis.taps(k, start)) for axis, start in zip(axes, starts, strict=True)]
        yield [tap for tap, _ in met], [place for _, place in met]


def render_pool(params: tuple, target) -> str:
    name, kind, dtype, windows, strips, extras, outputs, expression, index = params
    k = KernelSource(name, target, target.block if strips is None else block_of(target), index)
    x = k.operand(dtype)
    read = [(k.operand(extra), absent) for extra, absent in extras]
    written = [k.operand(output) for output in outputs]
    batch, axes, channels = read_sizes(k, windows)
    result_sizes = [batch, *(axis.out for axis in axes), channels]
    combine = lambda *values: scalar_ops.form(
        k, COMBINE[kind], values, [compute_dtype(dtype)] * 2, compute_dtype(dtype)
    )
    first = k.literal(neutral(kind, dtype), compute_dtype(dtype))

    def store(pooled: str, coordinates: list[str]) -> None:
        values = [pooled]
        for operand, absent in read:
            values.append(k.load(operand, k.offset(coordinates, result_sizes, [not a for a in absent])))
        at = k.let(k.offset(coordinates, result_sizes, [True] * len(result_sizes)), "at")
        for output, value in zip(written, k.emit(expression, values), strict=True):
            k.store(output, at, value)

    if strips is None:
        _one_by_one(k, x, (batch, axes, channels), first, combine, store)
    else:
        _by_tiles(k, x, (batch, axes, channels), [Strip(*s) for s in strips], first, combine, store)
    return k.text()


def _one_by_one(k: KernelSource, x: Operand, sizes: tuple, first: str, combine: Callable, store: Callable) -> None:
    """Threads have one element of the result each. sizes: as of `read_sizes`."""
    batch, axes, channels = sizes
    result_sizes = [batch, *(axis.out for axis in axes), channels]
    source_sizes = [batch, *(axis.size for axis in axes), channels]
    with k.grid_stride(k.let(k.product(result_sizes), "total")) as i:
        coordinates = k.coordinates(i, result_sizes)
        image, *positions, channel = coordinates
        starts = [axis.start(k, position) for axis, position in zip(axes, positions)]
        pooled = k.fresh("pooled")
        k.line(f"{pooled} = {first}")
        with walk_window(k, axes, starts) as (_, places):
            value = k.load(x, k.offset([image, *places, channel], source_sizes, [True] * len(source_sizes)))
            k.line(f"{pooled} = {combine(pooled, value)}")
        store(pooled, coordinates)


def _by_tiles(
    k: KernelSource, x: Operand, sizes: tuple, strips: list[Strip], first: str, combine: Callable, store: Callable
) -> None:
    """Threads have a tile of one channel each. sizes: as of `read_sizes`."""
    batch, axes, channels = sizes
    outs = [axis.out for axis in axes]
    counts = [k.let(k.ceil_div(out, s.length), "strips") for out, s in zip(outs, strips)]
    total = k.let(k.product([batch, *counts, channels]), "total")
    tile = Tile(k, strips, x.dtype)
    divisors = [at_least_1(k, n) for n in (*counts, channels)]
    with k.grid_stride(total) as i:
        image, *numbers, channel = k.coordinates(i, [batch, *divisors])
        tile.place(numbers, [axis.first(k) for axis in axes])
        tile.read(x, image, [axis.size for axis in axes], channels, channel, str, first)
        pooled = tile.reduce(first, combine)
        with tile.positions(outs) as (position, places):
            store(k.load(pooled, position), [image, *places, channel])
