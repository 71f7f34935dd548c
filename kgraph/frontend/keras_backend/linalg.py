"""kgraph's `keras.src.backend.<backend>.linalg`: decompositions and systems of equations, on the host's LAPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras.src import tree
from keras.src.backend.common import dtypes

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    HALF_TYPES,
    Tensor,
    axes_of,
    axis_of,
    broadcast,
    broadcast_sizes,
    convert,
    dtype_of,
    filled,
    insert_axes,
    is_complex,
    is_float,
    is_traced,
    permute,
    promote_inexact,
    reshape_to,
    scalar,
    to_inexact,
    widened,
)
from kgraph.frontend.tracer import GraphTracer, running_trace
from kgraph.ir import Graph, TensorType
from kgraph.ops.region_gradient import pull_back, replay


def _matrices(function: str, x: Tensor) -> Tensor:
    """A tensor of matrices in a dtype that LAPACK takes. Raises ValueError below rank 2."""
    x = to_inexact(x)
    if x.ndim < 2:
        raise ValueError(f"Expected input to have rank >= 2. Received input with shape {tuple(x.shape)}. ({function})")
    return x


def _in_full_precision(function: Callable, *matrices: Tensor, **attrs: Any) -> Any:
    """A decomposition of half floats computed in float32."""
    dtype = dtype_of(matrices[0])
    if dtype not in HALF_TYPES:
        return function(*matrices, **attrs)
    out = function(*(convert(m, "float32") for m in matrices), **attrs)
    narrow = lambda t: convert(t, dtype) if is_float(t) else t
    return tuple(narrow(t) for t in out) if isinstance(out, tuple) else narrow(out)


def _transposed(x: Tensor) -> Tensor:
    rank = x.ndim
    return permute(x, (*range(rank - 2), rank - 1, rank - 2))


def cholesky(a: Tensor, upper: bool = False) -> Tensor:
    """The triangular L with L L^T = a, or U with U^T U = a if `upper`.

    A matrix that is not positive definite raises ValueError; under trace, where values are not known, it gives NaN.
    """
    out = _in_full_precision(ops.cholesky, _matrices("cholesky", a))
    everywhere = tuple(range(out.ndim))
    if not is_traced(out) and bool(ops.reduce_or(ops.is_nan(out), axes=everywhere, keepdims=False)):
        raise ValueError("Cholesky decomposition failed. The input might not be a valid positive definite matrix.")
    return _transposed(out) if upper else out


def cholesky_inverse(a: Tensor, upper: bool = False) -> Tensor:
    """The inverse of the matrix whose Cholesky factor is a."""
    a = _matrices("cholesky_inverse", a)
    identity = ops.broadcast_to(_identity(a), shape=tuple(a.shape))
    inverse = solve_triangular(a, identity, lower=not upper)
    flipped = _transposed(inverse)
    return ops.matmul(inverse, flipped) if upper else ops.matmul(flipped, inverse)


def _identity(a: Tensor) -> Tensor:
    from kgraph.frontend.keras_backend.numpy import eye

    return eye(a.shape[-1], dtype=dtype_of(a))


def det(a: Tensor) -> Tensor:
    """The determinants of square matrices."""
    return _in_full_precision(ops.det, _matrices("det", a))


def eig(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., N] and, in columns, eigenvectors [..., N, N] of square matrices; complex."""
    a = _matrices("eig", a)
    return ops.eig(convert(a, "float32") if dtype_of(a) in HALF_TYPES else a)


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues [..., N] and, in columns, eigenvectors [..., N, N] of symmetric matrices."""
    return _in_full_precision(ops.eigh, _matrices("eigh", a))


def inv(a: Tensor) -> Tensor:
    """The inverses of square matrices."""
    return _in_full_precision(ops.inv, _matrices("inv", a))


def lu_factor(a: Tensor) -> tuple[Tensor, Tensor]:
    """L (below the diagonal, which is 1) and U in one matrix, and the int32 row exchanges, as LAPACK's getrf."""
    return _in_full_precision(ops.lu, _matrices("lu_factor", a))


def qr(x: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Orthogonal Q and triangular R with Q R = x. mode: "reduced" or "complete"."""
    if mode not in {"reduced", "complete"}:
        raise ValueError(
            f"`mode` argument value not supported. Expected one of {{'reduced', 'complete'}}. Received: mode={mode}"
        )
    return _in_full_precision(ops.qr, _matrices("qr", x), mode=mode)


def _solved(primitive: Callable, a: Tensor, b: Tensor, **attrs: Any) -> Tensor:
    a, b = promote_inexact(a, b)
    if is_vector := b.ndim == a.ndim - 1:
        b = insert_axes(b, (b.ndim,))
    lead = broadcast_sizes(a.shape[:-2], b.shape[:-2])
    a, b = (broadcast(x, (*lead, *x.shape[-2:])) for x in (a, b))
    out = _in_full_precision(primitive, a, b, **attrs)
    return reshape_to(out, tuple(out.shape[:-1])) if is_vector else out


def solve(a: Tensor, b: Tensor) -> Tensor:
    """x with a x = b, for square a [..., N, N] and b [..., N, K] or [..., N]."""
    return _solved(ops.solve, a, b)


def solve_triangular(a: Tensor, b: Tensor, lower: bool = False) -> Tensor:
    """x with a x = b, for triangular a [..., N, N] and b [..., N, K] or [..., N]."""
    return _solved(ops.triangular_solve, a, b, lower=bool(lower), transpose=False)


def svd(x: Tensor, full_matrices: bool = True, compute_uv: bool = True) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """U, the descending singular values, and V^H of matrices; the values only without `compute_uv`."""
    x = _matrices("svd", x)
    return _in_full_precision(ops.svd, x, full_matrices=bool(full_matrices), compute_uv=bool(compute_uv))


def lstsq(a: Tensor, b: Tensor, rcond: float | None = None) -> Tensor:
    """The x of least norm that minimises |a x - b|; singular values below rcond times the largest count as 0."""
    return _solved(ops.lstsq, a, b, rcond=None if rcond is None else float(rcond))


def matrix_rank(x: Tensor, tol: float | None = None) -> Tensor:
    """The int32 number of singular values above tol, by default the largest one times the rounding error."""
    x = _matrices("matrix_rank", convert_to_tensor(x))
    return convert(ops.matrix_rank(x, tol=None if tol is None else float(tol)), "int32")


def pinv(x: Tensor, rcond: float | None = None) -> Tensor:
    """The Moore-Penrose inverses of matrices; singular values below rcond times the largest count as 0."""
    x = _matrices("pinv", convert_to_tensor(x))
    return _in_full_precision(ops.pinv, x, rcond=None if rcond is None else float(rcond))


# -- derivatives ----------------------------------------------------------------------------------------------------
def jvp(fun: Callable, primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """(fun(*primals), its derivative in the direction of the tangents), and what fun gives beside if `has_aux`.

    Computed by reverse mode twice: the cotangents of the inputs are linear in those of the outputs, and the transpose
    of this linear map takes the tangents of the inputs to those of the outputs.
    """
    points = [convert_to_tensor(x) for x in tree.flatten(primals)]
    directions = [convert_to_tensor(t, dtype_of(x)) for x, t in zip(points, tree.flatten(tangents), strict=True)]
    extra: list = []

    def flat_function(*inputs: Tensor) -> list[Tensor]:
        result = fun(*tree.pack_sequence_as(primals, list(inputs)))
        result, aux = result if has_aux else (result, ())
        extra[:] = [result, aux]
        return [convert_to_tensor(leaf) for leaf in tree.flatten((result, aux))]

    graph, outer = _recorded(flat_function, points)
    outputs, values = replay(graph, [*points, *outer])
    result, aux = tree.pack_sequence_as(tuple(extra), list(outputs))
    leaves = tree.flatten(result)
    smooth = [i for i, x in enumerate(leaves) if is_float(x) or is_complex(x)]

    def transposed(*cotangents: Tensor) -> list[Tensor]:
        given = dict(zip(smooth, cotangents, strict=True))
        found = pull_back(graph, values, [given.get(i) for i in range(len(outputs))])
        return [_zeros_like(x) if c is None else c for x, c in zip(points, found)]

    zeros = [_zeros_like(leaves[i]) for i in smooth]
    backward, outer = _recorded(transposed, zeros)
    _, values = replay(backward, [*zeros, *outer])
    found = pull_back(backward, values, [t if is_float(t) or is_complex(t) else None for t in directions])
    derivatives = {i: c for i, c in zip(smooth, found) if c is not None}
    leaves = [derivatives.get(i, _zeros_like(x)) for i, x in enumerate(leaves)]
    derivative = tree.pack_sequence_as(result, leaves)
    return (result, derivative, aux) if has_aux else (result, derivative)


def _zeros_like(x: Tensor) -> Tensor:
    return filled(x.shape, 0, dtype_of(x))


def _recorded(function: Callable, operands: list[Tensor]) -> tuple[Graph, list[Tensor]]:
    """The graph of a function, and what it uses beside its operands, whose inputs come after theirs."""
    tracer = GraphTracer(function.__name__, parent=running_trace())
    with tracer.active():
        inputs = [tracer.add_input(TensorType(tuple(x.shape), dtype_of(x))) for x in operands]
        tracer.graph.outputs = [tracer.lift(x) for x in function(*inputs)]
    captured = [outer for outer, _ in tracer.captures.values()]
    variables = [convert_to_tensor(variable) for variable, _ in tracer.variables.values()]
    graph = Graph([*tracer.graph.inputs, *tracer.graph.params], (), tracer.graph.nodes, tracer.graph.outputs)
    return graph, [*captured, *variables]


# -- norms ----------------------------------------------------------------------------------------------------------
def norm(x: Tensor, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Norms of vectors (one axis) or matrices (two axes), of the whole tensor for axis None.

    ord: for vectors any number, inf, -inf, 0 (how many are not 0); for matrices "fro", "nuc", 1, -1, 2, -2, inf, -inf.
    """
    x = convert_to_tensor(x)
    x = convert(x, dtypes.result_type(x.dtype, float))
    if axis is None and ord is None:
        return _euclidean(x, tuple(range(x.ndim)), keepdims)
    axes = tuple(range(x.ndim)) if axis is None else None
    if axes is None:
        axes = tuple(axis_of(a, x.ndim) for a in axis) if isinstance(axis, (tuple, list)) else axes_of(axis, x.ndim)
    if len(axes) == 1:
        return _vector_norm(x, 2 if ord is None else ord, axes, keepdims)
    if len(axes) == 2:
        return _matrix_norm(x, "fro" if ord is None else ord, axes, keepdims)
    raise ValueError(f"norm: expected one or two axes. Received: axis={axis} for shape {tuple(x.shape)}, ord={ord}")


def _euclidean(x: Tensor, axes: tuple, keepdims: bool) -> Tensor:
    dtype = dtype_of(ops.abs(x)) if is_complex(x) else dtype_of(x)
    size = ops.abs(x) if is_complex(x) else widened(x)
    total = ops.mul(size, size)
    total = ops.reduce_sum(total, axes=tuple(sorted(axes)), keepdims=keepdims) if axes else total
    return convert(ops.sqrt(total), dtype)


def _vector_norm(x: Tensor, ord: Any, axes: tuple, keepdims: bool) -> Tensor:
    if isinstance(ord, str):
        raise ValueError(f"norm: ord={ord!r} is a norm of matrices; one axis is given")
    if ord == 2:
        return _euclidean(x, axes, keepdims)
    size = ops.abs(x)
    dtype = dtype_of(size)
    if ord == np.inf:
        return ops.reduce_max(size, axes=axes, keepdims=keepdims)
    if ord == -np.inf:
        return ops.reduce_min(size, axes=axes, keepdims=keepdims)
    size = widened(size)
    if ord == 0:
        size = convert(ops.ne(size, scalar(0, size)), dtype_of(size))
    elif ord != 1:
        size = ops.pow(size, scalar(ord, size))
    total = ops.reduce_sum(size, axes=axes, keepdims=keepdims)
    return convert(total if ord in (0, 1) else ops.pow(total, scalar(1 / ord, total)), dtype)


def _matrix_norm(x: Tensor, ord: Any, axes: tuple, keepdims: bool) -> Tensor:
    rows, columns = axes
    if rows == columns:
        raise ValueError("norm: the two axes of a matrix must differ")
    if ord == "fro":
        return _euclidean(x, axes, keepdims)
    if ord in (1, -1, np.inf, -np.inf):
        # The largest or smallest sum of a column (1) or of a row (inf).
        inner, outer = (rows, columns) if abs(ord) == 1 else (columns, rows)
        size = ops.abs(x)
        dtype = dtype_of(size)
        sums = convert(ops.reduce_sum(widened(size), axes=(inner,), keepdims=True), dtype)
        choose = ops.reduce_max if ord > 0 else ops.reduce_min
        out = choose(sums, axes=(outer,), keepdims=True)
    elif ord in (2, -2, "nuc"):
        rest = tuple(i for i in range(x.ndim) if i not in axes)
        values: Tensor = svd(permute(x, (*rest, rows, columns)), full_matrices=False, compute_uv=False)
        last = values.ndim - 1
        if ord == "nuc":
            out = ops.reduce_sum(values, axes=(last,), keepdims=False)
        else:
            out = (ops.reduce_max if ord == 2 else ops.reduce_min)(values, axes=(last,), keepdims=False)
    else:
        raise ValueError(f"norm: ord={ord!r} is not a norm of matrices")
    shape = tuple(1 if i in axes else s for i, s in enumerate(x.shape))
    return reshape_to(out, shape if keepdims else tuple(s for i, s in enumerate(shape) if i not in axes))
