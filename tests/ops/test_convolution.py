"""Convolution, pooling and Keras' padding rules against loops over single elements."""

import itertools

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType
from kgraph.ir.dims import evaluate
from kgraph.ops.convolution import conv_transpose_padding, same_padding

RNG = np.random.default_rng(0)
N, H = Dim.symbol("N"), Dim.symbol("H")


def padded_reads(shape, window, strides, padding, base_dilation, window_dilation, out_shape):
    """For every output position and tap that lands on an element of the input: (output, tap, input) positions."""
    for out in np.ndindex(*out_shape):
        for tap in np.ndindex(*window):
            at = [
                o * s + t * wd - lo
                for o, s, t, wd, (lo, _) in zip(out, strides, tap, window_dilation, padding, strict=True)
            ]
            if all(a % d == 0 and 0 <= a // d < n for a, d, n in zip(at, base_dilation, shape, strict=True)):
                yield out, tap, tuple(a // d for a, d in zip(at, base_dilation))


def conv_loop(x, w, strides, padding, lhs_dilation, rhs_dilation, feature_groups):
    record = PRIMITIVES["conv"]
    attrs = {"strides": strides, "padding": padding, "lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
    types = (TensorType(x.shape, "float32"), TensorType(w.shape, "float32"))
    out = np.zeros(record.infer(*types, **attrs, feature_groups=feature_groups).shape)
    filters = w.shape[-1] // feature_groups
    channels = w.shape[-2]
    reads = padded_reads(x.shape[1:-1], w.shape[:-2], strides, padding, lhs_dilation, rhs_dilation, out.shape[1:-1])
    for o, tap, i in reads:
        for g in range(feature_groups):
            own, mine = slice(g * filters, (g + 1) * filters), slice(g * channels, (g + 1) * channels)
            out[(slice(None), *o, own)] += x[(slice(None), *i, mine)] @ w[(*tap, slice(None), own)]
    return out


@pytest.mark.parametrize("sample", PRIMITIVES["conv"].samples(), ids=lambda s: s.name)
def test_conv_agrees_with_a_loop(sample):
    got = ops.conv(*sample.args, **sample.attrs)
    np.testing.assert_allclose(got, conv_loop(*sample.args, **sample.attrs), rtol=1e-4, atol=1e-5)


def test_conv_refuses_wrong_operands():
    x = np.zeros((1, 5, 5, 4), np.float32)
    with pytest.raises(ShapeError, match=r"conv\(f32\[1,5,5,4\], f32\[3,3,3,8\]\)"):
        ops.conv(x, np.zeros((3, 3, 3, 8), np.float32))
    with pytest.raises(ShapeError, match="filters that divide into 2 groups"):
        ops.conv(x, np.zeros((3, 3, 2, 7), np.float32), feature_groups=2)
    with pytest.raises(DTypeError, match="conv"):
        ops.conv(x, np.zeros((3, 3, 4, 8), np.float16))
    with pytest.raises(ShapeError, match="padding"):
        ops.conv(x, np.zeros((3, 3, 4, 8), np.float32), padding="causal")


def test_windows_that_do_not_fit_give_an_empty_result():
    assert ops.conv(np.zeros((2, 3, 1), np.float32), np.zeros((5, 1, 4), np.float32)).shape == (2, 0, 4)


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride", "dilation"), [*itertools.product(range(1, 6), range(1, 5), (1, 2))])
def test_same_padding_of_symbolic_sizes_is_that_of_every_size(window, stride, dilation):
    symbolic = same_padding(H, window, stride, dilation)
    for size in range(1, 20):
        low, high = same_padding(size, window, stride, dilation)
        assert tuple(evaluate(p, {"H": size}) for p in symbolic) == (low, high)
        extent = (window - 1) * dilation + 1
        assert (size + low + high - extent) // stride + 1 == -(-size // stride)
        assert low in (high, high - 1)
        assert low + high == 0 or (-(-size // stride) - 1) * stride + extent == size + low + high


def test_same_convolution_of_symbolic_sizes_has_the_usual_result_shape():
    x, w = TensorType((N, H, 224, 3), "float32"), TensorType((3, 3, 3, 8), "float32")
    padding = (same_padding(H, 3, 2), same_padding(224, 3, 2))
    attrs = {"strides": (2, 2), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_groups": 1}
    result = PRIMITIVES["conv"].infer(x, w, padding=padding, **attrs)
    assert result.shape == (N, (H + 1) // 2, 112, 8)


@pytest.mark.parametrize(
    ("window", "stride", "dilation", "padding", "output_padding", "size"),
    [
        (k, s, d, p, o, n)
        for k, s, d, p, o, n in itertools.product(
            [1, 2, 3, 4, 5], [1, 2, 3], [1, 2], ["valid", "same"], [None, 0, 1], [1, 4]
        )
        if (o is None or o < s) and (s == 1 or d == 1)
    ],
)
def test_conv_transpose_has_the_output_size_of_keras(window, stride, dilation, padding, output_padding, size):
    extent = (window - 1) * dilation + 1
    if padding == "valid":
        extra = max(extent, stride) - extent if output_padding is None else output_padding
        expected = (size - 1) * stride + extent + extra
    else:
        expected = size * stride if output_padding is None else (size - 1) * stride + extent % 2 + output_padding
    low, high = conv_transpose_padding(window, stride, dilation, padding, output_padding)
    assert (size - 1) * stride + 1 + low + high - extent + 1 == expected


def test_conv_transpose_is_the_transpose_of_conv():
    """<conv(x), y> = <x, conv_transpose(y)> where the padding rules correspond."""
    w = RNG.standard_normal((3, 2, 4, 5))
    x, y = RNG.standard_normal((2, 9, 8, 4)), RNG.standard_normal((2, 4, 4, 5))
    forward = ops.conv(x, w, strides=2, padding="valid")
    back = ops.conv_transpose(y, w, strides=2, padding="valid")
    assert forward.shape == y.shape
    assert back.shape == x.shape
    np.testing.assert_allclose(np.sum(forward * y), np.sum(x * back))


# -- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PRIMITIVES["reduce_window"].samples(), ids=lambda s: s.name)
def test_reduce_window_agrees_with_a_loop(sample):
    (x,), attrs = sample.args, sample.attrs
    got = ops.reduce_window(x, **attrs)
    start = {"sum": 0.0, "max": -np.inf, "min": np.inf}[attrs["kind"]]
    combine = {"sum": np.add, "max": np.maximum, "min": np.minimum}[attrs["kind"]]
    expected = np.full(got.shape, start)
    geometry = (attrs[k] for k in ("window", "strides", "padding", "base_dilation", "window_dilation"))
    for out, _, at in padded_reads(x.shape, *geometry, got.shape):
        expected[out] = combine(expected[out], x[at])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_first_of_equal_elements_gets_the_cotangent():
    x = np.array([[1, 3, 3, 0, 0, 0]], np.float32)
    cotangent = np.array([[1, 10, 100, 1000, 10000]], np.float32)
    got = ops.select_and_scatter_add(x, cotangent, kind="max", window=(1, 2))
    np.testing.assert_array_equal(got, [[0, 11, 100, 1000, 10000, 0]])


def test_average_pool_leaves_padding_out():
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 5, 1)
    got = ops.average_pool(x, window=3, strides=2, padding="same")
    np.testing.assert_allclose(got[0, :, 0], [1.5, 3.0, 4.5])
    np.testing.assert_allclose(ops.average_pool(x, window=2)[0, :, 0], [1.5, 3.5])


def test_max_pool_ignores_padding_and_keeps_nan():
    x = np.array([-3.0, -2.0, np.nan, -1.0, -5.0], np.float32).reshape(1, 5, 1)
    got = ops.max_pool(x, window=2, padding="same")
    np.testing.assert_array_equal(got[0, :, 0], [-2.0, np.nan, -5.0])
