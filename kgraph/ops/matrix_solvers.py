"""Factors, solutions, inverses and determinants of stacks of matrices; on the host, by LAPACK."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import scipy.linalg

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.ir import Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import dtype_of, require_same_dtype, sizes_differ, uniform, widened, zeros_like
from kgraph.ops.rules import matrix_transpose, require_float, scalar, shape_error

__all__ = ["cholesky", "det", "inv", "lu", "slogdet", "solve", "triangular_solve"]


# -- shared with decompositions ----------------------------------------------------------------------------------------
def require_matrices(name: str, types, *, square: bool = False) -> None:
    """Raises DTypeError unless all operands are floats, ShapeError below rank 2 (or, with `square`, for a first operand
    whose matrices are not square)."""
    require_float(name, *types)
    for t in types:
        if t.rank < 2:
            raise shape_error(name, types, "matrices in the last two axes")
    if square and sizes_differ(*types[0].shape[-2:]):
        raise shape_error(name, types, "square matrices")


def nan_on_failure(infer: Callable) -> Callable:
    """A reference whose matrices without solution (singular, not positive definite) give NaN instead of an exception.

    A compiled program has no place to raise from, and one bad matrix of a stack does not spoil the others.
    """

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*arrays, **attrs):
            try:
                return function(*arrays, **attrs)
            except np.linalg.LinAlgError:
                if arrays[0].ndim > 2:
                    each = [wrapped(*matrices, **attrs) for matrices in zip(*arrays, strict=True)]
                    return tuple(map(np.stack, zip(*each))) if isinstance(each[0], tuple) else np.stack(each)
                inferred = infer(*(TensorType(a.shape, a.dtype.name) for a in arrays), **attrs)
                if isinstance(inferred, tuple):
                    return tuple(map(_not_a_number, inferred))
                return _not_a_number(inferred)

        return widened(wrapped)

    return decorate


def _not_a_number(t: TensorType) -> np.ndarray:
    return np.full(t.shape, np.nan if t.np_dtype.kind in "fc" else 0, t.np_dtype)


def matmul(*factors):
    """The product of matrices, left to right."""
    out = factors[0]
    for factor in factors[1:]:
        out = ops.matmul(out, factor)
    return out


def band(x, compare: str):
    """`x` with zeros where `row <compare> column` is False: "ge" keeps the lower triangle, "gt" without diagonal."""
    shape = tuple(x.shape[-2:])
    rows, columns = (ops.iota(shape=shape, dtype="int32", axis=axis) for axis in (0, 1))
    return ops.select(getattr(ops, compare)(rows, columns), x, zeros_like(x))


def half(x):
    """x / 2."""
    return ops.mul(x, scalar(0.5, dtype_of(x)))


def symmetric(x):
    """(x + x^T) / 2 of the matrices in the last two axes."""
    return half(ops.add(x, matrix_transpose(x)))


def positive_definite(shape, seed=0) -> np.ndarray:
    """Well-conditioned symmetric sample matrices."""
    a = uniform(shape, seed=seed, dtype="float64")
    return (a @ np.swapaxes(a, -1, -2) / shape[-1] + np.eye(shape[-1])).astype(np.float32)


def regular(shape, seed=0) -> np.ndarray:
    """Well-conditioned square sample matrices."""
    return (uniform(shape, seed=seed) / np.sqrt(shape[-1]) + 1.5 * np.eye(shape[-1])).astype(np.float32)


def host_record(name, infer, reference, gradient, samples, results=1, tolerance=1e-4) -> Primitive:
    """Register a primitive that runs through its reference on the host for good."""
    return register(
        Primitive(
            name=name,
            infer=infer,
            reference=reference,
            gradient=gradient,
            traits=frozenset({"host"}),
            samples=samples,
            tolerance=tolerance,
            results=results,
        )
    )


# -- cholesky ---------------------------------------------------------------------------------------------------------
def _square_infer(name: str):
    def infer(a):
        require_matrices(name, (a,), square=True)
        return a

    return infer


@nan_on_failure(_square_infer("cholesky"))
def _cholesky(a):
    return np.linalg.cholesky((a + np.swapaxes(a, -1, -2)) / 2)


def _cholesky_gradient(cotangents, inputs, outputs):
    (cotangent,), (factor,) = cotangents, outputs
    inner = band(matmul(matrix_transpose(factor), cotangent), "ge")
    inner = ops.sub(inner, half(ops.sub(inner, band(inner, "gt"))))
    left = ops.triangular_solve(factor, inner, lower=True, transpose=True)
    return (symmetric(ops.triangular_solve(factor, matrix_transpose(left), lower=True, transpose=True)),)


CHOLESKY = host_record(
    "cholesky",
    _square_infer("cholesky"),
    _cholesky,
    _cholesky_gradient,
    lambda: [
        Sample((positive_definite((5, 5)),)),
        Sample((positive_definite((2, 3, 3)),), name="stack"),
        Sample((np.zeros((0, 3, 3), np.float32),), name="empty"),
        Sample((np.stack([np.eye(2), -np.eye(2)]).astype(np.float32),), name="special"),
    ],
)


def cholesky(a):
    """The lower triangular L with L L^T = (a + a^T) / 2; NaN where that is not positive definite.

    a: [..., N, N], float.
    """
    return bind(CHOLESKY, a)


# -- solve ------------------------------------------------------------------------------------------------------------
def _solve_infer(name: str):
    def infer(a, b, **attrs):
        types = (a, b)
        require_matrices(name, types, square=True)
        require_same_dtype(name, *types)
        if a.rank != b.rank or any(map(sizes_differ, a.shape[:-1], b.shape[:-1])):
            raise shape_error(name, types, "a[..., N, N] and b[..., N, K] with equal leading axes")
        return b

    return infer


@nan_on_failure(_solve_infer("triangular_solve"))
def _triangular_solve(a, b, *, lower, transpose):
    if b.size == 0:
        return np.zeros_like(b)
    solve = functools.partial(scipy.linalg.solve_triangular, lower=lower, trans=int(transpose), check_finite=False)
    if a.ndim == 2:
        return solve(a, b)
    return np.stack([_triangular_solve(x, y, lower=lower, transpose=transpose) for x, y in zip(a, b)])


def _triangular_solve_gradient(cotangents, inputs, outputs, *, lower, transpose):
    (cotangent,), (a, _), (x,) = cotangents, inputs, outputs
    to_b = ops.triangular_solve(a, cotangent, lower=lower, transpose=not transpose)
    product = matmul(x, matrix_transpose(to_b)) if transpose else matmul(to_b, matrix_transpose(x))
    return band(ops.neg(product), "ge" if lower else "le"), to_b


TRIANGULAR_SOLVE = host_record(
    "triangular_solve",
    _solve_infer("triangular_solve"),
    _triangular_solve,
    _triangular_solve_gradient,
    lambda: [
        Sample((regular((5, 5)), uniform((5, 3), seed=1)), {"lower": True, "transpose": False}, "lower"),
        Sample((regular((5, 5)), uniform((5, 1), seed=1)), {"lower": False, "transpose": False}, "upper"),
        Sample((regular((2, 3, 3)), uniform((2, 3, 4), seed=1)), {"lower": True, "transpose": True}, "stack"),
        Sample((regular((3, 3)), uniform((3, 2), seed=1)), {"lower": False, "transpose": True}, "upper, transposed"),
        Sample((regular((3, 3)), uniform((3, 0))), {"lower": True, "transpose": False}, "empty"),
    ],
)


def triangular_solve(a, b, *, lower: bool = False, transpose: bool = False):
    """x with a x = b, or a^T x = b with `transpose`, reading one triangle of a only.

    a: [..., N, N]. b: [..., N, K], equal leading axes, same float dtype. Gives the type of b; NaN where a is singular.
    """
    return bind(TRIANGULAR_SOLVE, a, b, lower=bool(lower), transpose=bool(transpose))


@nan_on_failure(_solve_infer("solve"))
def _solve(a, b):
    return np.linalg.solve(a, b)


def _solve_gradient(cotangents, inputs, outputs):
    (cotangent,), (a, _), (x,) = cotangents, inputs, outputs
    to_b = ops.solve(matrix_transpose(a), cotangent)
    return ops.neg(matmul(to_b, matrix_transpose(x))), to_b


SOLVE = host_record(
    "solve",
    _solve_infer("solve"),
    _solve,
    _solve_gradient,
    lambda: [
        Sample((regular((5, 5)), uniform((5, 3), seed=1))),
        Sample((regular((2, 3, 3)), uniform((2, 3, 1), seed=1)), name="stack"),
        Sample((regular((0, 3, 3)), uniform((0, 3, 2), seed=1)), name="empty"),
        Sample((np.zeros((2, 2), np.float32), np.ones((2, 1), np.float32)), name="special"),
    ],
)


def solve(a, b):
    """x with a x = b. a: [..., N, N]. b: [..., N, K], equal leading axes, same float dtype. NaN where a is singular."""
    return bind(SOLVE, a, b)


# -- inverse, determinant ---------------------------------------------------------------------------------------------
@nan_on_failure(_square_infer("inv"))
def _inv(a):
    return np.linalg.inv(a)


def _inv_gradient(cotangents, inputs, outputs):
    transposed = matrix_transpose(outputs[0])
    return (ops.neg(matmul(transposed, cotangents[0], transposed)),)


def _square_samples():
    return [
        Sample((regular((5, 5)),)),
        Sample((regular((2, 3, 3)),), name="stack"),
        Sample((regular((1, 1)),), name="one by one"),
        Sample((regular((0, 3, 3)),), name="empty"),
    ]


INV = host_record("inv", _square_infer("inv"), _inv, _inv_gradient, _square_samples)


def inv(a):
    """The inverse matrices. a: [..., N, N], float; gives its type, NaN where a is singular."""
    return bind(INV, a)


def _scalar_like(x, a):
    """A number per matrix, shaped to multiply the matrices."""
    return ops.reshape(x, shape=(*x.shape, 1, 1)) if len(a.shape) == len(x.shape) + 2 else x


def _det_infer(a):
    require_matrices("det", (a,), square=True)
    return a.with_shape(a.shape[:-2])


def _det_gradient(cotangents, inputs, outputs):
    scale = _scalar_like(ops.mul(cotangents[0], outputs[0]), inputs[0])
    return (ops.mul(scale, matrix_transpose(ops.inv(inputs[0]))),)


DET = host_record("det", _det_infer, widened(np.linalg.det), _det_gradient, _square_samples)


def det(a):
    """The determinants. a: [..., N, N], float; gives [...]. The gradient exists for regular matrices only."""
    return bind(DET, a)


def _slogdet_infer(a):
    require_matrices("slogdet", (a,), square=True)
    return (a.with_shape(a.shape[:-2]),) * 2


def _slogdet_gradient(cotangents, inputs, outputs):
    return (ops.mul(_scalar_like(cotangents[1], inputs[0]), matrix_transpose(ops.inv(inputs[0]))),)


SLOGDET = host_record(
    "slogdet",
    _slogdet_infer,
    widened(lambda a: tuple(np.linalg.slogdet(a))),
    _slogdet_gradient,
    _square_samples,
    results=2,
)


def slogdet(a) -> tuple:
    """(sign, log of the magnitude) of the determinants; (0, -inf) where a is singular. a: [..., N, N], float."""
    return bind(SLOGDET, a)


# -- LU ---------------------------------------------------------------------------------------------------------------
def _lu_infer(a):
    require_matrices("lu", (a,))
    rows, columns = a.shape[-2:]
    pivots = rows if rows == columns else min(rows, columns)
    return a, TensorType((*a.shape[:-2], pivots), "int32")


@widened
def _lu(a):
    if a.ndim == 2 and a.size:
        factors, pivots = scipy.linalg.lu_factor(a, check_finite=False)
        return factors, pivots.astype(np.int32)
    if a.size == 0:
        return a, np.zeros((*a.shape[:-2], min(a.shape[-2:])), np.int32)
    factors, pivots = zip(*map(_lu, a))
    return np.stack(factors), np.stack(pivots)


def _lu_gradient(cotangents, inputs, outputs):
    (a,), (factors, _) = inputs, outputs
    if sizes_differ(*a.shape[-2:]):
        raise UnsupportedError(f"the gradient of lu exists for square matrices only, got shape {tuple(a.shape)}")
    # With P a = L U: L^-T P = (U a^-1)^T, so that no permutation is needed.
    upper, strictly_lower = band(factors, "le"), band(factors, "gt")
    unit = ops.sub(scalar(1, dtype_of(a)), zeros_like(a))
    lower = ops.add(strictly_lower, ops.sub(band(unit, "ge"), band(unit, "gt")))
    inner = band(matmul(matrix_transpose(lower), band(cotangents[0], "gt")), "gt")
    inner = ops.add(inner, band(matmul(band(cotangents[0], "le"), matrix_transpose(upper)), "le"))
    inner = matrix_transpose(ops.triangular_solve(upper, matrix_transpose(inner), lower=False))
    return (ops.solve(matrix_transpose(a), matmul(matrix_transpose(upper), inner)),)


LU = host_record(
    "lu",
    _lu_infer,
    _lu,
    _lu_gradient,
    lambda: [
        Sample((regular((5, 5)),)),
        Sample((regular((2, 3, 3))[:, ::-1],), name="stack, pivoted"),
        Sample((regular((0, 3, 3)),), name="empty"),
    ],
    results=2,
)


def lu(a) -> tuple:
    """(L below the unit diagonal and U on and above it in one matrix, pivots) with partial pivoting, as LAPACK's getrf.

    a: [..., M, N], float. pivots: int32 [..., min(M, N)]; row i was exchanged with row pivots[i].
    """
    return bind(LU, a)
