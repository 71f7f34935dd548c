"""Kernels for the cotangents of convolution weights against float64: geometry, chunks, symbolic sizes, dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import conv_filter
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.convolution import CONV
from kgraph.ops.convolution_gradient import CONV_FILTER_GRADIENT
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample, compare

N, H, W = (Dim.symbol(s) for s in "NHW")
SAMPLES = CONV_FILTER_GRADIENT.samples()
FEW = settings(max_examples=40, deadline=None, derandomize=True)
assert ops


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 3])
def test_samples(sample, parts):
    check_sample(conv_filter, CONV_FILTER_GRADIENT, sample, parts)


def geometry(rank, strides=1, padding=0, rhs_dilation=1, groups=1) -> dict:
    each = lambda v: (v,) * rank if isinstance(v, int) else tuple(v)
    pairs = ((padding, padding),) * rank if isinstance(padding, int) else padding
    return {"strides": each(strides), "padding": pairs, "rhs_dilation": each(rhs_dilation), "feature_groups": groups}


def operands(shape, weight, attrs, dtype="float32"):
    """(x, cotangent, attributes) with random values. weight: its shape."""
    rng = np.random.default_rng(0)
    types = (TensorType(shape, "float32"), TensorType(weight, "float32"))
    out = CONV.infer(*types, lhs_dilation=(1,) * (len(shape) - 2), **attrs)
    arrays = [rng.standard_normal(s).astype(TensorType((), dtype).np_dtype) for s in (shape, out.shape)]
    return *arrays, {"window": tuple(weight[:-2]), **attrs}


def run(x, cotangent, attrs, symbols=(), parts=1, target=None):
    """symbols: names of the leading axes of x whose sizes are symbolic."""
    sizes = dict(zip(symbols, x.shape))
    shape = (*(Dim.symbol(s) for s in symbols), *x.shape[len(symbols) :])
    spatial = CONV.infer(
        TensorType(shape, "float32"),
        TensorType((*attrs["window"], x.shape[-1] // attrs["feature_groups"], cotangent.shape[-1]), "float32"),
        lhs_dilation=(1,) * (x.ndim - 2),
        **{name: value for name, value in attrs.items() if name != "window"},
    ).shape
    dtype = "bfloat16" if x.dtype.kind == "V" else x.dtype.name
    node = make_node(CONV_FILTER_GRADIENT, [Value(TensorType(s, dtype)) for s in (shape, spatial)], attrs)
    assert conv_filter.accepts(node) is None
    (out,) = run_node(conv_filter.lower, node, [x, cotangent], sizes, parts, target)
    return out


def check(shape, weight, attrs, *, symbols=(), dtype="float32", target=None, tolerance=1e-5):
    """Against float64, and the same bits however the units are shared out."""
    x, cotangent, attrs = operands(shape, weight, attrs, dtype)
    wanted = CONV_FILTER_GRADIENT.reference(x.astype("f8"), cotangent.astype("f8"), **attrs)
    first = run(x, cotangent, attrs, symbols, 1, target)
    compare(first, wanted, tolerance)
    np.testing.assert_array_equal(run(x, cotangent, attrs, symbols, 2, target).view("u1"), first.view("u1"))
    return first


LAYERS = {
    "3x3, 16 channels": ((5, 32, 32, 16), (3, 3, 16, 16), {"padding": 1}),
    "3x3, 32 channels": ((3, 16, 16, 32), (3, 3, 32, 32), {"padding": 1}),
    "3x3, channels in blocks": ((2, 9, 9, 128), (3, 3, 128, 72), {"padding": 1}),
    "3x3, a prime number of channels": ((2, 9, 9, 101), (3, 3, 101, 20), {"padding": 1}),
    "stride 2": ((3, 17, 16, 24), (3, 3, 24, 40), {"strides": 2, "padding": ((0, 1), (1, 1))}),
    "first layer": ((2, 40, 45, 3), (7, 7, 3, 24), {"strides": 2, "padding": 3}),
    "rows in pieces": ((2, 4, 300, 5), (3, 3, 5, 17), {"padding": 1}),
    "rows in pieces, stride 3": ((1, 5, 800, 4), (3, 5, 4, 33), {"strides": (1, 3), "padding": ((1, 1), (0, 2))}),
    "1x1": ((3, 14, 14, 24), (1, 1, 24, 144), {}),
    "1x1 of large images": ((2, 40, 30, 192), (1, 1, 192, 24), {}),
    "1x1 in groups": ((3, 14, 14, 24), (1, 1, 8, 60), {"groups": 3}),
    "1x1 strided": ((3, 14, 15, 24), (1, 1, 24, 40), {"strides": 2}),
    "dilated": ((2, 13, 14, 20), (3, 3, 20, 18), {"padding": 2, "rhs_dilation": 2}),
    "dilated, few channels": ((2, 13, 14, 2), (3, 3, 2, 18), {"padding": 2, "rhs_dilation": (2, 3)}),
    "groups": ((2, 13, 14, 24), (3, 3, 8, 30), {"padding": 1, "groups": 3}),
    "1D": ((4, 150, 12), (5, 12, 40), {"padding": ((4, 0),)}),
    "3D": ((2, 5, 9, 10, 8), (3, 3, 3, 8, 20), {"padding": 1}),
    "one filter": ((2, 20, 20, 16), (3, 3, 16, 1), {"padding": 1}),
    "window larger than the image": ((2, 2, 3, 8), (5, 5, 8, 20), {"padding": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("symbols", ["", "N", "NHW"])
def test_layers(name, symbols):
    shape, weight, options = LAYERS[name]
    check(shape, weight, geometry(len(shape) - 2, **options), symbols=symbols[: len(shape) - 1])


@pytest.mark.parametrize("symbols", ["", "N", "NHW"])
@pytest.mark.parametrize("groups", [1, 8])
def test_where_no_window_fits_or_there_are_no_images(symbols, groups):
    for shape in ((2, 5, 2, 8), (2, 2, 5, 8), (0, 5, 5, 8)):
        out = check(shape, (3, 3, 8 // groups, 8), geometry(2, groups=groups), symbols=symbols)
        assert not out.any()


@FEW
@given(data=st.data())
def test_any_geometry(data):
    rank = data.draw(st.integers(1, 3))
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(rank))
    sizes, window = draw(1, 9), draw(1, 4)
    padding = tuple((data.draw(st.integers(-1, 4)), data.draw(st.integers(-1, 4))) for _ in range(rank))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = data.draw(st.integers(1, 40)) * groups, data.draw(st.integers(1, 40)) * groups
    shape = (data.draw(st.integers(0, 3)), *sizes, channels)
    attrs = geometry(rank, draw(1, 3), padding, draw(1, 2), groups)
    check(shape, (*window, channels // groups, filters), attrs, symbols="N"[: data.draw(st.integers(0, 1))])


@pytest.mark.parametrize("channels", [1, 7, 40])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [3, 5])
def test_depthwise_in_several_chunks(channels, stride, taps):
    low = taps // 2
    check((3, 41, 37, channels), (taps, taps, 1, channels), geometry(2, stride, low, groups=channels))


@pytest.mark.parametrize("symbols", ["N", "NHW"])
def test_depthwise_of_symbolic_size(symbols):
    check((5, 9, 11, 18), (3, 3, 1, 18), geometry(2, padding=1, groups=18), symbols=symbols)


def test_depthwise_with_a_long_row_of_taps_is_a_product_in_groups():
    check((1, 4, 40, 2), (1, 30, 1, 2), geometry(2, groups=2))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 9])
@pytest.mark.parametrize("symbols", ["", "N"])
def test_dtypes(dtype, groups, symbols):
    weight = (3, 2, 9 // groups, 18 if groups == 1 else 9)
    attrs = geometry(2, padding=((1, 1), (0, 1)), groups=groups)
    tolerance = 1e-12 if dtype == "float64" else 1e-3
    check((2, 30, 20, 9), weight, attrs, dtype=dtype, symbols=symbols, tolerance=tolerance)


@pytest.mark.parametrize("vector_bytes", [16, 32])
def test_narrower_vectors(vector_bytes):
    target = host_target(vector_bytes)
    check((2, 9, 8, 20), (3, 3, 20, 30), geometry(2, padding=1), target=target)
    check((2, 9, 8, 20), (1, 1, 20, 30), geometry(2), target=target)


@pytest.mark.parametrize("where", [0, 1])
def test_infinities_stay_with_their_channels(where, monkeypatch):
    """Zeros that pad a copy meet no element that the convolution does not."""
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    x, cotangent, attrs = operands((1, 6, 300, 5), (3, 3, 5, 20), geometry(2))
    (x, cotangent)[where][0, 1, -1, 2] = np.inf
    out = run(x, cotangent, attrs, "N")
    wanted = CONV_FILTER_GRADIENT.reference(x, cotangent, **attrs)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(wanted))


def test_what_is_not_static_is_refused():
    attrs = {"window": (1, 1), **geometry(2)}
    node = make_node(CONV_FILTER_GRADIENT, [Value(TensorType((N, 4, 4, W), "float32"))] * 2, attrs)
    assert "symbolic" in conv_filter.accepts(node)
