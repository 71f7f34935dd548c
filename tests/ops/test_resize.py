"""Resampling against weights worked out by hand and the properties of the kernels."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType
from kgraph.ops.resize import KERNELS, METHODS, nearest_indices, weight_matrix

RNG = np.random.default_rng(0)


def line(values, size, method, antialias=False):
    x = np.asarray(values, np.float32).reshape(1, -1, 1)
    return ops.resize(x, size=(size,), method=method, antialias=antialias)[0, :, 0]


def test_bilinear_samples_at_half_integer_centres():
    np.testing.assert_allclose(line([0, 4], 4, "bilinear"), [0, 1, 3, 4])
    np.testing.assert_allclose(line([0, 1, 2, 3], 2, "bilinear"), [0.5, 2.5])
    np.testing.assert_allclose(line([0, 3, 6], 2, "bilinear"), [0.75, 5.25])


def test_antialiasing_widens_the_kernel_when_shrinking_only():
    # Four pixels to one: a triangle of half width 4 around 2, cut off at the border and scaled to sum 1.
    weights = np.array([2.5, 3.5, 3.5, 2.5])
    np.testing.assert_allclose(line([1, 0, 0, 0], 1, "bilinear", True), weights[:1] / weights.sum(), rtol=1e-6)
    x = RNG.standard_normal(5)
    np.testing.assert_array_equal(line(x, 9, "bilinear", True), line(x, 9, "bilinear"))


def test_nearest_takes_the_pixel_under_the_centre():
    np.testing.assert_array_equal(line([1, 2, 3], 6, "nearest"), [1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(line([1, 2, 3, 4], 2, "nearest"), [2, 4])
    np.testing.assert_array_equal(nearest_indices(3, 5), [0, 0, 1, 2, 2])
    # JAX's float32 product lands below the tie 20.5 * 2 / 41 = 1.
    assert nearest_indices(2, 41)[20] in (0, 1)


def test_area_averages_the_covered_pixels():
    np.testing.assert_allclose(line([1, 2, 3, 4], 2, "area"), [1.5, 3.5])
    np.testing.assert_allclose(line([1, 2, 4], 2, "area"), [(1 + 2 * 0.5) / 1.5, (2 * 0.5 + 4) / 1.5], rtol=1e-6)


@pytest.mark.parametrize("method", KERNELS)
def test_kernels_interpolate(method):
    kernel = KERNELS[method]
    np.testing.assert_allclose(kernel(np.array([0.0, 1, 2, 3, 4, 5, 6])), [1, 0, 0, 0, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "target"), [(5, 8), (8, 5), (7, 7), (1, 4), (6, 1)])
def test_weights_sum_to_one_and_keep_constants(method, size, target):
    for antialias in (False, True):
        weights = weight_matrix(size, target, method, antialias)
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-12)
        np.testing.assert_allclose(line([3.5] * size, target, method, antialias), 3.5, rtol=1e-6)
        if size == target:
            np.testing.assert_allclose(weights, np.eye(size), atol=1e-7)


@pytest.mark.parametrize("sample", PRIMITIVES["resize"].samples(), ids=lambda s: s.name)
def test_axes_are_resampled_one_after_the_other(sample):
    (x,), attrs = sample.args, sample.attrs
    expected = x.astype(np.float64)
    for axis, size in enumerate(attrs["size"], start=1):
        weights = weight_matrix(x.shape[axis], size, attrs["method"], attrs["antialias"])
        expected = np.moveaxis(np.tensordot(expected, weights, axes=(axis, 0)), -1, axis)
    np.testing.assert_allclose(ops.resize(x, **attrs), expected, rtol=1e-5, atol=1e-5)


def test_wrong_operands_are_refused():
    x = np.zeros((1, 4, 4, 3), np.float32)
    with pytest.raises(ShapeError, match="one target size per spatial axis"):
        ops.resize(x, size=(8,))
    with pytest.raises(ShapeError, match="expected one of"):
        ops.resize(x, size=(8, 8), method="mitchell")
    with pytest.raises(DTypeError, match="resize"):
        ops.resize(x.astype(np.uint8), size=(8, 8))


def test_sizes_may_be_symbolic():
    h = Dim.symbol("H")
    x = TensorType((1, h, 5, 3), "float32")
    got = PRIMITIVES["resize"].infer(x, size=(2 * h, 10), method="bilinear", antialias=False)
    assert got.shape == (1, 2 * h, 10, 3)
