"""Reductions over sliding windows, and Keras' pooling made of them."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, bind, register
from kgraph.ops.common import dtype_of, highest, lowest, per_axis, widened, zeros_like
from kgraph.ops.convolution import dilate_and_pad, dilated_size, window_count, window_padding
from kgraph.ops.rules import dtype_error, scalar, shape_error

__all__ = ["average_pool", "max_pool", "reduce_window", "select_and_scatter_add"]

KINDS = ("max", "min", "sum")


def identity(kind: str, dtype: np.dtype):
    """The value that the reduction ignores."""
    return {"max": lowest, "min": highest, "sum": lambda dtype: dtype.type(0)}[kind](dtype)


def _infer(x, *, kind, window, strides, padding, window_dilation, base_dilation):
    name = "reduce_window"
    if kind not in KINDS:
        raise ShapeError(f"{name}: kind {kind!r}: expected one of {KINDS}")
    if x.dtype == "bool" or x.dtype.startswith("complex"):
        raise dtype_error(name, (x,), "real numbers")
    for what, value in (
        ("window", window),
        ("strides", strides),
        ("padding", padding),
        ("window_dilation", window_dilation),
        ("base_dilation", base_dilation),
    ):
        if len(value) != x.rank:
            raise shape_error(name, (x,), f"{what} with one entry per axis, got {value}")
    return x.with_shape(
        window_count(dilated_size(n, bd), dilated_size(k, wd), s, lo, hi)
        for n, k, s, (lo, hi), wd, bd in zip(x.shape, window, strides, padding, window_dilation, base_dilation)
    )


@widened
def _reference(x, *, kind, window, strides, padding, window_dilation, base_dilation):
    # The reductions separate, so each axis is reduced by itself, one shifted slice per tap.
    combine = {"max": np.maximum, "min": np.minimum, "sum": np.add}[kind]
    x = dilate_and_pad(x, padding, base_dilation, identity(kind, x.dtype))
    for axis, (k, s, d) in enumerate(zip(window, strides, window_dilation)):
        count = window_count(x.shape[axis], dilated_size(k, d), s)
        if k == 1 and s == 1:
            continue
        lead = (slice(None),) * axis
        taps = [x[(*lead, slice(t * d, t * d + max((count - 1) * s + 1, 0), s))] for t in range(k)]
        if not count:
            x = taps[0]
            continue
        total = taps[0].copy()
        for tap in taps[1:]:
            combine(total, tap, out=total)
        x = total
    return x


def _gradient(cotangents, inputs, outputs, **attrs):
    (cotangent,), (x,) = cotangents, inputs
    if attrs["kind"] != "sum":
        return (select_and_scatter_add(x, cotangent, **attrs),)
    if any(size == 0 for size in cotangent.shape):
        return (zeros_like(x),)
    pairs = []
    for n, m, k, s, (low, _), wd, bd in zip(
        x.shape,
        cotangent.shape,
        attrs["window"],
        attrs["strides"],
        attrs["padding"],
        attrs["window_dilation"],
        attrs["base_dilation"],
    ):
        before = dilated_size(k, wd) - 1 - low
        pairs.append((before, dilated_size(n, bd) + dilated_size(k, wd) - 1 - dilated_size(m, s) - before))
    return (
        ops.reduce_window(
            cotangent,
            kind="sum",
            window=attrs["window"],
            strides=attrs["base_dilation"],
            padding=tuple(pairs),
            window_dilation=attrs["window_dilation"],
            base_dilation=attrs["strides"],
        ),
    )


def _samples():
    rng = np.random.default_rng(0)

    def sample(name, kind, shape, window, strides=None, padding=None, window_dilation=None, base_dilation=None):
        rank = len(shape)
        attrs = {
            "kind": kind,
            "window": window,
            "strides": strides or (1,) * rank,
            "padding": padding or ((0, 0),) * rank,
            "window_dilation": window_dilation or (1,) * rank,
            "base_dilation": base_dilation or (1,) * rank,
        }
        # All elements differ, and by far more than the steps of finite differences: a maximum stays where it is.
        values = rng.permutation(int(np.prod(shape))).astype(np.float32)
        return Sample((((values - values.size / 2) * 0.125).reshape(shape),), attrs, name)

    around = ((0, 0), (1, 1), (0, 1), (0, 0))
    out = [
        sample("max 3x3 stride 2", "max", (2, 7, 6, 3), (1, 3, 3, 1), (1, 2, 2, 1), around),
        sample("max 2x2", "max", (1, 4, 5, 2), (1, 2, 2, 1), (1, 2, 2, 1)),
        sample("min", "min", (2, 5, 3), (1, 3, 2), (1, 1, 2), ((0, 0), (2, 0), (1, 0))),
        sample("sum 3x3", "sum", (2, 5, 6, 3), (1, 3, 3, 1), (1, 1, 2, 1), around),
        sample("sum over all axes", "sum", (3, 4), (2, 3), (1, 2), ((1, 0), (0, 0))),
        sample("sum, dilated", "sum", (7, 4), (2, 3), (2, 1), ((1, 2), (2, 2)), (3, 1), (1, 2)),
        sample("sum, strides leave a rest", "sum", (1, 8), (1, 3), (1, 3)),
        sample("max, dilated window", "max", (1, 9, 2), (1, 3, 1), (1, 2, 1), None, (1, 2, 1)),
        sample("max, dilated base", "max", (1, 4, 2), (1, 3, 1), (1, 2, 1), ((0, 0), (1, 1), (0, 0)), None, (1, 2, 1)),
        sample("empty batch", "max", (0, 4, 4, 2), (1, 2, 2, 1), (1, 2, 2, 1)),
    ]
    ints = out[0].args[0].astype(np.int32)
    return [*out, Sample((ints,), out[0].attrs, "max of integers")]


REDUCE_WINDOW = register(
    Primitive(
        name="reduce_window",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def _normalise(name, x, kind, window, strides, padding, window_dilation, base_dilation) -> dict:
    rank = len(x.shape)
    window = per_axis(name, window, rank)
    strides = per_axis(name, strides, rank)
    window_dilation = per_axis(name, window_dilation, rank)
    base_dilation = per_axis(name, base_dilation, rank)
    sizes = [dilated_size(n, d) for n, d in zip(x.shape, base_dilation)]
    return {
        "kind": kind,
        "window": window,
        "strides": strides,
        "padding": window_padding(padding, sizes, window, strides, window_dilation),
        "window_dilation": window_dilation,
        "base_dilation": base_dilation,
    }


def reduce_window(x, *, kind: str, window, strides=1, padding="valid", window_dilation=1, base_dilation=1):
    """Maximum, minimum or sum over windows that slide along every axis of x.

    kind: "max", "min" or "sum". window, strides, window_dilation, base_dilation: an int or one per axis of x.
    padding: "valid", "same" or (low, high) per axis; what is padded, and what `base_dilation` puts between neighbours,
        does not count (a maximum over padding alone is -inf).
    Dtypes: float or integer; the result has it too; half precisions are summed in float32.
    Raises ShapeError where an attribute has not one entry per axis, DTypeError for bool and complex.
    """
    attrs = _normalise("reduce_window", x, kind, window, strides, padding, window_dilation, base_dilation)
    return bind(REDUCE_WINDOW, x, **attrs)


# -- the gradient of max and min --------------------------------------------------------------------------------------
def _infer_scatter(x, source, **attrs):
    expected = _infer(x, **attrs)
    name = "select_and_scatter_add"
    if attrs["kind"] == "sum":
        raise ShapeError(f'{name}: kind "sum" selects no element: expected "max" or "min"')
    if x.dtype != source.dtype:
        raise dtype_error(name, (x, source), "one dtype for both operands")
    if expected.shape != source.shape:
        raise shape_error(name, (x, source), f"a source of the shape of the windows' results, {expected}")
    return x


@widened
def _reference_scatter(x, source, *, kind, window, strides, padding, window_dilation, base_dilation):
    if source.size == 0:
        return np.zeros(x.shape, source.dtype)
    fill = identity(kind, x.dtype)
    padded = dilate_and_pad(x, padding, base_dilation, fill)
    # Padding never wins: positions that hold an element of x are told from the ones that do not.
    real = dilate_and_pad(np.ones(x.shape, bool), padding, base_dilation, False)
    total = np.zeros(padded.shape, source.dtype)
    better = np.greater if kind == "max" else np.less
    best = np.full(source.shape, fill, x.dtype)
    found = np.zeros(source.shape, bool)
    winner = np.full(source.shape, -1)
    taps = list(np.ndindex(*window))
    slices = [
        tuple(
            slice(t * d, t * d + (m - 1) * s + 1, s) for t, d, m, s in zip(tap, window_dilation, source.shape, strides)
        )
        for tap in taps
    ]
    for number, where in enumerate(slices):
        value = padded[where]
        # The first of equal elements wins; a NaN wins over everything before it that is not one.
        wins = real[where] & (~found | better(value, best) | (np.isnan(value) & ~np.isnan(best)))
        best = np.where(wins, value, best)
        winner[wins] = number
        found |= wins
    for number, where in enumerate(slices):
        total[where] += np.where(winner == number, source, 0)
    return _undo_padding(total, x.shape, padding, base_dilation)


def _undo_padding(padded, shape, padding, dilation) -> np.ndarray:
    """The elements of `padded` that came from an array of `shape`; zeros for those that were cropped away."""
    out = padded
    for axis, (n, (low, high), d) in enumerate(zip(shape, padding, dilation)):
        extra = [(0, 0)] * out.ndim
        extra[axis] = (max(-low, 0), max(-high, 0))
        out = np.pad(out, extra)
        start = max(low, 0)
        out = out[(slice(None),) * axis + (slice(start, start + dilated_size(n, d), d),)]
    return out


def _samples_scatter():
    out = []
    for sample in _samples():
        (x,) = sample.args
        if sample.attrs["kind"] == "sum" or x.dtype != np.float32:
            continue
        source = _reference(x, **sample.attrs)
        values = np.random.default_rng(1).standard_normal(source.shape).astype(np.float32)
        out.append(Sample((x, values), sample.attrs, sample.name))
    return out


SELECT_AND_SCATTER_ADD = register(
    Primitive(
        name="select_and_scatter_add",
        infer=_infer_scatter,
        reference=_reference_scatter,
        gradient=NotDifferentiable("second derivatives of a windowed maximum are not provided"),
        traits=frozenset({"coarse"}),
        samples=_samples_scatter,
        tolerance=1e-5,
    )
)


def select_and_scatter_add(
    x, source, *, kind: str, window, strides=1, padding="valid", window_dilation=1, base_dilation=1
):
    """For every window of x the source's element is added where the window's first maximum (minimum) lies.

    This is the cotangent of x in `reduce_window` of the same attributes, `source` being the cotangent of its result.
    Shapes: source has the shape of that result; the result has the shape and dtype of x.
    """
    attrs = _normalise("select_and_scatter_add", x, kind, window, strides, padding, window_dilation, base_dilation)
    return bind(SELECT_AND_SCATTER_ADD, x, source, **attrs)


# -- Keras' pooling ---------------------------------------------------------------------------------------------------
def _spatial(x, window, strides) -> tuple[tuple, tuple]:
    rank = len(x.shape) - 2
    window = per_axis("pool", window, rank)
    strides = window if strides is None else per_axis("pool", strides, rank)
    return (1, *window, 1), (1, *strides, 1)


def max_pool(x, *, window, strides=None, padding="valid"):
    """Maximum over windows of x[N, *spatial, C]; strides default to the window; padding is "valid" or "same"."""
    window, strides = _spatial(x, window, strides)
    return reduce_window(x, kind="max", window=window, strides=strides, padding=padding)


def average_pool(x, *, window, strides=None, padding="valid"):
    """Mean over windows of x[N, *spatial, C], padding left out; strides default to the window."""
    window, strides = _spatial(x, window, strides)
    total = reduce_window(x, kind="sum", window=window, strides=strides, padding=padding)
    dtype = dtype_of(x)
    if padding == "valid":
        return ops.div(total, scalar(int(np.prod(window)), dtype))
    ones = ops.full(shape=(1, *x.shape[1:-1], 1), value=1, dtype=dtype)
    return ops.div(total, reduce_window(ones, kind="sum", window=window, strides=strides, padding=padding))
