"""Padding and cropping that convolutions take over: the graph that remains, and its values."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.dims import evaluate as evaluate_size
from kgraph.ir.interpreter import evaluate
from kgraph.passes.dead_code import dead_code
from kgraph.passes.fold_padding import fold_padding

N, H = Dim.symbol("N"), Dim.symbol("H")
ZERO = np.zeros((), "float32")


def f32(*shape):
    return TensorType(shape, "float32")


def folded(function, *types):
    """The one node that the pass leaves of a function; values are those of before."""
    graph = trace(function, *types)
    out = dead_code(fold_padding(graph))
    rng = np.random.default_rng(0)
    shapes = [[evaluate_size(n, {"N": 2, "H": 7}) for n in t.shape] for t in types]
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    for got, wanted in zip(evaluate(out, arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    (node,) = (n for n in out.nodes if n.name != "constant")
    return node


@pytest.mark.parametrize("height", [7, H])
def test_the_cotangent_of_filters_reads_the_unpadded_input(height):
    def function(x, cotangent):
        padded = ops.pad(x, ZERO, low=(0, 1, 0, 0), high=(0, 2, 1, 0), interior=(0, 0, 0, 0))
        attrs = {"strides": (2, 1), "padding": ((0, 1), (1, 0)), "rhs_dilation": (1, 1)}
        return ops.conv_filter_gradient(padded, cotangent, window=(3, 3), **attrs)

    rows = (height + 3 + 1 - 3) // 2 + 1
    node = folded(function, f32(N, height, 6, 3), f32(N, rows, 6, 5))
    assert node.name == "conv_filter_gradient"
    assert node.attrs["padding"] == ((1, 3), (1, 1))


@pytest.mark.parametrize("name", ["slice", "pad"])
def test_cropped_convolution(name):
    """As in the cotangent of a padded input."""

    def function(x, w):
        y = ops.conv(x, w, padding=((2, 2), (2, 2)), lhs_dilation=(2, 1))
        assert y.shape == (N, 11, 6, 2)
        if name == "slice":
            return ops.slice(y, start=(0, 1, 0, 0), limit=(N, 9, 5, 2), stride=(1, 1, 1, 1))
        return ops.pad(y, ZERO, low=(0, -1, 0, 0), high=(0, -2, -1, 0), interior=(0, 0, 0, 0))

    node = folded(function, f32(N, 5, 4, 3), f32(3, 3, 3, 2))
    assert node.name == "conv"
    assert node.attrs["padding"] == ((1, 0), (2, 1))


def test_cropped_convolution_with_stride():
    def function(x, w):
        y = ops.conv(x, w, strides=(2, 3), padding="valid")
        return ops.slice(y, start=(0, 1, 0, 0), limit=(N, 3, 2, 2), stride=(1, 1, 1, 1))

    node = folded(function, f32(N, 10, 12, 3), f32(2, 2, 3, 2))
    assert node.attrs["padding"] == ((-2, -4), (0, -6))


def test_what_others_read_is_not_cropped():
    def function(x, w):
        y = ops.conv(x, w)
        return ops.slice(y, start=(0, 0, 1, 0), limit=(N, 3, 3, 2), stride=(1, 1, 1, 1)), y

    graph = trace(function, f32(N, 5, 4, 3), f32(1, 1, 3, 2))
    assert [n.name for n in fold_padding(graph).nodes] == ["conv", "slice"]


@pytest.mark.parametrize(
    ("start", "limit", "stride"),
    [
        ((0, 0, 0, 1), (2, 5, 4, 2), (1, 1, 1, 1)),
        ((0, 0, 0, 0), (2, 5, 4, 2), (1, 2, 1, 1)),
        ((1, 0, 0, 0), (2, 5, 4, 2), (1, 1, 1, 1)),
    ],
)
def test_other_slices_stay(start, limit, stride):
    def function(x, w):
        return ops.slice(ops.conv(x, w), start=start, limit=limit, stride=stride)

    graph = trace(function, f32(2, 5, 4, 3), f32(1, 1, 3, 2))
    assert [n.name for n in fold_padding(graph).nodes] == ["conv", "slice"]
