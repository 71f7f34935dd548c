"""Linear algebra: eager against NumPy and SciPy, traced against eager."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.linalg
from keras import ops

from kgraph.frontend.keras_backend import linalg as backend
from tests.frontend.numpy_cases import f
from tests.frontend.test_backend_math import agree

A = (f(2, 4, 4) + 3 * np.eye(4)).astype("float32")
POSITIVE = (A @ A.swapaxes(-1, -2)).astype("float32")
TALL = f(2, 5, 3, seed=1)
B = f(2, 4, 3, seed=2)


def test_cholesky():
    lower = np.linalg.cholesky(POSITIVE)
    agree(backend.cholesky, POSITIVE, expected=lower, rtol=1e-4)
    agree(lambda a: backend.cholesky(a, upper=True), POSITIVE, expected=lower.swapaxes(-1, -2), rtol=1e-4)
    agree(backend.cholesky_inverse, lower, expected=np.linalg.inv(POSITIVE), rtol=1e-3)


def test_cholesky_refuses_what_is_not_positive_definite():
    with pytest.raises(ValueError, match="positive definite"):
        backend.cholesky(-POSITIVE)


def test_determinant_and_inverse():
    agree(backend.det, A, expected=np.linalg.det(A), rtol=1e-4)
    agree(backend.inv, A, expected=np.linalg.inv(A), rtol=1e-4)


def test_eigenvalues():
    values, vectors = agree(backend.eigh, POSITIVE)
    np.testing.assert_allclose(POSITIVE @ vectors, vectors * values[:, None, :], rtol=1e-3, atol=1e-2)
    values, vectors = backend.eig(A)
    np.testing.assert_allclose(A @ vectors, vectors * values[:, None, :], rtol=1e-3, atol=1e-3)


def test_lu_factor():
    expected = [scipy.linalg.lu_factor(a) for a in A]
    agree(backend.lu_factor, A, expected=(np.stack([e[0] for e in expected]), np.stack([e[1] for e in expected])))


@pytest.mark.parametrize("mode", ["reduced", "complete"])
def test_qr(mode):
    q, r = agree(lambda x: backend.qr(x, mode), TALL)
    assert q.shape == ((2, 5, 3) if mode == "reduced" else (2, 5, 5))
    np.testing.assert_allclose(q @ r, TALL, rtol=1e-4, atol=1e-5)


def test_solve():
    agree(backend.solve, A, B, expected=np.linalg.solve(A, B), rtol=1e-4)
    agree(backend.solve, A, B[..., 0], expected=np.linalg.solve(A, B)[..., 0], rtol=1e-4)
    agree(backend.solve, A[0], B[0, :, 0], expected=np.linalg.solve(A[0], B[0, :, 0]), rtol=1e-4)


@pytest.mark.parametrize("lower", [True, False])
def test_solve_triangular(lower):
    triangle = np.tril(A) if lower else np.triu(A)
    expected = np.linalg.solve(triangle, B)
    agree(lambda a, b: backend.solve_triangular(a, b, lower=lower), A, B, expected=expected, rtol=1e-4)
    agree(lambda a, b: backend.solve_triangular(a, b, lower), A, B[..., 0], expected=expected[..., 0], rtol=1e-4)


def test_singular_values():
    u, s, v = agree(lambda x: backend.svd(x, full_matrices=False), TALL)
    np.testing.assert_allclose((u * s[:, None, :]) @ v, TALL, rtol=1e-4, atol=1e-5)
    agree(lambda x: backend.svd(x, compute_uv=False), TALL, expected=np.linalg.svd(TALL, compute_uv=False), rtol=1e-4)
    agree(backend.pinv, TALL, expected=np.linalg.pinv(TALL), rtol=1e-3)
    agree(backend.matrix_rank, TALL, expected=np.linalg.matrix_rank(TALL))


def test_least_squares():
    b = f(5, seed=3)
    agree(backend.lstsq, TALL[0], b, expected=np.linalg.lstsq(TALL[0], b, rcond=None)[0], rtol=1e-3)


NORMS = [(None, None), (2, 1), (1, -1), (0, 0), (3, 1), (np.inf, 1), (-np.inf, 0)]
MATRIX_NORMS = ["fro", "nuc", 1, -1, 2, -2, np.inf, -np.inf]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize(("ord", "axis"), NORMS + [(o, (0, 2)) for o in MATRIX_NORMS])
def test_norm(ord, axis, keepdims):
    expected = np.linalg.norm(TALL, ord=ord, axis=axis, keepdims=keepdims)
    agree(lambda x: backend.norm(x, ord=ord, axis=axis, keepdims=keepdims), TALL, expected=expected, rtol=1e-4)


def test_half_precision_keeps_its_dtype():
    narrow = A.astype("float16")
    assert backend.inv(narrow).dtype == backend.norm(narrow).dtype == backend.svd(narrow)[1].dtype == "float16"


def test_errors():
    with pytest.raises(ValueError, match="rank >= 2"):
        backend.inv(f(3))
    with pytest.raises(ValueError, match="mode"):
        backend.qr(TALL, "r")
    with pytest.raises(ValueError, match="norm"):
        backend.norm(TALL, "fro", axis=1)


def test_derivative_in_a_direction():
    point, direction = f(5, 4), f(5, 4, seed=1)
    agree(
        lambda x, t: backend.jvp(lambda v: ops.sin(v) * v, (x,), (t,)),
        point,
        direction,
        expected=(np.sin(point) * point, (np.cos(point) * point + np.sin(point)) * direction),
    )
    # Of several arguments, through a contraction, with a variable and something beside.
    variable = keras.Variable(f(4, 3, seed=2))

    def function(x, y):
        return ops.matmul(ops.exp(x), variable) * y, ops.shape(x)[0] + ops.sum(x)

    y, y_direction = f(5, 3, seed=3), f(5, 3, seed=4)
    result, derivative, aux = backend.jvp(function, (point, y), (direction, y_direction), has_aux=True)
    product = np.exp(point) @ variable.numpy()
    np.testing.assert_allclose(result, product * y, rtol=1e-5, atol=1e-5)
    expected = (np.exp(point) * direction) @ variable.numpy() * y + product * y_direction
    np.testing.assert_allclose(derivative, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux, 5 + point.sum(), rtol=1e-5)


def test_derivative_of_what_does_not_depend_on_the_point():
    result, derivative = backend.jvp(lambda x: {"a": ops.argmax(x), "b": ops.ones(3)}, (A,), (A,))
    assert derivative["a"] == 0
    assert not derivative["b"].any()
    assert result["b"].all()
