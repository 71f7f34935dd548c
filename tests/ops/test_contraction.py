"""dot_general, matmul and einsum against sums written out and against NumPy."""

import itertools

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DimDecisionError, DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType

RNG = np.random.default_rng(0)
N, M = Dim.symbol("N"), Dim.symbol("M")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_dot_general_sums_products_in_stablehlo_order():
    x, y = normal(3, 2, 4, 5), normal(5, 3, 6, 4)
    got = ops.dot_general(x, y, lhs_contract=(3, 2), rhs_contract=(0, 3), lhs_batch=(0,), rhs_batch=(1,))
    expected = np.zeros((3, 2, 6))
    for b, i, j in np.ndindex(*expected.shape):
        expected[b, i, j] = sum(x[b, i, c, d] * y[d, b, j, c] for c, d in itertools.product(range(4), range(5)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_half_precisions_accumulate_in_float32():
    ones = np.ones((1, 4096), "float16")
    assert ops.dot_general(ones, ones, lhs_contract=(1,), rhs_contract=(1,)) == 4096


def test_integers_accumulate_in_the_preferred_dtype():
    x = np.full((1, 100), 100, np.int8)
    got = ops.dot_general(x, x, lhs_contract=(1,), rhs_contract=(1,), preferred_dtype="int32")
    assert got.dtype == np.int32
    assert got == 1_000_000


def test_shapes_keep_symbolic_sizes():
    record = PRIMITIVES["dot_general"]
    attrs = {"lhs_contract": (2,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    result = record.infer(TensorType((N, M, 8), "float32"), TensorType((8, 3), "float32"), **attrs)
    assert result.shape == (N, M, 3)
    with pytest.raises(DimDecisionError):
        record.infer(TensorType((2, 2, N), "float32"), TensorType((8, 3), "float32"), **attrs)
    with pytest.raises(ShapeError):
        record.infer(TensorType((2, 2, N + 9), "float32"), TensorType((8, 3), "float32"), **attrs)


def test_errors_name_the_primitive_and_the_types():
    with pytest.raises(ShapeError, match=r"dot_general\(f32\[2,3\], f32\[4,5\]\): expected equal contracted sizes"):
        ops.matmul(normal(2, 3), normal(4, 5))
    with pytest.raises(DTypeError, match="dot_general"):
        ops.matmul(normal(2, 3), normal(3, 5).astype("float16"))
    with pytest.raises(ShapeError, match="matmul"):
        ops.matmul(np.float32(1), normal(3, 5))


MATMUL_SHAPES = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((3,), (5, 3, 4)),
    ((5, 2, 3), (3,)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((7, 1, 2, 3), (5, 3, 4)),
    ((7, 5, 2, 3), (7, 5, 3, 4)),
    ((1, 5, 2, 3), (7, 1, 3, 4)),
    ((0, 2, 3), (3, 4)),
    ((1, 2, 1), (5, 1, 3)),
]


@pytest.mark.parametrize(("x", "y"), MATMUL_SHAPES)
def test_matmul_broadcasts_as_numpy(x, y):
    x, y = normal(*x), normal(*y)
    got = ops.matmul(x, y)
    assert got.shape == np.matmul(x, y).shape
    np.testing.assert_allclose(got, np.matmul(x, y), rtol=1e-5, atol=1e-6)


EINSUMS = [
    ("ij,jk->ik", [(2, 3), (3, 4)]),
    ("ij,jk", [(2, 3), (3, 4)]),
    ("ba", [(2, 3)]),
    ("...ij,jk->...ik", [(5, 2, 3), (3, 4)]),
    ("...a,...a->...", [(2, 1, 4), (3, 4)]),
    ("i...->...", [(3, 2, 4)]),
    ("b...d,d->b...", [(2, 3, 4, 5), (5,)]),
    ("b...,c...", [(2, 3), (4, 3)]),
    ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("ii->i", [(4, 4)]),
    ("ii", [(4, 4)]),
    ("iij,jk", [(3, 3, 2), (2, 4)]),
    ("ijij->ij", [(2, 3, 2, 3)]),
    ("iii->i", [(3, 3, 3)]),
    ("i,j->ij", [(3,), (4,)]),
    ("ij,kl->lijk", [(2, 3), (4, 5)]),
    ("ij,ij->", [(3, 4), (3, 4)]),
    ("ij,ij->ij", [(3, 4), (3, 4)]),
    ("abc,cd,de->abe", [(2, 3, 4), (4, 5), (5, 6)]),
    ("ab,b,bc->ac", [(2, 3), (3,), (3, 4)]),
    ("ij,k->i", [(2, 3), (4,)]),
    (" i j , j -> i ", [(2, 3), (3,)]),
]


@pytest.mark.parametrize(("subscripts", "shapes"), EINSUMS)
def test_einsum_agrees_with_numpy(subscripts, shapes):
    arrays = [normal(*s) for s in shapes]
    got, expected = ops.einsum(subscripts, *arrays), np.einsum(subscripts, *arrays)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("ij,jk->ik", [(2, 3)]),
        ("ij->ii", [(2, 2)]),
        ("ij->ik", [(2, 2)]),
        ("ijk->i", [(2, 2)]),
        ("i->i", [(2, 2)]),
        ("ii->i", [(2, 3)]),
        ("...i->i", [(2, 3)]),
        ("i1->i", [(2, 3)]),
    ],
)
def test_einsum_refuses_subscripts_that_do_not_describe_the_operands(subscripts, shapes):
    with pytest.raises(ShapeError, match="einsum"):
        ops.einsum(subscripts, *(normal(*s) for s in shapes))
