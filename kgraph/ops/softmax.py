"""softmax, its logarithm, and logsumexp."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, bind, register
from kgraph.ops.common import dtype_of, normalize_axes, uniform, widened, zeros_like
from kgraph.ops.rules import convert, float32_at_least, require_float, shape_error, total

__all__ = ["log_softmax", "logsumexp", "softmax"]


def _axes(axis) -> tuple:
    return axis if isinstance(axis, tuple) else (axis,)


def _infer(name: str):
    def infer(x, *, axis):
        require_float(name, x)
        axes = _axes(axis)
        if not axes or any(not 0 <= a < x.rank for a in axes) or len(set(axes)) != len(axes):
            raise shape_error(name, (x,), f"distinct axes below rank {x.rank}, got {axis}")
        return x

    return infer


def _shifted(x: np.ndarray, axes: tuple) -> np.ndarray:
    return x - x.max(axes, keepdims=True, initial=-np.inf)


@widened
def _reference_softmax(x, *, axis):
    powers = np.exp(_shifted(x, _axes(axis)))
    return powers / powers.sum(_axes(axis), keepdims=True)


@widened
def _reference_log_softmax(x, *, axis):
    shifted = _shifted(x, _axes(axis))
    return shifted - np.log(np.exp(shifted).sum(_axes(axis), keepdims=True))


def _gradient_softmax(cotangents, inputs, outputs, *, axis):
    cotangent, y = float32_at_least(*cotangents, *outputs)
    weighted = ops.mul(cotangent, y)
    return (convert(ops.sub(weighted, ops.mul(y, total(weighted, _axes(axis)))), dtype_of(inputs[0])),)


def _gradient_log_softmax(cotangents, inputs, outputs, *, axis):
    cotangent, y = float32_at_least(*cotangents, *outputs)
    out = ops.sub(cotangent, ops.mul(ops.exp(y), total(cotangent, _axes(axis))))
    return (convert(out, dtype_of(inputs[0])),)


def _samples():
    def sample(name, x, axis):
        return Sample((x,), {"axis": axis}, name)

    masked = np.array([[0, -np.inf, 1], [-np.inf, -np.inf, 2], [80, 88, -90]], np.float32)
    return [
        sample("rows", uniform((5, 33), -8, 8), 1),
        sample("middle axis", uniform((2, 7, 3)), 1),
        sample("first axis", uniform((7, 5)), 0),
        sample("two axes", uniform((3, 4, 5)), (1, 2)),
        sample("vector", uniform((19,), -30, 30), 0),
        sample("one class", uniform((4, 1)), 1),
        sample("large", uniform((3, 17), -3e4, 3e4), 1),
        sample("special", masked, 1),
        sample("empty batch", uniform((0, 5)), 1),
        sample("empty", uniform((4, 0)), 1),
        sample("bfloat16", uniform((3, 17), dtype="bfloat16"), 1),
        sample("float16", uniform((3, 17), dtype="float16"), 1),
    ]


SOFTMAX = register(
    Primitive(
        name="softmax",
        infer=_infer("softmax"),
        reference=_reference_softmax,
        gradient=_gradient_softmax,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=2e-6,
    )
)
LOG_SOFTMAX = register(
    Primitive(
        name="log_softmax",
        infer=_infer("log_softmax"),
        reference=_reference_log_softmax,
        gradient=_gradient_log_softmax,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=2e-6,
    )
)


def _axis_attr(name: str, x, axis):
    axes = normalize_axes(name, axis, len(x.shape))
    return axes[0] if len(axes) == 1 else axes


def softmax(x, *, axis=-1):
    """exp(x) / sum(exp(x)) along `axis`, an int or a tuple; the largest entry is subtracted first.

    x: any shape, float. Gives the type of x; half precisions are computed in float32. A line of -inf alone gives NaN.
    """
    return bind(SOFTMAX, x, axis=_axis_attr("softmax", x, axis))


def log_softmax(x, *, axis=-1):
    """x - log(sum(exp(x))) along `axis`, an int or a tuple. x: any shape, float. Gives the type of x."""
    return bind(LOG_SOFTMAX, x, axis=_axis_attr("log_softmax", x, axis))


# -- logsumexp --------------------------------------------------------------------------------------------------------
def _infer_logsumexp(x, *, axes, keepdims):
    require_float("logsumexp", x)
    if any(not 0 <= a < x.rank for a in axes) or list(axes) != sorted(set(axes)):
        raise shape_error("logsumexp", (x,), f"ascending axes below rank {x.rank}, got {axes}")
    if keepdims:
        return x.with_shape(1 if a in axes else n for a, n in enumerate(x.shape))
    return x.with_shape(n for a, n in enumerate(x.shape) if a not in axes)


@widened
def _reference_logsumexp(x, *, axes, keepdims):
    largest = x.max(axes, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, x.dtype.type(0))
    out = np.log(np.exp(x - shift).sum(axes, keepdims=True)) + shift
    return out if keepdims else out.reshape([n for a, n in enumerate(x.shape) if a not in axes])


def _gradient_logsumexp(cotangents, inputs, outputs, *, axes, keepdims):
    cotangent, x, y = float32_at_least(*cotangents, *inputs, *outputs)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    cotangent, y = ops.reshape(cotangent, shape=shape), ops.reshape(y, shape=shape)
    # Where the result is infinite the difference would be NaN; -inf entries then get exp(-inf) = 0.
    y = ops.select(ops.is_finite(y), y, zeros_like(y))
    return (convert(ops.mul(cotangent, ops.exp(ops.sub(x, y))), dtype_of(inputs[0])),)


def _samples_logsumexp():
    def sample(name, x, axes, keepdims=False):
        return Sample((x,), {"axes": axes, "keepdims": keepdims}, name)

    infinite = np.array([[-np.inf, -np.inf], [np.inf, 0], [0, -np.inf], [90, 91]], np.float32)
    return [
        sample("rows", uniform((5, 33), -8, 8), (1,)),
        sample("rows kept", uniform((5, 7)), (1,), True),
        sample("all axes", uniform((2, 3, 5)), (0, 1, 2)),
        sample("outer axes", uniform((2, 3, 5)), (0, 2), True),
        sample("no axes", uniform((3,)), ()),
        sample("special", infinite, (1,)),
        sample("empty", uniform((3, 0)), (1,)),
        sample("bfloat16", uniform((3, 17), dtype="bfloat16"), (1,)),
    ]


LOGSUMEXP = register(
    Primitive(
        name="logsumexp",
        infer=_infer_logsumexp,
        reference=_reference_logsumexp,
        gradient=_gradient_logsumexp,
        traits=frozenset({"coarse"}),
        samples=_samples_logsumexp,
        tolerance=2e-6,
    )
)


def logsumexp(x, *, axes=None, keepdims: bool = False):
    """log(sum(exp(x))) over `axes` (None: all), without overflow. x: any shape, float.

    Gives x's dtype with the axes removed, or of size 1 with `keepdims`. -inf for no element. Raises ShapeError.
    """
    return bind(LOGSUMEXP, x, axes=normalize_axes("logsumexp", axes, len(x.shape)), keepdims=bool(keepdims))
