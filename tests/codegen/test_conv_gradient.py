"""Kernels for the cotangents of depthwise weights: samples, chunks, symbolic sizes, dtypes, vector widths."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import conv_filter
from kgraph.ir import Dim, TensorType, Value, make_node, type_of
from kgraph.ops.convolution import CONV
from kgraph.ops.convolution_gradient import CONV_FILTER_GRADIENT
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample, compare

N, H, W = (Dim.symbol(s) for s in "NHW")
assert ops


@pytest.mark.parametrize("sample", CONV_FILTER_GRADIENT.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 3])
def test_samples(sample, parts):
    check_sample(conv_filter, CONV_FILTER_GRADIENT, sample, parts)


def operands(shape, window, strides, padding, dtype="float32", seed=0):
    """(x, cotangent, attributes) with random values."""
    rng = np.random.default_rng(seed)
    attrs = {"strides": strides, "padding": padding, "rhs_dilation": (1,) * len(window)}
    weight = TensorType((*window, 1, shape[-1]), "float32")
    conv = {**attrs, "lhs_dilation": (1,) * len(window), "feature_groups": shape[-1]}
    out = CONV.infer(TensorType(shape, "float32"), weight, **conv)
    arrays = [rng.standard_normal(s).astype(TensorType((), dtype).np_dtype) for s in (shape, out.shape)]
    return *arrays, {"window": window, **attrs}


def run(x, cotangent, attrs, declared=None, sizes=None, parts=1):
    types = [type_of(x), type_of(cotangent)] if declared is None else declared
    node = make_node(CONV_FILTER_GRADIENT, [Value(t) for t in types], attrs)
    assert conv_filter.accepts(node) is None
    (out,) = run_node(conv_filter.lower, node, [x, cotangent], sizes, parts)
    return out


@pytest.mark.parametrize("channels", [1, 7, 16, 40])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [3, 5, 7])
def test_several_chunks(channels, stride, taps):
    low = taps // 2
    x, cotangent, attrs = operands((3, 41, 37, channels), (taps, taps), (stride, stride), ((low, low),) * 2)
    wanted = CONV_FILTER_GRADIENT.reference(x.astype("f8"), cotangent.astype("f8"), **attrs)
    first = run(x, cotangent, attrs)
    compare(first, wanted, 1e-5)
    for parts in (2, 5):
        np.testing.assert_array_equal(run(x, cotangent, attrs, parts=parts), first)


@pytest.mark.parametrize("symbols", [(N, 9, 11), (N, H, W)])
def test_symbolic_sizes(symbols):
    x, cotangent, attrs = operands((5, 9, 11, 18), (3, 3), (1, 1), ((1, 1), (1, 1)))
    declared = [TensorType((*symbols, 18), "float32")] * 2
    got = run(x, cotangent, attrs, declared, {"N": 5, "H": 9, "W": 11}, parts=2)
    compare(got, CONV_FILTER_GRADIENT.reference(x, cotangent, **attrs), 1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(dtype):
    x, cotangent, attrs = operands((2, 30, 20, 9), (3, 2), (1, 1), ((1, 1), (0, 1)), dtype)
    wanted = CONV_FILTER_GRADIENT.reference(x.astype("f8"), cotangent.astype("f8"), **attrs)
    compare(run(x, cotangent, attrs), wanted, 1e-12 if dtype == "float64" else 1e-3)


def test_refusals_have_reasons():
    x, cotangent, attrs = operands((1, 4, 40, 2), (1, 30), (1, 1), ((0, 0), (0, 0)))
    node = make_node(CONV_FILTER_GRADIENT, [Value(type_of(a)) for a in (x, cotangent)], attrs)
    assert "24 taps" in conv_filter.accepts(node)
