"""Transforms filters of Winograd convolutions into the layout of `kgraph.ops.packing`.

In training steps, where filters are activations, it is a step of the program. Weights are transformed ahead of the
calls, in float64 as the reference does it (`kgraph.codegen.packing`).
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder
from kgraph.codegen.cpu.pack import widen
from kgraph.codegen.cpu.scalar_ops import convert
from kgraph.codegen.cpu.strided import SizeTable, resolve
from kgraph.codegen.cpu.winograd_transform import filter_transform, over_axes
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import TensorType, Value
from kgraph.ops.packing import matrix_sizes, padded_columns
from kgraph.ops.winograd import PAIRS, TAPS

DTYPE = "float32"


class FiltersPlan(NamedTuple):
    """Params of `render_filters`. Sizes are those of run time, so that one kernel serves many shapes.

    axes: of the windows. pairs: of points of the transform. channels, filters, padded: sizes; the last one with the
    filters that fill up the last vector. matrix: distance of matrices. lanes, vectors: of a vector, of a full panel.
    wide: whether to compute in float64. scaled: whether there is a factor for each filter, a second operand.
    """

    axes: int
    pairs: tuple[float, ...]
    channels: tuple
    filters: tuple
    padded: tuple
    matrix: tuple
    lanes: int
    vectors: int
    wide: bool
    scaled: bool


def filters_call(w: Value, layout: tuple, wide: bool = False, scale: Value | None = None, apart: int = 0) -> KernelCall:
    """The call that brings filters [3, channels, filters] or [3, 3, channels, filters] into a "winograd" layout.

    It writes a Temporary.

    wide: computes in float64. scale: [filters], factors for `w`; the products are rounded. apart: elements
    between matrices.
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
        matrix=table.run_time(channels * padded + apart),
        lanes=lanes,
        vectors=panel // lanes,
        wide=wide,
        scaled=scale is not None,
    )
    out = Temporary(TensorType((points, channels * padded + apart), dtype))
    return KernelCall(
        spec=KernelSpec("winograd_filters", "kgraph.codegen.cpu.winograd_filters:render_filters", tuple(plan)),
        operands=[w, out] if scale is None else [w, scale, out],
        outputs=1,
        sizes=list(table.values),
        extent=channels,
        flops=(TAPS + outputs + 2) ** (plan.axes - 1) * (outputs + 2) * 2 * TAPS * channels * filters,
        bytes=w.type.nbytes + out.type.nbytes,
    )


def render_filters(params: tuple, target) -> str:
    """Kernel (filters, factors where `scaled`) -> (transformed filters): one unit is one channel."""
    plan = FiltersPlan(*params)
    b = KernelBuilder("winograd_filters", target)
    b.align_stack()
    sizes = (plan.channels, plan.filters, plan.padded, plan.matrix)
    channels, filters, padded, matrix = (resolve(b, n) for n in sizes)
    lanes, vectors = plan.lanes, plan.vectors
    pairs = tuple(Fraction(p) for p in plan.pairs)
    source, out = b.operand(0, DTYPE), b.operand(1 + plan.scaled, DTYPE)
    scale = b.operand(1, DTYPE) if plan.scaled else None
    sums = "float64" if plan.wide else DTYPE
    row = channels * filters  # from one tap to the next

    with b.loop(b.begin, b.end) as channel:

        def vector(filter, mask, slot):
            factors = scale and b.load(scale, filter, lanes, mask)

            def tap(number: int):
                value = b.load(source, number * row + (channel * filters + filter), lanes, mask)
                return widen(b, b.mul(value, factors) if scale else value, DTYPE, sums)

            number = b.int(filter) // lanes
            first = number // vectors * vectors
            width = b.min(padded - first * lanes, vectors * lanes)
            at = out + (first * lanes * channels + channel * width + (number - first) * lanes)
            along = lambda taps: filter_transform(b, taps, pairs)
            for point, value in over_axes(TAPS, plan.axes, tap, along):
                b.store(at, point * matrix, convert(b, value, sums, DTYPE))

        b.vector_loop(0, filters, lanes, vector)
    return b.ir_text()
