"""QR, singular values, eigenvalues, and what is made of them: pseudo-inverse, least squares, rank."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError, UnsupportedError
from kgraph.ir import NotDifferentiable, Sample, TensorType, bind
from kgraph.ops.common import COMPLEX_OF, dtype_of, require_same_dtype, sizes_differ, uniform, zeros_like
from kgraph.ops.matrix_solvers import (
    band,
    host_record,
    matmul,
    nan_on_failure,
    positive_definite,
    require_matrices,
    symmetric,
)
from kgraph.ops.rules import dtype_error, matrix_transpose, scalar, shape_error

__all__ = ["eig", "eigh", "lstsq", "matrix_rank", "pinv", "qr", "svd"]


def _smaller(a, b):
    return a if a == b else min(a, b)


def _column_scaled(a, values):
    """a times the diagonal matrix of `values`."""
    return ops.mul(a, ops.reshape(values, shape=(*values.shape[:-1], 1, values.shape[-1])))


def _inverse_gaps(values):
    """1 / (values[j] - values[i]) at [i, j], zero on the diagonal."""
    rows = ops.reshape(values, shape=(*values.shape[:-1], values.shape[-1], 1))
    columns = ops.reshape(values, shape=(*values.shape[:-1], 1, values.shape[-1]))
    gaps = ops.sub(columns, rows)
    size = values.shape[-1]
    row, column = (ops.iota(shape=(size, size), dtype="int32", axis=axis) for axis in (0, 1))
    off = ops.ne(row, column)
    one = scalar(1, dtype_of(values))
    return ops.select(off, ops.div(one, ops.select(off, gaps, one)), zeros_like(gaps))


def _tall(shape, seed=0) -> np.ndarray:
    """Sample matrices of full rank with singular values well apart."""
    rows, columns = shape[-2:]
    diagonal = np.zeros((rows, columns))
    np.fill_diagonal(diagonal, np.arange(1, min(rows, columns) + 1))
    return (uniform(shape, -0.3, 0.3, seed=seed) + diagonal).astype(np.float32)


# -- QR ---------------------------------------------------------------------------------------------------------------
def _qr_infer(a, *, mode):
    require_matrices("qr", (a,))
    if mode not in ("reduced", "complete"):
        raise ShapeError(f'qr: mode {mode!r}: expected "reduced" or "complete"')
    rows, columns = a.shape[-2:]
    inner = rows if mode == "complete" else _smaller(rows, columns)
    return a.with_shape((*a.shape[:-2], rows, inner)), a.with_shape((*a.shape[:-2], inner, columns))


@nan_on_failure(_qr_infer)
def _qr(a, *, mode):
    return tuple(np.linalg.qr(a, mode))


def _qr_gradient(cotangents, inputs, outputs, *, mode):
    (to_q, to_r), (a,), (q, r) = cotangents, inputs, outputs
    if sizes_differ(r.shape[-2], r.shape[-1]):
        raise UnsupportedError(
            f"the gradient of qr exists where R is square, got a of shape {tuple(a.shape)} in mode {mode!r}; "
            "use mode 'reduced' and at least as many rows as columns"
        )
    m = ops.sub(matmul(r, matrix_transpose(to_r)), matmul(matrix_transpose(to_q), q))
    m = ops.add(band(m, "ge"), matrix_transpose(band(m, "gt")))
    total = ops.add(to_q, matmul(q, m))
    return (matrix_transpose(ops.triangular_solve(r, matrix_transpose(total), lower=False)),)


QR = host_record(
    "qr",
    _qr_infer,
    _qr,
    _qr_gradient,
    lambda: [
        Sample((_tall((5, 3)),), {"mode": "reduced"}, "tall"),
        Sample((_tall((2, 3, 3)),), {"mode": "complete"}, "stack of square matrices"),
        Sample((_tall((0, 3, 2)),), {"mode": "reduced"}, "empty"),
    ],
    results=2,
)


def qr(a, *, mode: str = "reduced") -> tuple:
    """(Q, R) with Q R = a, orthonormal columns in Q and R upper triangular.

    a: [..., M, N], float. mode: "reduced" (Q has min(M, N) columns) or "complete" (M columns). The gradient exists
    where R is square.
    """
    return bind(QR, a, mode=mode)


# -- singular values --------------------------------------------------------------------------------------------------
def _svd_infer(a, *, full_matrices, compute_uv):
    require_matrices("svd", (a,))
    lead, (rows, columns) = a.shape[:-2], a.shape[-2:]
    inner = _smaller(rows, columns)
    values = a.with_shape((*lead, inner))
    if not compute_uv:
        return (values,)
    left, right = (rows, columns) if full_matrices else (inner, inner)
    return a.with_shape((*lead, rows, left)), values, a.with_shape((*lead, right, columns))


@nan_on_failure(_svd_infer)
def _svd(a, *, full_matrices, compute_uv):
    out = np.linalg.svd(a, full_matrices=full_matrices, compute_uv=compute_uv)
    return tuple(out) if compute_uv else (out,)


def _svd_gradient(cotangents, inputs, outputs, *, full_matrices, compute_uv):
    """Townsend, "Differentiating the singular value decomposition", 2016."""
    (a,) = inputs
    if not compute_uv:
        u, _, vt = ops.svd(a, full_matrices=False)
        return (matmul(_column_scaled(u, cotangents[0]), vt),)
    if full_matrices and sizes_differ(*a.shape[-2:]):
        raise UnsupportedError("the gradient of svd with full_matrices exists for square matrices only")
    (to_u, to_s, to_vt), (u, s, vt) = cotangents, outputs
    gaps = _inverse_gaps(ops.mul(s, s))
    ut, v, to_v = matrix_transpose(u), matrix_transpose(vt), matrix_transpose(to_vt)
    left, right = matmul(ut, to_u), matmul(vt, to_v)
    skew = lambda x: ops.mul(gaps, ops.sub(x, matrix_transpose(x)))
    row_scaled = lambda x: matrix_transpose(_column_scaled(matrix_transpose(x), s))
    inner = ops.add(_column_scaled(skew(left), s), row_scaled(skew(right)))
    out = matmul(u, inner, vt)
    out = ops.add(out, matmul(_column_scaled(u, to_s), vt))
    inverse = ops.div(scalar(1, dtype_of(s)), s)
    # What lies outside of the spaces that U and V span.
    outside_u = ops.sub(to_u, matmul(u, left))
    outside_v = ops.sub(to_v, matmul(v, right))
    out = ops.add(out, matmul(_column_scaled(outside_u, inverse), vt))
    return (ops.add(out, matmul(_column_scaled(u, inverse), matrix_transpose(outside_v))),)


def _svd_samples():
    def sample(name, shape, full_matrices, compute_uv):
        return Sample((_tall(shape),), {"full_matrices": full_matrices, "compute_uv": compute_uv}, name)

    return [
        sample("tall", (5, 3), False, True),
        sample("wide", (3, 5), False, True),
        sample("square", (3, 3), True, True),
        sample("values of a stack", (2, 4, 3), True, False),
        sample("empty", (0, 3, 2), False, True),
    ]


SVD = host_record("svd", _svd_infer, _svd, _svd_gradient, _svd_samples, results=0)


def svd(a, *, full_matrices: bool = True, compute_uv: bool = True):
    """(U, S, V^T) with U diag(S) V^T = a, singular values descending; S alone without `compute_uv`.

    a: [..., M, N], float. U: [..., M, M] and V^T: [..., N, N], or with min(M, N) columns and rows without
    `full_matrices`. The gradient needs distinct singular values, and the reduced or a square decomposition.
    """
    out = bind(SVD, a, full_matrices=bool(full_matrices), compute_uv=bool(compute_uv))
    return out if compute_uv else out[0]


# -- eigenvalues ------------------------------------------------------------------------------------------------------
def _eigh_infer(a):
    require_matrices("eigh", (a,), square=True)
    return a.with_shape(a.shape[:-1]), a


@nan_on_failure(_eigh_infer)
def _eigh(a):
    return tuple(np.linalg.eigh((a + np.swapaxes(a, -1, -2)) / 2))


def _eigh_gradient(cotangents, inputs, outputs):
    (to_w, to_v), (w, v) = cotangents, outputs
    vt = matrix_transpose(v)
    inner = ops.mul(_inverse_gaps(w), matmul(vt, to_v))
    out = ops.add(matmul(v, inner, vt), matmul(_column_scaled(v, to_w), vt))
    return (symmetric(out),)


EIGH = host_record(
    "eigh",
    _eigh_infer,
    _eigh,
    _eigh_gradient,
    lambda: [
        Sample((positive_definite((5, 5)),)),
        Sample((positive_definite((2, 3, 3)),), name="stack"),
        Sample((positive_definite((0, 3, 3)),), name="empty"),
    ],
    results=2,
)


def eigh(a) -> tuple:
    """(eigenvalues ascending [..., N], eigenvectors in columns [..., N, N]) of (a + a^T) / 2. a: [..., N, N], float.

    The gradient through the eigenvectors needs distinct eigenvalues.
    """
    return bind(EIGH, a)


def _eig_infer(a):
    require_matrices("eig", (a,), square=True)
    if a.dtype not in COMPLEX_OF:
        raise dtype_error("eig", (a,), "float32 or float64 matrices, whose eigenvalues have a complex dtype")
    dtype = COMPLEX_OF[a.dtype]
    return TensorType(a.shape[:-1], dtype), TensorType(a.shape, dtype)


@nan_on_failure(_eig_infer)
def _eig(a):
    dtype = COMPLEX_OF[a.dtype.name]
    return tuple(x.astype(dtype) for x in np.linalg.eig(a))


EIG = host_record(
    "eig",
    _eig_infer,
    _eig,
    NotDifferentiable("eigenvectors of a general matrix are fixed up to a complex factor only; use eigh"),
    lambda: [
        Sample((_tall((4, 4)),)),
        Sample((_tall((2, 3, 3)),), name="stack"),
        Sample((_tall((0, 2, 2)),), name="empty"),
    ],
    results=2,
)


def eig(a) -> tuple:
    """(eigenvalues [..., N], right eigenvectors in columns [..., N, N]), complex. a: [..., N, N], float32 or float64.

    The order of the eigenvalues is that of LAPACK's geev.
    """
    return bind(EIG, a)


# -- pseudo-inverse, least squares, rank ------------------------------------------------------------------------------
def _default_cutoff(a: np.ndarray, factor: int) -> float:
    return factor * max(a.shape[-2:]) * float(np.finfo(a.dtype).eps)


def _pinv_infer(a, *, rcond):
    require_matrices("pinv", (a,))
    return a.with_shape((*a.shape[:-2], a.shape[-1], a.shape[-2]))


@nan_on_failure(_pinv_infer)
def _pinv(a, *, rcond):
    return np.linalg.pinv(a, rcond=_default_cutoff(a, 10) if rcond is None else rcond)


def _pinv_transposed(a, p, cotangent):
    """Cotangent of a in p = pinv(a) (Golub and Pereyra, 1973), for matrices of constant rank."""
    pt, ct = matrix_transpose(p), matrix_transpose(cotangent)
    out = ops.neg(matmul(pt, cotangent, pt))
    left = matmul(ct, p, pt)
    out = ops.add(out, ops.sub(left, matmul(a, p, left)))
    right = matmul(pt, p, ct)
    return ops.add(out, ops.sub(right, matmul(right, p, a)))


def _pinv_gradient(cotangents, inputs, outputs, *, rcond):
    return (_pinv_transposed(inputs[0], outputs[0], cotangents[0]),)


PINV = host_record(
    "pinv",
    _pinv_infer,
    _pinv,
    _pinv_gradient,
    lambda: [
        Sample((_tall((5, 3)),), {"rcond": None}, "tall"),
        Sample((_tall((2, 3, 4)),), {"rcond": 1e-4}, "stack of wide matrices"),
        Sample((_tall((0, 3, 2)),), {"rcond": None}, "empty"),
    ],
)


def pinv(a, *, rcond: float | None = None):
    """The Moore-Penrose pseudo-inverse [..., N, M] of a [..., M, N], float.

    rcond: singular values up to rcond times the largest count as zero; 10 max(M, N) eps by default.
    """
    return bind(PINV, a, rcond=None if rcond is None else float(rcond))


def _lstsq_infer(a, b, *, rcond):
    types = (a, b)
    require_matrices("lstsq", types)
    require_same_dtype("lstsq", *types)
    if a.rank != 2 or b.rank != 2 or sizes_differ(a.shape[0], b.shape[0]):
        raise shape_error("lstsq", types, "a[M, N] and b[M, K]")
    return a.with_shape((a.shape[1], b.shape[1]))


@nan_on_failure(_lstsq_infer)
def _lstsq(a, b, *, rcond):
    return np.linalg.lstsq(a, b, rcond=_default_cutoff(a, 1) if rcond is None else rcond)[0]


def _lstsq_gradient(cotangents, inputs, outputs, *, rcond):
    (cotangent,), (a, b) = cotangents, inputs
    p = ops.pinv(a, rcond=rcond)
    return _pinv_transposed(a, p, matmul(cotangent, matrix_transpose(b))), matmul(matrix_transpose(p), cotangent)


LSTSQ = host_record(
    "lstsq",
    _lstsq_infer,
    _lstsq,
    _lstsq_gradient,
    lambda: [
        Sample((_tall((5, 3)), uniform((5, 2), seed=1)), {"rcond": None}, "overdetermined"),
        Sample((_tall((3, 5)), uniform((3, 1), seed=1)), {"rcond": 1e-4}, "underdetermined"),
    ],
)


def lstsq(a, b, *, rcond: float | None = None):
    """The x [N, K] of least norm among those that minimise |a x - b|. a: [M, N]. b: [M, K], same float dtype.

    rcond: singular values up to rcond times the largest count as zero; max(M, N) eps by default.
    """
    return bind(LSTSQ, a, b, rcond=None if rcond is None else float(rcond))


def _rank_infer(a, *, tol):
    require_matrices("matrix_rank", (a,))
    return TensorType(a.shape[:-2], "int32")


@nan_on_failure(_rank_infer)
def _rank(a, *, tol):
    return np.asarray(np.linalg.matrix_rank(a, tol=tol)).astype(np.int32)


MATRIX_RANK = host_record(
    "matrix_rank",
    _rank_infer,
    _rank,
    NotDifferentiable("its result is an integer"),
    lambda: [
        Sample((_tall((5, 3)),), {"tol": None}),
        Sample((np.ones((2, 3, 3), np.float32),), {"tol": 1e-3}, "deficient"),
    ],
    tolerance=0.0,
)


def matrix_rank(a, *, tol: float | None = None):
    """The number of singular values above `tol` (absolute; by default max(M, N) eps times the largest one).

    a: [..., M, N], float. Gives int32 [...].
    """
    return bind(MATRIX_RANK, a, tol=None if tol is None else float(tol))
