"""select_and_scatter_add: the cotangent of a windowed maximum (minimum) goes to the element that won.

A first kernel writes down which tap won in every window: the first of equal elements, or the first NaN. In a second one
every element of the operand looks at the windows that hold it and adds the cotangents of those that it won. So no two
threads add to one place, and sums are in the order of taps.
"""

from __future__ import annotations

from contextlib import ExitStack

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.conv_geometry import inside
from kgraph.codegen.cuda.pool import read_sizes, sizes_of, walk_window, windows_of
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.codegen.reductions import neutral
from kgraph.codegen.windows import refuses
from kgraph.ir import Node, TensorType
from kgraph.ir.dims import ceil_div, product

MODULE = "kgraph.codegen.cuda.pool_gradient"


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "select_and_scatter_add":
        return f"{node.name} is not the gradient of a windowed extremum"
    return refuses(node)


def lower(node: Node, target) -> list[KernelCall]:
    """The call that finds the winners, and the one that gives them their cotangents."""
    x, source = node.inputs
    kind, windows = node.attrs["kind"], windows_of(node)
    winners = Temporary(TensorType(source.shape, "int32"))
    index = index_type([x.type.size, source.type.size])
    sizes = sizes_of(node, x.shape, source.shape)
    taps = product(node.attrs["window"])
    name = f"pool_{kind}_winner"
    return [
        KernelCall(
            KernelSpec(name, f"{MODULE}:render_winners", (name, kind, x.dtype, windows, index)),
            [x, winners],
            outputs=1,
            sizes=sizes,
            extent=ceil_div(source.type.size, target.block),
            flops=source.type.size * taps,
            bytes=x.type.nbytes + winners.type.nbytes,
            launch=Launch(target.block),
        ),
        KernelCall(
            KernelSpec("pool_gradient", f"{MODULE}:render_gradient", (x.dtype, windows, index)),
            [winners, source, node.output],
            outputs=1,
            sizes=sizes,
            extent=ceil_div(x.type.size, target.block),
            flops=source.type.size * taps,
            bytes=winners.type.nbytes + source.type.nbytes + x.type.nbytes,
            launch=Launch(target.block),
        ),
    ]


def render_winners(params: tuple, target) -> str:
    """x[batch, axes..., channels] -> the number of the winning tap of every window; that of taps where none has won."""
    name, kind, dtype, windows, index = params
    k = KernelSource(name, target, target.block, index)
    x, winners = k.operand(dtype), k.operand("int32")
    batch, axes, channels = read_sizes(k, windows)
    results = [batch, *(axis.out for axis in axes), channels]
    sources = [batch, *(axis.size for axis in axes), channels]
    compute, none = compute_dtype(dtype), product([axis.window for axis in axes])
    best, winner = k.fresh("best"), k.fresh("winner")
    with k.grid_stride(k.let(k.product(results), "total")) as i:
        image, *positions, channel = k.coordinates(i, results)
        k.line(f"{best} = {k.literal(neutral(kind, dtype), compute)}")
        k.line(f"{winner} = {k.i(none)}")
        starts = [axis.start(k, position) for axis, position in zip(axes, positions)]
        with walk_window(k, axes, starts) as (taps, places):
            value = k.load(x, k.offset([image, *places, channel], sources, [True] * len(sources)))
            wins = f"{winner} == {k.i(none)} or {value} {'>' if kind == 'max' else '<'} {best}"
            if scalar_ops.is_float(compute):
                wins += f" or ({value} != {value} and {best} == {best})"
            with k.suite(f"if {wins}:"):
                k.line(f"{best} = {value}")
                k.line(f"{winner} = {_number(k, axes, taps)}")
        k.store(winners, i, f"int32({winner})")
    return k.text()


def _number(k: KernelSource, axes: list, taps: list[str]) -> str:
    """The number of a tap of the window."""
    return k.offset(taps, [k.i(axis.window) for axis in axes], [True] * len(axes))


def render_gradient(params: tuple, target) -> str:
    """winners, source[batch, results of the axes..., channels] -> out[batch, axes..., channels]."""
    dtype, windows, index = params
    k = KernelSource("pool_gradient", target, target.block, index)
    winners, source, out = k.operand("int32"), k.operand(dtype), k.operand(dtype)
    batch, axes, channels = read_sizes(k, windows)
    results = [batch, *(axis.out for axis in axes), channels]
    sources = [batch, *(axis.size for axis in axes), channels]
    compute, total = compute_dtype(dtype), k.fresh("sum")
    with k.grid_stride(k.let(k.product(sources), "total")) as i:
        image, *places, channel = k.coordinates(i, sources)
        k.line(f"{total} = {k.literal(0, compute)}")
        with ExitStack() as loops:
            taps, positions = [], []
            for axis, place in zip(axes, places):
                at = k.mul(place, axis.base_dilation)
                at = k.let(k.add(at, axis.low) if axis.low >= 0 else k.sub(at, -axis.low), "at")
                tap = loops.enter_context(k.range(0, k.i(axis.window), 1))
                # The start of the window whose tap this is, as it would lie without padding; below 0 it wraps.
                start = k.let(k.sub(at, k.mul(tap, axis.window_dilation)), "start")
                position = k.let(k.div(start, axis.stride), "position")
                starts = f"{k.mul(position, axis.stride)} == {start}"
                loops.enter_context(k.suite(f"if {starts} and {inside(k, position, axis.out)}:"))
                taps.append(tap)
                positions.append(position)
            window = k.let(k.offset([image, *positions, channel], results, [True] * len(results)), "window")
            number = _number(k, axes, taps)
            with k.suite(f"if {k.i(k.load(winners, window))} == {number}:"):
                given = k.load(source, window)
                k.line(f"{total} = {scalar_ops.form(k, 'add', [total, given], [compute] * 2, compute)}")
        k.store(out, i, total)
    return k.text()
