"""Products of vectors, matrices and tensors."""

from __future__ import annotations

from typing import Any

from kgraph import ops
from kgraph.frontend.keras_backend import sparse_rules
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import (
    Tensor,
    axis_of,
    convert,
    dtype_of,
    flatten,
    insert_axes,
    move_axis,
    promote,
    reshape_to,
    slice_axis,
    to_inexact,
    widened,
)
from kgraph.frontend.keras_backend.numpy.elementwise import conjugate
from kgraph.frontend.keras_backend.sparse import SparseTensor


def _operands(*tensors: Tensor) -> tuple[list[Tensor], str | None]:
    """Operands in their common dtype, and the dtype to accumulate in: int32 where all are int8."""
    converted = [convert_to_tensor(t) for t in tensors]
    preferred = "int32" if all(dtype_of(t) == "int8" for t in converted) else None
    return promote(*converted), preferred


def _of_numbers(product: Any, operands: list[Tensor]) -> Tensor:
    """A contraction of numbers; booleans are contracted as int32 and tell whether any pair is true."""
    if dtype_of(operands[0]) != "bool":
        return product(*operands)
    return convert(product(*(convert(x, "int32") for x in operands)), "bool")


def matmul(x1: Tensor, x2: Tensor) -> Tensor:
    """The product of matrices [..., M, K] and [..., K, N]; vectors stand for a row or a column. int8 gives int32.

    Sparse where both are.
    """
    if type(x1) is SparseTensor or type(x2) is SparseTensor:
        return sparse_rules.matmul(x1, x2, matmul)
    (x1, x2), preferred = _operands(x1, x2)
    return _of_numbers(lambda a, b: ops.matmul(a, b, preferred_dtype=preferred), [x1, x2])


def einsum(subscripts: str, *operands: Tensor, **kwargs: Any) -> Tensor:
    """Sums of products by labelled axes, as in NumPy. Options on the order of contractions are not needed here."""
    unknown = set(kwargs) - {"optimize", "precision"}
    if unknown:
        raise TypeError(f"einsum: unknown arguments {sorted(unknown)}")
    tensors, preferred = _operands(*operands)
    return _of_numbers(lambda *xs: ops.einsum(subscripts, *xs, preferred_dtype=preferred), tensors)


def _contract(x1: Tensor, x2: Tensor, axes1: tuple, axes2: tuple) -> Tensor:
    return _of_numbers(
        lambda a, b: ops.dot_general(a, b, lhs_contract=axes1, rhs_contract=axes2, lhs_batch=(), rhs_batch=()),
        [x1, x2],
    )


def _scaled(x1: Tensor, x2: Tensor) -> Tensor:
    return (ops.logical_and if dtype_of(x1) == "bool" else ops.mul)(x1, x2)


def dot(x1: Tensor, x2: Tensor) -> Tensor:
    """The sum over the last axis of x1 and the last but one of x2 (its only one for a vector); scalars scale."""
    x1, x2 = promote(x1, x2)
    if x1.ndim == 0 or x2.ndim == 0:
        return _scaled(x1, x2)
    return _contract(x1, x2, (x1.ndim - 1,), (max(x2.ndim - 2, 0),))


def inner(x1: Tensor, x2: Tensor) -> Tensor:
    """The sum over the last axes of both; scalars scale."""
    x1, x2 = promote(x1, x2)
    if x1.ndim == 0 or x2.ndim == 0:
        return _scaled(x1, x2)
    return _contract(x1, x2, (x1.ndim - 1,), (x2.ndim - 1,))


def vdot(x1: Tensor, x2: Tensor) -> Tensor:
    """The inner product of all elements in a row, x1 conjugated."""
    x1, x2 = promote(x1, x2)
    return _contract(conjugate(flatten(x1)), flatten(x2), (0,), (0,))


def outer(x1: Tensor, x2: Tensor) -> Tensor:
    """[size of x1, size of x2] of the products of all pairs of elements."""
    x1, x2 = promote(x1, x2)
    return _scaled(insert_axes(flatten(x1), (1,)), insert_axes(flatten(x2), (0,)))


def tensordot(x1: Tensor, x2: Tensor, axes: int | tuple = 2) -> Tensor:
    """The sum over axes of both: so many last ones of x1 and first ones of x2, or a pair of lists of axes."""
    x1, x2 = promote(x1, x2)
    if isinstance(axes, int):
        axes1, axes2 = tuple(range(x1.ndim - axes, x1.ndim)), tuple(range(axes))
        if axes > min(x1.ndim, x2.ndim) or axes < 0:
            raise ValueError(f"tensordot: axes={axes} for tensors of rank {x1.ndim} and {x2.ndim}")
    else:
        first, second = axes
        axes1 = tuple(axis_of(a, x1.ndim) for a in (first if isinstance(first, (tuple, list)) else [first]))
        axes2 = tuple(axis_of(a, x2.ndim) for a in (second if isinstance(second, (tuple, list)) else [second]))
    if not axes1:
        return reshape_to(outer(x1, x2), (*x1.shape, *x2.shape))
    return _contract(x1, x2, axes1, axes2)


def kron(x1: Tensor, x2: Tensor) -> Tensor:
    """The Kronecker product: every element of x1 times the whole of x2."""
    x1, x2 = promote(x1, x2)
    rank = max(x1.ndim, x2.ndim)
    sizes1 = (1,) * (rank - x1.ndim) + tuple(x1.shape)
    sizes2 = (1,) * (rank - x2.ndim) + tuple(x2.shape)
    left = reshape_to(x1, tuple(n for s in sizes1 for n in (s, 1)))
    right = reshape_to(x2, tuple(n for s in sizes2 for n in (1, s)))
    return reshape_to(_scaled(left, right), tuple(a * b for a, b in zip(sizes1, sizes2, strict=True)))


def cross(x1: Tensor, x2: Tensor, axisa: int = -1, axisb: int = -1, axisc: int = -1, axis: int | None = None) -> Tensor:
    """The vector product of vectors of 2 or 3 components; of two plane ones only the component normal to them."""
    if axis is not None:
        axisa = axisb = axisc = axis
    x1, x2 = promote(x1, x2)
    x1 = move_axis(x1, axis_of(axisa, x1.ndim), x1.ndim - 1)
    x2 = move_axis(x2, axis_of(axisb, x2.ndim), x2.ndim - 1)
    if x1.shape[-1] not in (2, 3) or x2.shape[-1] not in (2, 3):
        raise ValueError(
            "cross: vectors need 2 or 3 components. "
            f"Received: {x1.shape[-1]} along axis {axisa} of x1 and {x2.shape[-1]} along axis {axisb} of x2"
        )

    def components(x: Tensor) -> list[Tensor]:
        last = x.ndim - 1
        return [slice_axis(x, last, i, i + 1) for i in range(x.shape[-1])]

    a, b = components(x1), components(x2)
    normal = ops.sub(ops.mul(a[0], b[1]), ops.mul(a[1], b[0]))
    if len(a) == len(b) == 2:
        return reshape_to(normal, tuple(normal.shape[:-1]))

    # A vector of 2 components has 0 as its third.
    def minor(i: int, j: int) -> Tensor:
        terms = [ops.mul(u[p], v[q]) for u, v, p, q in ((a, b, i, j), (a, b, j, i)) if p < len(u) and q < len(v)]
        if len(terms) == 2:
            return ops.sub(*terms)
        return terms[0] if i < len(a) and j < len(b) else ops.neg(terms[0])

    out = ops.concatenate(minor(1, 2), minor(2, 0), normal, axis=normal.ndim - 1)
    return move_axis(out, out.ndim - 1, axis_of(axisc, out.ndim))


def correlate(x1: Tensor, x2: Tensor, mode: str = "valid") -> Tensor:
    """The sliding inner product of two vectors, c[k] = sum over n of x1[n + k] * x2[n], as in NumPy.

    mode: "valid" (whole overlaps only), "same" (as long as the longer one), "full" (all overlaps).
    """
    x1, x2 = promote(x1, x2, extra=(float,))
    if x1.ndim != 1 or x2.ndim != 1:
        raise ValueError(f"correlate: expected vectors. Received: shapes {tuple(x1.shape)} and {tuple(x2.shape)}")
    # The kernel is the shorter one; exchanging the two reverses the result.
    exchanged = x1.shape[0] < x2.shape[0]
    signal, kernel = (x2, x1) if exchanged else (x1, x2)
    width = kernel.shape[0]
    padding = {"valid": (0, 0), "same": (width // 2, width - 1 - width // 2), "full": (width - 1, width - 1)}
    if mode not in padding:
        raise ValueError(f'correlate: mode is "valid", "same" or "full". Received: mode={mode!r}')
    out = ops.conv(
        reshape_to(signal, (1, signal.shape[0], 1)),
        reshape_to(kernel, (width, 1, 1)),
        strides=(1,),
        padding=(padding[mode],),
        lhs_dilation=(1,),
        rhs_dilation=(1,),
        feature_groups=1,
    )
    out = flatten(out)
    return ops.rev(out, axes=(0,)) if exchanged else out


def slogdet(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sign and the logarithm of |det| of square matrices."""
    x = to_inexact(x)
    dtype = dtype_of(x)
    return tuple(convert(part, dtype) for part in ops.slogdet(widened(x)))
