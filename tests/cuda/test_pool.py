"""Pooling on CUDA, the gradient of its maxima, and resampling."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.codegen.cuda import families, pool, pool_gradient, resize, strips
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.codegen.lower import lower
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value, make_node
from kgraph.ir.graph import Node
from kgraph.ops.fusion import FUSION
from kgraph.ops.pooling import REDUCE_WINDOW, SELECT_AND_SCATTER_ADD
from kgraph.ops.resize import RESIZE
from tests.codegen.contractions import add
from tests.cuda.driver import run_node
from tests.cuda.windowed import check

N, H = Dim.symbol("N"), Dim.symbol("H")


def attributes(kind, window, strides=None, padding=None, window_dilation=None, base_dilation=None) -> dict:
    rank = len(window)
    return {
        "kind": kind,
        "window": window,
        "strides": strides or (1,) * rank,
        "padding": padding or ((0, 0),) * rank,
        "window_dilation": window_dilation or (1,) * rank,
        "base_dilation": base_dilation or (1,) * rank,
    }


def pooling(shape, attrs, dtype="float32"):
    return make_node(REDUCE_WINDOW, [Value(TensorType(shape, dtype))], attrs)


def gradient(shape, attrs, dtype="float32"):
    source = pooling(shape, attrs, dtype).output.type
    return make_node(SELECT_AND_SCATTER_ADD, [Value(TensorType(shape, dtype)), Value(source)], attrs)


# -- pooling ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["max", "sum"])
def test_symbolic_images_serve_every_size(kind):
    attrs = attributes(kind, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0)))
    for sizes in ({"N": 1, "H": 3}, {"N": 2, "H": 4}):
        check(pooling((N, H, 3, 2), attrs), sizes)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "uint8", "int64"])
def test_dtypes(dtype):
    for kind in ("max", "min", "sum"):
        check(pooling((1, 4, 2), attributes(kind, (1, 2, 1)), dtype))


def test_cropped_and_dilated():
    attrs = attributes("sum", (2, 3), (2, 1), ((-1, 2), (2, -1)), (2, 1), (1, 2))
    check(pooling((6, 4), attrs))


def test_nan_wins_a_maximum():
    x = np.array([[1.0, np.nan, 3.0, 4.0]], np.float32)
    (result,) = run_node(pooling(x.shape, attributes("max", (1, 2))), [x])
    np.testing.assert_array_equal(result, [[np.nan, np.nan, 4.0]])


def test_epilogue():
    """A mean in bfloat16, with an operand for every channel and one for every pixel."""
    core = pooling((2, 4, 3), attributes("sum", (1, 2, 1), (1, 2, 1)))
    types = [core.inputs[0].type, TensorType((3,), "float32"), TensorType((2, 2, 1), "float32")]
    body = Graph([Value(t) for t in types], name="pool")
    x, bias, scale = body.inputs
    pooled = body.add(REDUCE_WINDOW, [x], **core.attrs)
    body.outputs = [add(body, "relu", add(body, "add", add(body, "mul", pooled, scale), bias))]
    node = Node(FUSION, [Value(t) for t in types], {"kind": "pool", "body": body}, [v.type for v in body.outputs])
    assert families.family_of(node) is pool
    check(node)


TILES = [(4, 4), (2, 4), (1, 2)]


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch):
    """The tile of all windows for which it is not too large."""
    monkeypatch.setattr(strips, "TILES", (request.param, (1, 2)))
    monkeypatch.setattr(strips, "THREADS", 0)
    monkeypatch.setattr(strips, "FEW", 0)
    return request.param


def strips_of(node):
    (call,) = families.lower(node, simulator_target())
    return call.spec.params[4]


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), ((0, 1), (0, 1))),
        ((2, 2), (2, 2), ((0, 0), (0, 0))),
        ((2, 3), (3, 1), ((1, 2), (-1, 2))),
    ],
)
def test_tiles_that_do_not_divide_the_image(tile, kind, window, strides, padding):
    attrs = attributes(kind, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0)))
    node = pooling((2, 7, 9, 3), attrs)
    assert [s.length for s in strips_of(node)] == list(tile)
    check(node)


def test_distances_and_dilation_of_tiles(tile):
    dilated = {"window_dilation": (1, 2, 1, 1), "base_dilation": (1, 1, 3, 1)}
    check(
        pooling(
            (1, 6, 5, 2), attributes("max", (1, 3, 3, 1), (1, 1, 2, 1), ((0, 0), (2, 1), (1, 1), (0, 0)), **dilated)
        )
    )
    check(pooling((1, 4, 3, 5, 1), attributes("sum", (1, 2, 2, 3, 1))))
    check(pooling((2, 11), attributes("max", (1, 4), (1, 3))))


def test_nan_and_infinities_of_tiles(tile):
    """Padding is less than all elements, and NaN more than all others."""
    x = np.array([[-np.inf, -np.inf, -np.inf, np.nan, 1.0, np.inf, 2.0]], np.float32)
    node = pooling(x.shape, attributes("max", (1, 2), padding=((0, 0), (1, 0))))
    (result,) = run_node(node, [x])
    np.testing.assert_array_equal(result, [[-np.inf, -np.inf, -np.inf, np.nan, np.nan, np.inf, np.inf]])


@pytest.mark.parametrize("shape", [(0, 5, 5, 2), (2, 0, 5, 2), (1, 1, 1, 1), (1, 3, 3, 33)])
def test_images_of_tiles(tile, shape):
    check(pooling(shape, attributes("sum", (1, 3, 3, 1), padding=((0, 0), (2, 2), (1, 1), (0, 0)))))


def test_large_windows_have_no_tiles():
    node = pooling((1, 14, 15, 2), attributes("max", (1, 13, 14, 1)))
    assert strips_of(node) is None
    check(node)


# -- the gradient of maxima -------------------------------------------------------------------------------------------
def test_the_first_of_equal_elements_gets_the_cotangent():
    x = np.array([[2.0, 2.0, 1.0, np.nan, np.nan]], np.float32)
    node = gradient(x.shape, attributes("max", (1, 2)))
    (result,) = run_node(node, [x, np.array([[1.0, 2.0, 4.0, 8.0]], np.float32)])
    np.testing.assert_array_equal(result, [[1.0, 2.0, 0.0, 12.0, 0.0]])


def test_windows_of_padding_alone_give_nothing():
    x = np.full((1, 2), -np.inf, np.float32)
    node = gradient(x.shape, attributes("max", (1, 2), padding=((0, 0), (3, 0))))
    (result,) = run_node(node, [x, np.array([[1.0, 2.0, 4.0, 8.0]], np.float32)])
    np.testing.assert_array_equal(result, [[12.0, 0.0]])


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_of_symbolic_images(kind, dtype):
    attrs = attributes(kind, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (-1, 1), (0, 0)))
    check(gradient((N, H, 3, 2), attrs, dtype), {"N": 2, "H": 4})


def test_wide_indices(monkeypatch):
    for module in (pool, pool_gradient):
        monkeypatch.setattr(module, "index_type", lambda sizes: "int64")
    attrs = attributes("max", (2, 3), (2, 1), ((1, 2), (2, -1)), (2, 1), (1, 2))
    check(pooling((6, 4), attrs))
    check(gradient((6, 4), attrs))


# -- resampling -------------------------------------------------------------------------------------------------------
def resampling(shape, size, method, dtype="float32", antialias=False):
    attrs = {"size": size, "method": method, "antialias": antialias}
    return make_node(RESIZE, [Value(TensorType(shape, dtype))], attrs)


@pytest.fixture(params=[1, 2, 4])
def sharing(request, monkeypatch):
    """How many elements threads have, along any axis that does not change."""
    monkeypatch.setattr(resize, "SHARING", (request.param,))
    monkeypatch.setattr(resize, "THREADS", 0)
    monkeypatch.setattr(resize, "FEW", 0)
    return request.param


def shared_axis(node, target=None):
    return families.lower(node, target or simulator_target())[0].spec.params[3]


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_places_that_share_their_taps(sharing, method):
    """Along the channels, or along the images where those lie between axes that change."""
    for channels in (1, 3, 4, 9):
        node = resampling((2, 3, 4, channels), (5, 3), method)
        assert shared_axis(node) == (3, sharing)
        check(node)
    check(resampling((1, 3, 2, 1), (3, 2), method))


def test_images_that_share_their_taps(monkeypatch):
    monkeypatch.setattr(resize, "THREADS", 0)
    node = resampling((5, 3, 4, 2), (4, 6), "bilinear")
    assert shared_axis(node) == (0, 8)
    check(node)
    assert shared_axis(resampling((3, 3, 4, 2), (4, 6), "bilinear")) == (0, 1)
    check(resampling((N, 3, 4, 2), (4, 6), "bilinear"), {"N": 3})
    check(resampling((N, 3, 4, 2), (4, 6), "nearest"), {"N": 9})


def test_small_images_share_less():
    target = make_target((9, 0))
    of = lambda size: shared_axis(resampling((1, 8, 8, 64), (size, size), "bilinear"), target)
    assert (of(128), of(32), of(16)) == ((3, 8), (3, 1), (3, 1))


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
def test_dtypes_that_share_their_taps(sharing, dtype):
    check(resampling((1, 3, 2, 5), (2, 3), "nearest", dtype))
    if dtype != "uint8":
        check(resampling((1, 3, 2, 5), (2, 3), "bilinear", dtype))
        check(resampling((1, 40, 2, 5), (2, 3), "bilinear", dtype, antialias=True))


def test_wide_indices_of_resampling(sharing, monkeypatch):
    monkeypatch.setattr(resize, "index_type", lambda sizes: "int64")
    check(resampling((1, 3, 2, 5), (2, 3), "bilinear"))
    check(resampling((1, 3, 2, 5), (2, 3), "nearest"))


def test_volumes_and_axes_that_stay():
    check(resampling((1, 2, 3, 2, 2), (3, 3, 4), "bilinear"))
    check(resampling((1, 2, 3, 2, 2), (4, 3, 3), "nearest"))
    check(resampling((1, 2, 3, 2), (2, 3), "bilinear"))


def test_many_taps_take_a_pass_for_each_axis():
    node = resampling((1, 9, 8, 2), (3, 3), "lanczos3", antialias=True)
    assert len(families.lower(node, simulator_target())) == 2
    check(node)
    assert len(families.lower(resampling((1, 4, 4, 2), (3, 3), "bilinear"), simulator_target())) == 1


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_of_resampling(dtype):
    check(resampling((1, 3, 2, 2), (2, 3), "bicubic", dtype))
    check(resampling((N, 3, 2, 2), (2, 3), "nearest", dtype), {"N": 2})


def test_tables_are_constants_of_the_program():
    graph = Graph([Value(TensorType((1, 3, 2, 2), "float32"))])
    graph.outputs = [graph.add(PRIMITIVES["resize"], graph.inputs, size=(2, 3), method="bilinear", antialias=False)]
    lowered = lower(graph, simulator_target(), [])
    assert [b.kind for b in lowered.buffers].count("constant") == 4
    assert len(lowered.steps) == 1
