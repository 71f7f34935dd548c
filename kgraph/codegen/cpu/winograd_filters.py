"""Transforms filters of Winograd convolutions into the layout of `kgraph.ops.packing`.

In training steps, where filters are activations, it is a step of the program. Weights are transformed ahead of the
calls, in float64 as the reference does it (`kgraph.codegen.packing`).
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder, Pointer
from kgraph.codegen.cpu.pack import widen
from kgraph.codegen.cpu.scalar_ops import convert
from kgraph.codegen.cpu.strided import SizeTable, resolve
from kgraph.codegen.cpu.winograd_transform import filter_transform
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import TensorType, Value
from kgraph.ops.packing import matrix_sizes, padded_columns
from kgraph.ops.winograd import PAIRS, TAPS

DTYPE = "float32"


class FiltersPlan(NamedTuple):
    """Params of `render_filters`. Sizes are those of run time, so that one kernel serves many shapes.

    axes: of the windows. pairs: of points of the transform. channels, filters, padded: sizes; the last one with the
    filters that fill up the last vector. lanes, vectors: of a vector, of a full panel. wide: whether to compute in
    float64. scaled: whether there is a factor for each filter, a second operand.
    """

    axes: int
    pairs: tuple[float, ...]
    channels: tuple
    filters: tuple
    padded: tuple
    lanes: int
    vectors: int
    wide: bool
    scaled: bool


def filters_call(w: Value, layout: tuple, wide: bool = False, scale: Value | None = None) -> KernelCall:
    """The call that brings filters [3, channels, filters] or [3, 3, channels, filters] into a "winograd" layout.

    It writes a Temporary.

    wide: computes in float64. scale: [filters], factors for `w`; the products are rounded.
    """
    _, shape, outputs, panel, lanes, dtype = layout
    points, channels, filters = matrix_sizes(layout)
    padded = padded_columns(layout)
    table = SizeTable()
    plan = FiltersPlan(
        axes=len(shape) - 2,
        pairs=tuple(float(p) for p in PAIRS[outputs]),
        channels=table.run_time(channels),
        filters=table.run_time(filters),
        padded=table.run_time(padded),
        lanes=lanes,
        vectors=panel // lanes,
        wide=wide,
        scaled=scale is not None,
    )
    out = Temporary(TensorType((points, channels * padded), dtype))
    return KernelCall(
        spec=KernelSpec("winograd_filters", "kgraph.codegen.cpu.winograd_filters:render_filters", tuple(plan)),
        operands=[w, out] if scale is None else [w, scale, out],
        outputs=1,
        sizes=list(table.values),
        extent=channels,
        flops=(TAPS + outputs + 2) ** (plan.axes - 1) * (outputs + 2) * 2 * TAPS * channels * filters,
        bytes=w.type.nbytes + out.type.nbytes,
        scratch_bytes=TAPS * (outputs + 2) * lanes * (8 if wide else 4),
    )


def render_filters(params: tuple, target) -> str:
    """Kernel (filters, factors where `scaled`) -> (transformed filters): one unit is one channel."""
    plan = FiltersPlan(*params)
    b = KernelBuilder("winograd_filters", target)
    channels, filters, padded = (resolve(b, n) for n in (plan.channels, plan.filters, plan.padded))
    lanes, vectors, side = plan.lanes, plan.vectors, 2 * len(plan.pairs) + 2
    pairs = tuple(Fraction(p) for p in plan.pairs)
    source, out = b.operand(0, DTYPE), b.operand(1 + plan.scaled, DTYPE)
    scale = b.operand(1, DTYPE) if plan.scaled else None
    sums = "float64" if plan.wide else DTYPE
    stage = Pointer(b, b.scratch(sums).value, sums, "stage")
    row = channels * filters  # from one tap to the next
    matrix = channels * padded

    with b.loop(b.begin, b.end) as channel:

        def vector(filter, mask, slot):
            factors = scale and b.load(scale, filter, lanes, mask)

            def taps_at(first, step: int) -> list:
                places = [(first + i * step) * row + (channel * filters + filter) for i in range(TAPS)]
                taps = [b.load(source, place, lanes, mask) for place in places]
                return [widen(b, b.mul(tap, factors) if scale else tap, DTYPE, sums) for tap in taps]

            number = b.int(filter) // lanes
            first = number // vectors * vectors
            width = b.min(padded - first * lanes, vectors * lanes)
            at = out + (first * lanes * channels + channel * width + (number - first) * lanes)
            if plan.axes == 1:
                for j, value in enumerate(filter_transform(b, taps_at(0, 1), pairs)):
                    b.store(at, j * matrix, convert(b, value, sums, DTYPE))
                return
            with b.loop(0, TAPS) as j:
                for i, value in enumerate(filter_transform(b, taps_at(j, TAPS), pairs)):
                    b.store(stage, (j + i * TAPS) * lanes, value)
            with b.loop(0, side) as i:
                taps = [b.load(stage, (i * TAPS + j) * lanes, lanes) for j in range(TAPS)]
                for j, value in enumerate(filter_transform(b, taps, pairs)):
                    b.store(at, (i * side + j) * matrix, convert(b, value, sums, DTYPE))

        b.vector_loop(0, filters, lanes, vector)
    return b.ir_text()
