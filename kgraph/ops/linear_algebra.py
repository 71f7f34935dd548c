"""Linear algebra on stacks of matrices: solvers and decompositions, all on the host."""

from kgraph.ops.decompositions import eig, eigh, lstsq, matrix_rank, pinv, qr, svd
from kgraph.ops.matrix_solvers import cholesky, det, inv, lu, slogdet, solve, triangular_solve

__all__ = [
    "cholesky",
    "det",
    "eig",
    "eigh",
    "inv",
    "lstsq",
    "lu",
    "matrix_rank",
    "pinv",
    "qr",
    "slogdet",
    "solve",
    "svd",
    "triangular_solve",
]
