"""Convolutions on CUDA: geometry in run-time sizes, phases, dtypes, epilogues; the cotangents of their weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph.codegen.cuda import conv, conv_filter, conv_filter_depthwise, depthwise, families
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.convolution import CONV
from kgraph.ops.convolution_gradient import CONV_FILTER_GRADIENT
from tests.codegen.contractions import add, fused
from tests.cuda.windowed import check

N, H, W = (Dim.symbol(name) for name in "NHW")


def convolution(x, w, dtype="float32", extras=(), epilogue=None, kind="conv", **options):
    """A node with the attributes of a convolution; `options` that are ints hold for every axis."""
    rank = len(w) - 2
    attrs = {"strides": 1, "padding": 0, "lhs_dilation": 1, "rhs_dilation": 1, **options}
    attrs = {name: (v,) * rank if isinstance(v, int) else v for name, v in attrs.items()}
    attrs["padding"] = tuple((p, p) if isinstance(p, int) else p for p in attrs["padding"])
    attrs["feature_groups"] = options.get("feature_groups", 1)
    node = make_node(CONV, [Value(TensorType(x, dtype)), Value(TensorType(w, dtype))], attrs)
    return node if epilogue is None else fused(node, list(extras), epilogue, kind)


def filter_gradient(x, filters, window, dtype="float32", groups=1, **options):
    node = convolution(x, (*window, x[-1] // groups, filters), dtype, feature_groups=groups, **options)
    attrs = {name: node.attrs[name] for name in ("strides", "padding", "rhs_dilation", "feature_groups")}
    cotangent = Value(TensorType(node.output.shape, dtype))
    return make_node(CONV_FILTER_GRADIENT, [node.inputs[0], cotangent], {"window": window, **attrs})


# -- convolutions -----------------------------------------------------------------------------------------------------
GEOMETRIES = {
    "dense": ((N, H, W, 2), (2, 3, 2, 3), {"strides": (2, 1), "padding": 1}),
    "transposed": ((N, H, W, 2), (3, 2, 2, 3), {"lhs_dilation": (2, 3), "padding": ((2, 1), (-1, 2))}),
    "depthwise": ((N, H, W, 2), (2, 2, 1, 4), {"rhs_dilation": 2, "padding": 2, "feature_groups": 2}),
    "depthwise transposed": ((N, H, W, 2), (3, 2, 1, 2), {"lhs_dilation": 2, "padding": 1, "feature_groups": 2}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_symbolic_images_serve_every_size(name):
    x, w, options = GEOMETRIES[name]
    for sizes in ({"N": 1, "H": 3, "W": 4}, {"N": 2, "H": 4, "W": 2}):
        check(convolution(x, w, **options), sizes)


def test_one_kernel_serves_all_layers_of_a_kind():
    target = make_target((9, 0))
    layers = [
        convolution((N, 56, 56, 64), (3, 3, 64, 64), padding=1),
        convolution((N, 28, 28, 128), (1, 1, 128, 64), strides=2),
    ]
    specs = {families.lower(node, target)[0].spec for node in layers}
    assert len(specs) == 1


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "uint8"])
def test_dtypes(dtype):
    check(convolution((1, 3, 3, 2), (2, 2, 2, 3), dtype))
    check(convolution((1, 3, 3, 2), (2, 2, 1, 2), dtype, feature_groups=2))


def test_channels_that_end_inside_of_a_chunk():
    node = convolution((1, 3, 17), (2, 17, 3))
    assert not families.lower(node, simulator_target())[0].spec.params[5], "taps and channels as one line"
    check(node)


@pytest.mark.parametrize("stride", [1, 2])
def test_phases_that_meet_no_tap(stride):
    """A window smaller than the distance of elements leaves positions without any."""
    node = convolution((1, 3, 2), (2, 2, 3), lhs_dilation=4, strides=stride, padding=((3, 2),))
    (result,) = check(node)
    assert (result == 0).all(axis=(0, 2)).any()


def test_symbolic_channels_and_windows():
    """As in the gradient of filters that are not static: the batch is what is contracted."""
    check(convolution((2, 3, 3, N), (H, 2, N, 3), padding=1), {"N": 3, "H": 2})


def test_three_spatial_axes_and_groups():
    check(convolution((1, 2, 3, 3, 4), (2, 2, 1, 2, 4), padding=(1, 0, 0), feature_groups=2))


def bias_residual_relu(g, y, bias, residual):
    return [add(g, "relu", add(g, "add", add(g, "add", y, bias), residual)), y]


@pytest.mark.parametrize(
    ("w", "kind", "options"),
    [
        ((2, 2, 2, 4), "conv", {}),
        ((2, 2, 2, 4), "conv", {"lhs_dilation": 2}),
        ((2, 2, 1, 4), "depthwise", {"feature_groups": 2}),
    ],
)
def test_epilogues(w, kind, options):
    result = convolution((1, 3, 3, 2), w, **options).output.type
    extras = [TensorType(shape, "float32") for shape in (result.shape[-1:], result.shape)]
    check(convolution((1, 3, 3, 2), w, extras=extras, epilogue=bias_residual_relu, kind=kind, **options))


@pytest.mark.parametrize("module", [conv, depthwise])
def test_wide_indices(module, monkeypatch):
    monkeypatch.setattr(module, "index_type", lambda sizes: "int64")
    groups = {"feature_groups": 2} if module is depthwise else {}
    w = (2, 2, 2 // groups.get("feature_groups", 1), 2)
    check(convolution((1, 3, 3, 2), w, padding=1, **groups))
    check(convolution((1, 2, 3, 2), w, padding=1, lhs_dilation=2, **groups))


def test_results_do_not_depend_on_the_grid():
    node = convolution((2, 3, 3, 2), (2, 2, 2, 5), padding=1)
    one, three = (check(node, most_blocks=most)[0] for most in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(("x", "w"), [((1, 2, 2, 16), (2, 2, 16, 3)), ((1, 3, 6), (3, 6, 2))])
def test_depth_in_pieces(x, w):
    """The sums of the pieces are added up in order, and the epilogue sees them whole."""
    shape = convolution(x, w).output.shape
    extras = [TensorType(n, "float32") for n in (shape[-1:], shape)]
    node = convolution(x, w, extras=extras, epilogue=bias_residual_relu)
    target = replace(simulator_target(), num_sms=8)
    assert [len(families.lower(node, t)) for t in (simulator_target(), target)] == [1, 2]
    check(node, target=target)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_1x1_window_is_a_product(dtype):
    result = convolution((N, 2, 3, 3), (1, 1, 3, 2), dtype).output.type
    extras = [TensorType(n, dtype) for n in (result.shape[-1:], result.shape)]
    node = convolution((N, 2, 3, 3), (1, 1, 3, 2), dtype, extras=extras, epilogue=bias_residual_relu)
    (call,) = families.lower(node, simulator_target())
    assert call.notes["algorithm"] == "product"
    check(node, {"N": 2})


def test_narrow_results_take_narrow_tiles():
    target = make_target((9, 0))
    columns = {
        filters: families.lower(convolution((N, 56, 56, 64), (3, 3, 64, filters)), target)[0].spec.params[7].columns
        for filters in (16, 32, 64, 128, 192)
    }
    assert columns == {16: 16, 32: 32, 64: 64, 128: 128, 192: 64}


# -- cotangents of weights --------------------------------------------------------------------------------------------
def test_symbolic_positions_of_filter_gradients():
    node = filter_gradient((N, H, 3, 2), 3, (2, 2), padding=1)
    for sizes in ({"N": 1, "H": 2}, {"N": 3, "H": 3}):
        check(node, sizes)


@pytest.mark.parametrize("groups", [1, 3])
def test_positions_in_pieces(groups):
    """The sums of the pieces are added up in order, however many there are."""
    node = filter_gradient((2, 7, 5, 3), 3, (1, 2), groups=groups)
    target = replace(simulator_target(), num_sms=8)
    pieces = [len(families.lower(node, t)) for t in (simulator_target(), target)]
    assert pieces[1] == 2
    one, two = (check(node, target=target, most_blocks=most)[0] for most in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes_of_filter_gradients(dtype):
    check(filter_gradient((1, 3, 3, 2), 2, (2, 2), dtype))
    check(filter_gradient((1, 3, 3, 2), 2, (2, 2), dtype, groups=2))


def test_more_taps_than_a_block_sums(monkeypatch):
    monkeypatch.setattr(conv_filter_depthwise, "choose_strips", lambda *arguments, **options: None)
    assert conv_filter_depthwise.TAPS < 12
    check(filter_gradient((1, 5, 5, 2), 4, (3, 4), groups=2, padding=1))


@pytest.mark.parametrize("groups", [1, 2])
def test_wide_indices_of_filter_gradients(groups, monkeypatch):
    for module in (conv_filter, conv_filter_depthwise):
        monkeypatch.setattr(module, "index_type", lambda sizes: "int64")
    check(filter_gradient((1, 3, 3, 2), 2, (2, 2), groups=groups, padding=1))


def test_filter_gradient_of_symbolic_channels_is_refused():
    node = filter_gradient((2, 3, N), 2, (2,))
    assert "symbolic" in families.accepts(node)
