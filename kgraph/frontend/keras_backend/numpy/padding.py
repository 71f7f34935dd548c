"""`pad` in all modes of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    broadcast,
    convert,
    dtype_of,
    is_float,
    scalar,
    size_of,
    slice_axis,
)
from kgraph.ir import Dim

_MIRRORS = {"reflect": "reflect", "symmetric": "symmetric", "edge": "edge", "wrap": "wrap", "circular": "wrap"}


def pad(x: Tensor, pad_width: Any, mode: str = "constant", constant_values: Any = None) -> Tensor:
    """A tensor with elements added at both ends of its axes.

    pad_width: a number for all ends, a pair (before, after) for all axes, or a pair per axis.
    mode: "constant" (zeros, or `constant_values`), "edge", "reflect", "symmetric", "wrap" ("circular"), "linear_ramp"
        (down to 0), "maximum", "mean", "median", "minimum" (of the axis), "empty".
    """
    x = convert_to_tensor(x)
    if constant_values is not None and mode != "constant":
        raise ValueError(
            f"Argument `constant_values` can only be provided when `mode == 'constant'`. Received: mode={mode}"
        )
    widths = _widths(pad_width, x.ndim)
    if mode in ("constant", "empty"):
        return _pad_constant(x, widths, constant_values)
    if mode in _MIRRORS:
        low, high = tuple(a for a, _ in widths), tuple(b for _, b in widths)
        return ops.pad_mirror(x, low=low, high=high, mode=_MIRRORS[mode])
    if mode not in ("linear_ramp", "maximum", "mean", "median", "minimum"):
        raise ValueError(f"pad: unknown mode {mode!r}")
    for axis, (before, after) in enumerate(widths):
        if mode == "linear_ramp":
            x = _ramp(x, axis, before, after)
        elif _any(before) or _any(after):
            x = _attach(x, axis, before, after, _statistic(x, axis, mode))
    return x


def _any(width: int | Dim) -> bool:
    return not (isinstance(width, int) and width == 0)


def _widths(pad_width: Any, rank: int) -> list[tuple]:
    """`pad_width` as a pair per axis. Raises ValueError for another number of pairs, or a negative width."""
    if isinstance(pad_width, np.ndarray):
        pad_width = pad_width.tolist()
    if isinstance(pad_width, (int, np.integer, Dim)):
        pairs = [(pad_width, pad_width)] * rank
    else:
        entries = list(pad_width)
        if len(entries) in (1, 2) and not any(isinstance(e, (tuple, list, np.ndarray)) for e in entries):
            pairs = [(entries[0], entries[-1])] * rank
        else:
            entries = [tuple(e) for e in entries]
            entries = entries * rank if len(entries) == 1 else entries
            pairs = [(e[0], e[-1]) for e in entries]
    if len(pairs) != rank:
        raise ValueError(f"pad: pad_width {pad_width} has {len(pairs)} pairs for a tensor of rank {rank}")
    pairs = [(size_of(a), size_of(b)) for a, b in pairs]
    if any(isinstance(w, int) and w < 0 for pair in pairs for w in pair):
        raise ValueError(f"pad: pad_width cannot be negative. Received: {pad_width}")
    return pairs


def _pad_constant(x: Tensor, widths: list[tuple], values: Any) -> Tensor:
    if values is None or np.ndim(values) == 0:
        value = scalar(0, x) if values is None else convert_to_tensor(values, dtype_of(x))
        low, high = tuple(a for a, _ in widths), tuple(b for _, b in widths)
        return ops.pad(x, value, low=low, high=high, interior=(0,) * x.ndim)
    # A value per end: the axes one after the other, as NumPy does.
    per_axis = np.broadcast_to(np.asarray(values), (x.ndim, 2))
    rank = x.ndim
    for axis, width in enumerate(widths):
        for end in (0, 1):
            amounts = tuple(width[end] if i == axis else 0 for i in range(rank))
            none = (0,) * rank
            low, high = (amounts, none) if end == 0 else (none, amounts)
            value = np.asarray(per_axis[axis, end], dtype=x.dtype)
            x = ops.pad(x, value, low=low, high=high, interior=none)
    return x


def _statistic(x: Tensor, axis: int, mode: str) -> Tensor:
    from kgraph.frontend.keras_backend.numpy.reduction import amax, amin, mean
    from kgraph.frontend.keras_backend.numpy.statistics import median

    function = {"maximum": amax, "minimum": amin, "mean": mean, "median": median}[mode]
    value = function(x, axis=axis, keepdims=True)
    if not is_float(x) and is_float(value):
        value = ops.round_nearest_even(value)
    return convert(value, dtype_of(x))


def _attach(x: Tensor, axis: int, before: Any, after: Any, value: Tensor) -> Tensor:
    parts = [x]
    if _any(before):
        parts.insert(0, broadcast(value, tuple(before if i == axis else s for i, s in enumerate(value.shape))))
    if _any(after):
        parts.append(broadcast(value, tuple(after if i == axis else s for i, s in enumerate(value.shape))))
    return ops.concatenate(*parts, axis=axis)


def _ramp(x: Tensor, axis: int, before: Any, after: Any) -> Tensor:
    """x with ends that fall linearly from its first and last element to 0."""
    dtype, compute = dtype_of(x), dtypes.result_type(x.dtype, float)
    rank, parts = x.ndim, [x]
    for width, at_front in ((before, True), (after, False)):
        if not _any(width):
            continue
        steps = convert(ops.iota(shape=(width,), dtype="int32", axis=0), compute)
        fraction = ops.div(steps, convert_to_tensor(width, compute))
        if not at_front:
            fraction = ops.rev(fraction, axes=(0,))
        fraction = ops.reshape(fraction, shape=tuple(width if i == axis else 1 for i in range(rank)))
        edge = slice_axis(x, axis, 0, 1) if at_front else slice_axis(x, axis, x.shape[axis] - 1, x.shape[axis])
        ramp = convert(ops.mul(convert(edge, compute), fraction), dtype)
        parts = [ramp, *parts] if at_front else [*parts, ramp]
    return ops.concatenate(*parts, axis=axis) if len(parts) > 1 else x
