"""Image functions of the Keras backend: against SciPy and plain formulas, and traced against eager."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
from scipy import ndimage

from kgraph.frontend.install import KerasBackendFinder
from kgraph.frontend.keras_backend import image, image_geometry
from tests.frontend.agreement import both, floats, to_first

# -- images ------------------------------------------------------------------------------------------------------------
SCIPY_MODE = {"constant": "grid-constant", "nearest": "nearest", "wrap": "grid-wrap", "mirror": "mirror",
              "reflect": "reflect"}  # fmt: skip


@pytest.mark.parametrize("fill_mode", SCIPY_MODE)
@pytest.mark.parametrize("order", [0, 1])
def test_map_coordinates(fill_mode, order):
    x = floats(7, 6)
    coordinates = floats(2, 4, 5, seed=1, low=-12, high=16)
    y = both(lambda a, c: image.map_coordinates(a, c, order, fill_mode, 0.3), x, coordinates, batched=False)
    # As its own grid: SciPy interpolates towards the fill value in the same way there.
    expected = ndimage.map_coordinates(
        x.astype("float64"), coordinates.astype("float64"), order=order, mode=SCIPY_MODE[fill_mode], cval=0.3
    )
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_affine_transform(data_format, interpolation):
    x = floats(2, 6, 5, 3)
    transform = np.array(
        [[1.1, 0.2, -0.37, 0.13, 0.9, 0.41, 0, 0], [0.8, -0.3, 1.21, 0.2, 1.3, -1.17, 0, 0]], "float32"
    )
    row, column = np.mgrid[:6, :5]
    expected = np.empty_like(x)
    for n, (a0, a1, a2, b0, b1, b2, _, _) in enumerate(transform):
        places = [b0 * column + b1 * row + b2, a0 * column + a1 * row + a2]
        for c in range(3):
            expected[n, ..., c] = ndimage.map_coordinates(
                x[n, ..., c], places, order=image_geometry.INTERPOLATIONS[interpolation], mode="grid-constant", cval=0.5
            )
    if data_format == "channels_first":
        x, expected = to_first(x), to_first(expected)
    y = both(
        lambda t, m: image.affine_transform(t, m, interpolation, fill_value=0.5, data_format=data_format), x, transform
    )
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


def test_perspective_transform():
    x = floats(2, 6, 5, 3)
    corners = np.array([[[0, 0], [4, 0], [0, 5], [4, 5]]] * 2, "float32")
    same = both(lambda t, c: image.perspective_transform(t, c, c), x, corners)
    np.testing.assert_allclose(same, x, rtol=1e-4, atol=1e-4)
    end = corners + floats(2, 4, 2, seed=1, low=-0.5, high=0.5)
    h = image.compute_homography_matrix(corners, end)
    for n in range(2):
        matrix = np.append(h[n], 1).reshape(3, 3)
        mapped = np.c_[end[n], np.ones(4)] @ matrix.T
        np.testing.assert_allclose(mapped[:, :2] / mapped[:, 2:], corners[n], atol=1e-4)
    y = both(lambda t, e: image.perspective_transform(t, corners[0], e[0], "nearest"), x, end, batched=False)
    assert y.shape == x.shape


def test_gaussian_blur_and_sobel():
    x = floats(2, 8, 7, 3)
    y = both(lambda t: image.gaussian_blur(t, (5, 3), (1.2, 0.7)), x)
    gauss = lambda n, s: np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / s) ** 2)
    kernel = np.outer(gauss(3, 0.7) / gauss(3, 0.7).sum(), gauss(5, 1.2) / gauss(5, 1.2).sum())
    expected = ndimage.correlate(x.astype("float64"), kernel[None, :, :, None], mode="constant")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    first = image.gaussian_blur(to_first(x), (5, 3), (1.2, 0.7), "channels_first")
    np.testing.assert_allclose(first, to_first(y), rtol=1e-5, atol=1e-6)
    edges = both(lambda t: image.sobel_edges(t), x)
    vertical = np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]], "float32")
    expected = [ndimage.correlate(x, k[None, :, :, None], mode="constant") for k in (vertical, vertical.T)]
    np.testing.assert_allclose(edges, np.stack(expected, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolation", image.RESIZE_INTERPOLATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_resize(interpolation, data_format):
    x = floats(2, 6, 9, 3)
    given = x if data_format == "channels_last" else to_first(x)
    y = both(lambda t: image.resize(t, (4, 11), interpolation, data_format=data_format), given)
    y = y if data_format == "channels_last" else np.moveaxis(y, 1, -1)
    assert y.shape == (2, 4, 11, 3)
    # A ramp stays a ramp away from the border, whatever the kernel.
    ramp = np.broadcast_to(np.arange(16, dtype="float32")[None, :, None, None], (1, 16, 4, 1))
    up = image.resize(ramp, (32, 4), interpolation)
    inside = up[0, 8:-8, 0, 0]
    np.testing.assert_allclose(
        inside, (np.arange(8, 24) + 0.5) / 2 - 0.5, atol=0.3 if interpolation == "nearest" else 0.05
    )


def test_resize_to_an_aspect_ratio():
    x = floats(1, 6, 9, 2)
    np.testing.assert_allclose(
        image.resize(x, (4, 4), crop_to_aspect_ratio=True), image.resize(x[:, :, 1:7], (4, 4)), rtol=1e-6
    )
    padded = np.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)], constant_values=0.5)
    y = both(lambda t: image.resize(t, (8, 9), pad_to_aspect_ratio=True, fill_value=0.5), x)
    np.testing.assert_allclose(y, padded, rtol=1e-6)


def test_resize_of_integers_rounds_and_stays_in_range():
    x = np.array([[0, 255, 0, 255]], "uint8")[..., None]
    y = both(lambda t: image.resize(t[None], (1, 8), "lanczos3")[0], x, batched=False)
    assert y.dtype == "uint8"
    assert y.max() == 255


def test_colours():
    x = floats(2, 4, 5, 3, low=0, high=1)
    grey = both(lambda t: image.rgb_to_grayscale(t), x)
    np.testing.assert_allclose(grey[..., 0], x @ [0.2989, 0.5870, 0.1140], rtol=1e-5)
    hsv = both(lambda t: image.rgb_to_hsv(t), x)
    np.testing.assert_allclose(both(lambda t: image.hsv_to_rgb(t), hsv), x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(image.rgb_to_hsv(to_first(x), "channels_first"), to_first(hsv), rtol=1e-6)
    red = image.rgb_to_hsv(np.array([[[1.0, 0.0, 0.0]]], "float32"))
    np.testing.assert_allclose(red[0, 0], [0, 1, 1])
    with pytest.raises(ValueError, match="rank"):
        image.rgb_to_grayscale(x[0, 0])


def test_elastic_transform_follows_its_seed():
    x = floats(2, 8, 8, 3)
    y = image.elastic_transform(x, alpha=5.0, sigma=1.0, seed=3)
    assert y.shape == x.shape
    np.testing.assert_array_equal(y, image.elastic_transform(x, alpha=5.0, sigma=1.0, seed=3))
    assert not np.array_equal(y, image.elastic_transform(x, alpha=5.0, sigma=1.0, seed=4))
    np.testing.assert_allclose(image.elastic_transform(x, alpha=0.0, sigma=1.0, seed=3), x, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "cubic", "lanczos3"])
def test_scale_and_translate_generalises_resize(method):
    x = floats(2, 6, 8, 3)
    scale, shift = np.array([2.0, 0.5], "float32"), np.zeros(2, "float32")
    y = both(lambda t: image.scale_and_translate(t, (2, 12, 4, 3), scale, shift, (1, 2), method), x)
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(method, method)
    np.testing.assert_allclose(y, image.resize(x, (12, 4), name, antialias=True), rtol=1e-3, atol=1e-4)


def module_of_keras_hub(name: str, text: str, folder):
    """A module below `keras_hub.src.models` with this text, loaded through the finder."""
    (folder / f"{name.rpartition('.')[2]}.py").write_text(text)
    spec = KerasBackendFinder().find_spec(f"keras_hub.src.models.{name}", [str(folder)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rotary_embeddings_of_keras_hub_are_aligned(tmp_path):
    """In place of a method that indexes by a list."""
    text = "class RoformrPositionalEmbedding:\n    def align(self, *args):\n        return tensor[[0]]\n"
    module = module_of_keras_hub("roformer_v2.roformer_v2_attention", text, tmp_path)
    x = floats(2, 5, 3)
    y = both(lambda t: module.RoformrPositionalEmbedding().align(t, [0, 1, -1], 4), x)
    np.testing.assert_array_equal(y, x[:, :, None])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_interpolation_of_keras_hub(data_format, tmp_path):
    """Through the finder, in place of the module that refuses frameworks which it does not know."""
    text = "def interpolate(x, size, data_format=None):\n    raise NotImplementedError\n"
    module = module_of_keras_hub("depth_anything.interpolate", text, tmp_path)
    x = floats(2, 4, 5, 3)
    expected = x
    for axis, size in ((1, 7), (2, 3)):
        places = np.linspace(0, x.shape[axis] - 1, size)
        rows = functools.partial(np.interp, places, np.arange(x.shape[axis]))
        expected = np.apply_along_axis(rows, axis, expected)
    if data_format == "channels_first":
        x, expected = to_first(x), to_first(expected)
    y = both(lambda t: module.interpolate(t, (7, 3), data_format), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
