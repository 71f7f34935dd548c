"""The cotangent of a windowed maximum (minimum) whose windows share no element and leave none out.

A unit is a row of windows: each is read once, compared in registers, and written as a whole.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product as each

from llvmlite import ir

from kgraph.codegen.cpu.builder import KernelBuilder, compute_dtype, is_float
from kgraph.codegen.cpu.strided import SizeTable, dense_strides, resolve
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.windows import groups_of
from kgraph.ir import Node
from kgraph.ir.dims import product

MOST_TAPS = 16  # of a window, all of whose elements are in registers


def takes(node: Node) -> bool:
    """Whether windows lie side by side and cover all of x."""
    x, source = node.inputs
    attrs, (first, last) = node.attrs, groups_of(node)
    if first == last or product(attrs["window"]) > MOST_TAPS:
        return False
    for k in range(first, last):
        plain = attrs["window_dilation"][k] == attrs["base_dilation"][k] == 1 and attrs["padding"][k] == (0, 0)
        window = attrs["window"][k]
        sizes = x.shape[k], source.shape[k]
        if not plain or attrs["strides"][k] != window or not all(isinstance(n, int) for n in sizes):
            return False
        if sizes[0] != sizes[1] * window:
            return False
    return True


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a select_and_scatter_add that `takes` accepts."""
    x, source = node.inputs
    first, last = groups_of(node)
    table = SizeTable()
    windows = tuple((source.shape[k], node.attrs["window"][k]) for k in range(first, last))
    params = (node.attrs["kind"], x.dtype, windows, table(product(x.shape[last:])))
    return [
        KernelCall(
            KernelSpec(f"pool_{node.attrs['kind']}_gradient", "pool_gradient_disjoint:render_disjoint", params),
            [x, source, node.output],
            outputs=1,
            sizes=table.values,
            extent=product(x.shape[:first]) * product(n for n, _ in windows[:-1]),
            flops=source.type.size * (2 * product(node.attrs["window"])),
            bytes=x.type.nbytes * 2 + source.type.nbytes,
        )
    ]


def render_disjoint(params, target) -> str:
    """x[batch, axes..., channels], source[batch, results of the axes..., channels] -> out like x."""
    kind, dtype, windows, channels = params
    b = KernelBuilder(f"pool_{kind}_gradient", target)
    x, source, out = (b.operand(k, dtype) for k in range(3))
    channels, lanes = resolve(b, channels), target.lanes(compute_dtype(dtype))
    counts, extents = [n for n, _ in windows], [w for _, w in windows]
    strides = dense_strides([*(n * w for n, w in windows), channels])[:-1]
    taps = [sum((i * s for i, s in zip(tap, strides)), start=0) for tap in each(*map(range, extents))]
    with ExitStack() as loops:
        unit = loops.enter_context(b.loop(b.begin, b.end))
        column = loops.enter_context(b.loop(0, counts[-1]))
        # Where the window begins: its position along every axis, the innermost one last, then the batch entry.
        place, rest = column * extents[-1] * strides[-1], unit
        for count, extent, stride in zip(counts[-2::-1], extents[-2::-1], strides[-2::-1]):
            place, rest = place + rest % count * extent * stride, rest // count
        place = place + rest * (product(n * w for n, w in windows) * channels)
        at = (unit * counts[-1] + column) * channels

        def vector(channel, mask: ir.Value | None, slot: int) -> None:
            values = [b.load(x, place + tap + channel, lanes, mask) for tap in taps]
            given = b.load(source, at + channel, lanes, mask)
            winner = _winner(b, values, kind, dtype.startswith("int"), lanes)
            zero = b.constant(0, dtype, lanes)
            for number, tap in enumerate(taps):
                own = b.ir.icmp_signed("==", winner, b.constant(number, "int32", lanes))
                b.store(out, place + tap + channel, b.select(own, given, zero), mask)

        b.vector_loop(0, channels, lanes, vector)
    return b.ir_text()


def _winner(b: KernelBuilder, values: list[ir.Value], kind: str, signed: bool, lanes: int) -> ir.Value:
    """Per lane the number of the first extremum, or of the first NaN."""
    best, winner = values[0], b.constant(0, "int32", lanes)
    for number, value in enumerate(values[1:], 1):
        wins = b.compare(">" if kind == "max" else "<", value, best, signed=signed)
        if is_float(value):
            new, old = b.ir.fcmp_unordered("uno", value, value), b.ir.fcmp_ordered("ord", best, best)
            wins = b.ir.or_(wins, b.ir.and_(new, old))
        best = b.select(wins, value, best)
        winner = b.select(wins, b.constant(number, "int32", lanes), winner)
    return winner
