"""nn functions of the Keras backend: against plain formulas, and traced against eager."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from scipy import special

from kgraph.frontend.keras_backend import nn
from tests.frontend.agreement import both, floats, to_first


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


def test_one_hot_finds_the_number_of_classes_of_concrete_indices():
    np.testing.assert_array_equal(nn.one_hot(np.array([2, 0, -1]), None), [[0, 0, 1], [1, 0, 0], [0, 0, 0]])


def test_multi_hot():
    x = np.array([[0, 2, 2], [3, 1, 7]], "int32")
    y = both(lambda t: nn.multi_hot(t, 4, dtype="int32"), x)
    np.testing.assert_array_equal(y, [[1, 0, 1, 0], [0, 1, 0, 1]])


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
