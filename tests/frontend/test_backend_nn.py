"""nn, image and rnn functions of the Keras backend: against plain formulas, and traced against eager."""

from __future__ import annotations

import functools
import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers
from scipy import ndimage, special

from kgraph.frontend.capture import capture_function
from kgraph.frontend.keras_backend import image, image_geometry, nn, rnn
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType, type_of
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify

N = Dim.symbol("N")


def floats(*shape, seed=0, low=-3.0, high=3.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype("float32")


def both(function, *arrays, batched=True):
    """The eager result, after checking that a trace, with a symbolic first axis, gives the same."""
    eager = function(*arrays)
    captured = capture_function(function, *arrays, batch_symbol=batched)
    verify(captured.graph)
    results = evaluate(captured.graph, list(arrays), [v.value for v in captured.variables])
    for traced, concrete in zip(results, keras.tree.flatten(eager), strict=True):
        np.testing.assert_allclose(traced, concrete, rtol=1e-5, atol=1e-6)
        assert traced.dtype == concrete.dtype
    return eager


# -- activations -------------------------------------------------------------------------------------------------------
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "relu": (lambda x: np.maximum(x, 0), {}),
    "relu6": (lambda x: np.clip(x, 0, 6), {}),
    "sigmoid": (sigmoid, {}),
    "sparse_sigmoid": (lambda x: np.clip((x + 1) / 2, 0, 1), {}),
    "tanh": (np.tanh, {}),
    "tanh_shrink": (lambda x: x - np.tanh(x), {}),
    "softplus": (lambda x: np.log1p(np.exp(x)), {}),
    "softsign": (lambda x: x / (1 + np.abs(x)), {}),
    "soft_shrink": (lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.7, 0), {"threshold": 0.7}),
    "sparse_plus": (lambda x: np.where(x <= -1, 0, np.where(x >= 1, x, (x + 1) ** 2 / 4)), {}),
    "silu": (lambda x: x * sigmoid(x), {}),
    "squareplus": (lambda x: (x + np.sqrt(x * x + 3)) / 2, {"b": 3}),
    "log_sigmoid": (lambda x: np.log(sigmoid(x)), {}),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.3 * x), {"negative_slope": 0.3}),
    "hard_sigmoid": (lambda x: np.clip(x / 6 + 0.5, 0, 1), {}),
    "hard_silu": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), {}),
    "elu": (lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)), {"alpha": 0.7}),
    "selu": (lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)), {}),
    "gelu": (lambda x: x * (1 + special.erf(x / np.sqrt(2))) / 2, {"approximate": False}),
    "celu": (lambda x: np.maximum(x, 0) + np.minimum(0, 2 * np.expm1(x / 2)), {"alpha": 2.0}),
    "glu": (lambda x: x[:, :3] * sigmoid(x[:, 3:]), {"axis": 1}),
    "hard_tanh": (lambda x: np.clip(x, -1, 1), {}),
    "hard_shrink": (lambda x: np.where(np.abs(x) > 0.7, x, 0), {"threshold": 0.7}),
    "threshold": (lambda x: np.where(x > 0.5, x, -9), {"threshold": 0.5, "default_value": -9.0}),
    "softmax": (lambda x: special.softmax(x, 1), {}),
    "log_softmax": (lambda x: special.log_softmax(x, 0), {"axis": 0}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activation(name, dtype):
    expected, options = ACTIVATIONS[name]
    x = floats(5, 6).astype(dtype)
    y = both(lambda t: getattr(nn, name)(t, **options), x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(y.astype("float64"), expected(x.astype("float64")), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "gelu", "softmax", "elu", "hard_sigmoid"])
def test_activations_of_integers(name):
    y = getattr(nn, name)(np.array([[-2, 0, 3]], "int32"))
    assert y.dtype == ("int32" if name == "relu" else "float32")


@pytest.mark.parametrize("axis", [-1, 0])
def test_sparsemax(axis):
    x = floats(4, 5)
    y = both(lambda t: nn.sparsemax(t, axis), x, batched=False)
    np.testing.assert_allclose(y.sum(axis), 1, rtol=1e-5)
    # The projection: what is positive differs from x by one threshold per row.
    moved = np.moveaxis(x - y, axis, -1)
    positive = np.moveaxis(y, axis, -1) > 0
    for row, mask in zip(moved, positive):
        assert np.ptp(row[mask]) < 1e-5
        assert (row[~mask] <= row[mask][0] + 1e-6).all()


# -- convolution -------------------------------------------------------------------------------------------------------
def padding_pairs(padding, sizes, window, strides, dilation):
    if padding == "valid":
        return [(0, 0)] * len(sizes)
    pairs = []
    for n, k, s, d in zip(sizes, window, strides, dilation):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pairs.append((total // 2, total - total // 2))
    return pairs


def naive_conv(x, w, strides, padding, dilation, groups=1):
    """[N, *spatial, C] by [*window, C / groups, F], one output place at a time, in float64."""
    rank = x.ndim - 2
    pairs = padding_pairs(padding, x.shape[1:-1], w.shape[:rank], strides, dilation)
    x = np.pad(x.astype("float64"), [(0, 0), *pairs, (0, 0)])
    out = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[1:-1], w.shape[:rank], dilation, strides)]
    y = np.zeros((x.shape[0], *out, w.shape[-1]))
    per_group, features = w.shape[-2], w.shape[-1] // groups
    for place in itertools.product(*map(range, out)):
        index = tuple(slice(p * s, p * s + (k - 1) * d + 1, d) for p, s, k, d in zip(place, strides, w.shape, dilation))
        patch = x[(slice(None), *index)]
        for g in range(groups):
            channels = slice(g * per_group, (g + 1) * per_group)
            f = slice(g * features, (g + 1) * features)
            axes = tuple(range(1, rank + 2)), tuple(range(rank + 1))
            y[(slice(None), *place, f)] = np.tensordot(patch[..., channels], w[..., f], axes)
    return y


def to_first(x):
    return np.moveaxis(x, -1, 1)


CONVOLUTIONS = [
    ((2, 9, 4), (3, 4, 5), (1,), "valid", (1,), 1),
    ((2, 9, 4), (3, 2, 6), (2,), "same", (1,), 2),
    ((2, 9, 3), (4, 3, 5), (1,), "same", (2,), 1),
    ((2, 7, 8, 3), (3, 3, 3, 4), (2, 2), "same", (1, 1), 1),
    ((1, 7, 8, 4), (2, 3, 2, 6), (1, 3), "valid", (1, 1), 2),
    ((1, 9, 8, 2), (3, 2, 2, 3), (1, 1), "valid", (2, 3), 1),
    ((1, 5, 6, 4, 2), (2, 3, 2, 2, 3), (2, 1, 2), "same", (1, 1, 1), 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_conv(case, data_format):
    shape, window, strides, padding, dilation, groups = case
    x, w = floats(*shape), floats(*window, seed=1)
    expected = naive_conv(x, w, strides, padding, dilation, groups)
    if data_format == "channels_first":
        x, expected = to_first(x), to_first(expected)
    y = both(lambda t: nn.conv(t, w, strides, padding, data_format, dilation), x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_depthwise_and_separable_conv(padding, data_format):
    x, w, p = floats(2, 7, 6, 3), floats(3, 2, 3, 2, seed=1), floats(1, 1, 6, 4, seed=2)
    depthwise = naive_conv(x, w.reshape(3, 2, 1, 6), (2, 2), padding, (1, 1), groups=3)
    separable = depthwise @ p[0, 0]
    if data_format == "channels_first":
        x, depthwise, separable = to_first(x), to_first(depthwise), to_first(separable)
    y = both(lambda t: nn.depthwise_conv(t, w, 2, padding, data_format), x)
    np.testing.assert_allclose(y, depthwise, rtol=1e-4, atol=1e-4)
    y = both(lambda t: nn.separable_conv(t, w, p, 2, padding, data_format), x)
    np.testing.assert_allclose(y, separable, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_conv_transpose_is_the_adjoint(strides, padding, window):
    """<conv(x), y> = <x, conv_transpose(y)>, where the sizes correspond."""
    y = floats(1, 4, 5, 3)
    w = floats(window, window, 2, 3, seed=1)  # [*window, F, C]
    x = both(lambda t: nn.conv_transpose(t, w, strides, padding), y)
    size = [(n - 1) * strides + max(window, strides) if padding == "valid" else n * strides for n in (4, 5)]
    assert x.shape == (1, *size, 2)
    probe = floats(*x.shape, seed=2)
    forward = nn.conv(probe, w, strides, padding)
    assert forward.shape == y.shape
    np.testing.assert_allclose((forward * y).sum(), (probe * x).sum(), rtol=1e-3)


def test_conv_transpose_output_padding_and_formats():
    x, w = floats(1, 4, 3), floats(3, 2, 3, seed=1)
    y = nn.conv_transpose(x, w, strides=3, padding="same", output_padding=1)
    assert y.shape == (1, (4 - 1) * 3 + 3 % 2 + 1, 2)
    first = nn.conv_transpose(to_first(x), w, 3, "same", 1, "channels_first")
    np.testing.assert_allclose(first, to_first(y), rtol=1e-6)


def test_convolution_errors():
    with pytest.raises(ValueError, match="evenly divisible"):
        nn.conv(floats(1, 5, 5, 3), floats(2, 2, 2, 4))
    with pytest.raises(ValueError, match="empty output"):
        nn.conv(floats(1, 2, 2, 3), floats(3, 3, 3, 4))


# -- pooling -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", [(2, 9, 3), (2, 7, 8, 3), (1, 4, 5, 6, 2)], ids=str)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_pool(kind, padding, shape, data_format):
    x = floats(*shape)
    rank = x.ndim - 2
    pairs = padding_pairs(padding, shape[1:-1], (3,) * rank, (2,) * rank, (1,) * rank)
    padded = np.pad(x, [(0, 0), *pairs, (0, 0)], constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * rank, tuple(range(1, rank + 1)))
    windows = windows[(slice(None), *(slice(None, None, 2),) * rank)]
    reduced = np.nanmax if kind == "max" else np.nanmean
    expected = reduced(windows, axis=tuple(range(-rank, 0)))
    function = nn.max_pool if kind == "max" else nn.average_pool
    if data_format == "channels_first":
        x, expected = to_first(x), to_first(expected)
    y = both(lambda t: function(t, 3, 2, padding, data_format), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_pooling_strides_default_to_the_window():
    assert nn.max_pool(floats(1, 9, 9, 2), (2, 3)).shape == (1, 4, 3, 2)
    with pytest.raises(ValueError, match="padding"):
        nn.max_pool(floats(1, 9, 9, 2), 2, padding="causal")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_adaptive_pool(size, data_format):
    x = floats(2, 7, 9, 3)
    sizes = (size, 4)
    expected = np.zeros((2, *sizes, 3)), np.zeros((2, *sizes, 3))
    for place in itertools.product(*map(range, sizes)):
        index = tuple(
            slice(math.floor(p * n / s), math.ceil((p + 1) * n / s)) for p, n, s in zip(place, x.shape[1:], sizes)
        )
        expected[0][(slice(None), *place)] = x[(slice(None), *index)].mean((1, 2))
        expected[1][(slice(None), *place)] = x[(slice(None), *index)].max((1, 2))
    for function, reference in zip((nn.adaptive_average_pool, nn.adaptive_max_pool), expected):
        pool = functools.partial(function, output_size=sizes, data_format=data_format)
        given, wanted = (x, reference) if data_format == "channels_last" else (to_first(x), to_first(reference))
        y = both(pool, given)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


# -- labels, losses, statistics ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis):
    x = np.array([[0, 2, -1], [3, 1, 7]], "int32")
    y = both(lambda t: nn.one_hot(t, 4, axis, "float32"), x, batched=False)
    expected = np.moveaxis((x[..., None] == np.arange(4)).astype("float32"), -1, axis)
    np.testing.assert_array_equal(y, expected)


def test_multi_hot():
    x = np.array([[0, 2, 2], [3, 1, 7]], "int32")
    y = both(lambda t: nn.multi_hot(t, 4, dtype="int32"), x)
    np.testing.assert_array_equal(y, [[1, 0, 1, 0], [0, 1, 0, 1]])
    with pytest.raises(ValueError, match="sparse"):
        nn.one_hot(x, 4, sparse=True)


@pytest.mark.parametrize("from_logits", [True, False])
def test_crossentropies(from_logits):
    x = floats(4, 5)
    probabilities = special.softmax(x, -1)
    given = x if from_logits else probabilities * 3
    classes = np.array([0, 4, 2, 1], "int32")
    target = np.eye(5, dtype="float32")[classes]
    expected = -np.log(probabilities[np.arange(4), classes])
    y = both(lambda t, o: nn.categorical_crossentropy(t, o, from_logits), target, given)
    np.testing.assert_allclose(y, expected, rtol=1e-4)
    y = both(lambda t, o: nn.sparse_categorical_crossentropy(t, o, from_logits), classes[:, None], given)
    np.testing.assert_allclose(y, expected, rtol=1e-4)
    binary = special.expit(x)
    y = both(lambda t, o: nn.binary_crossentropy(t, o, from_logits), target, x if from_logits else binary)
    np.testing.assert_allclose(y, -(target * np.log(binary) + (1 - target) * np.log(1 - binary)), rtol=1e-3, atol=1e-6)


def test_sparse_crossentropy_of_unknown_classes_is_zero():
    y = nn.sparse_categorical_crossentropy(np.array([-1, 5, 1]), floats(3, 5), from_logits=True)
    assert y[0] == y[1] == 0
    assert y[2] > 0


def test_moments_and_batch_normalization():
    x = floats(4, 3, 5)
    mean, variance = both(lambda t: nn.moments(t, [0, 1]), x)
    np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, x.var((0, 1)), rtol=1e-5)
    half = nn.moments(np.full((4, 2), 60000, "float16"), [0], keepdims=True)
    assert [m.dtype.name for m in half] == ["float16", "float16"]
    assert half[0].shape == (1, 2)
    assert np.isfinite(half[0]).all()
    scale, offset = floats(3, seed=1), floats(3, seed=2)
    m, v = x.mean((0, 2)), x.var((0, 2))
    y = both(lambda t: nn.batch_normalization(t, m, v, 1, offset, scale, 1e-3), x)
    column = lambda a: a[:, None]
    expected = (x - column(m)) / np.sqrt(column(v) + 1e-3) * column(scale) + column(offset)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_psnr():
    x, y = floats(3, 4, low=0, high=1), floats(3, 4, seed=1, low=0, high=1)
    expected = 10 * np.log10(4.0 / np.mean((x - y) ** 2))
    np.testing.assert_allclose(both(lambda a, b: nn.psnr(a, b, 2.0), x, y), expected, rtol=1e-4)


# -- connectionist temporal classification -----------------------------------------------------------------------------
def collapse(path, blank):
    merged = [c for c, _ in itertools.groupby(path)]
    return tuple(c for c in merged if c != blank)


def test_ctc_loss_sums_over_all_alignments():
    logits = floats(3, 4, 3)
    target = np.array([[1, 2], [1, 1], [2, 0]], "int32")
    lengths, steps = np.array([2, 2, 1], "int32"), np.array([4, 4, 3], "int32")
    loss = both(lambda t, o: nn.ctc_loss(t, o, lengths, steps), target, logits, batched=False)
    for row in range(3):
        probabilities = special.softmax(logits[row, : steps[row]], -1)
        wanted = tuple(target[row, : lengths[row]])
        total = sum(
            np.prod([probabilities[t, c] for t, c in enumerate(path)])
            for path in itertools.product(range(3), repeat=int(steps[row]))
            if collapse(path, 0) == wanted
        )
        np.testing.assert_allclose(loss[row], -np.log(total), rtol=1e-4)


def test_ctc_greedy_decode():
    best = np.array([[1, 1, 0, 2, 2], [0, 2, 2, 0, 2]])
    logits = np.eye(3, dtype="float32")[best] * 4
    lengths = np.array([5, 3], "int32")
    classes, scores = both(lambda x: nn.ctc_decode(x, lengths, "greedy", mask_index=0), logits, batched=False)
    np.testing.assert_array_equal(classes, [[[1, 2, -1, -1, -1], [2, -1, -1, -1, -1]]])
    np.testing.assert_allclose(scores, [[-20.0], [-12.0]])
    kept, _ = nn.ctc_decode(logits, lengths, "greedy", merge_repeated=False, mask_index=0)
    np.testing.assert_array_equal(kept[0, 0], [1, 1, 2, 2, -1])


def test_ctc_beam_search_finds_the_most_likely_labels():
    logits = floats(2, 4, 3)
    lengths = np.array([4, 3], "int32")
    decode = lambda x, n: nn.ctc_decode(x, n, "beam_search", beam_width=50, top_paths=2, mask_index=2)
    paths, scores = both(decode, logits, lengths)
    for row in range(2):
        probabilities = special.log_softmax(logits[row, : lengths[row]], -1)
        totals: dict = {}
        for path in itertools.product(range(3), repeat=int(lengths[row])):
            score = sum(probabilities[t, c] for t, c in enumerate(path))
            key = collapse(path, 2)
            totals[key] = np.logaddexp(totals.get(key, -np.inf), score)
        ranked = sorted(totals.items(), key=lambda item: -item[1])[:2]
        for rank, (labels, score) in enumerate(ranked):
            assert tuple(c for c in paths[rank, row] if c >= 0) == labels
            np.testing.assert_allclose(scores[row, rank], score, rtol=1e-4)


# -- attention ---------------------------------------------------------------------------------------------------------
def naive_attention(q, k, v, mask=None, bias=None, scale=None, is_causal=False):
    k, v = (np.repeat(t, q.shape[2] // t.shape[2], axis=2) for t in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) * (scale or 1 / np.sqrt(q.shape[-1]))
    logits = logits if bias is None else logits + bias
    allowed = np.ones(logits.shape, bool) if mask is None else np.broadcast_to(mask, logits.shape)
    if is_causal:
        allowed = allowed & np.tri(*logits.shape[2:], dtype=bool)
    return np.einsum("bhts,bshd->bthd", special.softmax(np.where(allowed, logits, -1e30), -1), v)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(heads, is_causal):
    q, k, v = floats(2, 5, 4, 3), floats(2, 6, heads, 3, seed=1), floats(2, 6, heads, 7, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 5, 6)) > 0.3
    mask[..., 0] = True
    bias = floats(1, 4, 5, 6, seed=4)
    y = both(lambda *t: nn.dot_product_attention(*t, is_causal=is_causal), q, k, v)
    np.testing.assert_allclose(y, naive_attention(q, k, v, is_causal=is_causal), rtol=1e-4, atol=1e-5)
    y = both(lambda q, k, v, m: nn.dot_product_attention(q, k, v, bias, m, 0.3, is_causal), q, k, v, mask)
    np.testing.assert_allclose(y, naive_attention(q, k, v, mask, bias, 0.3, is_causal), rtol=1e-4, atol=1e-5)


def test_attention_masks_of_lower_rank():
    q = floats(2, 5, 4, 3)
    for shape in ((5, 5), (2, 5, 5)):
        mask = np.tri(5, dtype=bool) if len(shape) == 2 else np.broadcast_to(np.tri(5, dtype=bool), shape)
        y = nn.dot_product_attention(q, q, q, mask=mask.astype("int32"))
        np.testing.assert_allclose(y, naive_attention(q, q, q, is_causal=True), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="4D"):
        nn.dot_product_attention(q[0], q[0], q[0])


# -- patches -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"padding": 1, "stride": 2}, {"padding": (2, 1)}], ids=str)
def test_unfold_and_fold(options):
    x = floats(2, 3, 7, 6)
    y = both(lambda t: nn.unfold(t, (3, 2), **options), x)
    pair = lambda v: (v, v) if isinstance(v, int) else v
    padding, stride = pair(options.get("padding", 0)), pair(options.get("stride", 1))
    d = options.get("dilation", 1)
    padded = np.pad(x, [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2])
    blocks = [
        padded[:, :, i : i + 2 * d + 1 : d, j : j + d + 1 : d].reshape(2, -1)
        for i in range(0, padded.shape[2] - 2 * d, stride[0])
        for j in range(0, padded.shape[3] - d, stride[1])
    ]
    np.testing.assert_array_equal(y, np.stack(blocks, -1))
    # fold is its adjoint.
    probe = floats(*y.shape, seed=1)
    back = both(lambda t: nn.fold(t, (7, 6), (3, 2), **options), probe)
    np.testing.assert_allclose((probe * y).sum(), (back * x).sum(), rtol=1e-3)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_depth_and_space(data_format):
    x = floats(2, 4, 6, 8)
    deep = both(lambda t: nn.space_to_depth(t, 2, data_format), x)
    np.testing.assert_array_equal(both(lambda t: nn.depth_to_space(t, 2, data_format), deep), x)
    shape = (2, 2, 3, 32) if data_format == "channels_last" else (2, 16, 3, 4)
    assert deep.shape == shape


# -- coarse layers -----------------------------------------------------------------------------------------------------
def primitives(layer, *shape):
    layer.build((None, *shape))
    graph = trace(lambda x: layer(x), TensorType((N, *shape), "float32"))
    return [node.name for node in graph.nodes]


def test_normalisation_layers_stay_whole():
    assert primitives(layers.LayerNormalization(), 4, 6) == ["layer_norm"]
    assert primitives(layers.RMSNormalization(), 4, 6) == ["rms_norm"]
    assert primitives(layers.GroupNormalization(2), 4, 6) == ["group_norm"]
    assert primitives(layers.BatchNormalization(), 4, 6) == ["batch_norm"]


@pytest.mark.parametrize("axis", [-1, 1, [1, 2], [1, 3]])
def test_layer_normalization_over_axes(axis):
    x = floats(2, 3, 4, 5)
    layer = layers.LayerNormalization(axis=axis)
    layer.build(x.shape)
    for variable in layer.weights:
        variable.assign(floats(*variable.shape, seed=1))
    axes = tuple([axis] if isinstance(axis, int) else axis)
    shape = [x.shape[a] if a in {b % 4 for b in axes} else 1 for a in range(4)]
    centred = x - x.mean(axes, keepdims=True)
    expected = centred / np.sqrt(x.var(axes, keepdims=True) + 1e-3)
    expected = expected * layer.gamma.numpy().reshape(shape) + layer.beta.numpy().reshape(shape)
    np.testing.assert_allclose(both(lambda t: layer(t), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_group_normalization_over_axes(axis):
    x = floats(2, 6, 4, 6)
    layer = layers.GroupNormalization(3, axis=axis)
    grouped = x.reshape(2, 6, 4, 3, 2) if axis == -1 else x.reshape(2, 3, 2, 4, 6)
    over = (1, 2, 4) if axis == -1 else (2, 3, 4)
    expected = (grouped - grouped.mean(over, keepdims=True)) / np.sqrt(grouped.var(over, keepdims=True) + 1e-3)
    np.testing.assert_allclose(both(lambda t: layer(t), x), expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_attention_with_an_idle_dropout_rate_stays_whole():
    layer = layers.MultiHeadAttention(2, 3, dropout=0.5)
    layer.build((None, 4, 6), (None, 4, 6))
    call = lambda training: trace(lambda x: layer(x, x, training=training), TensorType((2, 4, 6), "float32"))
    assert "attention" in [n.name for n in call(False).nodes]
    layer._dropout_layer.rate = 0.0
    assert "attention" not in [n.name for n in call(True).nodes]


# -- recurrent layers --------------------------------------------------------------------------------------------------
def steps_by_hand(layer, x, mask=None):
    """Outputs in the order of processing and final states, by the cell alone."""
    states = [np.zeros((len(x), n), "float32") for n in np.atleast_1d(layer.cell.state_size)]
    outputs = []
    for t in range(x.shape[1])[:: -1 if layer.go_backwards else 1]:
        y, new = layer.cell(x[:, t], states)
        if mask is None:
            states = new
        else:
            valid = mask[:, t, None]
            y = np.where(valid, y, 0 if layer.zero_output_for_mask else states[0])
            states = [np.where(valid, a, b) for a, b in zip(new, states)]
        outputs.append(y)
    return np.stack(outputs, 1), states


@pytest.mark.parametrize("cell", [layers.LSTM, layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"go_backwards": True},
        {"activation": "relu", "use_bias": False},
        {"zero_output_for_mask": True},
        {"activation": "mish"},
        {"unroll": True},
    ],
    ids=str,
)
def test_recurrent_layers(cell, masked, options):
    layer = cell(4, return_sequences=True, return_state=True, **options)
    x = floats(3, 6, 5)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]], bool) if masked else None
    layer.build(x.shape)
    for variable in layer.trainable_weights:
        variable.assign(floats(*variable.shape, seed=2, low=-1, high=1))
    outputs, states = steps_by_hand(layer, x, mask)
    arrays = (x,) if mask is None else (x, mask)
    got = both(lambda x, m=None: layer(x, mask=m), *arrays)
    np.testing.assert_allclose(got[0], outputs, rtol=1e-4, atol=1e-5)
    for a, b in zip(got[1:], states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    graph = trace(lambda *t: layer(t[0], mask=t[1] if masked else None), *map(type_of, arrays))
    names = {n.name for n in graph.nodes}
    if options.get("activation") == "mish":
        assert "rnn" not in names
    else:
        assert "rnn" in names
        assert "scan" not in names
    layer.return_sequences = layer.return_state = False
    np.testing.assert_allclose(layer(x, mask=mask), outputs[:, -1], rtol=1e-4, atol=1e-5)


def test_gru_without_reset_after():
    layer = layers.GRU(4, reset_after=False, return_sequences=True)
    x = floats(2, 5, 3)
    layer.build(x.shape)
    np.testing.assert_allclose(both(lambda t: layer(t), x), steps_by_hand(layer, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", None])
@pytest.mark.parametrize("cell", [layers.LSTM, layers.GRU])
def test_bidirectional(cell, merge_mode):
    x = floats(2, 5, 3)
    layer = layers.Bidirectional(cell(4, return_sequences=True), merge_mode=merge_mode)
    layer.build(x.shape)
    forward = layer.forward_layer(x)
    backward = layer.backward_layer(x)[:, ::-1]
    got = both(lambda t: layer(t), x)
    merged = {"concat": np.concatenate([forward, backward], -1), "sum": forward + backward, None: (forward, backward)}
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(merged[merge_mode]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_subclassed_cell_is_scanned():
    class Doubling(layers.LSTMCell):
        def call(self, inputs, states, training=False):
            y, states = super().call(inputs, states, training=training)
            return y * 2, states

    layer = layers.RNN(Doubling(4), return_sequences=True)
    x = floats(2, 5, 3)
    layer.build(x.shape)
    assert "scan" in [n.name for n in trace(lambda t: layer(t), type_of(x)).nodes]
    np.testing.assert_allclose(both(lambda t: layer(t), x), steps_by_hand(layer, x)[0], rtol=1e-4, atol=1e-5)


def test_rnn_with_constants_and_time_major():
    def step(x, states):
        state, constant = states
        return x + state, [state * constant]

    x, c = floats(4, 2, 3), np.float32(0.5)
    start = np.ones((2, 3), "float32")
    last, outputs, (final,) = rnn.rnn(step, x, [start], constants=[c], time_major=True)
    np.testing.assert_allclose(outputs, x + start * (0.5 ** np.arange(4))[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(last, outputs[-1])
    np.testing.assert_allclose(final, start / 16)


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
