"""Convolution kernels against float64: every algorithm but Winograd's (`test_winograd`), static and symbolic sizes,
epilogues, packed weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import conv
from kgraph.codegen.cpu.conv_geometry import axis_phases
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.convolution import CONV
from tests.codegen.contractions import add, check, filled
from tests.codegen.driver import host_target

FEW = settings(max_examples=20, deadline=None, derandomize=True)
SAMPLES = list(CONV.samples())


@pytest.fixture(autouse=True)
def without_winograd(monkeypatch):
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")


def attributes(rank, strides=1, padding=0, lhs_dilation=1, rhs_dilation=1, feature_groups=1) -> dict:
    each = lambda v: (v,) * rank if isinstance(v, int) else tuple(v)
    return {
        "strides": each(strides),
        "padding": ((padding, padding),) * rank if isinstance(padding, int) else padding,
        "lhs_dilation": each(lhs_dilation),
        "rhs_dilation": each(rhs_dilation),
        "feature_groups": feature_groups,
    }


def convolution(x, w, attrs, *, dtype="float32", dynamic=(), **options):
    """dynamic: axes of x whose sizes are symbolic."""
    symbols = {axis: Dim.symbol(f"D{axis}") for axis in dynamic}
    shape = tuple(symbols.get(axis, size) for axis, size in enumerate(x))
    sizes = {f"D{axis}": x[axis] for axis in dynamic}
    types = (TensorType(shape, dtype), TensorType(w, dtype))
    return check(conv, CONV, types, [filled(x, dtype), filled(w, dtype, 1)], attrs, sizes=sizes, **options)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
@pytest.mark.parametrize("packed", [False, True])
def test_samples(sample, packed):
    x, w = (a.shape for a in sample.args)
    convolution(x, w, sample.attrs, packed=packed)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_samples_of_symbolic_size(sample):
    x, w = (a.shape for a in sample.args)
    convolution(x, w, sample.attrs, packed=True, dynamic=range(len(x) - 1))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_samples_by_definition(sample, monkeypatch):
    monkeypatch.setattr(conv, "choose", lambda *_, **__: ("direct", "under test"))
    x, w = (a.shape for a in sample.args)
    convolution(x, w, sample.attrs)
    convolution(x, w, sample.attrs, dynamic=range(len(x) - 1))


@FEW
@given(data=st.data())
def test_any_geometry(data):
    rank = data.draw(st.integers(1, 3))
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(rank))
    sizes, window = draw(1, 9), draw(1, 4)
    strides, lhs_dilation, rhs_dilation = draw(1, 3), draw(1, 2), draw(1, 2)
    padding = tuple((data.draw(st.integers(-1, 4)), data.draw(st.integers(-1, 4))) for _ in range(rank))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = data.draw(st.integers(1, 5)) * groups, data.draw(st.integers(1, 40)) * groups
    images = data.draw(st.integers(1, 2))
    dynamic = range(data.draw(st.integers(0, 1)))
    attrs = attributes(rank, strides, padding, lhs_dilation, rhs_dilation, groups)
    packed = data.draw(st.booleans())
    x, w = (images, *sizes, channels), (*window, channels // groups, filters)
    convolution(x, w, attrs, packed=packed, dynamic=dynamic)


LAYERS = {
    "first layer": ((1, 23, 37, 3), (7, 7, 3, 40), {"strides": 2, "padding": 3}),
    "3x3 of an odd width": ((2, 17, 17, 20), (3, 3, 20, 33), {"padding": 1}),
    "two rows per tile": ((1, 7, 7, 24), (3, 3, 24, 64), {"padding": 1}),
    "k in blocks": ((1, 8, 9, 256), (3, 3, 256, 32), {"padding": 1}),
    "k in blocks, two rows per tile": ((1, 5, 5, 512), (3, 3, 512, 48), {"padding": 1}),
    "1x1 with stride": ((1, 14, 14, 512), (1, 1, 512, 32), {"strides": 2}),
    "transposed, window smaller than stride": ((1, 6, 5, 4), (2, 2, 4, 8), {"lhs_dilation": 3, "padding": 2}),
    "a row wider than a block": ((1, 3, 500, 4), (3, 3, 4, 8), {"padding": 1}),
    "causal": ((2, 50, 8), (3, 8, 16), {"padding": ((4, 0),), "rhs_dilation": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    x, w, options = LAYERS[name]
    attrs = attributes(len(x) - 2, **options)
    convolution(x, w, attrs, packed=True)
    convolution(x, w, attrs, packed=True, dynamic=range(len(x) - 1))


DEPTHWISE = {
    "same": ((2, 14, 15, 40), (3, 3, 1, 40), {"padding": 1}),
    "5x5 stride 2": ((1, 15, 29, 20), (5, 5, 1, 20), {"strides": 2, "padding": ((1, 2), (2, 2))}),
    "dilated, multiplier": ((1, 15, 9, 20), (3, 3, 1, 40), {"padding": 2, "rhs_dilation": 2}),
    "1D causal": ((2, 15, 5), (4, 1, 5), {"padding": ((3, 0),)}),
    "3D": ((2, 5, 4, 3, 5), (3, 2, 2, 1, 5), {"padding": 1}),
    "long rows of taps": ((1, 5, 100, 5), (3, 31, 1, 5), {"padding": ((1, 1), (15, 15))}),
    "narrower than the window": ((1, 2, 2, 17), (5, 5, 1, 17), {"padding": 2}),
}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_depthwise(name, dynamic, dtype):
    x, w, options = DEPTHWISE[name]
    attrs = attributes(len(x) - 2, feature_groups=x[-1], **options)
    node = make_node(CONV, [Value(TensorType(s, dtype)) for s in (x, w)], attrs)
    assert conv.choose(node, host_target())[0] == "depthwise"
    convolution(x, w, attrs, dtype=dtype, dynamic=range(len(x) - 1) if dynamic else ())


DILATED = {
    "input of a 3x3 stride 2": ((2, 7, 8, 40), (3, 3, 1, 40), {"lhs_dilation": 2, "padding": 2}),
    "of one that was padded": ((2, 7, 8, 20), (3, 3, 1, 20), {"lhs_dilation": 2, "padding": ((2, 1), (2, 1))}),
    "cropped": ((2, 7, 8, 20), (3, 3, 1, 20), {"lhs_dilation": 2, "padding": ((-1, 1), (1, -2))}),
    "5x5 stride 3": ((2, 5, 30, 20), (5, 5, 1, 20), {"lhs_dilation": 3, "padding": ((4, 3), (3, 5))}),
    "window smaller than the stride": ((2, 5, 6, 20), (2, 1, 1, 20), {"lhs_dilation": (3, 2), "padding": 1}),
    "strides too": ((2, 9, 30, 5), (3, 4, 1, 5), {"lhs_dilation": (4, 3), "strides": (2, 2), "padding": 3}),
    "1D, dilated window": ((2, 40, 5), (4, 1, 10), {"lhs_dilation": 2, "rhs_dilation": 3, "padding": 4}),
    "3D": ((2, 3, 4, 9, 5), (3, 3, 3, 1, 5), {"lhs_dilation": (2, 1, 2), "padding": 2}),
}


@pytest.mark.parametrize("name", DILATED)
@pytest.mark.parametrize("dynamic", ["none", "images", "all"])
def test_depthwise_with_input_dilation(name, dynamic):
    """The cotangent of the input of a strided depthwise convolution."""
    x, w, options = DILATED[name]
    attrs = attributes(len(x) - 2, feature_groups=x[-1], **options)
    node = make_node(CONV, [Value(TensorType(s, "float32")) for s in (x, w)], attrs)
    assert conv.choose(node, host_target())[0] == "depthwise"
    convolution(x, w, attrs, dynamic=range({"none": 0, "images": 1, "all": len(x) - 1}[dynamic]))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32"])
def test_dtypes(dtype):
    attrs = attributes(2, padding=1)
    convolution((1, 9, 8, 5), (3, 3, 5, 20), attrs, dtype=dtype, packed=True)
    convolution((1, 9, 8, 5), (1, 1, 5, 20), attributes(2), dtype=dtype)


def test_padding_of_symbolic_size():
    """Padding "same" with stride 2 of a symbolic height depends on the height's parity."""
    from kgraph.ops.convolution import same_padding

    height = Dim.symbol("D1")
    attrs = attributes(2, strides=2, padding=(same_padding(height, 3, 2), (1, 1)))
    for rows in (7, 8):
        convolution((1, rows, 9, 4), (3, 3, 4, 8), attrs, packed=True, dynamic=(1,))
        depthwise = {**attrs, "feature_groups": 4}
        convolution((1, rows, 9, 4), (3, 3, 1, 4), depthwise, dynamic=(1,))


# -- epilogues --------------------------------------------------------------------------------------------------------
def bias_residual_relu(g, y, bias, residual):
    return [add(g, "relu", add(g, "add", add(g, "add", y, bias), residual))]


def bias_silu(g, y, bias, residual):
    return [add(g, "add", add(g, "silu", add(g, "add", y, bias)), residual), y]


@pytest.mark.parametrize("epilogue", [bias_residual_relu, bias_silu])
@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 9, 7, 5), (3, 3, 5, 20), {"padding": 1}),
        ((2, 9, 7, 5), (1, 1, 5, 40), {}),
        ((2, 9, 7, 20), (3, 3, 1, 20), {"padding": 1, "feature_groups": 20}),
        ((1, 7, 7, 512), (3, 3, 512, 32), {"padding": 1}),
        ((2, 4, 5, 6), (3, 3, 6, 10), {"lhs_dilation": 2, "padding": 2}),
    ],
)
def test_epilogues(epilogue, x, w, options):
    attrs = attributes(2, **options)
    result = make_node(CONV, [Value(TensorType(s, "float32")) for s in (x, w)], attrs).output.type
    shapes = [result.shape[-1:], result.shape]
    extras = [(TensorType(s, "float32"), filled(s, "float32", i + 2)) for i, s in enumerate(shapes)]
    convolution(x, w, attrs, epilogue=epilogue, extras=extras, packed=True)


# -- properties -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"lhs_dilation": 2}, {"feature_groups": 32}])
def test_same_bits_for_any_split(options):
    attrs = attributes(2, padding=1, **options)
    w = (3, 3, 1 if options.get("feature_groups") else 32, 64)
    first, *others = (convolution((2, 9, 20, 32), w, attrs, parts=parts)[0] for parts in (1, 2, 7))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("vector_bytes", [16, 32])
def test_narrower_vectors(vector_bytes):
    target = host_target(vector_bytes)
    attrs = attributes(2, padding=1)
    convolution((1, 9, 8, 5), (3, 3, 5, 20), attrs, packed=True, target=target)
    convolution((1, 9, 8, 20), (3, 3, 1, 20), {**attrs, "feature_groups": 20}, target=target)


def test_phases_multiply_no_zeros():
    """A transposed convolution of stride 2 meets each of its 3x3 taps once per input element."""
    phases = axis_phases(window=3, stride=1, low=1, input_dilation=2, window_dilation=1)
    assert [p.taps for p in phases] == [1, 2]
    x, w = (1, 8, 8, 4), (3, 3, 4, 8)
    attrs = attributes(2, lhs_dilation=2, padding=((1, 2), (1, 2)))
    node = make_node(CONV, [Value(TensorType(s, "float32")) for s in (x, w)], attrs)
    (call,) = conv.lower(node, host_target())[-1:]
    assert call.flops == 2 * 8 * 8 * 9 * 4 * 8


def test_symbolic_filters_are_left_to_the_definition():
    """The gradient of filters: the window is as large as the image, the channels are the batch."""
    batch = Dim.symbol("D3")
    types = (TensorType((3, 8, 8, batch), "float32"), TensorType((8, 8, batch, 5), "float32"))
    node = make_node(CONV, [Value(t) for t in types], attributes(2, padding=1))
    assert conv.choose(node, host_target())[0] == "direct"
    arrays = [filled((3, 8, 8, 2), "float32"), filled((8, 8, 2, 5), "float32", 1)]
    check(conv, CONV, types, arrays, attributes(2, padding=1), sizes={"D3": 2})
