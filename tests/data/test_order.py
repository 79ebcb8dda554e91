"""The order of windows: a bijection for every size, the same for ever, and not visibly an order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.data.order import SMALL, Order, Ramp, Skipped, mix64, permutation, rows_of_rank


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


def test_sources_of_one_size_are_not_visited_in_step():
    orders = [Order(1, 1000, stream).windows(0, 1000) for stream in range(4)]
    for i, one in enumerate(orders):
        assert np.array_equal(np.sort(one), np.arange(1000))
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(1000)


def test_the_order_of_a_second_source_never_changes():
    assert Order(7, 4096, 1).windows(0, 5).tolist() == [1135, 2361, 2272, 1272, 803]
    assert Order(7, 150_000_000, 3).windows(0, 3).tolist() == [51055767, 70461109, 109408295]


stairs = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=5).map(
    lambda parts: [[sum(length for length, _ in parts[:i]), size] for i, (_, size) in enumerate(parts)]
)


@given(batch=stairs, step=st.integers(0, 60))
def test_a_ramp_is_the_sum_of_its_steps(batch, step):
    ramp = Ramp.of(batch)
    sizes = [next(size for start, size in reversed(batch) if start <= s) for s in range(step + 1)]
    assert ramp.size(step) == sizes[step]
    assert ramp.consumed(step) == sum(sizes[:step])


def test_the_ramp_of_the_published_7b_run():
    """128 sequences for 2,000 steps, 256 for 2,000, then 512, over 550,000 steps of 8,192 tokens: 2.296T tokens."""
    ramp = Ramp.of([[0, 128], [2000, 256], [4000, 512]])
    assert ramp.consumed(550_000) * 8192 == 2_296_381_440_000


@given(
    ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 12)).map(lambda r: (r[0], sum(r))), max_size=6),
    first=st.integers(0, 60),
    count=st.integers(0, 60),
)
def test_skipped_samples_are_left_out_and_no_others(ranges, first, count):
    skipped = Skipped.of(ranges)
    gone = {sample for a, b in ranges for sample in range(a, b)}
    kept = [sample for sample in range(300) if sample not in gone]
    assert skipped.samples(first, count).tolist() == kept[first : first + count]
    assert skipped.holds(np.arange(80)).tolist() == [sample in gone for sample in range(80)]
    assert Skipped.of(skipped.ranges) == skipped


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_the_rows_of_all_ranks_are_the_batch(ranks, micro_batch):
    batch = 3 * ranks * micro_batch
    parts = [rows_of_rank(batch, micro_batch, rank, ranks) for rank in range(ranks)]
    assert all(part.shape == (3, micro_batch) for part in parts)
    assert np.array_equal(np.stack(parts, axis=1).reshape(-1), np.arange(batch))


def test_a_split_that_does_not_come_out_names_the_nearest():
    with pytest.raises(
        ValueError, match="batch=30 must be a multiple of micro_batch=4 times 2 processes; nearest are 24 and 32"
    ):
        rows_of_rank(30, 4, 0, 2)
    with pytest.raises(ValueError, match="nearest is 8"):
        rows_of_rank(3, 4, 0, 2)
    with pytest.raises(ValueError, match=r"rank=2 in 0\.\.1"):
        rows_of_rank(8, 4, 2, 2)


@pytest.mark.parametrize("batch", [[], [[1, 8]], [[0, 8], [0, 9]], [[0, 8], [5, 9], [3, 1]]])
def test_a_ramp_must_rise_from_step_0(batch):
    with pytest.raises(ValueError, match="must begin with step 0 and go on in rising steps"):
        Ramp.of(batch)


def test_ramps_and_gaps_without_sense_are_refused_by_name():
    with pytest.raises(ValueError, match="less than one row"):
        Ramp.of([[0, 8], [5, 0]])
    with pytest.raises(ValueError, match=r"step=-1 must not be negative"):
        Ramp.of(8).size(-1)
    for wrong in ((3, 3), (5, 2), (-1, 4)):
        with pytest.raises(ValueError, match=rf"skipped range \[{wrong[0]}, {wrong[1]}\)"):
            Skipped.of([wrong])
