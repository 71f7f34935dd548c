"""Random functions: distributions, reproducibility, dtypes, and the same numbers under trace."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kgraph.frontend.keras_backend import random as backend
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.interpreter import evaluate

N = Dim.symbol("N")
MANY = (20000,)
SEED = np.array([3, 7], "uint32")
SEED_TYPE = TensorType((2,), "uint32")

DRAWS = {
    "normal": lambda seed: backend.normal(MANY, 1.0, 2.0, seed=seed),
    "uniform": lambda seed: backend.uniform(MANY, -1.0, 3.0, seed=seed),
    "truncated_normal": lambda seed: backend.truncated_normal(MANY, 1.0, 2.0, seed=seed),
    "gamma": lambda seed: backend.gamma(MANY, 2.5, seed=seed),
    "beta": lambda seed: backend.beta(MANY, 2.0, 3.0, seed=seed),
    "binomial": lambda seed: backend.binomial(MANY, 10, 0.3, seed=seed),
    "randint": lambda seed: backend.randint(MANY, -3, 4, seed=seed),
    "categorical": lambda seed: backend.categorical(np.log([[0.2, 0.3, 0.5]]).astype("float32"), 20000, seed=seed)[0],
    "shuffle": lambda seed: backend.shuffle(np.arange(20000, dtype="int32"), seed=seed),
    "dropout": lambda seed: backend.dropout(np.ones(MANY, "float32"), 0.25, seed=seed),
}
CONTINUOUS = {
    "normal": stats.norm(1, 2),
    "uniform": stats.uniform(-1, 4),
    "truncated_normal": stats.truncnorm(-2, 2, 1, 2),
    "gamma": stats.gamma(2.5),
    "beta": stats.beta(2, 3),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_distributions(name):
    assert stats.kstest(DRAWS[name](SEED), CONTINUOUS[name].cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "values", "probabilities"),
    [
        ("randint", range(-3, 4), [1 / 7] * 7),
        ("categorical", range(3), [0.2, 0.3, 0.5]),
        ("binomial", range(11), stats.binom(10, 0.3).pmf(np.arange(11))),
        ("dropout", [0.0, 1 / 0.75], [0.25, 0.75]),
    ],
)
def test_discrete_distributions(name, values, probabilities):
    sample = DRAWS[name](SEED)
    counts = [np.isclose(sample, v).sum() for v in values]
    assert sum(counts) == sample.size
    assert stats.chisquare(counts, np.asarray(probabilities) * sample.size).pvalue > 1e-3


def test_shuffle_keeps_every_element_and_shuffles_lines_apart():
    x = np.broadcast_to(np.arange(100, dtype="int32")[:, None], (100, 2))
    out = backend.shuffle(x, seed=SEED)
    np.testing.assert_array_equal(np.sort(out, axis=0), x)
    assert (out[:, 0] != out[:, 1]).any()


@pytest.mark.parametrize("name", DRAWS)
def test_the_seed_decides(name):
    np.testing.assert_array_equal(DRAWS[name](SEED), DRAWS[name](SEED))
    np.testing.assert_array_equal(DRAWS[name](42), DRAWS[name](42))
    assert (DRAWS[name](SEED) != DRAWS[name](SEED + np.uint32(1))).any()


@pytest.mark.parametrize("name", DRAWS)
def test_a_traced_seed_gives_the_same_numbers(name):
    graph = trace(DRAWS[name], SEED_TYPE)
    (actual,) = evaluate(graph, [SEED])
    np.testing.assert_array_equal(actual, DRAWS[name](SEED))


def test_generators_draw_anew_each_time():
    generator = backend.SeedGenerator(1)
    assert (backend.normal((9,), seed=generator) != backend.normal((9,), seed=generator)).all()


def test_dropout_by_rate():
    x = np.ones((4, 3), "float32")
    assert backend.dropout(x, 0.0, seed=SEED) is x
    np.testing.assert_array_equal(backend.dropout(x, 1.0, seed=SEED), 0 * x)


def test_dropout_noise_shape_drops_whole_rows():
    out = backend.dropout(np.ones((50, 8), "float32"), 0.5, noise_shape=(None, 1), seed=SEED)
    assert set(out.sum(axis=1)) == {0.0, 16.0}


def test_dropout_of_a_symbolic_batch():
    graph = trace(lambda x, seed: backend.dropout(x, 0.5, seed=seed), TensorType((N, 3), "float32"), SEED_TYPE)
    x = np.ones((7, 3), "float32")
    (actual,) = evaluate(graph, [x, SEED])
    np.testing.assert_array_equal(actual, backend.dropout(x, 0.5, seed=SEED))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["normal", "uniform", "truncated_normal"])
def test_float_dtypes(name, dtype):
    out = getattr(backend, name)((100,), dtype=dtype, seed=SEED)
    assert out.dtype.name == dtype
    assert np.isfinite(out.astype("float32")).all()


def test_uniform_never_reaches_its_upper_end():
    out = backend.uniform((200000,), 1.0, np.nextafter(np.float32(1), np.float32(2)), seed=SEED)
    assert (out == 1.0).all()
    assert (backend.uniform((200000,), dtype="bfloat16", seed=SEED).astype("float32") < 1).all()


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("uint8", 0, 256), ("int32", -(2**31), 2**31 - 1), ("uint32", 0, 2**32 - 1)]
)
def test_randint_over_the_whole_range(dtype, low, high):
    out = backend.randint((1000,), low, high, dtype=dtype, seed=SEED)
    assert out.dtype.name == dtype
    middle = (low + high) / 2
    assert 400 < (out.astype("float64") < middle).sum() < 600
