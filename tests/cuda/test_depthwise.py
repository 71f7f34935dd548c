"""Depthwise convolutions on CUDA whose geometry is known: tiles of every form over images that they do not divide."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.codegen.cuda import conv_filter_depthwise, depthwise, depthwise_strips, families, strips
from kgraph.codegen.cuda.strips import Strip
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import Dim, TensorType
from tests.codegen.contractions import add
from tests.cuda.test_conv import convolution, filter_gradient
from tests.cuda.windowed import check

N, W = Dim.symbol("N"), Dim.symbol("W")
TILES = [(4, 4), (2, 4), (4, 1)]


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch):
    """The tile of all geometries for which it is not too large."""
    monkeypatch.setattr(strips, "TILES", (request.param, (1, 2)))
    monkeypatch.setattr(strips, "THREADS", 0)
    monkeypatch.setattr(strips, "FEW", 0)
    return request.param


def depthwise_node(image, window, channels=3, multiplier=1, dtype="float32", images=1, **options):
    w = (*window, 1, channels * multiplier)
    return convolution((images, *image, channels), w, dtype, feature_groups=channels, **options)


def strips_of(node, target=None):
    (call,) = families.lower(node, target or simulator_target())
    assert call.notes["algorithm"] == "depthwise"
    return call.spec.params[3] if call.spec.template == depthwise_strips.TEMPLATE else None


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [(3, 3), (2, 5)])
def test_tiles_that_do_not_divide_the_image(tile, window, stride):
    node = depthwise_node((6, 9), window, strides=stride, padding=((1, 1), (0, 3)))
    fits = (tile, stride) != ((4, 4), 3)  # too many elements
    assert [s.length for s in strips_of(node)] == list(tile if fits else (1, 2))
    check(node)


@pytest.mark.parametrize("padding", [1, 2, ((3, 0), (-1, 2)), ((-1, -1), (0, 4))])
def test_padding(tile, padding):
    """More of it than the window has, on one side only, and less than none."""
    check(depthwise_node((5, 4), (3, 3), padding=padding))


@pytest.mark.parametrize("options", [{}, {"rhs_dilation": 2, "padding": 2}, {"strides": 2, "rhs_dilation": (3, 2)}])
def test_distances_of_taps(tile, options):
    check(depthwise_node((8, 7), (3, 2), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"lhs_dilation": 2, "padding": ((1, 2), (2, 1))},
        {"lhs_dilation": 3, "padding": 1},
        {"lhs_dilation": (4, 2), "strides": (2, 3), "padding": ((5, 3), (-1, 2))},
        {"lhs_dilation": (2, 3), "rhs_dilation": (2, 2), "padding": 3},
        {"lhs_dilation": 4, "strides": 4, "padding": ((2, 1), (1, 2))},  # taps that meet nothing
    ],
)
def test_dilated_images(tile, options):
    node = depthwise_node((3, 4), (3, 3), **options)
    assert strips_of(node)
    check(node)


@pytest.mark.parametrize(("channels", "multiplier"), [(1, 2), (3, 1), (3, 3), (33, 1), (2, 17)])
def test_channels_and_filters(channels, multiplier):
    check(depthwise_node((3, 5), (3, 3), channels, multiplier, padding=1))


@pytest.mark.parametrize("image", [(1, 1), (1, 5), (5, 1)])
def test_few_pixels(tile, image):
    check(depthwise_node(image, (3, 3), padding=1))


@pytest.mark.parametrize("image", [(0, 3), (3, 0)])
def test_images_without_pixels(tile, image):
    """Padding is all there is."""
    node = depthwise_node(image, (3, 3), padding=3)
    assert strips_of(node)
    check(node)


@pytest.mark.parametrize("images", [0, 3])
def test_images(tile, images):
    check(depthwise_node((3, 5), (3, 3), images=images, padding=1))


def test_one_axis_and_three(tile):
    check(depthwise_node((11,), (4,), padding=2))
    check(depthwise_node((9,), (3,), lhs_dilation=2, padding=2))
    check(depthwise_node((3, 3, 5), (2, 3, 2), 2, padding=1))
    check(depthwise_node((2, 2, 3), (2, 3, 2), 1, padding=1, lhs_dilation=(1, 2, 2)))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "uint8"])
def test_dtypes(tile, dtype):
    check(depthwise_node((4, 5), (3, 3), dtype=dtype, padding=1))


def test_symbolic_images(tile):
    node = convolution((N, 3, W, 2), (3, 3, 1, 2), feature_groups=2, padding=1)
    assert strips_of(node)
    for sizes in ({"N": 1, "W": 5}, {"N": 2, "W": 4}, {"N": 0, "W": 1}):
        check(node, sizes)


def test_wide_indices(tile, monkeypatch):
    monkeypatch.setattr(depthwise, "index_type", lambda sizes: "int64")
    check(depthwise_node((4, 5), (3, 3), padding=1))
    check(depthwise_node((4, 3), (3, 3), multiplier=2, padding=2, lhs_dilation=2))


def test_epilogues(tile):
    """Operands of channels are read once for all positions of a thread, others where they belong."""
    shape = depthwise_node((3, 5), (3, 3), padding=1).output.shape
    extras = [TensorType(s, "float32") for s in (shape[-1:], shape, (*shape[:-1], 1), ())]

    def epilogue(g, y, bias, residual, of_pixel, scale):
        y = add(g, "add", y, bias)
        return [add(g, "mul", add(g, "add", y, residual), add(g, "mul", of_pixel, scale)), y]

    node = convolution(
        (1, 3, 5, 3), (3, 3, 1, 3), feature_groups=3, padding=1, extras=extras, epilogue=epilogue, kind="depthwise"
    )
    check(node)


def test_results_do_not_depend_on_the_grid(tile):
    node = depthwise_node((5, 6), (3, 3), padding=1)
    one, three = (check(node, most_blocks=most)[0] for most in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_what_has_no_tiles():
    """Windows that are too large to be unrolled, and geometry that is not known."""
    large = depthwise_node((4, 9), (3, 40), 2, padding=((1, 1), (20, 20)))
    unknown = convolution((1, 3, 3, 2), (N, 2, 1, 2), feature_groups=2, padding=1)
    assert strips_of(large) is strips_of(unknown) is None
    check(large)
    check(unknown, {"N": 3})


def test_small_results_take_small_tiles():
    target = make_target((9, 0))
    counts = lambda *image, images=1: [
        s.length for s in strips_of(depthwise_node(image, (3, 3), 128, padding=1, images=images), target)
    ]
    assert counts(112, 112, images=32) == [4, 4]
    assert counts(56, 56) == [2, 4]
    assert counts(28, 28) == [1, 2]
    assert counts(28, 28, images=N) == [4, 4]


def test_wide_numbers_take_small_tiles():
    target = make_target((9, 0))
    node = lambda dtype: depthwise_node((32, 32), (5, 5), 64, padding=2, images=64, dtype=dtype)
    assert [[s.length for s in strips_of(node(d), target)] for d in ("float32", "float64")] == [[4, 4], [1, 4]]


def test_few_channels_take_tiles_along_the_outer_axis():
    target = make_target((9, 0))
    of = lambda channels: [
        s.length for s in strips_of(depthwise_node((28, 28), (3, 3), channels, padding=1, images=128), target)
    ]
    assert (of(3), of(16)) == ([4, 2], [4, 4])


# -- cotangents of weights --------------------------------------------------------------------------------------------
def depthwise_gradient(image, window, channels=3, multiplier=1, dtype="float32", images=1, **options):
    x = (images, *image, channels)
    return filter_gradient(x, channels * multiplier, window, dtype, channels, **options)


def strips_of_gradient(node):
    return families.lower(node, simulator_target())[0].spec.params[3]


@pytest.fixture(params=[*TILES, None], ids=str)
def tile_or_position(request, monkeypatch):
    """As `tile`, or None for single positions."""
    if request.param is None:
        monkeypatch.setattr(conv_filter_depthwise, "choose_strips", lambda *arguments, **options: None)
    else:
        monkeypatch.setattr(strips, "TILES", (request.param, (1, 2)))
        monkeypatch.setattr(strips, "THREADS", 0)
        monkeypatch.setattr(strips, "FEW", 0)
    return request.param


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": ((0, 1), (1, 2)), "strides": 2},
        {"padding": ((-1, 2), (3, 0)), "strides": (1, 3)},
        {"padding": 2, "rhs_dilation": 2},
    ],
)
@pytest.mark.parametrize("window", [(3, 3), (2, 4)])
def test_gradients_of_tiles_that_do_not_divide_the_image(tile_or_position, window, options):
    node = depthwise_gradient((6, 9), window, images=2, **options)
    assert (strips_of_gradient(node) is None) == (tile_or_position is None)
    check(node)


@pytest.mark.parametrize(("channels", "multiplier"), [(3, 3), (33, 1)])
def test_channels_and_filters_of_gradients(tile_or_position, channels, multiplier):
    check(depthwise_gradient((3, 5), (3, 3), channels, multiplier, padding=1))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_of_gradients(tile_or_position, dtype):
    check(depthwise_gradient((4, 5), (3, 3), 2, dtype=dtype, padding=1))


def test_gradients_of_few_pixels_and_axes(tile_or_position):
    check(depthwise_gradient((1, 1), (3, 3), 2, padding=1))
    check(depthwise_gradient((0, 2), (3, 3), 2, padding=2))
    check(depthwise_gradient((4, 4), (3, 3), 2, padding=1, images=0))
    check(depthwise_gradient((11,), (4,), 2, padding=2))
    check(depthwise_gradient((3, 3, 5), (2, 3, 2), 2, padding=1))


def test_gradients_of_symbolic_images_and_wide_indices(tile_or_position, monkeypatch):
    node = filter_gradient((N, 3, W, 2), 2, (3, 3), groups=2, padding=1)
    for sizes in ({"N": 1, "W": 5}, {"N": 2, "W": 4}):
        check(node, sizes)
    monkeypatch.setattr(conv_filter_depthwise, "index_type", lambda sizes: "int64")
    check(depthwise_gradient((4, 5), (3, 3), 2, padding=1))


def test_sums_that_do_not_fit_shared_memory():
    """Positions are taken one by one."""
    strips_with = lambda window, dtype: (
        conv_filter_depthwise.Plan(
            *families.lower(depthwise_gradient((32, 32), window, 64, dtype=dtype, padding=3), make_target((9, 0)))[
                0
            ].spec.params
        ).strips
    )
    assert strips_with((7, 7), "float32")
    assert strips_with((7, 7), "float64") is None


# -- geometry ---------------------------------------------------------------------------------------------------------
def test_strips():
    strip = Strip.make(4, 3, 2, 1, 1, 1)
    assert (strip.step, strip.span, strip.rest) == (8, (0, 9), 0)
    strip = Strip.make(4, 3, 1, 1, 3, 1)  # begins 2 places behind a whole element
    assert (strip.length, strip.step, strip.span, strip.rest) == (6, 2, (1, 3), 2)
    assert Strip.make(1, 1, 2, 1, 2, 1).span == (0, 1), "meets nothing"
