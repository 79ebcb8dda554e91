"""What a model makes of a window is what it makes of each document alone: in float64, in every kind of window."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from models.small_models import KINDS, W, build

from openxlstm.data.feed import WINDOWS, Feed
from openxlstm.data.gather import Batch
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import Shard, TokenFolder
from openxlstm.train.loss import Rows
from openxlstm.train.objective import Objective

SHARDS = [[5, 1, 40, 3, 16, 2, 9], [17, 7, 1, 33]]
T, LANES = 16, 3
END = W - 1


def folder(tokens: list[np.ndarray], name: str) -> TokenFolder:
    shards = tuple(
        Shard(f"{number}.ds", part, np.cumsum(lengths), len(part), "")
        for number, (part, lengths) in enumerate(zip(tokens, SHARDS, strict=True))
    )
    return TokenFolder(Path(name), Tokenizer.bytes(), END, True, name, shards)


def segments(window: str, feed: Feed) -> list[tuple[int, int]]:
    """[start, end) of what a memory may see together: documents, cut where this kind of window cuts them."""
    cuts, offset = {sum(map(sum, SHARDS))}, 0
    windows = []  # where those of the stream begin
    for lengths in SHARDS:
        windows += range(offset, offset + sum(lengths), T)
        for length in lengths:
            cuts |= set(range(offset, offset + length, T)) if window in ("packed", "docs") else {offset}
            offset += length
    if window == "stream":
        cuts |= set(windows)
    if window == "lanes":
        cuts |= {windows[lane * len(windows) // LANES] for lane in range(LANES)}
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def nats_in_windows(objective: Objective, text: Feed, places: Feed) -> np.ndarray:
    """Nats of every token of the folder, by its place; the state goes from step to step in lanes, and only there."""
    found = np.full(sum(map(sum, SHARDS)), np.nan)
    state = None
    for step in range(-(-text.epochs[0] // LANES)):
        samples = text.step(step)
        rows = Rows.of(text.rows(samples), torch.device("cpu"))
        nats, after = objective.token_nats(rows.tokens, rows.targets, rows.reset, rows.valid, state)
        state = after if text.lanes is not None else None
        here: Batch = places.rows(samples)
        first_epoch = (samples.epoch == 0)[:, None] & here.valid
        assert np.isnan(found[here.targets[first_epoch]]).all(), "no token twice"
        found[here.targets[first_epoch]] = nats.numpy()[first_epoch]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_its_documents_alone(kind, window, record_property):
    text = np.random.default_rng(0).integers(0, END, sum(map(sum, SHARDS)))
    cut = np.cumsum([sum(lengths) for lengths in SHARDS])[:-1]
    options = {"seed": 1, "window": window, "context": T, "batch": LANES}
    as_text = Feed.open([(folder(np.split(text.astype(np.uint16), cut), "text"), 1)], **options)
    as_places = Feed.open([(folder(np.split(np.arange(len(text), dtype=np.uint16), cut), "places"), 1)], **options)
    objective = Objective(build(kind))
    got = nats_in_windows(objective, as_text, as_places)

    documents = set(np.cumsum([0, *(length for lengths in SHARDS for length in lengths)]).tolist())
    want = np.empty_like(got)
    for start, end in segments(window, as_text):
        inputs = np.concatenate(([END if start in documents else text[start - 1]], text[start : end - 1]))
        logits, _ = objective.model(torch.from_numpy(inputs)[None])
        want[start:end] = torch.nn.functional.cross_entropy(
            logits[0], torch.from_numpy(text[start:end]), reduction="none"
        ).detach()
    error = np.abs(got - want).max()
    if window == "packed":
        record_property("measured", f"packed against separate documents, {kind}: per-token loss within {error:.0e}")
    assert error < 1e-10
