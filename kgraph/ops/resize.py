"""Resampling of images along their spatial axes, as `jax.image.resize` and `keras.ops.image.resize` define it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ops.common import dtype_of, integers, size_attr, uniform, widened
from kgraph.ops.rules import convert, float32_at_least, reorder, require_float, shape_error

__all__ = ["resize", "resize_weights"]


# -- weights ----------------------------------------------------------------------------------------------------------
def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - x)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    """The interpolating cubic kernel with a = -1/2 (Keys, 1981)."""
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x >= 2.0, 0.0, np.where(x >= 1.0, far, near))


def _lanczos(radius: float) -> Callable[[np.ndarray], np.ndarray]:
    def kernel(x: np.ndarray) -> np.ndarray:
        # Close to zero the quotient is 1 to working precision.
        safe = np.where(x > 1e-3, x, 1.0)
        value = radius * np.sin(np.pi * safe) * np.sin(np.pi * safe / radius) / (np.pi * safe) ** 2
        return np.where(x > radius, 0.0, np.where(x > 1e-3, value, 1.0))

    return kernel


KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bilinear": _triangle,
    "bicubic": _keys_cubic,
    "lanczos3": _lanczos(3.0),
    "lanczos5": _lanczos(5.0),
}
METHODS = ("nearest", *KERNELS, "area")
ALIASES = {"linear": "bilinear", "trilinear": "bilinear", "cubic": "bicubic", "tricubic": "bicubic"}


def nearest_indices(in_size: int, out_size: int) -> np.ndarray:
    """The element that each place takes: floor((i + 1/2) * in / out).

    Ties are those of JAX, whose compiler rounds to float32 and multiplies by (in * (1 / out)).
    """
    ratio = np.float32(in_size) * (np.float32(1) / np.float32(out_size))
    return np.floor((np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * ratio).astype(np.int32)


def weight_matrix(in_size: int, out_size: int, method: str, antialias: bool) -> np.ndarray:
    """[in_size, out_size] in float64: column j holds the weights of the inputs in output j.

    Pixel i covers [i, i + 1). The kernel is stretched when shrinking with `antialias`; weights outside the image are
    left out and the rest is scaled to sum 1.
    """
    if in_size == 0 or out_size == 0:
        return np.zeros((in_size, out_size))
    if method == "nearest":
        return (np.arange(in_size)[:, None] == nearest_indices(in_size, out_size)).astype(np.float64)
    step = in_size / out_size
    if method == "area":
        left = np.arange(out_size) * step
        low = np.arange(in_size)[:, None]
        weights = np.maximum(0.0, np.minimum(left + step, low + 1.0) - np.maximum(left, low))
    else:
        centres = (np.arange(out_size) + 0.5) * step - 0.5
        distance = np.abs(centres - np.arange(in_size)[:, None])
        weights = KERNELS[method](distance / (max(step, 1.0) if antialias else 1.0))
    sums = weights.sum(0, keepdims=True)
    usable = np.abs(sums) > 1000.0 * float(np.finfo(np.float32).eps)
    return np.where(usable, weights / np.where(usable, sums, 1.0), 0.0)


def band(in_size: int, out_size: int, method: str, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """(first tap [out], weights [out, taps]) of one axis; all taps lie inside of the source."""
    matrix = weight_matrix(in_size, out_size, method, antialias).T
    used = matrix != 0
    first = used.argmax(1)
    behind = np.where(used.any(1), in_size - used[:, ::-1].argmax(1), first + 1)
    taps = max(int((behind - first).max(initial=1)), 1)
    first = np.minimum(first, in_size - taps)
    return first, np.take_along_axis(matrix, first[:, None] + np.arange(taps), 1)


def _check_method(name: str, method: str) -> None:
    if method not in METHODS:
        raise ShapeError(f"{name}: method {method!r}: expected one of {METHODS}")


def _infer_weights(*, in_size, out_size, method, antialias, dtype):
    _check_method("resize_weights", method)
    return TensorType((in_size, out_size), dtype)


def _reference_weights(*, in_size, out_size, method, antialias, dtype):
    return weight_matrix(in_size, out_size, method, antialias).astype(np_dtype(dtype))


def _samples_weights():
    sizes = [(5, 8), (8, 5), (4, 4), (1, 3), (7, 1)]
    return [
        Sample((), {"in_size": n, "out_size": m, "method": method, "antialias": antialias, "dtype": "float32"})
        for (n, m), method, antialias in zip(
            sizes, ("bilinear", "bicubic", "lanczos3", "area", "nearest"), (1, 1, 0, 0, 0)
        )
    ]


RESIZE_WEIGHTS = register(
    Primitive(
        name="resize_weights",
        infer=_infer_weights,
        reference=_reference_weights,
        gradient=NotDifferentiable("it has no operands"),
        traits=frozenset({"host"}),
        samples=_samples_weights,
    )
)


def resize_weights(*, in_size, out_size, method: str, antialias: bool = True, dtype: str = "float32"):
    """The matrix [in_size, out_size] by which `resize` maps one axis; see `resize` for the arguments."""
    return bind(
        RESIZE_WEIGHTS,
        in_size=size_attr(in_size),
        out_size=size_attr(out_size),
        method=ALIASES.get(method, method),
        antialias=bool(antialias),
        dtype=dtype_name(dtype),
    )


# -- resize -----------------------------------------------------------------------------------------------------------
def _infer(x, *, size, method, antialias):
    _check_method("resize", method)
    if method != "nearest":
        require_float("resize", x)
    if x.rank < 3 or len(size) != x.rank - 2:
        raise shape_error("resize", (x,), f"x[N, *spatial, C] with one target size per spatial axis, got {size}")
    return x.with_shape((x.shape[0], *size, x.shape[-1]))


@widened
def _reference(x, *, size, method, antialias):
    for axis, out_size in enumerate(size, start=1):
        in_size = x.shape[axis]
        if in_size == out_size:
            continue
        if method == "nearest":
            x = x.take(nearest_indices(in_size, out_size), axis=axis)
        else:
            weights = weight_matrix(in_size, out_size, method, antialias).astype(x.dtype)
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ weights, -1, axis)
    return np.ascontiguousarray(x)


def _gradient(cotangents, inputs, outputs, *, size, method, antialias):
    """Each axis goes back through the transpose of its weights."""
    (x,) = inputs
    (cotangent,) = float32_at_least(*cotangents)
    rank = len(x.shape)
    for axis, out_size in enumerate(size, start=1):
        in_size = x.shape[axis]
        if in_size == out_size:
            continue
        weights = ops.resize_weights(
            in_size=in_size, out_size=out_size, method=method, antialias=antialias, dtype=dtype_of(cotangent)
        )
        cotangent = ops.dot_general(cotangent, weights, lhs_contract=(axis,), rhs_contract=(1,))
        cotangent = reorder(cotangent, [*(a for a in range(rank) if a != axis), axis])
    return (convert(cotangent, dtype_of(x)),)


def _samples():
    def sample(name, shape, size, method, antialias=False):
        return Sample((uniform(shape),), {"size": size, "method": method, "antialias": antialias}, name)

    ints = {"size": (3, 9), "method": "nearest", "antialias": False}
    return [
        sample("nearest, up", (2, 3, 4, 3), (6, 8), "nearest"),
        sample("nearest, odd", (1, 7, 5, 2), (3, 11), "nearest"),
        sample("bilinear, up", (2, 3, 4, 3), (6, 9), "bilinear"),
        sample("bilinear, down", (1, 8, 7, 3), (3, 7), "bilinear"),
        sample("bilinear, down, antialias", (1, 8, 7, 3), (3, 4), "bilinear", True),
        sample("bicubic", (1, 5, 6, 2), (8, 4), "bicubic"),
        sample("bicubic, antialias", (1, 5, 6, 2), (8, 4), "bicubic", True),
        sample("lanczos3", (1, 9, 6, 2), (5, 7), "lanczos3", True),
        sample("lanczos5", (1, 9, 6, 1), (5, 7), "lanczos5"),
        sample("area", (1, 9, 6, 2), (4, 8), "area"),
        sample("one axis", (2, 5, 3), (7,), "bilinear"),
        sample("from one pixel", (1, 1, 1, 2), (3, 2), "bicubic"),
        sample("empty batch", (0, 3, 4, 3), (6, 8), "bilinear"),
        Sample((integers((1, 4, 5, 3), 0, 256, "uint8"),), ints, "nearest of integers"),
    ]


RESIZE = register(
    Primitive(
        name="resize",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def resize(x, *, size, method: str = "bilinear", antialias: bool = False):
    """x[N, *spatial, C] resampled to [N, *size, C], pixel centres at half-integers.

    size: int or Dim per spatial axis. method: "nearest" (any dtype), "bilinear", "bicubic" (Keys, a = -1/2),
        "lanczos3", "lanczos5" or "area" (mean of the covered pixels), float only.
    antialias: widen the kernel when shrinking. Gives the dtype of x; half precisions are computed in float32.
    Raises ShapeError for a wrong number of sizes or an unknown method, DTypeError.
    """
    method = ALIASES.get(method, method)
    return bind(RESIZE, x, size=tuple(map(size_attr, size)), method=method, antialias=bool(antialias))
