"""Weight packing: the layouts in which contraction kernels read their second operand.

The layout of a matrix product is that of panels. The weight is seen as matrices [batch, K, N]; the columns are cut into
panels of `panel` columns, and each panel is stored row by row, so that a kernel that computes one
panel of output columns reads memory in order. The last panel is only as wide as its columns need, rounded up to
`vector` columns with zeros.

    layout = ("panels", shape, batch_axes, k_axes, n_axes, groups, steps, offset, halves, panel, vector, dtype)

shape: of the weight (static). batch_axes, k_axes, n_axes: its axes in the order in which they form batch, K and N.
groups: N is cut into so many equal parts, each a matrix of its own (batch becomes batch * groups), as in grouped
convolution. dtype: of the packed array; the weight is converted to it. steps: so many rows are stored together, the
elements of a column side by side, for instructions that sum several products at once; K is filled up with zeros to a
multiple of them. offset: where the kernel adds it to all that the weight is multiplied with, each panel of an int8
weight begins with -offset times the sums of its columns, as the bytes of int32 numbers; else 0. halves: in panels of
two vectors, elements of one and the other alternate, so that they are lower and upper halves of wider elements.
Result: [batch * groups, length of a column * padded N].

Winograd convolutions (`kgraph.ops.winograd`) read transformed filters, a matrix [channels, filters] per point, or pair
of points:

    layout = ("winograd", shape, outputs, panel, vector, dtype)

shape: (3, channels, filters) or (3, 3, channels, filters). outputs: the m of the transform. Result:
[(m + 2)^axes, channels * padded filters].
"""

from __future__ import annotations

import math

import numpy as np

from kgraph.errors import ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, np_dtype, register
from kgraph.ops import winograd

__all__ = ["pack"]

Layout = tuple
_HEAD = 4  # bytes of a sum


def panels_layout(
    shape,
    batch_axes,
    k_axes,
    n_axes,
    groups: int,
    panel: int,
    vector: int,
    dtype: str,
    steps: int = 1,
    offset: int = 0,
    halves: bool = False,
) -> Layout:
    """The layout tuple of the panel layout, see the module's docstring."""
    axes = (tuple(int(a) for a in group) for group in (batch_axes, k_axes, n_axes))
    how = (int(groups), int(steps), int(offset), bool(halves), int(panel), int(vector), dtype)
    return ("panels", tuple(int(s) for s in shape), *axes, *how)


def winograd_layout(shape, outputs: int, panel: int, vector: int, dtype: str) -> Layout:
    """The layout tuple of transformed filters, see the module's docstring."""
    return ("winograd", tuple(int(s) for s in shape), int(outputs), int(panel), int(vector), dtype)


def matrix_sizes(layout: Layout) -> tuple[int, int, int]:
    """(number of matrices, K, N of a matrix) of a layout."""
    if layout[0] == "winograd":
        _, shape, outputs, *_ = layout
        return (outputs + 2) ** (len(shape) - 2), shape[-2], shape[-1]
    _, shape, batch_axes, k_axes, n_axes, groups, *_ = layout
    batch, depth, columns = (math.prod(shape[a] for a in axes) for axes in (batch_axes, k_axes, n_axes))
    return batch * groups, depth, columns // groups


def is_reordering(layout: Layout, dtype: str) -> bool:
    """Whether a weight of this dtype can be told from what is packed of it: the elements are the same."""
    return layout[0] == "panels" and layout[-1] == dtype


def padded_columns(layout: Layout) -> int:
    """Columns of one packed matrix, the padding of the last panel included."""
    columns, vector = matrix_sizes(layout)[2], layout[-2]
    return -(-columns // vector) * vector


def interleaving(layout: Layout) -> tuple[int, int]:
    """(steps that are stored together, offset) of a layout."""
    return (1, 0) if layout[0] == "winograd" else layout[6:8]


def column_length(layout: Layout) -> int:
    """Elements of one column of a packed matrix: K filled up to whole steps, behind the first value of its sums."""
    steps, offset = interleaving(layout)
    return -(-matrix_sizes(layout)[1] // steps) * steps + (_HEAD if offset else 0)


def _infer(w, *, layout):
    if layout[0] not in ("panels", "winograd") or tuple(w.shape) != layout[1]:
        raise ShapeError(f"pack: the layout {layout} is not one for {w}")
    return TensorType((matrix_sizes(layout)[0], column_length(layout) * padded_columns(layout)), layout[-1])


def _reference(w, *, layout):
    # In float64, as the oracle evaluates, the packed array stays float64.
    kind = w.dtype if w.dtype == np.float64 else np_dtype(layout[-1])
    batch, depth, columns = matrix_sizes(layout)
    out = np.zeros((batch, column_length(layout) * padded_columns(layout)), kind)
    if layout[0] == "winograd":
        for panel, first, last in _panels(out, layout):
            panel[:, :, : last - first, 0] = winograd.transformed_filters(w[..., first:last], layout[2])
        return out
    _, _, batch_axes, k_axes, n_axes, groups, *_ = layout
    matrices = w.transpose(*batch_axes, *k_axes, *n_axes).reshape(batch // groups, depth, groups, columns)
    matrices = matrices.transpose(0, 2, 1, 3).reshape(batch, depth, columns)
    steps, offset = interleaving(layout)
    whole = depth // steps
    for panel, first, last in _panels(out, layout):
        columns = matrices[:, :, first:last]
        if offset:
            sums = np.zeros((batch, panel.shape[2]), np.int32)
            sums[:, : last - first] = -offset * columns.sum(axis=1, dtype=np.int32)
            start = _panel_range(layout, first).start
            out[:, start : start + sums.shape[1] * _HEAD] = sums.view(np.int8)
        place = _places(layout, panel, last - first)
        panel[:, :whole, place] = columns[:, : whole * steps].reshape(batch, whole, steps, last - first).swapaxes(2, 3)
        if depth % steps:
            panel[:, whole, place, : depth % steps] = columns[:, whole * steps :].swapaxes(1, 2)
    return out


def _places(layout: Layout, panel: np.ndarray, count: int):
    """What indexes the first `count` columns of a panel's view."""
    vector = layout[-2]
    if layout[0] == "winograd" or not layout[8] or panel.shape[2] != 2 * vector:
        return slice(0, count)
    return np.arange(2 * vector).reshape(vector, 2).T.reshape(-1)[:count]


def _panel_range(layout: Layout, first: int) -> range:
    """Where the panel that begins with column `first` lies in a packed matrix."""
    last = min(first + layout[-3], padded_columns(layout))
    return range(column_length(layout) * first, column_length(layout) * last)


def _panels(packed: np.ndarray, layout: Layout):
    """(view [matrices, steps, columns with padding, elements of a step], first column, last one + 1) of each panel of a
    packed array, without what it begins with."""
    batch, depth, columns = matrix_sizes(layout)
    steps, offset = interleaving(layout)
    for start in range(0, padded_columns(layout), layout[-3]):
        place = _panel_range(layout, start)
        stop = min(start + layout[-3], padded_columns(layout))
        head = (stop - start) * _HEAD if offset else 0
        view = packed[:, place.start + head : place.stop].reshape(batch, -(-depth // steps), stop - start, steps)
        yield view, start, min(stop, columns)


def unpack_reference(packed: np.ndarray, layout: Layout) -> np.ndarray:
    """The array that `pack` made `packed` of, in the packed dtype; filters of a Winograd convolution up to rounding."""
    shape = layout[1]
    batch, depth, columns = matrix_sizes(layout)
    matrices = np.empty((batch, depth, columns), packed.dtype)
    for panel, first, last in _panels(packed, layout):
        rows = panel[:, :, _places(layout, panel, last - first)].swapaxes(2, 3)
        matrices[:, :, first:last] = rows.reshape(batch, rows.shape[1] * rows.shape[2], last - first)[:, :depth]
    if layout[0] == "winograd":
        return winograd.original_filters(matrices, layout[2], len(shape) - 2).astype(packed.dtype)
    _, _, batch_axes, k_axes, n_axes, groups, *_ = layout
    matrices = matrices.reshape(batch // groups, groups, depth, columns).transpose(0, 2, 1, 3)
    order = (*batch_axes, *k_axes, *n_axes)
    return matrices.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def _samples():
    rng = np.random.default_rng(0)

    def sample(name, shape, batch_axes, k_axes, n_axes, groups=1, panel=8, vector=4):
        layout = panels_layout(shape, batch_axes, k_axes, n_axes, groups, panel, vector, "float32")
        return Sample((rng.standard_normal(shape).astype(np.float32),), {"layout": layout}, name)

    filters = rng.standard_normal((3, 3, 5, 10)).astype(np.float32)
    transformed = [
        Sample((w,), {"layout": winograd_layout(w.shape, m, 8, 4, "float32")}, f"filters, {axes} axes, {m} outputs")
        for m in winograd.PAIRS
        for axes, w in ((2, filters), (1, filters[0]))
    ]
    return [
        *transformed,
        sample("matrix", (5, 16), (), (0,), (1,)),
        sample("narrow last panel", (3, 10), (), (0,), (1,)),
        sample("transposed", (21, 6), (), (1,), (0,)),
        sample("batch", (4, 2, 3), (1,), (2,), (0,)),
        sample("convolution in two groups", (3, 3, 2, 10), (), (0, 1, 2), (3,), groups=2),
        sample("empty", (0, 7), (), (0,), (1,)),
    ]


pack = register(
    Primitive(
        name="pack",
        infer=_infer,
        reference=_reference,
        gradient=NotDifferentiable("packing is introduced after differentiation"),
        traits=frozenset({"host"}),
        samples=_samples,
        tolerance=0.0,
    )
)
