"""Contractions: `dot_general`, and NumPy's `matmul` and `einsum` lowered to it."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ops.common import dtype_of, normalize_axis, require_same_dtype, sizes_differ
from kgraph.ops.rules import convert, dtype_error, reorder, shape_error, wide

__all__ = ["contract_labels", "dot_general", "matmul", "sum_labels"]


def _free(rank: int, *taken: tuple) -> tuple:
    used = {axis for axes in taken for axis in axes}
    return tuple(axis for axis in range(rank) if axis not in used)


def _infer(lhs, rhs, *, lhs_contract, rhs_contract, lhs_batch, rhs_batch, preferred_dtype=None):
    types = (lhs, rhs)
    require_same_dtype("dot_general", *types)
    if lhs.dtype == "bool":
        raise dtype_error("dot_general", types, "numbers; convert bool operands to an integer first")
    if len(lhs_contract) != len(rhs_contract) or len(lhs_batch) != len(rhs_batch):
        raise shape_error("dot_general", types, "as many contracted and as many batch axes on both sides")
    for operand, axes in ((lhs, (*lhs_contract, *lhs_batch)), (rhs, (*rhs_contract, *rhs_batch))):
        if len(set(axes)) != len(axes) or any(not 0 <= a < operand.rank for a in axes):
            raise shape_error("dot_general", types, f"distinct axes below rank {operand.rank}, got {axes}")
    for kind, left, right in (("contracted", lhs_contract, rhs_contract), ("batch", lhs_batch, rhs_batch)):
        for a, b in zip(left, right):
            if sizes_differ(lhs.shape[a], rhs.shape[b]):
                raise shape_error(
                    "dot_general", types, f"equal {kind} sizes, got {lhs.shape[a]} (axis {a}) and {rhs.shape[b]} ({b})"
                )
    shape = [lhs.shape[a] for a in lhs_batch]
    shape += [lhs.shape[a] for a in _free(lhs.rank, lhs_contract, lhs_batch)]
    shape += [rhs.shape[a] for a in _free(rhs.rank, rhs_contract, rhs_batch)]
    return TensorType(tuple(shape), preferred_dtype or lhs.dtype)


def _reference(lhs, rhs, *, lhs_contract, rhs_contract, lhs_batch, rhs_batch, preferred_dtype=None):
    result_dtype = np_dtype(preferred_dtype) if preferred_dtype else lhs.dtype
    lhs_free, rhs_free = _free(lhs.ndim, lhs_contract, lhs_batch), _free(rhs.ndim, rhs_contract, rhs_batch)
    batch = [lhs.shape[a] for a in lhs_batch]
    free = [lhs.shape[a] for a in lhs_free] + [rhs.shape[a] for a in rhs_free]
    lhs, rhs = wide(lhs), wide(rhs)
    if np.issubdtype(lhs.dtype, np.integer):  # int8 x int8 -> int32 must accumulate in the wider type
        lhs, rhs = lhs.astype(np.result_type(lhs, result_dtype)), rhs.astype(np.result_type(rhs, result_dtype))
    contracted = int(np.prod([lhs.shape[a] for a in lhs_contract], dtype=np.int64))
    rows = int(np.prod([lhs.shape[a] for a in lhs_free], dtype=np.int64))
    columns = int(np.prod([rhs.shape[a] for a in rhs_free], dtype=np.int64))
    left = lhs.transpose((*lhs_batch, *lhs_free, *lhs_contract)).reshape((*batch, rows, contracted))
    right = rhs.transpose((*rhs_batch, *rhs_contract, *rhs_free)).reshape((*batch, contracted, columns))
    return np.matmul(left, right).reshape((*batch, *free)).astype(result_dtype, copy=False)


def _gradient(cotangents, inputs, outputs, *, lhs_contract, rhs_contract, lhs_batch, rhs_batch, preferred_dtype=None):
    (cotangent,), (lhs, rhs) = cotangents, inputs
    dtype = dtype_of(cotangent)
    lhs_free = _free(len(lhs.shape), lhs_contract, lhs_batch)
    rhs_free = _free(len(rhs.shape), rhs_contract, rhs_batch)
    # Axes of the cotangent: batch, then the free axes of lhs, then those of rhs.
    batch = tuple(range(len(lhs_batch)))
    rows = tuple(range(len(batch), len(batch) + len(lhs_free)))
    columns = tuple(range(len(batch) + len(lhs_free), len(cotangent.shape)))
    to_lhs = ops.dot_general(
        cotangent,
        convert(rhs, dtype),
        lhs_contract=columns,
        rhs_contract=rhs_free,
        lhs_batch=batch,
        rhs_batch=rhs_batch,
    )
    to_rhs = ops.dot_general(
        convert(lhs, dtype), cotangent, lhs_contract=lhs_free, rhs_contract=rows, lhs_batch=lhs_batch, rhs_batch=batch
    )
    # A product keeps the contracted axes of the other operand in that operand's order.
    lhs_axis, rhs_axis = dict(zip(rhs_contract, lhs_contract)), dict(zip(lhs_contract, rhs_contract))
    to_lhs = reorder(to_lhs, (*lhs_batch, *lhs_free, *(lhs_axis[a] for a in sorted(rhs_contract))))
    to_rhs = reorder(to_rhs, (*rhs_batch, *(rhs_axis[a] for a in sorted(lhs_contract)), *rhs_free))
    return convert(to_lhs, dtype_of(lhs)), convert(to_rhs, dtype_of(rhs))


def _samples():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    plain = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    batched = {"lhs_contract": (2,), "rhs_contract": (1,), "lhs_batch": (0,), "rhs_batch": (0,)}
    return [
        Sample((normal(5, 7), normal(7, 3)), plain, "matrix"),
        Sample((normal(1, 33), normal(33, 17)), plain, "row"),
        Sample((normal(2, 5, 7), normal(2, 7, 3)), batched, "batched"),
        Sample((normal(2, 5, 7), normal(7, 3)), {**plain, "lhs_contract": (2,)}, "dense over a sequence"),
        Sample(
            (normal(3, 2, 4, 5), normal(5, 3, 6, 4)),
            {"lhs_contract": (3, 2), "rhs_contract": (0, 3), "lhs_batch": (0,), "rhs_batch": (1,)},
            "two contracted axes, permuted",
        ),
        Sample(
            (normal(4, 3, 2), normal(2, 5, 3, 4)),
            {"lhs_contract": (0,), "rhs_contract": (3,), "lhs_batch": (2, 1), "rhs_batch": (0, 2)},
            "two batch axes, permuted",
        ),
        Sample((normal(5), normal(5)), {**plain, "lhs_contract": (0,)}, "inner product"),
        Sample((normal(0, 7), normal(7, 3)), plain, "empty"),
        Sample(
            (rng.integers(-9, 9, (5, 7), dtype=np.int8), rng.integers(-9, 9, (7, 3), dtype=np.int8)),
            {**plain, "preferred_dtype": "int32"},
            "int8 into int32",
        ),
        Sample(
            (np.full((2, 133), -128, np.int8), rng.choice(np.array([-128, 127], np.int8), (133, 19))),
            {**plain, "preferred_dtype": "int32"},
            "int8 of extreme values",
        ),
    ]


DOT_GENERAL = register(
    Primitive(
        name="dot_general",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
    )
)


def dot_general(
    lhs,
    rhs,
    *,
    lhs_contract,
    rhs_contract,
    lhs_batch=(),
    rhs_batch=(),
    preferred_dtype: str | None = None,
):
    """Sum of products over the contracted axes, per batch axis.

    Shapes: the result's axes are the batch axes, the free axes of `lhs`, the free axes of `rhs`, as in StableHLO.
    Dtypes: both operands the same number type; the result has it too, or `preferred_dtype`. Half precisions are
    accumulated in float32, integers in the result's dtype.
    Raises ShapeError where paired axes differ in size, DTypeError for bool or mixed dtypes.
    """
    rank = {"lhs": len(lhs.shape), "rhs": len(rhs.shape)}

    def axes(side, values):
        return tuple(normalize_axis("dot_general", a, rank[side]) for a in values)

    return bind(
        DOT_GENERAL,
        lhs,
        rhs,
        lhs_contract=axes("lhs", lhs_contract),
        rhs_contract=axes("rhs", rhs_contract),
        lhs_batch=axes("lhs", lhs_batch),
        rhs_batch=axes("rhs", rhs_batch),
        preferred_dtype=None if preferred_dtype is None else dtype_name(preferred_dtype),
    )


def matmul(x, y, *, preferred_dtype: str | None = None):
    """NumPy's matrix product: x[..., M, K] and y[..., K, N] give [..., M, N].

    Vectors stand for a row (left) or a column (right) that the result drops. Leading axes broadcast; an axis that only
    one operand has becomes a free axis of the contraction, so nothing is copied to broadcast it.
    Raises ShapeError for scalars and for sizes that do not fit, DTypeError for mixed dtypes.
    """
    types = (TensorType(tuple(x.shape), dtype_of(x)), TensorType(tuple(y.shape), dtype_of(y)))
    if not types[0].rank or not types[1].rank:
        raise shape_error("matmul", types, "operands of rank 1 or more")
    # Labels: "m" rows, "k" contracted, "n" columns; batch axes are numbered from the back, so that they align.
    x_labels = [*range(types[0].rank - 2, 0, -1), "m", "k"] if types[0].rank > 1 else ["k"]
    y_labels = [*range(types[1].rank - 2, 0, -1), "k", "n"] if types[1].rank > 1 else ["k"]
    batch = range(max(types[0].rank, types[1].rank) - 2, 0, -1)
    result = [*batch, *(label for label in ("m", "n") if label in x_labels or label in y_labels)]
    return contract_labels(x, x_labels, y, y_labels, result, preferred_dtype)


def contract_labels(x, x_labels: list, y, y_labels: list, result: list, preferred_dtype: str | None = None):
    """The product of two labelled tensors, summed over every label that is not in `result`.

    A label is a letter, whose sizes must agree, or a number, along which an operand of size 1 broadcasts. No operand
    repeats a label. Without a label to contract the product is a broadcast `mul`.
    """
    x, x_labels = _drop_broadcast_axes(x, x_labels, y, y_labels)
    y, y_labels = _drop_broadcast_axes(y, y_labels, x, x_labels)
    x, x_labels = sum_labels(x, x_labels, {*result, *y_labels})
    y, y_labels = sum_labels(y, y_labels, {*result, *x_labels})
    contract = [label for label in x_labels if label in y_labels and label not in result]
    if not contract:
        return _outer_product(x, x_labels, y, y_labels, result, preferred_dtype)
    batch = [label for label in result if label in x_labels and label in y_labels]
    out = dot_general(
        x,
        y,
        lhs_contract=[x_labels.index(label) for label in contract],
        rhs_contract=[y_labels.index(label) for label in contract],
        lhs_batch=[x_labels.index(label) for label in batch],
        rhs_batch=[y_labels.index(label) for label in batch],
        preferred_dtype=preferred_dtype,
    )
    used = {*contract, *batch}
    labels = [*batch, *(a for a in x_labels if a not in used), *(a for a in y_labels if a not in used)]
    return reorder(out, labels, result)


def sum_labels(x, labels: list, keep) -> tuple:
    """`x` summed over the labels outside of `keep`, and the labels that are left."""
    axes = tuple(i for i, label in enumerate(labels) if label not in keep)
    if not axes:
        return x, labels
    return ops.reduce_sum(x, axes=axes, keepdims=False), [label for label in labels if label in keep]


def _drop_broadcast_axes(x, x_labels, y, y_labels) -> tuple:
    """`x` without the numbered axes of size 1 that the other operand has with another size."""
    sizes = dict(zip(y_labels, y.shape))
    drop = [
        isinstance(label, int) and size == 1 and label in sizes and sizes[label] != 1
        for label, size in zip(x_labels, x.shape)
    ]
    if not any(drop):
        return x, x_labels
    shape = tuple(size for size, dropped in zip(x.shape, drop) if not dropped)
    return ops.reshape(x, shape=shape), [label for label, dropped in zip(x_labels, drop) if not dropped]


def _outer_product(x, x_labels, y, y_labels, result, preferred_dtype):
    operands = []
    for value, labels in ((x, x_labels), (y, y_labels)):
        value = reorder(value, labels, [label for label in result if label in labels])
        sizes = dict(zip([label for label in result if label in labels], value.shape))
        value = ops.reshape(value, shape=tuple(sizes.get(label, 1) for label in result))
        operands.append(value if preferred_dtype is None else convert(value, preferred_dtype))
    return ops.mul(*operands)
