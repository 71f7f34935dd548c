"""Linear algebra and Fourier transforms against their defining equations."""

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError, UnsupportedError
from kgraph.ir import PRIMITIVES, Dim, TensorType

RNG = np.random.default_rng(0)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def stack(*shape):
    return RNG.standard_normal(shape)


def transpose(a):
    return np.swapaxes(a, -1, -2)


def test_solvers_solve():
    a, b = stack(2, 4, 4), stack(2, 4, 3)
    np.testing.assert_allclose(a @ ops.solve(a, b), b, **CLOSE)
    np.testing.assert_allclose(a @ ops.inv(a), np.broadcast_to(np.eye(4), a.shape), **CLOSE)
    for lower in (False, True):
        triangle = np.tril(a) if lower else np.triu(a)
        np.testing.assert_allclose(triangle @ ops.triangular_solve(a, b, lower=lower), b, **CLOSE)
        got = ops.triangular_solve(a, b, lower=lower, transpose=True)
        np.testing.assert_allclose(transpose(triangle) @ got, b, **CLOSE)


def test_factors_multiply_back():
    a = stack(2, 4, 4)
    spd = a @ transpose(a) + np.eye(4)
    factor = ops.cholesky(spd)
    np.testing.assert_allclose(factor @ transpose(factor), spd, **CLOSE)
    np.testing.assert_array_equal(factor, np.tril(factor))
    q, r = ops.qr(stack(2, 5, 3))
    np.testing.assert_allclose(transpose(q) @ q, np.broadcast_to(np.eye(3), (2, 3, 3)), **CLOSE)
    np.testing.assert_array_equal(r, np.triu(r))
    u, s, vt = ops.svd(a)
    np.testing.assert_allclose(u * s[:, None] @ vt, a, **CLOSE)
    np.testing.assert_allclose(ops.svd(a, compute_uv=False), s, **CLOSE)
    w, v = ops.eigh(spd)
    np.testing.assert_allclose(spd @ v, v * w[:, None], **CLOSE)
    w, v = ops.eig(a)
    assert w.dtype == np.complex128
    np.testing.assert_allclose(a @ v, v * w[:, None], **CLOSE)


def test_lu_pivots_are_exchanges_in_order():
    a = stack(5, 5)
    factors, pivots = ops.lu(a)
    rows = np.arange(5)
    for i, p in enumerate(pivots):
        rows[[i, p]] = rows[[p, i]]
    np.testing.assert_allclose((np.tril(factors, -1) + np.eye(5)) @ np.triu(factors), a[rows], **CLOSE)


def test_determinants():
    a = stack(2, 3, 3)
    sign, logarithm = ops.slogdet(a)
    np.testing.assert_allclose(sign * np.exp(logarithm), ops.det(a), **CLOSE)
    np.testing.assert_allclose(ops.det(a[0]), np.dot(a[0, 0], np.cross(a[0, 1], a[0, 2])), **CLOSE)
    sign, logarithm = ops.slogdet(np.zeros((2, 2)))
    assert (sign, logarithm) == (0, -np.inf)


def test_pseudo_inverse_least_squares_and_rank():
    a, b = stack(5, 3), stack(5, 2)
    p = ops.pinv(a)
    np.testing.assert_allclose(a @ p @ a, a, **CLOSE)
    x = ops.lstsq(a, b)
    np.testing.assert_allclose(a.T @ (a @ x - b), 0, atol=1e-9)
    np.testing.assert_allclose(x, p @ b, **CLOSE)
    np.testing.assert_array_equal(ops.matrix_rank(np.stack([np.eye(3), np.ones((3, 3))])), [3, 1])
    assert ops.matrix_rank(np.diag([1.0, 1e-3]), tol=1e-2) == 1


def test_a_matrix_without_solution_gives_nan_and_leaves_the_others_alone():
    a = np.stack([np.eye(2), np.zeros((2, 2)), -np.eye(2)])
    np.testing.assert_array_equal(np.isnan(ops.inv(a)).any((1, 2)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(ops.solve(a, np.ones((3, 2, 1)))).any((1, 2)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(ops.cholesky(a)).any((1, 2)), [False, True, True])
    assert np.isnan(ops.cholesky(-np.eye(2))).all()


def test_gradients_that_do_not_exist_are_refused():
    a = stack(3, 5)
    wide_svd = {"full_matrices": True, "compute_uv": True}
    for name, attrs, reason in (
        ("qr", {"mode": "reduced"}, "R is square"),
        ("svd", wide_svd, "full_matrices"),
        ("lu", {}, "square"),
    ):
        results = getattr(ops, name)(a, **attrs)
        with pytest.raises(UnsupportedError, match=reason):
            PRIMITIVES[name].gradient(results, (a,), results, **attrs)


def test_wrong_operands_are_refused():
    with pytest.raises(ShapeError, match="square"):
        ops.inv(stack(2, 3))
    with pytest.raises(ShapeError, match="last two axes"):
        ops.cholesky(stack(3))
    with pytest.raises(ShapeError, match="solve"):
        ops.solve(stack(3, 3), stack(2, 1))
    with pytest.raises(DTypeError, match="float operands"):
        ops.det(np.eye(3, dtype=np.int32))


def test_the_number_of_matrices_may_be_symbolic():
    n = Dim.symbol("N")
    a = TensorType((n, 5, 3), "float32")
    u, s, vt = PRIMITIVES["svd"].infer(a, full_matrices=False, compute_uv=True)
    assert (u.shape, s.shape, vt.shape) == ((n, 5, 3), (n, 3), (n, 3, 3))
    assert PRIMITIVES["pinv"].infer(a, rcond=None).shape == (n, 3, 5)


# -- Fourier transforms -----------------------------------------------------------------------------------------------


def fourier_matrix(size):
    k = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(k, k) / size)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_transforms_are_products_with_the_fourier_matrix(size):
    x = stack(3, size) + 1j * stack(3, size)
    matrix = fourier_matrix(size)
    np.testing.assert_allclose(ops.fft(x), x @ matrix, **CLOSE)
    np.testing.assert_allclose(ops.ifft(x), x @ matrix.conj() / size, **CLOSE)
    np.testing.assert_allclose(ops.fft2(x), fourier_matrix(3) @ x @ matrix, **CLOSE)
    np.testing.assert_allclose(ops.ifft2(ops.fft2(x)), x, **CLOSE)
    np.testing.assert_allclose(ops.rfft(x.real), (x.real @ matrix)[:, : size // 2 + 1], **CLOSE)
    np.testing.assert_allclose(ops.irfft(ops.rfft(x.real), length=size), x.real, **CLOSE)


def test_lengths_cut_or_fill_with_zeros():
    x = stack(2, 6)
    np.testing.assert_allclose(ops.rfft(x, length=4), ops.rfft(x[:, :4]), **CLOSE)
    np.testing.assert_allclose(ops.rfft(x, length=9), ops.rfft(np.pad(x, ((0, 0), (0, 3)))), **CLOSE)
    spectrum = ops.rfft(x)
    assert ops.irfft(spectrum).shape == (2, 6)
    np.testing.assert_allclose(ops.irfft(spectrum, length=4), ops.irfft(spectrum[:, :3], length=4), **CLOSE)


def test_dtypes():
    assert ops.rfft(stack(4).astype(np.float32)).dtype == np.complex64
    assert ops.irfft(np.ones(3, np.complex64)).dtype == np.float32
    with pytest.raises(DTypeError, match="complex"):
        ops.fft(stack(4))
    with pytest.raises(DTypeError, match="float32 or float64"):
        ops.rfft(np.ones(4, np.float16))
