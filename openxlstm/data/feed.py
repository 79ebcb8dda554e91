"""The feed: from the number of a step to the rows of its batch. All that a trainer knows of data.

    feed = Feed.open([(wiki, 3), (code, 1)], seed=1, window="packed", context=2048, batch=[[0, 64], [2000, 128]])
    samples = feed.samples(feed.consumed(step), feed.batch_size(step))      # which windows: a pure function
    batch = feed.rows(samples)                                              # their tokens

Nothing here has a place that could be lost: the state of the data is the number of samples consumed, and the ranges
skipped. `Prefetch` reads ahead in a thread, and is told the step it is asked for like everybody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64

from openxlstm.data import packing
from openxlstm.data.gather import Batch
from openxlstm.data.mixture import Mixture
from openxlstm.data.order import Order, Ramp, Skipped, rows_of_rank
from openxlstm.data.tokens import TokenFolder
from openxlstm.data.windows import Lanes, Pieces, Stream

WINDOWS = ("stream", "packed", "docs", "lanes")
_TOGETHER = 1000  # sample ids computed at once: 0.9 ms, where 16 of them alone take 0.5 ms
AHEAD = 2  # steps that a Prefetch reads before they are asked for


@final
@dataclass(frozen=True, slots=True)
class Samples:
    """Which windows, in order: `window` of a source in its `epoch`; `sample` is the id, which ranges to skip name."""

    sample: Int64[np.ndarray, "N"]
    source: Int64[np.ndarray, "N"]
    epoch: Int64[np.ndarray, "N"]
    window: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Int64[np.ndarray, "M"]) -> Samples:
        """The samples of these rows of a batch."""
        return Samples(self.sample[rows], self.source[rows], self.epoch[rows], self.window[rows])


@final
class Feed:
    """Sources, and the order in which a run reads them. Make one with `Feed.open`."""

    def __init__(
        self, windows: Sequence[Stream | Pieces], mixture: Mixture, ramp: Ramp, skipped: Skipped, lanes: Lanes | None
    ) -> None:
        self.windows = tuple(windows)  # one per source
        self.mixture = mixture
        self.ramp = ramp
        self.skipped = skipped
        self.lanes = lanes
        self.context = windows[0].context
        self._orders = [Order(mixture.seed, len(source), stream) for stream, source in enumerate(windows)]
        self._meant = lru_cache(maxsize=8)(self._compute)

    @classmethod
    def open(
        cls,
        sources: Sequence[tuple[TokenFolder, float | int]],
        *,
        seed: int,
        window: str,
        context: int,
        batch: int | Sequence[Sequence[int]],
        phases: Sequence[tuple[int, Sequence[float | int]]] = (),
        skipped: Iterable[Sequence[int]] = (),
        cache: Path | None = None,
    ) -> Feed:
        """The feed of a run.

        Args:
            sources: token folders with their weights; the seed of a source's order is its place in this list.
            window: one of WINDOWS: how documents become rows of `context` tokens (windows.py).
            batch: rows per step, or [[from_step, rows], ...].
            phases: (from_step, weights): other weights from a step on. They begin at a sample id, that of the step's
                first row when nothing is skipped, so a sample id means the same window whatever is skipped.
            skipped: ranges [a, b) of sample ids that are not to be trained on.
            cache: where the plans of `packed` and `docs` are kept; without it each process makes its own.

        Raises:
            ValueError: sources of different tokenizers, weights that give a source nothing, `lanes` with anything
                that would tear them.
        """
        if window not in WINDOWS:
            raise ValueError(f"window={window!r} must be one of {', '.join(WINDOWS)}")
        if not sources:
            raise ValueError("there is not one source to read from")
        _refuse_two_tokenizers([folder for folder, _ in sources])
        ramp, gaps = Ramp.of(batch), Skipped.of(skipped)
        windows = [_windows(folder, window, context, cache) for folder, _ in sources]
        mixture = Mixture(
            [weight for _, weight in sources],
            [(ramp.consumed(step), weights) for step, weights in phases],
            seed,
        )
        lanes = _lanes(windows, ramp, gaps) if window == "lanes" else None
        return cls(windows, mixture, ramp, gaps, lanes)

    @property
    def fingerprint(self) -> str:
        """Of all tokens of all sources. That of the folder, if there is only one."""
        each = [source.folder.fingerprint for source in self.windows]
        return each[0] if len(each) == 1 else hashlib.sha256(",".join(each).encode()).hexdigest()

    @property
    def epochs(self) -> tuple[int, ...]:
        """Rows in one epoch of each source."""
        return tuple(map(len, self.windows)) if self.lanes is None else (len(self.lanes),)

    def consumed(self, step: int) -> int:
        """Samples that the steps before this one have taken."""
        return self.ramp.consumed(step)

    def batch_size(self, step: int) -> int:
        """Rows of this step, in all processes together."""
        return self.ramp.size(step)

    def samples(self, first: int, count: int) -> Samples:
        """The samples first, first + 1, ... that are not skipped: which windows they are."""
        ids = self.skipped.samples(first, count)
        blocks, place = np.divmod(ids, _TOGETHER)
        meant = [self._meant(block)[:, place[blocks == block]] for block in np.unique(blocks).tolist()]
        return Samples(ids, *np.concatenate([np.empty((3, 0), np.int64), *meant], axis=1))

    def _compute(self, block: int) -> Int64[np.ndarray, "3 ids"]:
        """Source, epoch and window of the sample ids of a block."""
        ids = np.arange(block * _TOGETHER, (block + 1) * _TOGETHER, dtype=np.int64)
        if self.lanes is not None:
            return np.stack((np.zeros_like(ids), *self.lanes.visits(ids)))
        source, draw = self.mixture.draws(ids)
        epoch, window = np.empty_like(draw), np.empty_like(draw)
        for number, order in enumerate(self._orders):
            here = source == number
            epoch[here], window[here] = order.visits(draw[here])
        return np.stack((source, epoch, window))

    def rows(self, samples: Samples) -> Batch:
        """The tokens of these samples, a row each, in this order."""
        if self.lanes is not None:
            fresh = self.lanes.begins(samples.sample) | self.skipped.holds(samples.sample - self.lanes.lanes)
            return self.lanes.batch(samples.window, fresh)
        if len(self.windows) == 1:
            return self.windows[0].batch(samples.window)
        shape, end_id = (len(samples), self.context), self.windows[0].folder.end_id
        mixed = Batch(
            np.full(shape, end_id, np.int64),
            np.full(shape, end_id, np.int64),
            np.zeros(shape, np.bool_),
            np.zeros(shape, np.bool_),
        )
        for number in np.unique(samples.source).tolist():
            here = samples.source == number
            part = self.windows[number].batch(samples.window[here])
            mixed.tokens[here], mixed.targets[here] = part.tokens, part.targets
            mixed.reset[here], mixed.valid[here] = part.reset, part.valid
        return mixed

    def step(self, step: int) -> Samples:
        """The samples of a step, all rows of all processes."""
        return self.samples(self.consumed(step), self.batch_size(step))

    def portions(self, step: int, micro_batch: int | None = None, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """What one process reads in a step: its batches of `micro_batch` rows (None: all of its rows at once)."""
        size = self.batch_size(step)
        samples = self.step(step)
        each = rows_of_rank(size, size // ranks if micro_batch is None else micro_batch, rank, ranks)
        return [self.rows(samples[rows]) for rows in each]

    def without(self, ranges: Iterable[Sequence[int]]) -> Feed:
        """The same feed, with these ranges [a, b) of sample ids skipped as well."""
        gaps = Skipped.of([*self.skipped.ranges, *ranges])
        if self.lanes is not None:
            _check_gaps(gaps, self.lanes)
        return Feed(self.windows, self.mixture, self.ramp, gaps, self.lanes)


@final
class Prefetch:
    """Reads the portions of the next steps in a thread. Asked for another step than the next, it starts there.

    Use it as a context: `with Prefetch(feed, micro_batch, rank, ranks) as ahead: batches = ahead.portions(step)`.
    """

    def __init__(self, feed: Feed, micro_batch: int | None = None, rank: int = 0, ranks: int = 1) -> None:
        self.feed = feed
        self._split = (micro_batch, rank, ranks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: dict[int, Future[list[Batch]]] = {}

    def portions(self, step: int) -> list[Batch]:
        """`feed.portions` of the step. An error of the reading thread is raised here, at the step it belongs to."""
        wanted = range(step, step + AHEAD + 1)
        for other in self._coming.keys() - set(wanted):
            self._coming.pop(other).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self.feed.portions, number, *self._split)
        return self._coming.pop(step).result()

    def close(self) -> None:
        """End the thread; what it has read is forgotten."""
        self._thread.shutdown(cancel_futures=True)
        self._coming.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _windows(folder: TokenFolder, window: str, context: int, cache: Path | None) -> Stream | Pieces:
    if window == "packed":
        return Pieces(folder, context, packing.plan(folder, context, "best_fit", cache))
    if window == "docs":
        return Pieces(folder, context, packing.plan(folder, context, "one_per_row", cache))
    return Stream(folder, context)


def _lanes(windows: Sequence[Stream | Pieces], ramp: Ramp, gaps: Skipped) -> Lanes:
    if len(windows) > 1 or len(ramp.sizes) > 1:
        raise ValueError(
            f"lanes read one source in batches of one size, not {len(windows)} sources in sizes {list(ramp.sizes)}:"
            " a row must find its own continuation at every step"
        )
    (stream,) = windows
    assert isinstance(stream, Stream)
    lanes = Lanes(stream, ramp.sizes[0])
    _check_gaps(gaps, lanes)
    return lanes


def _check_gaps(gaps: Skipped, lanes: Lanes) -> None:
    for a, b in gaps.ranges:
        if a % lanes.lanes or b % lanes.lanes:
            raise ValueError(
                f"skipped range [{a}, {b}) must consist of whole steps of {lanes.lanes} lanes; nearest around it is"
                f" [{a // lanes.lanes * lanes.lanes}, {-(-b // lanes.lanes) * lanes.lanes})"
            )


def _refuse_two_tokenizers(folders: Sequence[TokenFolder]) -> None:
    first = folders[0]
    for folder in folders[1:]:
        if (folder.tokenizer.sha256, folder.end_id) != (first.tokenizer.sha256, first.end_id):
            raise ValueError(
                f"{folder.path} was written with another tokenizer (sha256 {folder.tokenizer.sha256[:12]}, end id"
                f" {folder.end_id}) than {first.path} ({first.tokenizer.sha256[:12]}, {first.end_id}); prepare both"
                " with one tokenizer"
            )
