"""Axes of convolutions in kernels: which elements of the image a position of the result meets, under which taps.

All geometry is in run-time sizes, so that one kernel serves all layers of a network. Output position o meets tap k at
the element (o * stride + k * reach - low) / dilation of the image, if that is a whole number that lies inside. Places
before the image wrap around in unsigned arithmetic: they are told from those inside by the one comparison that also
finds those behind it.

With input dilation, positions with the same remainder modulo a period meet the same taps: they form a *phase*, a
convolution of its own in which no zeros are multiplied (see `kgraph.codegen.cpu.conv_geometry`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kgraph.codegen.cuda.source import KernelSource
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product


@dataclass
class Axis:
    """One spatial axis inside of a kernel; all are texts. out, window, stride, reach: as in the module's docstring.

    start: the place of tap 0 at position 0, of the index type (it may have wrapped). With input dilation also:
    dilation; period; tap_step: distance of taps that meet elements at one position.
    """

    size: str
    out: str
    window: str
    start: str
    stride: str
    reach: str
    dilation: str = ""
    period: str = ""
    tap_step: str = ""


def axis_sizes(node: Node, window: Sequence) -> list:
    """The run-time sizes that `read_axes` reads, for a node with the attributes of a convolution."""
    attrs, rank = node.attrs, len(window)
    dilated = is_dilated(node)
    sizes: list = []
    for n in range(rank):
        stride, reach = attrs["strides"][n], attrs["rhs_dilation"][n]
        sizes += [node.inputs[0].shape[n + 1], window[n], -attrs["padding"][n][0], stride, reach]
        if dilated:
            dilation = attrs["lhs_dilation"][n]
            sizes += [dilation, period(stride, dilation), period(reach, dilation)]
    return sizes


def period(step, dilation):
    """After how many steps places fall on elements of an axis with this dilation again."""
    if isinstance(step, Dim) or isinstance(dilation, Dim):
        return dilation
    return dilation // math.gcd(step, dilation)


def phases(node: Node):
    """The number of phases of a convolution."""
    attrs = node.attrs
    return product([period(s, d) for s, d in zip(attrs["strides"], attrs["lhs_dilation"], strict=True)])


def phase_positions(node: Node):
    """Positions of the largest phase of one image."""
    attrs, out = node.attrs, node.output.shape[1:-1]
    periods = [period(s, d) for s, d in zip(attrs["strides"], attrs["lhs_dilation"], strict=True)]
    return product([ceil_div(n, p) for n, p in zip(out, periods, strict=True)])


def is_dilated(node: Node) -> bool:
    """Whether the image is dilated."""
    return any(isinstance(d, Dim) or d != 1 for d in node.attrs.get("lhs_dilation", ()))


def read_axes(k: KernelSource, dilated: bool, outs: Sequence[str]) -> list[Axis]:
    """The axes from the next sizes of a kernel. outs: positions of the result along each."""
    axes = []
    for out in outs:
        size, window, start, stride, reach = (k.size() for _ in range(5))
        axes.append(Axis(size, out, window, start, stride, reach))
        if dilated:
            axes[-1].dilation, axes[-1].period, axes[-1].tap_step = (k.size() for _ in range(3))
    return axes


def inside(k: KernelSource, place: str, size: str) -> str:
    """The condition that a place, which may lie before or behind, is one of `size`."""
    return f"{place} < {size}" if k.index == "uint32" else f"{place} >= {k.i(0)} and {place} < {size}"


@dataclass
class Walk:
    """The taps of an axis that positions of one phase meet, and where; texts.

    Position q of the phase is output position `phase + q * period`, one of `count`. It meets `taps` taps, `first`,
    `first + tap_step`, ..., number t of them on the element `q * step + start + t * reach`.
    """

    count: str
    taps: str
    first: str
    tap_step: str
    start: str
    step: str
    reach: str
    phase: str
    period: str

    def position(self, k: KernelSource, q: str) -> str:
        """Of the result, from a number in the phase."""
        return k.add(self.phase, k.mul(q, self.period)) if self.period else q

    def place(self, k: KernelSource, q: str) -> str:
        """Of the first tap."""
        return k.add(k.mul(q, self.step), self.start)

    def tap(self, k: KernelSource, t: str) -> str:
        """The tap with this number in the phase."""
        return k.add(self.first, k.mul(t, self.tap_step)) if self.period else t


def walk(k: KernelSource, axis: Axis, phase: str) -> Walk:
    """What the positions of a phase meet; phase: its number, which may be "" without input dilation."""
    if not axis.dilation:
        return Walk(axis.out, axis.window, "", "", axis.start, axis.stride, axis.reach, "", "")
    # Signed, and before the image less than nothing: the division rounds down.
    signed = lambda text: f"int64({text})" if k.index != "uint32" else f"int64(int32({text}))"
    begin = k.let(f"int64(int64({phase}) * int64({axis.stride}) + {signed(axis.start)})", "begin")
    dilation, reach = k.let(f"int64({axis.dilation})"), k.let(f"int64({axis.reach})")
    first = k.fresh("first")
    fewest = k.let(f"({axis.window} if {axis.window} < {axis.tap_step} else {axis.tap_step})")
    k.line(f"{first} = {k.i(0)}")
    place = f"int64({begin} + int64(int64({first}) * {reach}))"
    with k.suite(f"while {first} < {fewest} and int64({place} % {dilation}) != int64(0):"):
        k.line(f"{first} = {k.add(first, 1)}")
    met = k.ceil_div(k.sub(axis.window, first), axis.tap_step)
    taps = k.let(f"({met} if {first} < {fewest} else {k.i(0)})", "taps")
    start = k.let(k.i(f"int64({place} // {dilation})"), "start")
    step = k.let(k.div(k.mul(axis.period, axis.stride), axis.dilation), "step")
    stretch = k.let(k.div(k.mul(axis.tap_step, axis.reach), axis.dilation), "reach")
    count = k.let(k.div(k.sub(k.add(axis.out, k.sub(axis.period, 1)), phase), axis.period), "count")
    return Walk(count, taps, first, axis.tap_step, start, step, stretch, phase, axis.period)
