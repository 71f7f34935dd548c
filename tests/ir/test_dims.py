"""Symbolic sizes against plain ints: every operation agrees with int arithmetic under `evaluate`."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.errors import DimDecisionError
from kgraph.ir.dims import Dim, ceil_div, evaluate, product, substitute, symbols
from kgraph.ir.parser import _Parser

NAMES = ("K", "M", "N")
N, M, K = (Dim.symbol(name) for name in "NMK")

sizes_of = st.fixed_dictionaries({name: st.integers(1, 40) for name in NAMES})
leaves = st.one_of(st.integers(-9, 9), st.sampled_from([N, M, K]))


def _extend(inner):
    binary = st.tuples(st.sampled_from("+-*"), inner, inner).map(_apply)
    division = st.tuples(st.just("//"), inner, st.integers(1, 6)).map(_apply)
    return binary | division


def _apply(parts):
    op, a, b = parts
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b}[op]()


dims = st.recursive(leaves, _extend, max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(dims, dims, sizes_of, st.integers(1, 7))
def test_arithmetic_agrees_with_ints(a, b, sizes, divisor):
    x, y = evaluate(a, sizes), evaluate(b, sizes)
    assert evaluate(a + b, sizes) == x + y
    assert evaluate(a - b, sizes) == x - y
    assert evaluate(a * b, sizes) == x * y
    assert evaluate(a // divisor, sizes) == x // divisor
    assert evaluate(a // -divisor, sizes) == x // -divisor
    assert evaluate(a % divisor, sizes) == x % divisor
    assert evaluate(ceil_div(a, divisor), sizes) == -(-x // divisor)
    assert evaluate(-a + 3, sizes) == 3 - x
    assert evaluate(2 * a - b * 3 + 1, sizes) == 2 * x - y * 3 + 1


@settings(max_examples=300, deadline=None)
@given(dims, dims, sizes_of)
def test_an_answer_about_order_holds_for_all_sizes(a, b, sizes):
    x, y = evaluate(a, sizes), evaluate(b, sizes)
    for compare in (
        lambda p, q: p < q,
        lambda p, q: p <= q,
        lambda p, q: p > q,
        lambda p, q: p >= q,
    ):
        try:
            answer = compare(a, b)
        except DimDecisionError:
            continue
        assert answer == compare(x, y)


@settings(max_examples=300, deadline=None)
@given(dims, sizes_of)
def test_bounds_hold(a, sizes):
    if isinstance(a, Dim):
        value, low, high = a.evaluate(sizes), a.lower_bound(), a.upper_bound()
        assert low is None or low <= value
        assert high is None or value <= high


@settings(max_examples=200, deadline=None)
@given(dims, dims, sizes_of)
def test_equal_sizes_are_equal_everywhere_and_hash_alike(a, b, sizes):
    try:
        equal = a == b
    except DimDecisionError:
        return
    if equal:
        assert hash(a) == hash(b)
        assert evaluate(a, sizes) == evaluate(b, sizes)


@settings(max_examples=200, deadline=None)
@given(dims, dims)
def test_exact_division_undoes_multiplication(a, b):
    if isinstance(b, Dim):
        assert (a * b) // b == a


@settings(max_examples=200, deadline=None)
@given(dims, dims, sizes_of)
def test_substitution_agrees_with_evaluation(a, b, sizes):
    whole = substitute(a, {"N": b})
    assert evaluate(whole, sizes) == evaluate(a, sizes | {"N": evaluate(b, sizes)})
    assert substitute(a, sizes) == evaluate(a, sizes)


@settings(max_examples=200, deadline=None)
@given(dims)
def test_text_reads_back_and_pickle_too(a):
    assert _Parser(str(a), {}).expression() == a
    assert pickle.loads(pickle.dumps(a)) == a
    assert hash(pickle.loads(pickle.dumps(a))) == hash(a)


def test_canonical_forms():
    assert N + N == 2 * N
    assert (N + M) * (N - M) == N * N - M * M
    assert (6 * N) // 4 == N + N // 2
    assert (2 * N) // 4 == N // 2
    assert ((N + 1) // 2 + 1) // 2 == (N + 3) // 4
    assert (2 * N + 1) // 2 == N
    assert N - N == 0
    assert isinstance((N + 3) - N, int)
    assert (N * M * 12) // (M * 4) == 3 * N
    assert (N * (2 * M + 1) * (2 * K + 1)) // ((2 * M + 1) * (2 * K + 1)) == N
    assert 0 // N == 0
    assert product((2, N, 3)) == 6 * N
    assert symbols((N // 2, 3, M)) == {"N", "M"}


def test_order_that_holds_for_all_sizes():
    assert N >= 1
    assert N > 0
    assert N + 1 > N
    assert N * M >= N
    assert N * N >= N
    assert N // 2 <= N
    assert (N + 1) // 2 <= N
    assert (N + 1) // 2 >= 1
    assert min(N, N + 1) is N
    assert max(N, 1) is N
    assert bool(N)
    assert np.int64(0) < N


@pytest.mark.parametrize(
    "question",
    [
        lambda: N >= 2,
        lambda: N > M,
        lambda: N * (M - 3) >= -5,
        lambda: N * ((M - 5) // 2) >= -2,
        lambda: bool(N - 1),
        lambda: bool(N % 2),
        lambda: N % 2 == 0,
        lambda: N % 2 == 1,
        lambda: int(N),
        lambda: float(N),
        lambda: N / 2,
        lambda: 1 / N,
        lambda: N**0.5,
        lambda: (N + 1) // N,
        lambda: 5 // N,
        lambda: np.zeros((N,)),
        lambda: range(N),
    ],
)
def test_questions_without_a_symbolic_answer_raise(question):
    with pytest.raises(DimDecisionError):
        question()


def test_generic_inequality():
    assert N != 1
    assert N != M
    assert N // 2 != 1
    assert N % 2 != 2
    assert (N + 1) // 2 != N // 2
    assert N not in (1, 2, M)


def test_numpy_integers_behave_as_ints():
    for value in (np.int64(3) + N, N + np.int32(3), np.int64(3) * N, np.int64(3) - N):
        assert isinstance(value, Dim)
    assert np.int64(3) + N == N + 3
    assert np.int64(3) * N == N * 3
    assert (N * 6) // np.int64(3) == 2 * N
    assert np.int64(1) != N


def test_zero_division():
    with pytest.raises(ZeroDivisionError):
        N // 0


def test_missing_symbol():
    with pytest.raises(KeyError):
        (N + M).evaluate({"N": 1})
