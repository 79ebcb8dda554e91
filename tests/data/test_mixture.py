"""Mixtures: exact in every block, no draw twice or left out, whatever the phases, and the same for ever."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openxlstm.data.mixture import BLOCK, Mixture, counts

SEVEN_B = (0.40, 0.15, 0.10, 0.15, 0.15, 0.05)  # the second stage of xLSTM-7B


def test_every_block_holds_exactly_its_shares():
    mixture = Mixture(SEVEN_B, (), seed=3)
    for block in (0, 1, 2, 10**9):
        source, _ = mixture.draws(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert np.bincount(source).tolist() == [400, 150, 100, 150, 150, 50]


def test_a_block_is_well_mixed():
    """In the 50 windows of 20 samples of a block the biggest source is neither absent nor alone."""
    source, _ = Mixture(SEVEN_B, (), seed=0).draws(np.arange(BLOCK))
    share = (source == 0).reshape(-1, 20).sum(axis=1)
    assert 1 <= share.min() < share.max() <= 17


weights = st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any)


@given(weights=weights)
def test_counts_are_the_nearest_whole_shares(weights):
    made = counts(weights)
    exact = np.array(weights) * BLOCK / sum(weights)
    assert made.sum() == BLOCK
    assert (np.abs(made - exact) < 1).all()


@given(data=st.data(), seed=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=40)
def test_a_source_gives_its_draws_one_after_the_other(data, seed):
    """Over phases that begin anywhere, and in samples asked for in any order."""
    sources = data.draw(st.integers(1, 4))
    mix = st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any)
    begins = sorted(data.draw(st.sets(st.integers(1, 4000), max_size=3)))
    weights = [data.draw(mix) for _ in range(len(begins) + 1)]
    assume(all(map(any, zip(*weights))))
    mixture = Mixture(weights[0], list(zip(begins, weights[1:])), seed)
    samples = np.arange(5000)
    source, draw = mixture.draws(samples)
    for number in range(sources):
        assert np.array_equal(draw[source == number], np.arange((source == number).sum()))
    some = np.array(data.draw(st.lists(st.integers(0, 4999), max_size=50)), np.int64)
    for asked, whole in zip(mixture.draws(some), (source, draw)):
        assert np.array_equal(asked, whole[some])


def test_a_phase_begins_at_its_sample_with_its_own_shares():
    mixture = Mixture((1, 1), [(1500, (0, 3))], seed=0)
    source, _ = mixture.draws(np.arange(3000))
    assert np.bincount(source[:1000]).tolist() == [500, 500]
    assert set(source[1000:1500].tolist()) == {0, 1}
    assert (source[1500:] == 1).all()


def test_one_source_is_read_in_its_own_order():
    source, draw = Mixture((7,), [(30, (2,))], seed=5).draws(np.arange(100))
    assert not source.any()
    assert np.array_equal(draw, np.arange(100))


# (seed, first sample): sources of the next 12 samples of the six sources above. A mixture that changes breaks runs.
STORED = {
    (0, 0): [4, 0, 0, 1, 2, 0, 0, 0, 0, 4, 0, 4],
    (0, 1000): [0, 0, 4, 0, 2, 5, 0, 1, 0, 0, 0, 5],
    (2**64 - 1, 10**12): [0, 1, 0, 0, 0, 2, 5, 0, 4, 1, 0, 0],
}


@pytest.mark.parametrize(("seed", "first"), STORED)
def test_a_mixture_never_changes(seed, first):
    source, _ = Mixture(SEVEN_B, (), seed).draws(np.arange(first, first + 12))
    assert source.tolist() == STORED[seed, first]


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weight 0.0004 of \[1, 0.0004\] is less than one sample in 1000"):
        counts((1, 0.0004))
    for wrong in ((), (0, 0), (1, -1), (1, float("nan")), (float("inf"),)):
        with pytest.raises(ValueError, match="must be finite, not negative, and not all 0"):
            counts(wrong)
    with pytest.raises(ValueError, match=r"weights \[1\], but there are 2 sources"):
        Mixture((1, 1), [(5, (1,))], 0)
    with pytest.raises(ValueError, match=r"sources \[0, 2\], counted from 0, have weight 0 in every phase"):
        Mixture((0, 1, 0), [(5, (0, 2, 0))], 0)
    for begins in ((0,), (7, 7), (9, 8)):
        with pytest.raises(ValueError, match="must rise, from above 0"):
            Mixture((1, 1), [(begin, (1, 1)) for begin in begins], 0)
