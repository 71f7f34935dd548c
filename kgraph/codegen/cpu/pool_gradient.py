"""select_and_scatter_add: the cotangent of a windowed maximum (minimum) goes to the element that won.

A unit is one vector of channels of one batch entry, so no two threads add to one place. Every window is read twice: to
find the winner, then to add the source to it. Windows that share no element have a kernel of their own
(`pool_gradient_disjoint`).
"""

from __future__ import annotations

from contextlib import ExitStack

from llvmlite import ir

from kgraph.codegen.cpu import pool_gradient_disjoint
from kgraph.codegen.cpu.builder import MEMORY_TYPES, Int, KernelBuilder, compute_dtype, is_float
from kgraph.codegen.cpu.pool import WindowAxis, window_params
from kgraph.codegen.cpu.strided import SizeTable, dense_strides, resolve
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.reductions import neutral
from kgraph.codegen.windows import groups_of, refuses
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "select_and_scatter_add":
        return f"{node.name} is not the gradient of a windowed extremum"
    return refuses(node)


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a select_and_scatter_add."""
    if pool_gradient_disjoint.takes(node):
        return pool_gradient_disjoint.lower(node, target)
    x, source = node.inputs
    first, last = groups_of(node)
    table = SizeTable()
    axes = window_params(node, x.shape, source.shape, first, last, table)
    channels = product(x.shape[last:])
    lanes = target.lanes(compute_dtype(x.dtype))
    params = (node.attrs["kind"], x.dtype, lanes, axes, table(channels))
    return [
        KernelCall(
            KernelSpec(f"pool_{node.attrs['kind']}_gradient", "pool_gradient:render_gradient", params),
            [x, source, node.output],
            outputs=1,
            sizes=table.values,
            extent=product(x.shape[:first]) * ceil_div(channels, lanes),
            flops=source.type.size * (2 * product(node.attrs["window"])),
            bytes=x.type.nbytes * 2 + source.type.nbytes,
        )
    ]


def render_gradient(params, target) -> str:
    """x[batch, axes..., channels], source[batch, results of the axes..., channels] -> out like x."""
    kind, dtype, lanes, axis_params, channels = params
    b = KernelBuilder(f"pool_{kind}_gradient", target)
    x, source, out = (b.operand(k, dtype) for k in range(3))
    channels = resolve(b, channels)
    axes = WindowAxis.resolved(b, axis_params, channels)
    pixels = results = 1
    for axis in axes:
        pixels, results = axis.size * pixels, axis.out * results
    result_strides = dense_strides([*(a.out for a in axes), channels])
    zero = b.constant(0, dtype, lanes)
    blocks = b.ceil_div(channels, lanes)
    with b.loop(b.begin, b.end) as unit:
        batch, channel = unit // blocks, b.int(unit % blocks) * lanes
        mask = b.tail_mask(channels - channel, lanes)
        image = batch * pixels * channels + channel
        with b.loop(0, pixels) as p:
            b.store(out, image + p * channels, zero, mask)
        with ExitStack() as loops:
            positions = [loops.enter_context(b.loop(0, a.out)) for a in axes]
            at = batch * results * channels + channel
            for position, stride in zip(positions, result_strides, strict=False):
                at = at + position * stride
            windows = [a.taps(b, p) for a, p in zip(axes, positions, strict=True)]
            winner = _find_winner(b, x, image, axes, windows, mask, kind, dtype, lanes)
            value = b.load(source, at, lanes, mask)

            def give(number: ir.Value, place, value=value, winner=winner, mask=mask) -> None:
                own = b.select(b.ir.icmp_signed("==", winner, number), value, zero)
                b.store(out, place, b.add(b.load(out, place, lanes, mask), own), mask)

            _walk_window(b, axes, windows, image, lanes, give)
    return b.ir_text()


def _find_winner(b: KernelBuilder, x, image, axes, windows, mask, kind: str, dtype: str, lanes: int) -> ir.Value:
    """Per lane the number of the first tap with the extremum (or the first NaN); -1 for windows of padding alone."""
    compute = compute_dtype(dtype)
    best = b.variable(b.constant(neutral(kind, dtype), compute, lanes))
    none = b.constant(-1, "int32", lanes)
    winner = b.variable(none)
    signed = dtype.startswith("int")

    def compare(number: ir.Value, place) -> None:
        value = b.load(x, place, lanes, mask)
        wins = b.compare(">" if kind == "max" else "<", value, best.get(), signed=signed)
        wins = b.ir.or_(wins, b.ir.icmp_signed("==", winner.get(), none))
        if is_float(value):
            new = b.ir.fcmp_unordered("uno", value, value)
            old = b.ir.fcmp_ordered("ord", best.get(), best.get())
            wins = b.ir.or_(wins, b.ir.and_(new, old))
        best.set(b.select(wins, value, best.get()))
        winner.set(b.select(wins, number, winner.get()))

    _walk_window(b, axes, windows, image, lanes, compare)
    return winner.get()


def _walk_window(b: KernelBuilder, axes, windows, image, lanes: int, body) -> None:
    """Calls `body(number of the tap in every lane, place of it)` for the taps of a window that hold an element."""

    def walk(remaining: list, number: int | Int, place) -> None:
        if not remaining:
            lane = b.ir.trunc(b.i64(number), MEMORY_TYPES["int32"])
            body(b.broadcast(lane, lanes), place)
            return
        (axis, (start, first, last)), *rest = remaining
        with b.loop(first, last) as t:
            position = start + t * axis.window_dilation
            inner_number = number * axis.window + t
            if axis.base_dilation == 1:
                walk(rest, inner_number, place + position * axis.source_stride)
                return
            with b.if_then(b.int(position % axis.base_dilation).equals(0)):
                walk(rest, inner_number, place + position // axis.base_dilation * axis.source_stride)

    walk(list(zip(axes, windows, strict=True)), 0, image)
