"""The feed: every token once per epoch whatever the split, and the batch of a step a pure function of the step."""

import mmap
import threading
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import FIRST, numbered, starts

from openxlstm.data import gather
from openxlstm.data.feed import WINDOWS, Feed, Prefetch, Samples
from openxlstm.data.gather import Batch
from openxlstm.data.order import Order, rows_of_rank
from openxlstm.data.tokens import Shard, TokenFolder
from openxlstm.data.windows import Stream

SHARDS = [[3, 1, 90, 5, 16, 2], [7, 33, 2, 2, 17], [130]]
FIELDS = ("tokens", "targets", "reset", "valid")


def tokens_by_epoch(feed: Feed, steps: int, ranks: int, micro_batch: int) -> dict[int, list[int]]:
    """The targets that all processes together read in the first steps, by epoch."""
    seen: dict[int, list[int]] = {}
    for step in range(steps):
        samples = feed.step(step)
        for rank in range(ranks):
            for rows in rows_of_rank(len(samples), micro_batch, rank, ranks):
                part = samples[rows]
                batch = feed.rows(part)
                for epoch in np.unique(part.epoch).tolist():
                    here = (part.epoch == epoch)[:, None] & batch.valid
                    seen.setdefault(epoch, []).extend(batch.targets[here].tolist())
    return seen


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("context", "copies"), [(1, 1), (7, 1), (16, 2), (64, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_token_is_trained_on_once_per_epoch(window, context, copies, ranks):
    """Counted over two whole epochs of 24 rows a step; the border of the epochs lies inside a batch, but for lanes."""
    folder = numbered(SHARDS * copies)
    for seed in (0, 2**63 - 1):
        feed = Feed.open([(folder, 1)], seed=seed, window=window, context=context, batch=24)
        steps = -(-2 * feed.epochs[0] // 24)
        seen = tokens_by_epoch(feed, steps, ranks, micro_batch=24 // ranks if seed else 1)
        for epoch in (0, 1):
            assert sorted(seen[epoch]) == list(range(FIRST, FIRST + folder.total_tokens))


@pytest.mark.parametrize("window", WINDOWS)
def test_inputs_are_the_tokens_before_and_documents_begin_with_a_reset(window):
    """Everywhere, for every target: the definition, read off the numbers."""
    first = starts(SHARDS)
    feed = Feed.open([(numbered(SHARDS), 1)], seed=0, window=window, context=16, batch=4)
    batch = feed.rows(feed.samples(0, feed.epochs[0]))
    for row in range(len(batch.tokens)):
        cuts = 0
        for t in range(16):
            token, target, reset = batch.tokens[row, t], batch.targets[row, t], batch.reset[row, t]
            if not batch.valid[row, t]:
                assert (token, target, reset) == (256, 256, False)
                assert not batch.valid[row, t:].any(), "padding comes last"
                continue
            assert token == (256 if target in first else target - 1)
            assert reset or target not in first
            cuts += reset and target not in first
            if t and not reset:
                assert target == batch.targets[row, t - 1] + 1
        assert window == "packed" or cuts <= (window != "stream"), "a document that is read on begins a row"


@pytest.mark.parametrize("window", ["packed", "docs"])
def test_only_documents_longer_than_a_row_are_cut(window):
    feed = Feed.open([(numbered(SHARDS), 1)], seed=0, window=window, context=33, batch=4)
    batch = feed.rows(feed.samples(0, feed.epochs[0]))
    assert batch.reset.sum() == sum(-(-length // 33) for shard in SHARDS for length in shard)
    assert (window == "docs") == bool((batch.reset.sum(axis=1) == 1).all())


def mixed(skipped: tuple[tuple[int, int], ...] = (), window: str = "packed") -> Feed:
    """Three sources, a ramp and two phases, the second inside a block and inside an epoch."""
    sources = [(numbered(SHARDS, name="a"), 2), (numbered([[40, 50]], name="b"), 1), (numbered([[9] * 9], name="c"), 0)]
    phases = [(10, (1, 1, 1)), (23, (0, 1, 3))]
    return Feed.open(
        sources, seed=5, window=window, context=16, batch=[[0, 8], [12, 24]], phases=phases, skipped=skipped
    )


def same(one: Samples | Batch, other: Samples | Batch) -> bool:
    """Equal in every field."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__slots__)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_portions_of_all_ranks_are_the_batch_of_the_step(ranks):
    feed = mixed()
    for step in (0, 9, 11, 12, 30):
        whole = feed.rows(feed.step(step))
        for micro_batch in (None, 1):
            parts = [feed.portions(step, micro_batch, rank, ranks) for rank in range(ranks)]
            assert len({len(part) for part in parts}) == 1
            for name in FIELDS:
                rows = [getattr(part[m], name) for m in range(len(parts[0])) for part in parts]
                assert np.array_equal(np.concatenate(rows), getattr(whole, name)), name


@given(
    gaps=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)).map(lambda r: (r[0], sum(r))), max_size=3),
    cuts=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    first=st.integers(0, 500),
)
@settings(deadline=None, max_examples=30)
def test_a_run_may_be_resumed_anywhere(gaps, cuts, first):
    feed = mixed(tuple(gaps))
    whole = feed.samples(first, sum(cuts))
    parts, place = [], first
    for count in cuts:
        parts.append(mixed(tuple(gaps)).samples(place, count))
        place += count
    for name in Samples.__slots__:
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_each_source_is_read_through_before_it_is_read_again():
    samples = mixed().samples(0, 3000)
    for source, size in enumerate(mixed().epochs):
        here = samples.source == source
        assert here.sum() > 3 * size
        for epoch in range(3):
            assert sorted(samples.window[here & (samples.epoch == epoch)].tolist()) == list(range(size))
        assert (np.diff(samples.epoch[here]) >= 0).all()


def test_a_row_holds_what_its_source_holds():
    feed = mixed()
    samples = feed.samples(300, 100)
    assert len(np.unique(samples.source)) == 3
    batch = feed.rows(samples)
    for row in range(100):
        alone = feed.windows[samples.source[row]].batch(samples.window[row : row + 1])
        for name in FIELDS:
            assert np.array_equal(getattr(batch, name)[row], getattr(alone, name)[0])


def test_one_source_in_a_stream_is_read_as_ever():
    """The order that runs began with before there were mixtures."""
    folder = numbered(SHARDS)
    feed = Feed.open([(folder, 3.5)], seed=11, window="stream", context=7, batch=4)
    stream = Stream(folder, 7)
    assert np.array_equal(feed.samples(13, 200).window, Order(11, len(stream)).windows(13, 200))
    assert same(feed.rows(feed.step(2)), stream.batch(Order(11, len(stream)).windows(8, 4)))
    assert feed.fingerprint == folder.fingerprint


def test_a_sample_keeps_its_meaning_when_others_are_skipped():
    plain, skipping = mixed(), mixed(((20, 50), (300, 310)))
    later = skipping.samples(100, 500)
    assert not ((later.sample >= 300) & (later.sample < 310)).any()
    meant = plain.samples(0, 700)[later.sample]
    assert same(later, meant)
    assert same(plain.without([(20, 50)]).without([(300, 310)]).samples(100, 500), later)
    assert plain.skipped.ranges == (), "nothing was changed in place"


# step: (source, window) of its first four rows in the feed above. A feed that changes breaks runs.
STORED = {
    0: [(0, 7), (1, 4), (0, 17), (0, 9)],
    11: [(2, 1), (0, 11), (2, 4), (1, 0)],
    12: [(0, 2), (2, 5), (1, 3), (1, 4)],
    30: [(2, 0), (1, 4), (1, 3), (2, 7)],
    10**6: [(1, 2), (2, 3), (2, 5), (2, 2)],
}


@pytest.mark.parametrize("step", STORED)
def test_a_feed_never_changes(step):
    samples = mixed().step(step)
    assert list(zip(samples.source.tolist(), samples.window.tolist()))[:4] == STORED[step]


def test_lanes_read_on_where_they_stopped():
    """Row by row over two epochs: the next window, or a reset; and every lane a stretch of the stream."""
    folder = numbered(SHARDS)
    feed = Feed.open([(folder, 1)], seed=0, window="lanes", context=7, batch=5)
    stream = Stream(folder, 7)
    steps = feed.epochs[0] // 5
    first, resets = starts(SHARDS), 0
    last: list[int | None] = [None] * 5  # the token a lane would have to go on with
    for step in range(2 * steps):
        samples = feed.step(step)
        batch = feed.rows(samples)
        for lane in range(5):
            valid = batch.valid[lane]
            if not valid.any():
                assert samples.window[lane] == -1
                assert step % steps == steps - 1, "padding is at the end of an epoch"
                continue
            begins = batch.targets[lane, 0]
            assert batch.reset[lane, 0] == (step % steps == 0 or begins in first)
            assert batch.reset[lane, 0] or begins == last[lane]
            assert np.array_equal(batch.targets[lane], stream.batch(samples.window[lane : lane + 1]).targets[0])
            last[lane] = batch.targets[lane][valid][-1] + 1
            resets += batch.reset[lane, 0] and begins not in first
    assert resets > 0, "a lane that begins inside a document was seen"


def test_a_lane_begins_anew_after_what_was_skipped():
    feed = Feed.open([(numbered([[400]]), 1)], seed=0, window="lanes", context=7, batch=4)
    gap = feed.without([(8, 12)])
    after, plain = gap.rows(gap.step(2)), feed.rows(feed.step(3))
    assert np.array_equal(after.targets, plain.targets)
    assert after.reset[:, 0].all()
    assert not plain.reset[:, 0].any()
    assert not gap.rows(gap.step(3)).reset.any(), "and then it goes on"
    with pytest.raises(ValueError, match=r"\[9, 12\) must consist of whole steps of 4 lanes; .* \[8, 12\)"):
        feed.without([(9, 12)])


@pytest.mark.parametrize("window", WINDOWS)
def test_tokens_that_are_no_targets_are_read_all_the_same(window):
    masked = [0, 5, 6, 7, 100, 301]
    feed = Feed.open([(numbered(SHARDS), 1)], seed=0, window=window, context=16, batch=4)
    marked = Feed.open([(numbered(SHARDS, masked=masked), 1)], seed=0, window=window, context=16, batch=4)
    plain, batch = (each.rows(each.samples(0, each.epochs[0])) for each in (feed, marked))
    for name in ("tokens", "targets", "reset"):
        assert np.array_equal(getattr(plain, name), getattr(batch, name))
    assert sorted(plain.targets[plain.valid & ~batch.valid] - FIRST) == masked
    assert not (batch.valid & ~plain.valid).any()


@pytest.mark.parametrize("window", ["packed", "docs"])
def test_a_plan_from_the_cache_is_the_plan(tmp_path, window):
    options = {"seed": 0, "window": window, "context": 16, "batch": 4}
    feeds = [Feed.open([(numbered(SHARDS), 1)], **options, cache=cache) for cache in (None, tmp_path, tmp_path)]
    for feed in feeds[1:]:
        assert same(feed.rows(feed.step(1)), feeds[0].rows(feeds[0].step(1)))
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_ahead_changes_nothing_and_ends_with_its_context():
    feed = mixed()
    before = threading.active_count()
    with Prefetch(feed, 2, 1, 2) as ahead:
        for step in (0, 1, 2, 3, 40, 41, 3, 4):  # on, forward, and back as after a rollback
            for got, want in zip(ahead.portions(step), feed.portions(step, 2, 1, 2), strict=True):
                assert same(got, want)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_an_error_while_reading_ahead_comes_with_its_step():
    feed = Feed.open([(numbered(SHARDS), 1)], seed=0, window="stream", context=16, batch=[[0, 4], [2, 5]])
    with Prefetch(feed, 2) as ahead:
        for step in (0, 1):
            assert len(ahead.portions(step)) == 2
        with pytest.raises(ValueError, match="batch=5 must be a multiple of micro_batch=2"):
            ahead.portions(2)


def test_two_steps_are_read_before_they_are_asked_for(monkeypatch):
    feed, read = mixed(), []
    portions = feed.portions

    def note(step: int, *split: int) -> list[Batch]:
        read.append(step)
        return portions(step, *split)

    monkeypatch.setattr(feed, "portions", note)
    with Prefetch(feed) as ahead:
        for step in (7, 8, 9):
            ahead.portions(step)
            wait(ahead._coming.values())
            assert read == list(range(7, step + 3)), "each once, and in order"


def test_the_fingerprint_is_of_the_data_alone():
    a, b = numbered(SHARDS, name="a"), numbered([[40, 50]], name="b")

    def fingerprint(*folders: TokenFolder, seed: int = 0) -> str:
        sources = [(folder, 1) for folder in folders]
        return Feed.open(sources, seed=seed, window="stream", context=7, batch=4).fingerprint

    assert fingerprint(a, b) == fingerprint(a, b, seed=1)
    assert len({fingerprint(a), fingerprint(b), fingerprint(a, b), fingerprint(b, a)}) == 4


def memory_of_files() -> int:
    """Bytes of files that are mapped into this process now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux shows it")
@pytest.mark.parametrize("limit", [1 << 24, 1 << 40])
def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch, limit):
    """96 MB are read in windows of 2 kB; and the same without giving anything back, so that the test can fail."""
    tokens = 48 << 20
    np.zeros(tokens, "<u2").tofile(tmp_path / "big")  # not sparse: what is written is cached in pages of all sizes
    mapped = np.memmap(tmp_path / "big", dtype="<u2", mode="r")
    assert isinstance(mapped.base, mmap.mmap)
    (tmp_path / "big").unlink()  # it stays mapped, and no test folder keeps it
    byte = numbered([[1]]).tokenizer
    folder = TokenFolder(tmp_path, byte, 256, True, "", (Shard("big", mapped, np.array([tokens]), tokens, ""),))
    feed = Feed.open([(folder, 1)], seed=0, window="stream", context=1024, batch=256)
    monkeypatch.setattr(gather, "MAPPED", limit)
    before, most = memory_of_files(), 0
    for step in range(feed.epochs[0] // 256):
        feed.rows(feed.step(step))
        most = max(most, memory_of_files() - before)
    assert (most < 40 << 20) == (limit < 1 << 30), f"{most >> 20} MB"


def test_nonsense_is_refused_by_name():
    folder = numbered(SHARDS)
    options = {"seed": 0, "window": "stream", "context": 16, "batch": 4}
    with pytest.raises(ValueError, match="window='rows' must be one of stream, packed, docs, lanes"):
        Feed.open([(folder, 1)], **options | {"window": "rows"})
    with pytest.raises(ValueError, match="not one source"):
        Feed.open([], **options)
    for window in WINDOWS:
        with pytest.raises(ValueError, match="context=0 must be at least 1"):
            Feed.open([(folder, 1)], **options | {"context": 0, "window": window})
    with pytest.raises(ValueError, match="1 sources in sizes"):
        Feed.open([(folder, 1)], **options | {"window": "lanes", "batch": [[0, 4], [9, 8]]})
    with pytest.raises(ValueError, match="2 sources in sizes"):
        Feed.open([(folder, 1), (folder, 1)], **options | {"window": "lanes"})
    with pytest.raises(ValueError, match=r"batch=99 lanes cannot share 21 windows of 16 tokens; choose 1\.\.21"):
        Feed.open([(folder, 1)], **options | {"window": "lanes", "batch": 99})


def test_sources_of_two_tokenizers_do_not_mix(bpe):
    one = numbered(SHARDS)
    other = TokenFolder(Path("other"), bpe, 0, True, "other", one.shards)
    with pytest.raises(ValueError, match="other was written with another tokenizer .* end id 0"):
        Feed.open([(one, 1), (other, 1)], seed=0, window="stream", context=16, batch=4)
