"""Sparse tensors: functions give what they give for the dense form, and are sparse where they should be.

Every case also runs under a trace with a symbolic number of entries, where no entry can be dropped.
"""

from __future__ import annotations

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from keras import ops

import kgraph
from kgraph.errors import InputError, ShapeError
from tests.frontend.agreement import both

SparseTensor = kgraph.SparseTensor
DTYPES = ("float32", "float16", "float64", "bfloat16", "int32", "int8", "uint8", "bool")
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2}
many = settings(max_examples=60, deadline=None)


def entries(rng, shape: tuple, nse: int, axes: int | None = None, dtype="float32") -> tuple:
    """Indices [nse, axes], with repeated places, and values [nse, *shape[axes:]], with zeros and negative numbers."""
    axes = len(shape) if axes is None else axes
    nse = 0 if 0 in shape[:axes] else nse
    indices = np.stack([rng.integers(0, n, nse) for n in shape[:axes]] or [np.zeros((nse, 0), int)][:0], axis=1) \
        if axes else np.zeros((nse, 0), "int64")  # fmt: skip
    values = rng.integers(-3, 4, (nse, *shape[axes:]))
    if dtype in ("uint8", "bool"):
        values = abs(values)
    elif "int" not in dtype:
        values = values / 4
    return indices, values.astype(keras.ops.zeros((), dtype).dtype)


def dense_of(indices, values, shape: tuple) -> np.ndarray:
    """What the entries stand for, added up one by one."""
    out = np.zeros(shape, values.dtype)
    for index, value in zip(indices, values):
        out[tuple(index)] = out[tuple(index)] | value if out.dtype == bool else out[tuple(index)] + value
    return out


def assert_agree(found, expected):
    found, expected = ops.convert_to_numpy(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    tolerance = TOLERANCES.get(expected.dtype.name, 1e-5)
    wide = "complex128" if expected.dtype.kind == "c" else "float64"
    np.testing.assert_allclose(found.astype(wide), expected.astype(wide), rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw, dtypes=DTYPES):
    """(shape, indices, values), of any density, repeated places and blocks included."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    axes = draw(st.integers(1, len(shape)))
    return (shape, *entries(rng, shape, draw(st.integers(0, 12)), axes, draw(st.sampled_from(dtypes))))


# -- the tensor --------------------------------------------------------------------------------------------------------
@many
@given(cases())
@example(((2, 3), np.zeros((0, 2), "int64"), np.zeros((0,), "float32")))
def test_dense_form_and_back(case):
    shape, indices, values = case
    x, expected = SparseTensor(indices, values, shape), dense_of(indices, values, shape)
    assert (x.shape, x.dtype, x.ndim) == (shape, values.dtype, len(shape))
    np.testing.assert_array_equal(x.to_dense(), expected)
    np.testing.assert_array_equal(np.asarray(x), expected)
    back = SparseTensor.from_dense(expected)
    np.testing.assert_array_equal(back.to_dense(), expected)
    assert back.nse == np.count_nonzero(expected)
    merged = x.coalesced()
    assert len(np.unique(merged.indices, axis=0)) == merged.nse
    np.testing.assert_array_equal(merged.to_dense(), expected)
    np.testing.assert_array_equal(x.spelled_out().to_dense(), expected)


def test_lists_and_python_numbers():
    x = SparseTensor([[0, 0], [1, 2]], [1.0, 2.0], (2, 3))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[1, 0, 0], [0, 0, 2]])
    empty = SparseTensor([], np.zeros(0, "float32"), (2, 3))
    assert empty.nse == 0
    np.testing.assert_array_equal(empty, np.zeros((2, 3)))


def test_what_a_sparse_tensor_prints():
    assert repr(SparseTensor([[0, 1]], [1.0], (2, 3))) == "<SparseTensor float32[2,3], 1 entry>"
    assert repr(SparseTensor([[0], [1]], np.ones((2, 3), "int8"), (2, 3))) == (
        "<SparseTensor int8[2,3], 2 entries of [3]>"
    )


@pytest.mark.parametrize(
    ("indices", "values", "error", "match"),
    [
        ([[0, 3]], [1.0], InputError, "outside of the shape"),
        ([[0, -1]], [1.0], InputError, "outside of the shape"),
        ([[0.0, 1.0]], [1.0], InputError, "expected integers"),
        ([[0, 1]], [1.0, 2.0], ShapeError, "expected indices"),
        ([[0, 1, 0]], [1.0], ShapeError, "expected indices"),
        ([[0]], [1.0], ShapeError, "expected indices"),
    ],
)
def test_members_that_do_not_fit(indices, values, error, match):
    with pytest.raises(error, match=match):
        SparseTensor(indices, values, (2, 3))


def test_a_traced_entry_out_of_range_is_no_element():
    # The last but one would be the place of the last, were places counted without a look at each index.
    indices = np.array([[0, 1], [0, -1], [5, 0], [1, 2], [0, 1], [0, 4], [1, 1]])
    values = np.array([1, 2, 4, 8, 16, 32, 64], "float32")

    def with_outside(function):
        return kgraph.jit(lambda i, v: ops.convert_to_tensor(function(SparseTensor(i, v, (2, 3))), sparse=False))(
            indices, values
        )

    expected = np.array([[0, 17, 0], [0, 64, 8]], "float32")
    for function in (lambda x: x, ops.square, lambda x: ops.sum(x, axis=0), ops.sum, lambda x: ops.reshape(x, (3, 2)),
                     lambda x: ops.transpose(x), lambda x: ops.add(x, x), lambda x: ops.concatenate([x, x], 1),
                     lambda x: ops.sum(ops.squeeze(ops.expand_dims(x, 0), 0))):  # fmt: skip
        assert_agree(with_outside(function), function(expected))


def test_a_traced_entry_out_of_range_is_none_either_when_the_axis_is_gone():
    @kgraph.jit
    def squeezed(indices, values):
        return ops.squeeze(SparseTensor(indices, values, (1, 3)), 0).to_dense()

    found = squeezed(np.array([[0, 1], [1, 2]]), np.array([1, 2], "float32"))
    np.testing.assert_array_equal(found, [0, 1, 0])


def test_sparse_and_dense_conversion():
    x = SparseTensor([[0, 0], [0, 0]], [1.0, 2.0], (2, 3))
    assert ops.is_tensor(x)
    assert ops.shape(x) == (2, 3)
    assert ops.convert_to_tensor(x) is x
    assert ops.convert_to_tensor(x, sparse=True) is x
    assert type(ops.convert_to_tensor(x, sparse=False)) is np.ndarray
    assert type(ops.convert_to_numpy(x)) is np.ndarray
    cast = ops.cast(SparseTensor([[0], [0]], [0.5, 0.5], (2,)), "int32")
    np.testing.assert_array_equal(cast, [1, 0])  # added up before the fraction goes
    with pytest.raises(ValueError, match="ragged"):
        ops.convert_to_tensor(x, ragged=True)


@pytest.mark.parametrize("form", ["csr_matrix", "coo_matrix", "csc_array", "lil_matrix"])
def test_matrices_of_scipy(form):
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.array([[0, 1, 0], [2, 0, 3]], "float32")
    x = ops.convert_to_tensor(getattr(sparse, form)(dense))
    assert type(x) is SparseTensor
    np.testing.assert_array_equal(x, dense)
    np.testing.assert_array_equal(ops.exp(getattr(sparse, form)(dense)), np.exp(dense))


# -- element by element ------------------------------------------------------------------------------------------------
ZERO_PRESERVING = ("abs absolute arcsin arcsinh arctan arctanh ceil conj copy expm1 floor imag isinf isnan log1p "
                   "negative real round sign sin sinh sqrt square tan tanh").split()  # fmt: skip
DENSIFYING = "arccos cos cosh exp isfinite log reciprocal sigmoid relu softmax cumsum max logical_not".split()


def sparse_and_dense(case):
    shape, indices, values = case
    return SparseTensor(indices, values, shape), dense_of(indices, values, shape)


def traced(function, case):
    """The dense result of a function of a sparse tensor, from a trace that does not know the number of entries."""
    shape, indices, values = case
    return both(lambda i, v: ops.convert_to_tensor(function(SparseTensor(i, v, shape)), sparse=False), indices, values)


@many
@pytest.mark.filterwarnings("ignore:invalid value")
@given(cases([d for d in DTYPES if d != "bool"]), st.sampled_from(ZERO_PRESERVING))
def test_functions_that_keep_zeros(case, name):
    if case[2].dtype.name == "uint8" and name == "negative":
        return
    x, dense = sparse_and_dense(case)
    result = getattr(ops, name)(x)
    assert type(result) is SparseTensor
    assert_agree(result, getattr(ops, name)(dense))


@many
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@given(cases(["float32", "int32"]), st.sampled_from(DENSIFYING))
def test_functions_that_give_dense_tensors(case, name):
    x, dense = sparse_and_dense(case)
    if 0 in dense.shape or (name == "softmax" and dense.dtype.kind != "f"):
        return
    result = getattr(ops, name)(x)
    assert type(result) is np.ndarray
    assert_agree(result, getattr(ops, name)(dense))


BINARY = {
    "add": lambda a, b: a and b,
    "subtract": lambda a, b: a and b,
    "maximum": lambda a, b: a and b,
    "minimum": lambda a, b: a and b,
    "multiply": lambda a, b: a or b,
    "divide": lambda a, b: a and not b,
    "divide_no_nan": lambda a, b: a and not b,
    "power": lambda a, b: False,
    "less": lambda a, b: False,
}


@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@given(
    cases(["float32", "int32", "float16"]),
    st.integers(0, 10**6),
    st.sampled_from(sorted(BINARY)),
    st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_functions_of_two_tensors(case, seed, name, kinds):
    rng, shape = np.random.default_rng(seed), case[0]
    # The other operand broadcasts with the first, and the first with it.
    other_shape = tuple(1 if rng.random() < 0.25 else n for n in shape)[int(rng.random() < 0.2) :]
    if rng.random() < 0.2 and shape:
        case = ((1, *shape[1:]), *entries(rng, (1, *shape[1:]), 5, dtype=case[2].dtype.name))
    other = (other_shape, *entries(rng, other_shape, 7, dtype=case[2].dtype.name))
    if not other_shape:
        return
    operands = [sparse_and_dense(c)[0 if is_sparse else 1] for c, is_sparse in zip((case, other), kinds)]
    expected = getattr(ops, name)(*(sparse_and_dense(c)[1] for c in (case, other)))
    result = getattr(ops, name)(*operands)
    assert (type(result) is SparseTensor) == BINARY[name](*kinds)
    assert_agree(result, expected)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("number", [2, 0, 0.5, np.float32(3), np.array(2.0, "float32")])
def test_sparse_tensors_and_numbers(number):
    x, dense = sparse_and_dense(((2, 3), np.array([[0, 1], [1, 2], [0, 1]]), np.array([1, 2, 3], "float32")))
    for function, is_sparse in ((ops.multiply, True), (ops.divide, True), (ops.add, False)):
        result = function(x, number)
        assert (type(result) is SparseTensor) == is_sparse
        assert_agree(result, function(dense, number))
    assert_agree(ops.multiply(number, x), ops.multiply(number, dense))
    assert type(ops.divide(number, x)) is np.ndarray


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_a_quotient_has_entries_where_the_divisor_makes_something_of_a_zero():
    x, dense = sparse_and_dense(((2, 3), np.array([[0, 0], [1, 2], [0, 0]]), np.array([1, 2, 3], "float32")))
    divisor = np.array([[0, 2, 0], [np.nan, 1, 4]], "float32")
    quotient = ops.divide(x, divisor)
    assert quotient.nse == 4
    assert_agree(quotient, dense / divisor)
    assert_agree(ops.divide_no_nan(x, divisor), ops.divide_no_nan(dense, divisor))


def test_operators():
    x, dense = sparse_and_dense(((2, 3), np.array([[0, 1], [1, 2], [0, 1]]), np.array([1, 2, 3], "float32")))
    other = np.arange(6, dtype="float32").reshape(2, 3)
    for result, expected in (
        (x + x, dense + dense), (x - other, dense - other), (other - x, other - dense), (x * other, dense * other),
        (other * x, dense * other), (2 * x, 2 * dense), (x / 2, dense / 2), (-x, -dense), (abs(x), abs(dense)),
        (x @ x.T, dense @ dense.T), (other @ x.T, other @ dense.T), (x.sum(), dense.sum()), (x**2, dense**2),
        (x == 4, dense == 4),
        (x[0], dense[0]), (x[:, 1:], dense[:, 1:]), (np.stack(list(x)), dense),
        (x > other, dense > other), (x.mean(0), dense.mean(0)),
        (x.reshape((6,)), dense.reshape(6)),
    ):  # fmt: skip
        assert_agree(result, expected)
    assert float(x.sum()) == 6
    variable = keras.Variable(other)
    assert_agree(variable * x, other * dense)
    assert_agree(x + variable, other + dense)
    variable.assign_add(x)
    assert_agree(variable.value, other + dense)


# -- order, rank, sums -------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_functions_that_move_and_sum_elements(case, seed):
    rng, (shape, *_) = np.random.default_rng(seed), case
    rank = len(shape)
    axes = tuple(int(a) for a in rng.permutation(rank)[: rng.integers(0, rank + 1)])
    axis = int(rng.integers(-rank, rank))
    order = tuple(int(a) for a in rng.permutation(rank))
    keepdims = bool(rng.integers(0, 2))
    splits = [(-1,), tuple(reversed(shape)), (1, *shape)] if 0 not in shape else [tuple(reversed(shape))]
    functions = [
        lambda x: ops.transpose(x, order),
        ops.transpose,
        lambda x: ops.reshape(x, splits[seed % len(splits)]),
        lambda x: ops.expand_dims(x, axis),
        lambda x: ops.squeeze(ops.expand_dims(x, (0, rank + 1)), 0),
        lambda x: ops.squeeze(x),
        lambda x: ops.concatenate([x, x, x], axis),
        lambda x: ops.sum(x, axes, keepdims),
        lambda x: ops.sum(x, keepdims=keepdims),
        lambda x: ops.cast(x, "float32"),
    ]
    if all(shape[a] for a in range(rank)):
        functions.append(lambda x: ops.mean(x, axes, keepdims))
    x, dense = sparse_and_dense(case)
    for function in functions:
        result = function(x)
        assert type(result) is SparseTensor
        assert_agree(result, function(dense))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.transpose(x, (1, 0)),
        lambda x: ops.reshape(x, (2, -1)),
        lambda x: ops.expand_dims(x, 1),
        lambda x: ops.concatenate([x, ops.negative(x)], 1),
        lambda x: ops.sum(x, axis=0),
        lambda x: ops.sum(x),
        lambda x: ops.mean(x, axis=1, keepdims=True),
        lambda x: ops.square(x),
        lambda x: ops.add(x, ops.square(x)),
        lambda x: ops.maximum(x, ops.negative(x)),
        lambda x: ops.multiply(x, ops.square(x)),
        lambda x: ops.multiply(x, np.arange(3, dtype="float32")),
        lambda x: ops.divide(x, np.array([1, 2, 4], "float32")),
        lambda x: ops.divide(x, np.array([1, 0, np.nan], "float32")),
        lambda x: ops.divide(x, x),
        lambda x: ops.matmul(x, np.ones((3, 2), "float32")),
        lambda x: ops.matmul(x, ops.transpose(x)),
        lambda x: ops.exp(x),
        lambda x: ops.cast(x, "int32"),
        lambda x: ops.digitize(x, np.array([0.1, 2.0])),
        lambda x: ops.digitize(x, np.array([-1.0, 2.0])),
        lambda x: ops.add(ops.expand_dims(x, 0), ops.expand_dims(x, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("nse", [0, 1, 9])
def test_a_trace_agrees_with_arrays(function, nse):
    case = ((4, 3), *entries(np.random.default_rng(nse), (4, 3), nse))
    assert_agree(traced(function, case), function(sparse_and_dense(case)[1]))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("axes", [1, 2])
def test_compiled_functions_agree_with_arrays(axes):
    @kgraph.jit
    def function(indices, values, other, weights):
        x = SparseTensor(indices, values, (6, 5))
        y = ops.add(ops.square(x), ops.multiply(x, other))
        return ops.matmul(y, weights), ops.sum(ops.maximum(x, y), axis=0).to_dense(), ops.divide(x, other).to_dense()

    rng = np.random.default_rng(0)
    other, weights = (rng.random(s).astype("float32") for s in ((6, 5), (5, 3)))
    indices, values = entries(rng, (6, 5), 14, axes)
    dense = dense_of(indices, values, (6, 5))
    y = dense**2 + dense * other
    for found, expected in zip(
        function(indices, values, other, weights), (y @ weights, np.maximum(dense, y).sum(0), dense / other)
    ):
        assert_agree(found, expected)


def test_gradients_by_values():
    indices = np.array([[0, 1], [1, 2], [0, 1]])
    weights = np.arange(6, dtype="float32").reshape(3, 2)

    def loss(values, weights):
        return ops.sum(ops.square(ops.matmul(SparseTensor(indices, values, (2, 3)), weights)))

    def dense_loss(values, weights):
        dense = ops.scatter(indices, values, (2, 3))
        return ops.sum(ops.square(ops.matmul(dense, weights)))

    values = np.array([1, 2, 3], "float32")
    for found, expected in zip(
        kgraph.grad(loss, (0, 1))(values, weights), kgraph.grad(dense_loss, (0, 1))(values, weights)
    ):
        assert_agree(found, expected)


# -- products of matrices ----------------------------------------------------------------------------------------------
@many
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(0, 6),
    st.sampled_from(["float32", "float16", "int32", "int8"]),
)
def test_products_of_matrices(seed, sizes, nse, dtype):
    rng, (b, m, k, n) = np.random.default_rng(seed), sizes
    shapes = [((m, k), (k, n)), ((b, m, k), (k, n)), ((m, 40), (40, n)), ((k,), (k, n)), ((b, m, k), (b, k, n))]
    first, second = shapes[seed % len(shapes)]
    cases = [(s, *entries(rng, s, nse, dtype=dtype)) for s in (first, second)]
    (x, dense_x), (y, dense_y) = (sparse_and_dense(c) for c in cases)
    expected = ops.matmul(dense_x, dense_y)
    for result, is_sparse in (
        (ops.matmul(x, dense_y), False),
        (ops.matmul(dense_x, y), False),
        (ops.matmul(x, y), True),
    ):
        assert (type(result) is SparseTensor) == is_sparse
        assert_agree(result, expected)
    for function in (ops.dot, lambda a, b: ops.tensordot(a, b, axes=1)) if len(second) == 2 else ():
        assert_agree(function(x, dense_y), function(dense_x, dense_y))


def test_a_product_with_few_entries_makes_nothing_dense(monkeypatch):
    monkeypatch.setattr(SparseTensor, "to_dense", lambda self: pytest.fail("made dense"))
    indices, values = entries(np.random.default_rng(0), (4, 10**9), 5)
    x = SparseTensor(indices, values, (10**9, 4)[::-1])
    assert ops.sum(x, axis=1).shape == (4,)
    y = SparseTensor([[0, 7], [3, 2]], [1.0, 2.0], (4, 1000))
    product = ops.matmul(y, np.ones((1000, 2), "float32"))
    np.testing.assert_array_equal(product, [[1, 1], [0, 0], [0, 0], [2, 2]])
    np.testing.assert_array_equal(ops.matmul(np.ones((2, 1000), "float32"), ops.transpose(y)), product.T)
    with pytest.raises(ValueError, match="do not fit"):
        ops.matmul(y, np.ones((999, 2), "float32"))


def test_more_places_than_can_be_counted():
    x = SparseTensor([[0, 0], [0, 0]], [1.0, 2.0], (2**40, 2**40))
    with pytest.raises(InputError, match="more places"):
        ops.square(x)


# -- encodings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
def test_one_hot_and_multi_hot(axis, dtype):
    classes = np.array([[0, 3, 3], [-1, 5, 2]])
    for function in (ops.one_hot, ops.multi_hot):
        expected = function(classes, 4, axis=axis, dtype=dtype)
        result = function(classes, 4, axis=axis, dtype=dtype, sparse=True)
        assert type(result) is SparseTensor
        assert_agree(result, expected)
        assert result.nse == np.count_nonzero(expected)
        both(lambda c: function(c, 4, axis=axis, dtype=dtype, sparse=True).to_dense(), classes)  # noqa: B023


def test_bincount():
    x, weights = np.array([[1, 2, 2], [0, 5, 1]]), np.array([[1, 2, 4], [8, 16, 32]])
    for kwargs in ({}, {"weights": weights}, {"minlength": 9}):
        expected = ops.bincount(x, **kwargs)
        result = ops.bincount(x, sparse=True, **kwargs)
        assert type(result) is SparseTensor
        assert_agree(result, expected)
    # Of a sparse tensor the entries count, not the zeros between them.
    indices = np.array([[0, 1], [0, 3], [1, 0]])
    sparse = SparseTensor(indices, np.array([2, 2, 1]), (2, 4))
    by = SparseTensor(indices, np.array([10, 20, 30]), (2, 4))
    assert_agree(ops.bincount(sparse), np.array([[0, 0, 2], [0, 1, 0]], "int32"))
    np.testing.assert_array_equal(ops.bincount(sparse, weights=by), [[0, 0, 30], [0, 30, 0]])
    with pytest.raises(ValueError, match="entries differ"):
        ops.bincount(sparse, weights=SparseTensor(indices[:, ::-1] % 2, np.array([10, 20, 30]), (2, 4)))
    with pytest.raises(ValueError, match="weights` are not"):
        ops.bincount(sparse, weights=np.ones((2, 4)))


# -- everything else ---------------------------------------------------------------------------------------------------
# The first counts entries, not the zeros between them; the others take functions.
OTHERS = "bincount while_loop scan map cond fori_loop switch vectorized_map associative_scan custom_gradient".split()


@pytest.mark.filterwarnings("ignore")
def test_every_function_gives_for_sparse_tensors_what_it_gives_for_dense_ones():
    x, dense = sparse_and_dense(((2, 3), np.array([[0, 0], [1, 2], [0, 0]]), np.array([1, 2, 3], "float32")))
    agreeing = 0
    for name, function in sorted(vars(ops).items()):
        if name.startswith("_") or not callable(function) or isinstance(function, type) or name in OTHERS:
            continue
        for arguments, plain in (
            ((x,), (dense,)),
            ((x, x), (dense, dense)),
            ((x, dense), (dense, dense)),
            ((dense, x), (dense, dense)),
            (([x, dense],), ([dense, dense],)),
            ((x, 0), (dense, 0)),
        ):
            try:
                expected = function(*plain)
            except Exception:
                continue  # not a function of such arguments
            result = function(*arguments)
            for found, value in zip(keras.tree.flatten(result), keras.tree.flatten(expected), strict=True):
                if ops.is_tensor(value):
                    assert_agree(found, value)
                    agreeing += 1
    assert agreeing > 500


# -- shape inference ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [None, 4])
def test_shape_inference(size):
    from kgraph.frontend.keras_backend.core import compute_output_spec

    x, dense = keras.KerasTensor((size, 3), sparse=True), keras.KerasTensor((size, 3))
    for function, shape, is_sparse in (
        (ops.square, (size, 3), True),
        (lambda x: ops.add(x, x), (size, 3), True),
        (lambda x: ops.multiply(x, np.ones((3,), "float32")), (size, 3), True),
        (lambda x: ops.divide(x, np.array([1, 0, 2], "float32")), (size, 3), True),
        (lambda x: ops.matmul(x, np.ones((3, 5), "float32")), (size, 5), False),
        (lambda x: ops.sum(x, axis=1), (size,), True),
        (lambda x: ops.reshape(x, (-1,)), (None if size is None else 12,), True),
        (lambda x: ops.cast(x, "int32"), (size, 3), True),
        (ops.exp, (size, 3), False),
        (lambda x: ops.take(np.ones((7, 2), "float32"), ops.cast(x, "int32"), axis=0), (size, 3, 2), False),
    ):
        spec = compute_output_spec(function, x)
        assert (spec.shape, spec.sparse) == (shape, is_sparse)
    spec = compute_output_spec(ops.divide, x, dense)
    assert (spec.shape, spec.sparse) == ((size, 3), True)
    constant = SparseTensor([[0, 1]], [1.0], (4, 3))
    assert compute_output_spec(lambda y: ops.square(y), constant).sparse
