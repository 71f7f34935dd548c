"""Random numbers: determined by the seed, and distributed as they should be."""

import numpy as np
import pytest
from scipy import stats

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ops import philox
from kgraph.ops.random import unit_interval, words

SEED = np.array([7, 11], np.uint32)
SHAPE = (40, 50)

DRAWS = {
    "uniform": (lambda seed: ops.random_uniform(seed, shape=SHAPE), stats.uniform()),
    "normal": (lambda seed: ops.random_normal(seed, shape=SHAPE), stats.norm()),
    "truncated_normal": (lambda seed: ops.truncated_normal(seed, shape=SHAPE), stats.truncnorm(-2, 2)),
    "gamma": (lambda seed: ops.random_gamma(seed, np.float32(2.5), shape=SHAPE), stats.gamma(2.5)),
    "beta": (lambda seed: ops.random_beta(seed, np.float32(2), np.float32(3), shape=SHAPE), stats.beta(2, 3)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_distributions(name):
    draw, distribution = DRAWS[name]
    values = draw(SEED)
    assert values.dtype == np.float32
    assert stats.kstest(values.reshape(-1), distribution.cdf).pvalue > 0.01


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_determines_the_numbers(name):
    draw, _ = DRAWS[name]
    np.testing.assert_array_equal(draw(SEED), draw(SEED))
    np.testing.assert_array_equal(draw(SEED), draw(SEED.astype(np.int32)))
    for other in ([7, 12], [8, 11], [11, 7]):
        assert np.mean(draw(SEED) == draw(np.array(other, np.uint32))) < 0.01


# The known answers that the authors of Philox publish with their Random123 library: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, result):
    counters = np.array([[c, 5] for c in counter], np.uint32)
    np.testing.assert_array_equal(philox.philox(counters, tuple(key))[:, 0], result)


def test_the_stream_never_changes():
    """Saved models and compiled kernels rely on these very words."""
    np.testing.assert_array_equal(words(SEED, 4), words(SEED, 9)[:4])
    long = words(SEED, 3 * philox.GROUP, stream=5)
    for place in (0, 15, 16, 63, 64, 190):
        group, inside = divmod(place, philox.GROUP)
        word, lane = divmod(inside, philox.LANES)
        counter = np.array([[group * philox.LANES + lane], [0], [5], [0]], np.uint32)
        assert long[place] == philox.philox(counter, (7, 11))[word, 0]
    chunked = words(SEED, 40000)
    np.testing.assert_array_equal(chunked[:300], words(SEED, 300))
    assert len(np.unique(chunked)) > 39990


@pytest.mark.parametrize("stream", [0, 1])
def test_many_words_come_from_the_kernel_and_are_the_same(stream):
    for count in (philox.NATIVE_FROM, 70001):
        for key in ((7, 11), (0xFFFFFFFF, 0x80000000)):
            wanted = philox.words_by_numpy(key, count, stream)
            np.testing.assert_array_equal(philox.words(key, count, stream), wanted)


def test_uniform_numbers_are_multiples_of_the_spacing_below_one():
    x = ops.random_uniform(SEED, shape=(1000,))
    np.testing.assert_array_equal(x * 2.0**24, np.round(x * 2.0**24))
    for dtype in ("float16", "bfloat16", "float64"):
        y = ops.random_uniform(SEED, shape=(5000,), dtype=dtype).astype(np.float64)
        assert (y >= 0).all()
        assert (y < 1).all()
    centred = unit_interval(SEED, (5000,), "float32", centred=True)
    assert (centred.astype(np.float32) == centred).all()
    assert centred.min() > 0
    assert centred.max() < 1


def test_integers_and_bits():
    x = ops.random_integers(SEED, np.int32(-3), np.int32(4), shape=SHAPE)
    assert x.dtype == np.int32
    assert stats.chisquare(np.bincount(x.reshape(-1) + 3, minlength=7)).pvalue > 0.01
    for dtype in ("uint8", "int32", "uint64"):
        bits = ops.random_bits(SEED, shape=(4000,), dtype=dtype)
        assert bits.dtype == dtype
        set_bits = np.unpackbits(bits.view(np.uint8)).mean()
        assert set_bits == pytest.approx(0.5, abs=0.02)


def test_categorical_follows_the_softmax():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.0 + 1e-30, 1, 1e-30, 1e-30]], np.float32))
    x = ops.random_categorical(SEED, logits, num_samples=4000)
    assert x.shape == (2, 4000)
    counts = np.bincount(x[0], minlength=4)
    assert stats.chisquare(counts, 4000 * np.array([0.5, 0.25, 0.125, 0.125])).pvalue > 0.01
    assert (x[1] == 1).all()


def test_binomial_counts():
    x = ops.random_binomial(SEED, np.float32(10), np.float32(0.25), shape=SHAPE)
    assert x.mean() == pytest.approx(2.5, abs=0.1)
    np.testing.assert_array_equal(x, np.round(x))


def test_permutations_shuffle_each_line_by_itself():
    indices = ops.random_permutation(SEED, shape=(3, 9), axis=1)
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(9), (3, 1)))
    assert len({tuple(row) for row in indices}) == 3


def test_wrong_operands_are_refused():
    with pytest.raises(DTypeError, match=r"a seed of type u32\[2\]"):
        ops.random_uniform(np.zeros(3, np.uint32), shape=(2,))
    with pytest.raises(DTypeError, match="random_normal"):
        ops.random_normal(SEED, shape=(2,), dtype="int32")
    with pytest.raises(ShapeError, match="broadcast"):
        ops.random_gamma(SEED, np.ones(3, np.float32), shape=(2,))
    with pytest.raises(ShapeError, match="random_categorical"):
        ops.random_categorical(SEED, np.ones(3, np.float32), num_samples=2)
