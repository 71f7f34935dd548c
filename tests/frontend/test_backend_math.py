"""Segments, order, Fourier transforms and special functions: eager against NumPy and SciPy, traced against eager."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal, special

from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend import math as backend
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.interpreter import evaluate
from tests.frontend.numpy_cases import f, ints, positive, unit

N = Dim.symbol("N")
X = f(5, 4)
IDS = np.array([2, 0, -1, 2, 0], "int32")
SIGNAL = f(2, 200)


def agree(function, *arrays, expected=None, rtol=1e-5):
    """The eager result, after comparing it with what is expected and with the traced one."""

    def flat(result):
        return list(result) if isinstance(result, (tuple, list)) else [result]

    eager = flat(function(*arrays))
    if expected is not None:
        for a, e in zip(eager, flat(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol)
    graph = trace(lambda *xs: flat(function(*xs)), *arrays)
    for a, e in zip(evaluate(graph, arrays), eager, strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)
    return eager if len(eager) > 1 else eager[0]


def segments(combine, start):
    out = np.full((4, 4), start, "float32")
    for row, place in zip(X, IDS, strict=True):
        if place >= 0:
            out[place] = combine(out[place], row)
    return out


@pytest.mark.parametrize(
    ("name", "combine", "start"),
    [
        ("segment_sum", np.add, 0.0),
        ("segment_prod", np.multiply, 1.0),
        ("segment_max", np.maximum, -np.inf),
        ("segment_min", np.minimum, np.inf),
    ],
)
def test_segments_leave_out_negative_ids(name, combine, start):
    function = getattr(backend, name)
    agree(lambda x, ids: function(x, ids, num_segments=4), X, IDS, expected=segments(combine, start))


def test_the_number_of_segments_is_found_eagerly_and_asked_for_under_trace():
    assert backend.segment_sum(X, IDS).shape == (3, 4)
    with pytest.raises(UnsupportedError, match="segment"):
        trace(backend.segment_sum, X, IDS)


def test_segments_of_integers_start_at_the_end_of_their_range():
    out = backend.segment_max(ints(5), IDS, num_segments=4)
    assert out[1] == out[3] == np.iinfo("int32").min


def test_top_k():
    order = np.argsort(-X, axis=-1)[:, :2]
    _, indices = agree(lambda x: backend.top_k(x, 2), X, expected=(np.take_along_axis(X, order, -1), order))
    assert indices.dtype == "int32"


def test_in_top_k_counts_ties_and_refuses_nan():
    predictions = np.array([[1, 2, 3], [3, 3, 1], [np.nan, 1, 2]], "float32")
    targets = np.array([1, 1, 0], "int32")
    agree(lambda t, p: backend.in_top_k(t, p, 1), targets, predictions, expected=np.array([False, True, False]))
    agree(lambda t, p: backend.in_top_k(t, p, 2), targets, predictions, expected=np.array([True, True, False]))


def test_logsumexp():
    big = 1000 * X
    agree(lambda x: backend.logsumexp(x, axis=1), big, expected=special.logsumexp(big.astype("float64"), axis=1))
    agree(lambda x: backend.logsumexp(x, keepdims=True), X, expected=special.logsumexp(X, keepdims=True))


def test_cdist():
    y = f(3, 4, seed=1)
    agree(backend.cdist, X, y, expected=np.linalg.norm(X[:, None] - y, axis=-1))


def test_extract_sequences():
    windows = np.lib.stride_tricks.sliding_window_view(SIGNAL, 32, axis=-1)[:, ::10]
    agree(lambda x: backend.extract_sequences(x, 32, 10), SIGNAL, expected=windows)


@pytest.mark.parametrize(("name", "function"), [("fft", np.fft.fft), ("fft2", np.fft.fft2), ("ifft2", np.fft.ifft2)])
def test_complex_transforms(name, function):
    y = f(5, 4, seed=1)
    expected = function(X + 1j * y)
    agree(lambda a, b: getattr(backend, name)((a, b)), X, y, expected=(expected.real, expected.imag))


@pytest.mark.parametrize("length", [None, 150, 256])
def test_real_transforms(length):
    expected = np.fft.rfft(SIGNAL, length)
    parts = agree(lambda x: backend.rfft(x, length), SIGNAL, expected=(expected.real, expected.imag), rtol=2e-4)
    back = np.fft.irfft(expected, length)
    agree(lambda a, b: backend.irfft((a, b), length), *parts, expected=back, rtol=1e-4)


@pytest.mark.parametrize("window", ["hann", "hamming", None])
def test_stft_is_that_of_scipy(window):
    values = np.ones(64) if window is None else np.pad(signal.get_window(window, 48), 8)
    _, _, expected = signal.stft(SIGNAL, window=values, nperseg=64, noverlap=44, boundary=None, padded=False)
    expected = np.swapaxes(expected, -1, -2) * values.sum()
    agree(
        lambda x: backend.stft(x, 48, 20, 64, window=window, center=False),
        SIGNAL,
        expected=(expected.real, expected.imag),
        rtol=1e-4,
    )


@pytest.mark.parametrize("center", [True, False])
def test_istft_restores_the_signal(center):
    parts = backend.stft(SIGNAL, 64, 16, 64, center=center)
    back = agree(lambda a, b: backend.istft((a, b), 64, 16, 64, center=center), *parts)
    inner = slice(16, back.shape[-1] - 16)
    np.testing.assert_allclose(back[:, inner], SIGNAL[:, : back.shape[-1]][:, inner], rtol=1e-3, atol=1e-4)


def test_the_length_of_a_signal_can_be_symbolic():
    graph = trace(lambda x: backend.stft(x, 32, 8, 32)[0], TensorType((2, N), "float32"))
    for length in (200, 120):
        x = SIGNAL[:, :length]
        (actual,) = evaluate(graph, [x])
        np.testing.assert_allclose(actual, backend.stft(x, 32, 8, 32)[0], rtol=1e-5, atol=1e-5)


def test_pairs_are_asked_for():
    with pytest.raises(ValueError, match="tuple of two tensors"):
        backend.fft(X)
    with pytest.raises(ValueError, match="same shape"):
        backend.fft((X, X[:2]))
    with pytest.raises(ValueError, match="not of type float"):
        backend.fft((ints(3), ints(3)))


def test_special_functions():
    agree(backend.rsqrt, positive(5), expected=1 / np.sqrt(positive(5)))
    agree(backend.erf, X, expected=special.erf(X))
    agree(backend.erfc, X, expected=special.erfc(X))
    agree(backend.erfinv, unit(5, 4), expected=special.erfinv(unit(5, 4)))
    matrices = f(2, 3, 3)
    agree(backend.logdet, matrices, expected=np.linalg.slogdet(matrices)[1])
