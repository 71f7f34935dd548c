"""Corners of the primitives' meaning, stated as values; the derived tests cannot know them."""

import ml_dtypes
import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DimDecisionError, DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType
from kgraph.ops.common import broadcast_shapes, unbroadcast

N, M = Dim.symbol("N"), Dim.symbol("M")
F32 = lambda *shape: TensorType(shape, "float32")
f32 = lambda *values: np.array(values, "float32")
i32 = lambda *values: np.array(values, "int32")
inf, nan = np.inf, np.nan


def check(actual, expected, dtype=None):
    expected = np.asarray(expected)
    np.testing.assert_array_equal(actual, expected)
    if dtype:
        assert actual.dtype.name == dtype


# -- elementwise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("int8", [0, 127, -128, 1, -1, 127, -128]),
        ("uint8", [0, 255, 0, 1, 0, 255, 0]),
        ("int32", [0, 2**31 - 1, -(2**31), 1, -1, 2**31 - 1, -(2**31)]),
        ("uint32", [0, 2**32 - 1, 0, 1, 0, 2**32 - 1, 0]),
        ("int64", [0, 2**63 - 1, -(2**63), 1, -1, 2**63 - 1, -(2**63)]),
        ("uint64", [0, 2**64 - 1, 0, 1, 0, 2**64 - 1, 0]),
        ("int4", [0, 7, -8, 1, -1, 7, -8]),
        ("bool", [True] * 7),
    ],
)
@pytest.mark.parametrize("source", ["float32", "float64", "bfloat16"])
def test_convert_truncates_and_saturates(source, dtype, expected):
    x = np.array([nan, inf, -inf, 1.9, -1.9, 1e20, -1e20]).astype(
        ml_dtypes.bfloat16 if source == "bfloat16" else source
    )
    assert [v.item() for v in ops.convert(x, dtype=dtype)] == expected


def test_convert_between_ints_wraps_and_complex_takes_the_real_part():
    check(ops.convert(i32(300, -1), dtype="uint8"), [44, 255], "uint8")
    check(ops.convert(np.array([1.5 + 2j], "complex64"), dtype="int32"), [1], "int32")
    check(ops.convert(np.array([0, 2j], "complex64"), dtype="bool"), [False, True])
    x = f32(1)
    assert ops.convert(x, dtype="float32") is x


def test_integer_power_division_and_shifts():
    check(ops.pow(i32(2, -1, -1, 3, 0), i32(-1, -3, -4, 3, 0)), [0, -1, 1, 27, 1])
    check(ops.floor_divide(i32(7, -7, 5), i32(2, 2, 0)), [3, -4, 0])
    check(ops.mod(f32(5, -5), f32(3, 3)), [2, 1])
    check(ops.rem(f32(5, -5), f32(3, 3)), [2, -2])
    check(ops.mod(i32(-5, 5), i32(3, 0)), [1, 0])
    check(ops.shift_right(i32(-8), i32(1)), [-4])
    check(ops.shift_right(np.array([0xF0000000], "uint32"), np.array([4], "uint32")), [0x0F000000])
    check(ops.shift_left(i32(1, 1), i32(3, 32)), [8, 0])


def test_nan_goes_through():
    for f in (ops.relu, ops.relu6, ops.sign, ops.silu, ops.softplus, ops.gelu, ops.elu, ops.leaky_relu, ops.logistic):
        assert np.isnan(f(f32(nan))).all(), f
    for f in (ops.maximum, ops.minimum):
        assert np.isnan(f(f32(nan, 1), f32(1, nan))).all()
    for f in (ops.reduce_max, ops.reduce_min, ops.reduce_sum, ops.reduce_prod):
        assert np.isnan(f(f32(1, nan, 2)))


def test_activations_at_infinity():
    for f in (ops.silu, ops.softplus, ops.gelu, ops.relu):
        check(f(f32(-inf, inf)), [0, inf])
    check(ops.gelu(f32(-inf), approximate=False), [0])
    check(ops.logistic(f32(-inf, inf, 0)), [0, 1, 0.5])


def test_narrow_floats_round_once():
    x = np.array([1.0, 3.0], ml_dtypes.bfloat16)
    assert ops.add(x, x).dtype.name == "bfloat16"
    wide = np.float32(1.0) / np.float32(3.0)
    assert ops.div(x[:1], x[1:])[0] == wide.astype(ml_dtypes.bfloat16)
    many = np.full(1000, 1, ml_dtypes.bfloat16)  # bfloat16 alone would stop counting at 256
    assert ops.reduce_sum(many) == 1000
    assert ops.cumsum(many, axis=0)[-1] == 1000


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_reshape_resolves_the_unknown_size():
    assert ops.reshape(np.zeros((2, 3, 4)), shape=(-1, 6)).shape == (4, 6)
    assert ops.reshape(np.zeros((0, 3)), shape=(-1, 3)).shape == (0, 3)
    with pytest.raises(ShapeError, match="does not fit"):
        ops.reshape(np.zeros((2, 3)), shape=(-1, 4))
    with pytest.raises(ShapeError, match="at most one"):
        ops.reshape(np.zeros((2, 3)), shape=(-1, -1))
    with pytest.raises(ShapeError, match="not determined"):
        ops.reshape(np.zeros((0, 3)), shape=(-1, 0))
    with pytest.raises(ShapeError, match="6 elements do not fill 4"):
        ops.reshape(np.zeros((2, 3)), shape=(4,))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((N, 4, 6), (N, -1), (N, 24)),
        ((N, 4, 6), (-1, 6), (4 * N, 6)),
        ((N, M, 8), (-1, M, 2, 4), (N, M, 2, 4)),
        ((N, 2 * M + 1, 3), (-1, 2 * M + 1, 3), (N, 2 * M + 1, 3)),
        ((N * M, 8), (N, -1, 8), (N, M, 8)),
    ],
)
def test_reshape_with_symbolic_sizes(old, new, expected):
    from kgraph.ops.shape import _fill_unknown

    assert _fill_unknown(old, new) == expected
    assert PRIMITIVES["reshape"].infer(F32(*old), shape=expected) == F32(*expected)


def test_reshape_that_depends_on_the_run_time_size():
    from kgraph.ops.shape import _fill_unknown

    with pytest.raises(DimDecisionError):
        _fill_unknown((N, 3), (-1, 4))
    with pytest.raises(DimDecisionError):
        PRIMITIVES["reshape"].infer(F32(N, 3), shape=(6,))
    with pytest.raises(ShapeError):
        PRIMITIVES["reshape"].infer(F32(N, 3), shape=(4 * N,))


def test_slices_and_padding_with_symbolic_sizes():
    infer = lambda name, *types, **attrs: PRIMITIVES[name].infer(*types, **attrs).shape
    assert infer("slice", F32(N, 8), start=(0, 2), limit=(N, 8), stride=(1, 3)) == (N, 2)
    assert infer(
        "slice",
        F32(
            N + 2,
        ),
        start=(1,),
        limit=(N + 1,),
        stride=(2,),
    ) == ((N + 1) // 2,)
    assert infer(
        "slice",
        F32(
            N,
        ),
        start=(0,),
        limit=(N // 2,),
        stride=(1,),
    ) == (N // 2,)
    with pytest.raises(ShapeError):
        infer(
            "slice",
            F32(
                N,
            ),
            start=(0,),
            limit=(N + 1,),
            stride=(1,),
        )
    with pytest.raises(DimDecisionError):
        infer(
            "slice",
            F32(
                N,
            ),
            start=(0,),
            limit=(3,),
            stride=(1,),
        )
    assert infer(
        "pad",
        F32(
            N,
        ),
        F32(),
        low=(1,),
        high=(M,),
        interior=(1,),
    ) == (2 * N + M,)
    assert infer("concatenate", F32(N, 2), F32(3, 2), axis=0) == (N + 3, 2)
    assert infer(
        "pad_mirror",
        F32(
            N,
        ),
        low=(2,),
        high=(1,),
        mode="reflect",
    ) == (N + 3,)


def test_negative_padding_crops():
    zero = np.float32(0)
    check(ops.pad(f32(1, 2, 3, 4), zero, low=(-1,), high=(1,)), [2, 3, 4, 0])
    check(ops.pad(f32(1, 2, 3), zero, low=(-1,), high=(-1,), interior=(1,)), [0, 2, 0])
    with pytest.raises(ShapeError, match="negative size"):
        ops.pad(f32(1, 2), zero, low=(-2,), high=(-1,))


def test_windows_at_run_time_offsets_stay_inside():
    x = f32(0, 1, 2, 3, 4)
    check(ops.dynamic_slice(x, np.int32(9), shape=(2,)), [3, 4])
    check(ops.dynamic_slice(x, np.int32(-9), shape=(2,)), [0, 1])
    check(ops.dynamic_update_slice(x, f32(7, 8), np.int32(9)), [0, 1, 2, 7, 8])


def test_what_changes_nothing_is_not_recorded():
    x = np.ones((2, 3), "float32")
    assert ops.reshape(x, shape=(2, 3)) is x
    assert ops.transpose(x, permutation=(0, 1)) is x
    assert ops.broadcast_to(x, shape=(2, 3)) is x
    assert ops.slice(x, start=(0, 0), limit=(2, 3)) is x
    assert ops.pad(x, np.float32(0), low=0, high=0) is x
    assert ops.concatenate(x, axis=0) is x


# -- indexing ---------------------------------------------------------------------------------------------------------


def test_take_modes():
    x, far = f32(10, 11, 12), i32(0, -1, 3, -4, 7)
    check(ops.take(x, far, axis=0), [10, 12, 12, 10, 12])
    check(ops.take(x, far, axis=0, mode="wrap"), [10, 12, 10, 12, 11])
    check(ops.take(x, far, axis=0, mode="fill"), [10, 12, nan, nan, nan])
    check(ops.take(i32(5, 6), i32(2), axis=0, mode="fill"), [-(2**31)])
    assert ops.take(np.ones((2, 3, 4)), np.zeros((5, 6), "int32"), axis=1).shape == (2, 5, 6, 4)


def test_scatter_of_repeated_and_far_indices():
    base, where, updates = f32(1, 2, 3), i32(1, 1, -1, 9, -7)[:, None], f32(5, 7, 2, 100, 100)
    for reduction, expected in {
        "update": [1, 7, 2],
        "add": [1, 14, 5],
        "mul": [1, 70, 6],
        "max": [1, 7, 3],
        "min": [1, 2, 2],
    }.items():
        check(ops.scatter_nd(base, where, updates, reduction=reduction), expected)
        check(ops.scatter_along_axis(base, where[:, 0], updates, axis=0, reduction=reduction), expected)


def test_gather_nd_shapes():
    x = np.arange(24, dtype="float32").reshape(2, 3, 4)
    check(ops.gather_nd(x, i32([1, 2], [0, -1])), [x[1, 2], x[0, 2]])
    assert ops.gather_nd(x, np.zeros((5, 0), "int32")).shape == (5, 2, 3, 4)
    with pytest.raises(ShapeError, match="at most 3 long"):
        ops.gather_nd(x, np.zeros((5, 4), "int32"))


# -- reductions, order ------------------------------------------------------------------------------------------------


def test_reductions_over_nothing():
    x = np.zeros((0, 2), "float32")
    check(ops.reduce_sum(x, axes=0), [0, 0], "float32")
    check(ops.reduce_prod(x, axes=0), [1, 1])
    check(ops.reduce_max(x, axes=0), [-inf, -inf])
    check(ops.reduce_min(x.astype("int8"), axes=0), [127, 127], "int8")
    check(ops.reduce_and(x.astype(bool), axes=0), [True, True])
    check(ops.reduce_or(x.astype(bool), axes=0), [False, False])
    with pytest.raises(ShapeError, match="empty"):
        ops.argmax(x, axis=0)


def test_integer_reductions_keep_their_dtype():
    check(ops.reduce_sum(np.full(3, 100, "int8")), 44, "int8")
    check(ops.cumsum(np.full(3, 100, "uint8"), axis=0), [100, 200, 44], "uint8")


def test_order_of_ties_and_nan():
    x = f32(2, nan, 1, 2)
    check(ops.sort(x), [1, 2, 2, nan])
    check(ops.argsort(x), [2, 0, 3, 1], "int32")
    check(ops.argsort(x, descending=True), [1, 0, 3, 2])
    values, indices = ops.top_k(f32(1, 3, 3, 2), k=3)
    check(values, [3, 3, 2])
    check(indices, [1, 2, 3], "int32")
    check(ops.argmax(f32(1, nan, 5), axis=0), 1)
    check(ops.argmax(i32(1, 5, 5), axis=0), 1)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.add(f32(1), i32(1)), DTypeError, r"add\(f32\[1\], s32\[1\]\): expected one dtype"),
        (lambda: ops.add(f32(1, 2), f32(1, 2, 3)), ShapeError, r"add\(f32\[2\], f32\[3\]\): sizes 2 and 3 of axis -1"),
        (lambda: ops.exp(i32(1)), DTypeError, r"exp\(s32\[1\]\): expected float or complex operands"),
        (lambda: ops.bitwise_and(f32(1), f32(1)), DTypeError, "expected int operands"),
        (lambda: ops.select(i32(1), f32(1), f32(1)), DTypeError, "expected a bool predicate"),
        (lambda: ops.select(f32(1) > 0, f32(1), i32(1)), DTypeError, "expected one dtype"),
        (lambda: ops.reduce_sum(f32(1), axes=1), ShapeError, "axis 1 is out of range for rank 1"),
        (lambda: ops.reduce_sum(np.ones((2, 2)), axes=(0, -2)), ShapeError, "repeat an axis"),
        (lambda: ops.reduce_and(f32(1)), DTypeError, "expected bool operands"),
        (lambda: ops.transpose(np.ones((2, 2)), permutation=(0, 0)), ShapeError, "not a permutation"),
        (lambda: ops.broadcast_to(f32(1, 2), shape=(3,)), ShapeError, "expected 2"),
        (lambda: ops.concatenate(np.ones((2, 2)), np.ones((3, 3)), axis=0), ShapeError, "is 3, expected 2"),
        (lambda: ops.concatenate(axis=0), ShapeError, "at least one"),
        (lambda: ops.slice(f32(1, 2), start=1, limit=3), ShapeError, "expected 0 <= start <= limit <= size"),
        (lambda: ops.take(f32(1), f32(0), axis=0), DTypeError, "expected int indices"),
        (lambda: ops.take(f32(1), i32(0), axis=0, mode="other"), ShapeError, "expected a mode out of"),
        (lambda: ops.scatter_nd(f32(1), i32([0]), f32(1, 2)), ShapeError, r"expected updates of shape \(1,\)"),
        (lambda: ops.top_k(f32(1), k=2), ShapeError, "less than 2"),
        (lambda: ops.convert(f32(1), dtype="float33"), TypeError, "no dtype 'float33'"),
        (lambda: ops.bitcast_convert(f32(1) > 0, dtype="int8"), DTypeError, "bits of bool"),
        (lambda: ops.iota(shape=(3,), dtype="int32", axis=1), ShapeError, "axis 1 is out of range"),
        (lambda: ops.dim_value(dim=N, dtype="int32"), DimDecisionError, "no integer value"),
    ],
)
def test_errors_name_the_primitive_and_the_types(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- helpers of the rules ---------------------------------------------------------------------------------------------


def test_broadcast_of_symbolic_shapes():
    assert broadcast_shapes("f", F32(N, 1, 3), F32(M, 1)) == (N, M, 3)
    assert broadcast_shapes("f", F32(N, 3), F32()) == (N, 3)
    with pytest.raises(DimDecisionError):
        broadcast_shapes("f", F32(N), F32(M))
    with pytest.raises(DimDecisionError):
        broadcast_shapes("f", F32(N), F32(3))
    with pytest.raises(ShapeError):
        broadcast_shapes("f", F32(N), F32(N + 1))


def test_unbroadcast():
    c = np.ones((2, 3, 4), "float32")
    check(unbroadcast(c, F32(4)), [6, 6, 6, 6])
    check(unbroadcast(c, F32(3, 1)), np.full((3, 1), 8))
    check(unbroadcast(c, F32()), 24)
    assert unbroadcast(c, F32(2, 3, 4)) is c
    assert unbroadcast(None, F32(4)) is None


def test_gradients_at_ties_and_zeros():
    grad = lambda name, args, **attrs: PRIMITIVES[name].gradient(
        (np.ones_like(PRIMITIVES[name].reference(*args, **attrs)),),
        args,
        (PRIMITIVES[name].reference(*args, **attrs),),
        **attrs,
    )
    check(grad("maximum", (f32(1, 2), f32(1, 3)))[0], [0.5, 0])
    check(grad("reduce_max", (f32(2, 2, 1),), axes=(0,), keepdims=False)[0], [0.5, 0.5, 0])
    check(grad("relu", (f32(0, -1, 1),))[0], [0, 0, 1])
    check(grad("abs", (f32(0, -1, 1),))[0], [0, -1, 1])
    check(grad("hypot", (f32(0), f32(0)))[0], [0])
    check(grad("pow", (f32(0, 0, 2), f32(0, 1, 2)))[0], [0, 1, 4])
    check(grad("pow", (f32(0, 0), f32(0, 1)))[1], [0, 0])
    check(grad("reduce_prod", (f32(0, 2, 3),), axes=(0,), keepdims=False)[0], [6, 0, 0])
    check(grad("cumprod", (f32(2, 0, 3),), axis=0, reverse=False)[0], [1, 8, 0])
    check(grad("logaddexp", (f32(-inf), f32(-inf)))[0], [0])
