"""Keras' array functions: eager against NumPy, traced against eager, with a symbolic batch against concrete ones."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.errors import CaptureError, UnsupportedError
from kgraph.frontend.keras_backend import numpy as backend
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType, np_dtype, type_of
from kgraph.ir.interpreter import evaluate
from tests.frontend.numpy_cases import BATCH, CASES, Case

N = Dim.symbol("N")


def flat(result) -> list:
    """The tensors of a result, with Python numbers and sizes as they are."""
    if isinstance(result, (tuple, list)):
        return [r for item in result for r in flat(item)]
    return [result]


def tensors(arguments) -> list[np.ndarray]:
    if isinstance(arguments, np.ndarray):
        return [arguments]
    if isinstance(arguments, (tuple, list)):
        return [a for item in arguments for a in tensors(item)]
    return []


def with_tensors(arguments, replacements):
    """The arguments with their arrays replaced, in order, by what the iterator gives."""
    if isinstance(arguments, np.ndarray):
        return next(replacements)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(with_tensors(item, replacements) for item in arguments)
    return arguments


def call(case: Case, arrays):
    arguments = with_tensors((case.args, tuple(case.kwargs.values())), iter(arrays))
    kwargs = dict(zip(case.kwargs, arguments[1], strict=True))
    return getattr(backend, case.name)(*arguments[0], **kwargs)


def arrays_of(case: Case) -> list[np.ndarray]:
    return tensors((case.args, tuple(case.kwargs.values())))


def check(actual, expected, tolerance: float):
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape
        if a.dtype.kind in "biu" and e.dtype.kind in "biu":
            np.testing.assert_array_equal(a, e)
        else:
            np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def select(condition) -> list:
    return [pytest.param(c, id=f"{i}-{c}") for i, c in enumerate(CASES) if condition(c)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", select(lambda c: c.name != "vectorize"))
def test_eager_gives_what_numpy_gives(case):
    expected = (case.expected or getattr(np, case.name))(*case.args, **case.kwargs)
    actual = call(case, arrays_of(case))
    for a in flat(actual):
        assert not isinstance(a, np.ndarray) or a.dtype not in ("float64", "complex128") or case.name == "view"
    check(actual, expected, case.tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", select(lambda c: c.traceable and arrays_of(c)))
def test_traced_gives_what_eager_gives(case):
    arrays = arrays_of(case)
    eager = flat(call(case, arrays))
    graph = trace(lambda *xs: flat(call(case, xs)), *arrays)
    for value, result in zip(graph.outputs, eager, strict=True):
        if isinstance(result, np.ndarray):
            assert value.type == type_of(result)
    check(evaluate(graph, arrays), eager, 1e-6)


def symbolic_type(array: np.ndarray) -> TensorType:
    kind = type_of(array)
    is_batch = array.ndim > 0 and array.shape[0] == BATCH
    return kind.with_shape((N, *array.shape[1:])) if is_batch else kind


def has_batch(case: Case) -> bool:
    return any(a.ndim > 0 and a.shape[0] == BATCH for a in arrays_of(case))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", select(lambda c: c.traceable and c.symbolic and has_batch(c)))
def test_a_symbolic_batch_serves_every_size(case):
    arrays = arrays_of(case)
    graph = trace(lambda *xs: flat(call(case, xs)), *map(symbolic_type, arrays))
    for size in (BATCH, 2):
        cut = [a[:size] if a.ndim > 0 and a.shape[0] == BATCH else a for a in arrays]
        check(evaluate(graph, cut), flat(call(case, cut)), 1e-6)


@pytest.mark.parametrize("case", select(lambda c: not c.traceable and arrays_of(c)))
def test_shapes_that_depend_on_values_are_refused_under_trace(case):
    with pytest.raises((UnsupportedError, CaptureError), match=r"keras\.ops|value"):
        trace(lambda *xs: flat(call(case, xs)), *arrays_of(case))


def test_every_function_has_a_case():
    covered = {c.name for c in CASES}
    assert set(backend.__all__) == covered


def test_symbolic_sizes_serve_as_shapes_and_as_numbers():
    row = np.arange(3, dtype="float32")

    def function(x):
        n = x.shape[0]
        return [
            backend.arange(n),
            backend.arange(1, 2 * n, 2, dtype="float32"),
            backend.arange(n, 0, -1),
            backend.ones((n, 2)),
            backend.full((n,), n),
            backend.eye(n, k=1),
            backend.tri(n),
            backend.tile(row, (n, 1)),
            backend.repeat(row, n),
            backend.broadcast_to(row, (n, 3)),
            backend.reshape(x, (n, -1)),
            backend.reshape(x, (-1, 1)),
            backend.add(x, n),
            backend.multiply(2, n),
            backend.pad(x, ((0, 1), (n, 0))),
            backend.roll(x, 1, axis=0),
            backend.sum(x) / n,
            backend.split(backend.concatenate([x, x]), 2)[1],
            backend.array_split(x, [1])[1],
            backend.meshgrid(backend.arange(n), row)[0],
            backend.diag(x[:, 0]),
            backend.diff(x, axis=0),
            backend.quantile(x, 0.25, axis=0),
            backend.vander(x[:, 0], 3),
        ]

    graph = trace(function, TensorType((N, 3), "float32"))
    for size in (5, 2):
        x = np.arange(3 * size, dtype="float32").reshape(size, 3)
        check(evaluate(graph, [x]), function(x), 1e-6)


def test_python_lists_of_traced_values_are_tensors():
    graph = trace(lambda x: backend.concatenate([[x, 1.0], backend.stack([x, x])]), TensorType((), "float32"))
    np.testing.assert_array_equal(evaluate(graph, [np.float32(2)])[0], [2, 1, 2, 2])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: backend.reshape(np.ones(6), (4, -1)), "do not fit"),
        (lambda: backend.split(np.ones(5), 2), "array_split"),
        (lambda: backend.squeeze(np.ones((2, 3)), 0), "not of size 1"),
        (lambda: backend.stack([np.ones(2), np.ones(3)]), "same shape"),
        (lambda: backend.sum(np.ones((2, 3)), axis=2), "out of bounds"),
        (lambda: backend.sum(np.ones((2, 3)), axis=(0, 0)), "twice"),
        (lambda: backend.max(np.ones((0, 3)), axis=0), "no elements"),
        (lambda: backend.transpose(np.ones((2, 3)), (0, 0)), "not an order"),
        (lambda: backend.pad(np.ones(3), 1, "reflect", constant_values=1), "constant_values"),
        (lambda: backend.pad(np.ones(3), -1), "negative"),
        (lambda: backend.where(True, 1.0), "both"),
        (lambda: backend.quantile(np.ones(3), 0.5, method="best"), "method"),
        (lambda: backend.cross(np.ones(4), np.ones(4)), "2 or 3"),
    ],
)
def test_wrong_arguments_are_named(call, error):
    with pytest.raises(ValueError, match=error):
        call()


# Functions that are computed in float32 where half precision would lose digits or overflow.
IN_HALF_PRECISION = "sin tanh exp log1p abs sum mean max var std cumsum sort median logaddexp add multiply".split()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", IN_HALF_PRECISION)
def test_half_precision_keeps_its_dtype_and_digits(name, dtype):
    function = getattr(backend, name)
    narrow = np.linspace(0.5, 2.0, 40).astype(np_dtype(dtype)).reshape(4, 10)
    operands = (narrow, narrow) if name in ("logaddexp", "add", "multiply") else (narrow,)
    actual = function(*operands)
    assert actual.dtype.name == dtype
    exact = function(*(x.astype("float32") for x in operands))
    np.testing.assert_allclose(actual.astype("float32"), exact, rtol=1e-3 if dtype == "float16" else 8e-3)


def test_long_sums_of_half_floats_do_not_overflow_on_the_way():
    x = np.full((70000,), 1.0, "float16")
    assert float(backend.mean(x)) == 1.0
    assert float(backend.var(x * np.float16(3))) == 0.0
