"""The order of windows: a bijection for every size, the same for ever, and not visibly an order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.data.order import SMALL, Order, mix64, permutation


def test_the_mixer_is_the_published_one():
    """The first outputs of SplitMix64 from state 1234567, as its reference implementation in C prints them."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.array([1234567], np.uint64) + np.arange(1, 6, dtype=np.uint64) * golden
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert mix64(states).tolist() == [*expected, 16408922859458223821]


# (seed, windows): the first windows of epochs 0, 1 and 2. An order that changes breaks every run that is resumed.
STORED = {
    (0, 5): [[1, 2, 0, 3, 4], [0, 2, 4, 3, 1], [0, 4, 2, 1, 3]],
    (1, 1000): [[743, 144, 709, 200, 891], [380, 16, 45, 178, 925], [55, 283, 519, 254, 384]],
    (7, 4096): [[563, 2112, 588, 540, 2909], [1178, 1869, 140, 1859, 2822], [1786, 2455, 761, 3598, 1065]],
    (0, 4097): [[1138, 517, 3882, 3556, 1461], [3276, 1066, 1697, 187, 3175], [1182, 2629, 1960, 2336, 223]],
    (1, 41410): [
        [24502, 28488, 40344, 37685, 34665],
        [3752, 25078, 30988, 19311, 1097],
        [37264, 7679, 24295, 23675, 12844],
    ],
    (2**64 - 1, 150_000_000): [
        [97221332, 92705814, 45121281, 74438157, 71771301],
        [105886387, 98574141, 83076029, 77924166, 31878986],
        [139864292, 116439905, 139674626, 94177577, 144577726],
    ],
}


@pytest.mark.parametrize(("seed", "windows"), STORED)
def test_an_order_never_changes(seed, windows):
    order = Order(seed, windows)
    assert [order.windows(epoch * windows, 5).tolist() for epoch in range(3)] == STORED[seed, windows]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, SMALL - 1, SMALL, SMALL + 1, 2**13, 2**14, 2**14 + 1, 50_021])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_epoch_visits_every_window_once(n, seed):
    for epoch in (0, 1, 10**12):
        assert np.array_equal(np.sort(permutation(np.arange(n), n, seed, epoch)), np.arange(n))


@given(
    seed=st.integers(0, 2**64 - 1),
    size=st.integers(1, 3 * SMALL),
    first=st.integers(0, 10**15),
    cuts=st.lists(st.integers(0, 400), min_size=1, max_size=5),
)
@settings(deadline=None)  # a busy machine is not a fault
def test_where_the_asking_is_cut_does_not_matter(seed, size, first, cuts):
    order = Order(seed, size)
    parts, start = [], first
    for count in cuts:
        parts.append(order.windows(start, count))
        start += count
    assert np.array_equal(np.concatenate(parts), order.windows(first, start - first))


@pytest.mark.parametrize("n", [1000, 30_000])
def test_the_order_is_not_visibly_an_order(n):
    """Rank correlations with the position, between neighbours, epochs and seeds: within 4.5 standard deviations."""
    here = np.arange(n)
    perms = [permutation(here, n, seed, epoch) for seed in range(4) for epoch in range(4)]
    correlations = [np.corrcoef(perm, here)[0, 1] for perm in perms]
    correlations += [np.corrcoef(perm[1:], perm[:-1])[0, 1] for perm in perms]
    correlations += [np.corrcoef(one, other)[0, 1] for i, one in enumerate(perms) for other in perms[:i]]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n)


def test_small_orders_are_even():
    """Each of the 24 orders of 4 windows about equally often: chi-squared over 23 degrees of freedom, 99.99 % point."""
    seen = [tuple(permutation(np.arange(4), 4, seed, 0)) for seed in range(4800)]
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 56


def test_large_orders_stay_in_bounds():
    n = 150_000_000_001
    windows = Order(3, n).windows(5 * n + 17, 4096)
    assert windows.dtype == np.int64
    assert 0 <= windows.min() < windows.max() < n
    assert len(np.unique(windows)) == 4096


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"seed=-1 must be in 0..2\^64-1"):
        Order(-1, 5)
    with pytest.raises(ValueError, match="windows=0 must be at least 1"):
        Order(0, 0)
    with pytest.raises(ValueError, match="first_sample=-3"):
        Order(0, 5).windows(-3, 1)
