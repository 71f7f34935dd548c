"""Windows of tensors: slice, pad, mirrored padding, and slices at run-time offsets."""

from __future__ import annotations

import builtins

import numpy as np

from kgraph import ops
from kgraph.errors import DTypeError
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ir.dims import ceil_div
from kgraph.ir.types import INTS
from kgraph.ops.common import (
    Array,
    Size,
    dtype_of,
    integers,
    like,
    listing,
    per_axis,
    require,
    require_same_dtype,
    uniform,
    zeros_like,
)

# -- slice ------------------------------------------------------------------------------------------------------------


def _slice_infer(x: TensorType, start: tuple, limit: tuple, stride: tuple) -> TensorType:
    what = lambda: f"slice({x}) from {start} to {limit} by {stride}"
    require(len(start) == len(limit) == len(stride) == x.rank, lambda: f"{what()}: expected {x.rank} values of each")
    shape = []
    for n, low, high, step in zip(x.shape, start, limit, stride):
        require(step >= 1, lambda: f"{what()}: expected strides of at least 1")
        inside = low >= 0 and low <= high and (high == n or high <= n)
        require(inside, lambda: f"{what()}: expected 0 <= start <= limit <= size on each axis")
        shape.append(ceil_div(high - low, step))
    return x.with_shape(shape)


def _slice_gradient(cotangents, inputs, outputs, start, limit, stride):
    (c,), (x,) = cotangents, inputs
    high = []
    for n, low, count, step in zip(x.shape, start, c.shape, stride):
        empty = isinstance(count, int) and count == 0
        high.append(n - low if empty else n - low - (count - 1) * step - 1)
    return (ops.pad(c, like(c, 0), low=start, high=tuple(high), interior=tuple(s - 1 for s in stride)),)


SLICE = register(
    Primitive(
        "slice",
        infer=_slice_infer,
        reference=lambda x, start, limit, stride: x[tuple(map(builtins.slice, start, limit, stride))].copy(),
        gradient=_slice_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((5, 7)),), {"start": (1, 2), "limit": (4, 7), "stride": (1, 1)}),
            Sample((uniform((5, 17)),), {"start": (0, 1), "limit": (5, 16), "stride": (2, 3)}),
            Sample((uniform((2, 3, 5)),), {"start": (0, 2, 0), "limit": (2, 3, 5), "stride": (1, 1, 2)}),
            Sample((integers((9,)),), {"start": (3,), "limit": (8,), "stride": (1,)}, "int32"),
            Sample((uniform((5, 3)),), {"start": (2, 0), "limit": (2, 3), "stride": (1, 1)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def slice(x: Array, *, start, limit, stride=None) -> Array:
    """Elements start, start + stride ... below limit along each axis.

    start, limit: an int or Dim per axis with 0 <= start <= limit <= size. stride: ints of at least 1; None means 1.
    Gives x's dtype; x itself for a full slice. Raises ShapeError for limits out of range.
    """
    rank = len(x.shape)
    start, limit = per_axis("slice", start, rank), per_axis("slice", limit, rank)
    stride = (1,) * rank if stride is None else per_axis("slice", stride, rank)
    if start == (0,) * rank and limit == tuple(x.shape) and stride == (1,) * rank:
        return x
    return bind(SLICE, x, start=start, limit=limit, stride=stride)


# -- pad --------------------------------------------------------------------------------------------------------------


def _pad_infer(x: TensorType, value: TensorType, low: tuple, high: tuple, interior: tuple) -> TensorType:
    what = lambda: f"pad({x}, {value}) by low {low}, high {high}, interior {interior}"
    require_same_dtype("pad", x, value)
    require(value.rank == 0, lambda: f"{what()}: expected a scalar value")
    require(len(low) == len(high) == len(interior) == x.rank, lambda: f"{what()}: expected {x.rank} values of each")
    shape = []
    for n, before, after, between in zip(x.shape, low, high, interior):
        require(between >= 0, lambda: f"{what()}: expected interior padding of at least 0")
        spread = n if between == 0 or (isinstance(n, int) and n == 0) else n + (n - 1) * between
        size = spread + before + after
        require(size >= 0, lambda: f"{what()}: the result would have a negative size")
        shape.append(size)
    return x.with_shape(shape)


def _pad(x: np.ndarray, value: np.ndarray, low: tuple, high: tuple, interior: tuple) -> np.ndarray:
    spread = [n + max(n - 1, 0) * i for n, i in zip(x.shape, interior)]
    grown = [s + max(lo, 0) + max(hi, 0) for s, lo, hi in zip(spread, low, high)]
    out = np.full(grown, value, x.dtype)
    inner = (builtins.slice(max(lo, 0), max(lo, 0) + s, i + 1) for s, lo, i in zip(spread, low, interior))
    out[tuple(inner)] = x
    # Negative padding crops.
    return out[tuple(builtins.slice(max(-lo, 0), n - max(-hi, 0)) for n, lo, hi in zip(grown, low, high))].copy()


def _pad_gradient(cotangents, inputs, outputs, low, high, interior):
    (c,) = cotangents
    rank = len(low)
    spread = ops.pad(c, like(c, 0), low=tuple(-v for v in low), high=tuple(-v for v in high), interior=(0,) * rank)
    stride = tuple(i + 1 for i in interior)
    dx = ops.slice(spread, start=(0,) * rank, limit=spread.shape, stride=stride)
    everything = tuple(range(rank))
    return dx, ops.sub(ops.reduce_sum(c, axes=everything), ops.reduce_sum(dx, axes=everything))


PAD = register(
    Primitive(
        "pad",
        infer=_pad_infer,
        reference=_pad,
        gradient=_pad_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((3, 5)), uniform()), {"low": (1, 0), "high": (0, 2), "interior": (0, 0)}),
            Sample((uniform((3, 5)), uniform()), {"low": (2, 1), "high": (1, 0), "interior": (1, 2)}),
            Sample((uniform((5, 7)), uniform()), {"low": (-1, 2), "high": (1, -2), "interior": (0, 0)}),
            Sample((uniform((4,)), uniform()), {"low": (-2,), "high": (-1,), "interior": (2,)}),
            Sample((integers((2, 3)), integers()), {"low": (0, 1), "high": (0, 1), "interior": (0, 0)}, "int32"),
            Sample((uniform((0, 3)), uniform()), {"low": (2, 0), "high": (1, 0), "interior": (1, 0)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def pad(x: Array, value: Array, *, low, high, interior=0) -> Array:
    """x with `value` around it and between its elements.

    value: a scalar of x's dtype. low, high: elements added before and after each axis (negative ones crop), ints or
    Dims. interior: elements added between neighbours. One value per axis, or one for all.
    Gives x's dtype; x itself for no padding. Raises ShapeError for a negative result size.
    """
    rank = len(x.shape)
    low, high, interior = (per_axis("pad", v, rank) for v in (low, high, interior))
    if low == high == interior == (0,) * rank:
        return x
    return bind(PAD, x, value, low=low, high=high, interior=interior)


# -- pad_mirror -------------------------------------------------------------------------------------------------------

MODES = ("reflect", "symmetric", "edge", "wrap")


def _pad_mirror_infer(x: TensorType, low: tuple, high: tuple, mode: str) -> TensorType:
    what = lambda: f"pad_mirror({x}) by low {low}, high {high}"
    require(mode in MODES, lambda: f"{what()}: expected a mode out of {MODES}, got {mode!r}")
    require(len(low) == len(high) == x.rank, lambda: f"{what()}: expected {x.rank} values of each")
    for n, before, after in zip(x.shape, low, high):
        require(before >= 0 and after >= 0, lambda: f"{what()}: expected padding of at least 0")
        padded = not (before == 0 and after == 0)
        require(not (padded and n == 0), lambda: f"{what()}: an empty axis has no elements to repeat")
    return x.with_shape(n + before + after for n, before, after in zip(x.shape, low, high))


def _source_indices(n: Size, low: Size, high: Size, mode: str) -> Array:
    """For each position of a padded axis of n elements the element that stands there, int32."""
    i32 = lambda size: ops.dim_value(dim=size, dtype="int32")
    position = ops.sub(ops.iota(shape=(n + low + high,), dtype="int32"), i32(low))
    if mode == "wrap":
        return ops.mod(position, i32(n))
    if mode == "edge":
        return ops.minimum(ops.maximum(position, i32(0)), i32(n - 1))
    # The sequence there and back has this period; its second half is read backwards.
    period = ops.maximum(i32(2 * n - 2), i32(1)) if mode == "reflect" else i32(2 * n)
    phase = ops.mod(position, period)
    back = ops.sub(period if mode == "reflect" else i32(2 * n - 1), phase)
    return ops.minimum(phase, back)


def _pad_mirror_gradient(cotangents, inputs, outputs, low, high, mode):
    (c,), (x,) = cotangents, inputs
    for axis, (n, before, after) in enumerate(zip(x.shape, low, high)):
        if before == 0 and after == 0:
            continue
        source = _source_indices(n, before, after, mode)
        column = ops.reshape(source, shape=(source.shape[0],) + (1,) * (len(c.shape) - axis - 1))
        base = ops.full(shape=(*c.shape[:axis], n, *c.shape[axis + 1 :]), value=0, dtype=dtype_of(c))
        indices = ops.broadcast_to(column, shape=c.shape)
        c = ops.scatter_along_axis(base, indices, c, axis=axis, reduction="add")
    return (c,)


PAD_MIRROR = register(
    Primitive(
        "pad_mirror",
        infer=_pad_mirror_infer,
        reference=lambda x, low, high, mode: np.pad(x, tuple(zip(low, high)), mode),
        gradient=_pad_mirror_gradient,
        traits=frozenset(),
        samples=lambda: [
            *(Sample((uniform((3, 5)),), {"low": (1, 2), "high": (2, 0), "mode": m}, m) for m in MODES),
            *(Sample((uniform((2, 3)),), {"low": (0, 7), "high": (0, 4), "mode": m}, f"far {m}") for m in MODES),
            *(Sample((uniform((1, 2)),), {"low": (2, 0), "high": (1, 1), "mode": m}, f"single {m}") for m in MODES),
            Sample((integers((4,)),), {"low": (1,), "high": (1,), "mode": "reflect"}, "int32"),
            Sample((uniform((0, 3)),), {"low": (0, 1), "high": (0, 1), "mode": "edge"}, "empty"),
        ],
        tolerance=0.0,
    )
)


def pad_mirror(x: Array, *, low, high, mode: str) -> Array:
    """x extended along each axis by its own elements.

    mode: "reflect" mirrors about the edge element (c b|a b c|b a), "symmetric" repeats it (b a|a b c|c b), "edge"
    repeats only it, "wrap" continues periodically. low, high: elements to add per axis, ints or Dims of at least 0;
    they may exceed the axis. Gives x's dtype. Raises ShapeError for an empty axis or an unknown mode.
    """
    rank = len(x.shape)
    low, high = per_axis("pad_mirror", low, rank), per_axis("pad_mirror", high, rank)
    return x if low == high == (0,) * rank else bind(PAD_MIRROR, x, low=low, high=high, mode=mode)


# -- dynamic_slice, dynamic_update_slice ------------------------------------------------------------------------------


def _require_starts(name: str, x: TensorType, starts: tuple, types: tuple) -> None:
    require(len(starts) == x.rank, lambda: f"{name}({listing(types)}): expected {x.rank} start scalars")
    for s in starts:
        require(s.rank == 0, lambda: f"{name}({listing(types)}): expected scalar starts")
        if s.dtype not in INTS:
            raise DTypeError(f"{name}({listing(types)}): expected int starts, got {s.dtype}")


def _require_window(name: str, x: TensorType, window: tuple) -> None:
    fits = len(window) == x.rank and all(w == n or w <= n for w, n in zip(window, x.shape))
    require(fits, lambda: f"{name}: the window {window} does not lie within {x}")


def _dynamic_slice_infer(x: TensorType, *starts: TensorType, shape: tuple) -> TensorType:
    _require_starts("dynamic_slice", x, starts, (x, *starts))
    _require_window("dynamic_slice", x, shape)
    return x.with_shape(shape)


def _window(x_shape: tuple, starts: tuple, shape: tuple) -> tuple:
    """NumPy slices of a window whose starts are clamped so that it lies inside."""
    clamped = (min(max(int(s), 0), n - w) for s, n, w in zip(starts, x_shape, shape))
    return tuple(builtins.slice(s, s + w) for s, w in zip(clamped, shape))


def _dynamic_slice_gradient(cotangents, inputs, outputs, shape):
    x, *starts = inputs
    return (ops.dynamic_update_slice(zeros_like(x), cotangents[0], *starts), *(None for _ in starts))


def _starts(*values: int) -> tuple:
    return tuple(np.array(v, "int32") for v in values)


DYNAMIC_SLICE = register(
    Primitive(
        "dynamic_slice",
        infer=_dynamic_slice_infer,
        reference=lambda x, *starts, shape: x[_window(x.shape, starts, shape)].copy(),
        gradient=_dynamic_slice_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((5, 7)), *_starts(1, 2)), {"shape": (3, 4)}),
            Sample((uniform((5, 7)), *_starts(-4, 9)), {"shape": (3, 4)}, "clamped"),
            Sample((integers((9,)), *_starts(3)), {"shape": (1,)}, "int32"),
            Sample((uniform((0, 3)), *_starts(0, 1)), {"shape": (0, 2)}, "empty"),
        ],
        tolerance=0.0,
    )
)


def dynamic_slice(x: Array, *starts: Array, shape) -> Array:
    """The window of the given shape that begins at run-time offsets, moved inside of x where it would stick out.

    starts: an int scalar per axis. shape: the window's sizes, at most x's. Gives x's dtype.
    Raises ShapeError for a window larger than x or a wrong number of starts.
    """
    return bind(DYNAMIC_SLICE, x, *starts, shape=per_axis("dynamic_slice", shape, len(x.shape)))


def _dynamic_update_slice_infer(x: TensorType, update: TensorType, *starts: TensorType) -> TensorType:
    require_same_dtype("dynamic_update_slice", x, update)
    _require_starts("dynamic_update_slice", x, starts, (x, update, *starts))
    _require_window("dynamic_update_slice", x, update.shape)
    return x


def _dynamic_update_slice(x: np.ndarray, update: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    out = x.copy()
    out[_window(x.shape, starts, update.shape)] = update
    return out


def _dynamic_update_slice_gradient(cotangents, inputs, outputs):
    (c,), (_, update, *starts) = cotangents, inputs
    dx = ops.dynamic_update_slice(c, zeros_like(update), *starts)
    return (dx, ops.dynamic_slice(c, *starts, shape=update.shape), *(None for _ in starts))


DYNAMIC_UPDATE_SLICE = register(
    Primitive(
        "dynamic_update_slice",
        infer=_dynamic_update_slice_infer,
        reference=_dynamic_update_slice,
        gradient=_dynamic_update_slice_gradient,
        traits=frozenset(),
        samples=lambda: [
            Sample((uniform((5, 7)), uniform((3, 4), seed=1), *_starts(1, 2))),
            Sample((uniform((5, 7)), uniform((3, 4), seed=1), *_starts(-4, 9)), name="clamped"),
            Sample((integers((9,)), integers((1,), seed=1), *_starts(3)), name="int32"),
            Sample((uniform((3, 3)), uniform((0, 2)), *_starts(0, 1)), name="empty"),
        ],
        tolerance=0.0,
    )
)


def dynamic_update_slice(x: Array, update: Array, *starts: Array) -> Array:
    """x with the window at run-time offsets replaced, moved inside of x where it would stick out.

    update: x's dtype and rank, at most x's sizes. starts: an int scalar per axis. Gives x's type.
    Raises ShapeError for an update larger than x or a wrong number of starts.
    """
    return bind(DYNAMIC_UPDATE_SLICE, x, update, *starts)
