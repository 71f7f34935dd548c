import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.runtime.arena import ALIGNMENT, Interval, lower_bound, plan_arena

intervals = st.lists(
    st.builds(
        lambda nbytes, first, span: Interval(nbytes, first, first + span),
        st.one_of(st.integers(0, 300), st.integers(0, 5_000_000)),
        st.integers(0, 40),
        st.integers(0, 12),
    ),
    max_size=40,
)


def check(buffers, offsets, peak):
    assert peak >= lower_bound(buffers)
    for a, (one, start) in enumerate(zip(buffers, offsets)):
        assert start % ALIGNMENT == 0
        assert start >= 0
        assert start + one.nbytes <= peak or one.nbytes == 0
        for other, begin in list(zip(buffers, offsets))[:a]:
            if one.first <= other.last and other.first <= one.last and one.nbytes and other.nbytes:
                assert start + one.nbytes <= begin or begin + other.nbytes <= start


@settings(max_examples=300, deadline=None)
@given(intervals)
def test_live_buffers_do_not_overlap(buffers):
    if buffers:
        check(buffers, *plan_arena(buffers))


@settings(max_examples=200, deadline=None)
@given(intervals.filter(bool))
def test_peak_is_near_the_lower_bound(buffers):
    assert plan_arena(buffers)[1] <= 1.7 * lower_bound(buffers)


def test_peak_is_near_the_lower_bound_on_average():
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        first = random.integers(0, 60, 50)
        span = random.geometric(0.3, 50)
        size = np.exp(random.uniform(5, 16, 50)).astype(int)
        buffers = [Interval(int(n), int(f), int(f + s)) for n, f, s in zip(size, first, span)]
        ratios.append(plan_arena(buffers)[1] / lower_bound(buffers))
    assert np.mean(ratios) < 1.03


def test_chain_needs_two_buffers():
    buffers = [Interval(1000, i, i + 1) for i in range(50)]
    assert plan_arena(buffers)[1] == 2 * 1024


def test_residual_branches():
    buffers = []
    for block in range(10):
        at = block * 3
        buffers += [Interval(640, at, at + 3), Interval(6400, at + 1, at + 2), Interval(6400, at + 2, at + 3)]
    assert plan_arena(buffers)[1] <= 1.05 * lower_bound(buffers)


def test_nothing_to_place():
    assert lower_bound([]) == 0
    assert plan_arena([Interval(0, 0, 3)]) == ([0], 0)
