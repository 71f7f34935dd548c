"""Data movement kernels against NumPy: any shape, any item size, static and symbolic sizes, any split."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import data_movement
from kgraph.ir import Dim
from tests.codegen.driver import run_node
from tests.codegen.nodes import node

DTYPES = ["float32", "float64", "int8", "bfloat16", "bool", "int64"]
N, L = Dim.symbol("N"), Dim.symbol("L")
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def filled(shape, dtype, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    return rng.integers(-100, 100, shape).astype(kind)


def symbolic(shape, axes) -> tuple:
    """The shape with the given axes replaced by symbols, and their sizes."""
    symbols = dict(zip(axes, (N, L)))
    return tuple(symbols.get(k, n) for k, n in enumerate(shape)), {
        str(s): shape[k] for k, s in symbols.items() if k < len(shape)
    }


def check(result, expected):
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


# -- transpose --------------------------------------------------------------------------------------------------------
@FEW
@given(
    shape=st.lists(st.integers(1, 21), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    dynamic=st.integers(0, 2),
    parts=st.integers(1, 3),
)
def test_transpose_of_any_permutation(shape, data, dtype, dynamic, parts):
    permutation = tuple(data.draw(st.permutations(range(len(shape)))))
    x = filled(shape, dtype)
    declared, sizes = symbolic(shape, range(dynamic))
    n = node("transpose", [(declared, dtype)], [([declared[k] for k in permutation], dtype)], permutation=permutation)
    (y,) = run_node(data_movement.lower, n, [x], sizes, parts)
    check(y, x.transpose(permutation))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "float16"])
@pytest.mark.parametrize(
    ("shape", "permutation"),
    [
        ((2, 49, 64), (0, 2, 1)),
        ((2, 64, 49), (0, 2, 1)),
        ((2, 33, 3), (0, 2, 1)),
        ((2, 3, 150), (0, 2, 1)),
        ((1, 5, 7), (0, 2, 1)),
        ((3, 70, 2, 16), (0, 2, 1, 3)),
        ((2, 20, 3, 18), (0, 2, 3, 1)),
        ((40, 50), (1, 0)),
        ((2, 3, 4, 5, 6), (4, 2, 0, 1, 3)),
    ],
)
def test_transpose_schedules(shape, permutation, dtype):
    x = filled(shape, dtype)
    for dynamic in ((), (0,), (1, 2)):
        declared, sizes = symbolic(shape, dynamic)
        n = node("transpose", [(declared, dtype)], [([declared[k] for k in permutation], dtype)],
                 permutation=permutation)  # fmt: skip
        for parts in (1, 2):
            (y,) = run_node(data_movement.lower, n, [x], sizes, parts)
            check(y, x.transpose(permutation))


# -- slice, rev, broadcast_to -----------------------------------------------------------------------------------------
@FEW
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 3),
)
def test_slice_with_strides(shape, data, dtype, parts):
    start, limit, stride = [], [], []
    for size in shape:
        first = data.draw(st.integers(0, size))
        start.append(first)
        limit.append(data.draw(st.integers(first, size)))
        stride.append(data.draw(st.integers(1, 3)))
    x = filled(shape, dtype)
    expected = x[tuple(slice(*t) for t in zip(start, limit, stride))]
    n = node("slice", [(shape, dtype)], [(expected.shape, dtype)],
             start=tuple(start), limit=tuple(limit), stride=tuple(stride))  # fmt: skip
    (y,) = run_node(data_movement.lower, n, [x], parts=parts)
    check(y, expected)


def test_slice_with_symbolic_limits():
    x = filled((5, 9, 4), "float32")
    n = node("slice", [((N, L, 4), "float32")], [((N, L - 2, 3), "float32")],
             start=(0, 2, 1), limit=(N, L, 4), stride=(1, 1, 1))  # fmt: skip
    (y,) = run_node(data_movement.lower, n, [x], {"N": 5, "L": 9}, 3)
    check(y, x[:, 2:, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axes"), [((7,), (0,)), ((3, 45), (1,)), ((3, 4, 20), (0, 2)), ((3, 4, 20), (1,))])
def test_rev(shape, axes, dtype):
    x = filled(shape, dtype)
    for dynamic in ((), (0, 1)):
        declared, sizes = symbolic(shape, dynamic)
        n = node("rev", [(declared, dtype)], [(declared, dtype)], axes=axes)
        (y,) = run_node(data_movement.lower, n, [x], sizes, 2)
        check(y, np.flip(x, axes))


@pytest.mark.parametrize(
    ("shape", "out"),
    [((), (3, 5)), ((1, 5), (4, 5)), ((4, 1), (4, 70)), ((4, 1, 3), (2, 4, 6, 3)), ((1,), (40000,)), ((3, 4), (3, 4))],
)
def test_broadcast_to(shape, out):
    x = filled(shape, "float32")
    n = node("broadcast_to", [(shape, "float32")], [(out, "float32")], shape=out)
    (y,) = run_node(data_movement.lower, n, [x], parts=3)
    check(y, np.broadcast_to(x, out))


def test_broadcast_to_symbolic():
    x = filled((1, 6), "float32")
    n = node("broadcast_to", [((1, 6), "float32")], [((N, 6), "float32")], shape=(N, 6))
    (y,) = run_node(data_movement.lower, n, [x], {"N": 7}, 2)
    check(y, np.broadcast_to(x, (7, 6)))


# -- dynamic slices ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("starts", [(0, 0, 0), (1, 2, 3), (-5, 9, 1)])
def test_dynamic_slice_and_update(starts):
    x, update = filled((4, 6, 20), "float32"), filled((2, 6, 5), "float32", 1)
    clamped = [min(max(s, 0), n - m) for s, n, m in zip(starts, x.shape, update.shape)]
    region = tuple(slice(s, s + m) for s, m in zip(clamped, update.shape))
    scalars = [np.array(s, t) for s, t in zip(starts, ("int32", "int64", "int32"))]
    types = [((), "int32"), ((), "int64"), ((), "int32")]
    for dynamic in ((), (0, 2)):
        declared, sizes = symbolic(x.shape, dynamic)
        n = node("dynamic_slice", [(declared, "float32"), *types], [(update.shape, "float32")], shape=update.shape)
        (y,) = run_node(data_movement.lower, n, [x, *scalars], sizes, 2)
        check(y, x[region])
        n = node("dynamic_update_slice", [(declared, "float32"), (update.shape, "float32"), *types],
                 [(declared, "float32")])  # fmt: skip
        (y,) = run_node(data_movement.lower, n, [x, update, *scalars], sizes, 2)
        expected = x.copy()
        expected[region] = update
        check(y, expected)


# -- concatenate ------------------------------------------------------------------------------------------------------
@FEW
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    pieces=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 3),
    dynamic=st.booleans(),
)
def test_concatenate(shape, pieces, data, dtype, parts, dynamic):
    axis = data.draw(st.integers(0, len(shape) - 1))
    shapes = [(*shape[:axis], p, *shape[axis + 1 :]) for p in pieces]
    arrays = [filled(s, dtype, k) for k, s in enumerate(shapes)]
    expected = np.concatenate(arrays, axis)
    declared = [[N if dynamic and k == 0 and axis else n for k, n in enumerate(s)] for s in shapes]
    out = [N if dynamic and k == 0 and axis else n for k, n in enumerate(expected.shape)]
    n = node("concatenate", [(s, dtype) for s in declared], [(out, dtype)], axis=axis)
    (y,) = run_node(data_movement.lower, n, arrays, {"N": shape[0]}, parts)
    check(y, expected)


def test_concatenate_long_and_symbolic_rows():
    arrays = [filled((2, k, 3), "float32", k) for k in (5000, 1, 7000)]
    n = node("concatenate", [((2, s, 3), "float32") for s in (N, 1, L)], [((2, N + L + 1, 3), "float32")], axis=1)
    (y,) = run_node(data_movement.lower, n, arrays, {"N": 5000, "L": 7000}, 3)
    check(y, np.concatenate(arrays, 1))


# -- pad --------------------------------------------------------------------------------------------------------------
def numpy_pad(x, value, low, high, interior):
    for axis, (before, after, i) in enumerate(zip(low, high, interior)):
        x = np.moveaxis(x, axis, 0)
        size = max(len(x) + max(len(x) - 1, 0) * i + before + after, 0)
        out = np.full((size, *x.shape[1:]), value, x.dtype)
        for k in range(len(x)):
            place = before + k * (i + 1)
            if 0 <= place < size:
                out[place] = x[k]
        x = np.moveaxis(out, 0, axis)
    return x


@FEW
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 3),
    dynamic=st.booleans(),
)
def test_pad(shape, data, dtype, parts, dynamic):
    small, gap = st.integers(-2, 4), st.sampled_from([0, 0, 0, 1, 2])
    rank = len(shape)
    low, high = (tuple(data.draw(st.lists(small, min_size=rank, max_size=rank))) for _ in range(2))
    interior = tuple(data.draw(st.lists(gap, min_size=rank, max_size=rank)))
    x, value = filled(shape, dtype), filled((), dtype, 5)
    expected = numpy_pad(x, value, low, high, interior)
    if expected.size == 0:
        return
    declared, out = list(shape), list(expected.shape)
    if dynamic:
        declared[0], out[0] = N, N + (N - 1) * interior[0] + low[0] + high[0]
    n = node("pad", [(declared, dtype), ((), dtype)], [(out, dtype)], low=low, high=high, interior=interior)
    (y,) = run_node(data_movement.lower, n, [x, value], {"N": shape[0]}, parts)
    check(y, expected)


def test_pad_long_rows():
    x, value = filled((30000,), "float32"), filled((), "float32", 3)
    n = node("pad", [((N,), "float32"), ((), "float32")], [((N + 9000,), "float32")],
             low=(4000,), high=(5000,), interior=(0,))  # fmt: skip
    (y,) = run_node(data_movement.lower, n, [x, value], {"N": 30000}, 3)
    check(y, np.pad(x, (4000, 5000), constant_values=value))


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge", "wrap"])
@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [((5,), (3,), (4,)), ((3, 7, 4), (0, 2, 0), (0, 1, 0)), ((4, 5), (2, 0), (3, 9)), ((2, 3), (0, 0), (0, 0)),
     ((1, 6), (0, 5), (0, 13))],
)  # fmt: skip
def test_pad_mirror(mode, shape, low, high):
    x = filled(shape, "float32")
    expected = np.pad(x, list(zip(low, high)), mode=mode)
    for dynamic in ((), (0,)):
        declared, sizes = symbolic(shape, dynamic)
        out = [s + a + c for s, a, c in zip(declared, low, high)]
        n = node("pad_mirror", [(declared, "float32")], [(out, "float32")], low=low, high=high, mode=mode)
        (y,) = run_node(data_movement.lower, n, [x], sizes, 2)
        check(y, expected)
