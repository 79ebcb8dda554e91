"""Measurements: the same sums for every split over batches and processes, and lengths that are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from openxlstm.data.prepare import prepare_corpus
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder
from openxlstm.data.windows import Stream
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.train.evaluate import by_length, continued, evaluate
from openxlstm.train.loss import Rows
from openxlstm.train.objective import Objective

BYTES = torch.from_numpy(Tokenizer.bytes().bytes_of.copy())


@pytest.fixture(scope="module")
def folder(texts: Path, cache: Path) -> TokenFolder:
    return TokenFolder.open(prepare_corpus(texts, cache, Tokenizer.bytes()) / "train")


@pytest.fixture
def model() -> xLSTM:
    """Both kinds of block, dropout, and weights large enough that context matters."""
    model = xLSTM(xLSTMConfig(vocab_size=257, width=16, heads=2, pattern="ms", dropout=0.5)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model


def test_every_window_is_scored_once_whatever_the_batch(model: xLSTM, folder: TokenFolder) -> None:
    stream, state = Stream(folder, 40), torch.get_rng_state()
    whole = evaluate(model, stream, BYTES, batch=1000)
    small = evaluate(Objective(model), stream, BYTES, batch=3)
    assert whole.tokens == small.tokens == folder.total_tokens
    assert whole.bytes == folder.total_bytes
    assert small.byte_nats == pytest.approx(whole.byte_nats, rel=1e-12)
    assert model.training, "the mode is as before"
    assert torch.equal(torch.get_rng_state(), state)
    rows = Rows.of(next(stream.in_order(10_000)), torch.device("cpu"))
    model.eval()
    logits, _ = model(rows.tokens, reset=rows.reset)
    nats = torch.nn.functional.cross_entropy(logits[rows.valid], rows.targets[rows.valid], reduction="none")
    is_byte = rows.targets[rows.valid] < 256
    expected = nats[is_byte].sum().item() / math.log(2) / is_byte.sum().item()
    assert whole.bits_per_byte == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_processes_share_the_windows_and_make_equally_many_passes(
    ranks: int, model: xLSTM, folder: TokenFolder
) -> None:
    objective, passes = Objective(model), []
    alone = evaluate(objective, Stream(folder, 40), BYTES, batch=4, windows=22)
    parts = torch.zeros(5, dtype=torch.float64)
    for rank in range(ranks):
        counted: list[int] = []
        hook = objective.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        evaluate(
            objective, Stream(folder, 40), BYTES, batch=4, windows=22, rank=rank, ranks=ranks,
            total=lambda sums: parts.add_(sums),
        )  # fmt: skip
        hook.remove()
        passes.append(len(counted))
    assert len(set(passes)) == 1, "a sharded model would hang"
    assert parts[1].item() == alone.tokens
    assert parts[0].item() == pytest.approx(alone.nats, rel=1e-12)


def test_a_length_is_scored_as_a_stream_of_that_length_would_be(model: xLSTM, folder: TokenFolder) -> None:
    """All targets of the split, once per length; lengths that divide nothing, longer than some documents."""
    lengths = [7, 16, 64]
    found = by_length(model, folder, BYTES, lengths, tokens=10**9, batch_tokens=640)
    assert [row["length"] for row in found["lengths"]] == lengths
    for row in found["lengths"][1:]:
        expected = evaluate(model, Stream(folder, row["length"]), BYTES, batch=16).bits_per_byte
        assert row["bits_per_byte"] == pytest.approx(expected, rel=1e-10)


def test_positions_add_up_to_the_longest_and_carry_the_state(model: xLSTM, folder: TokenFolder) -> None:
    found = by_length(model, folder, BYTES, [64, 16, 24], tokens=10**9, batch_tokens=320)
    assert [(row["from"], row["to"]) for row in found["positions"]] == [(0, 16), (16, 24), (24, 64)]
    objective, nats, count = Objective(model.eval()), torch.zeros(64, dtype=torch.float64), torch.zeros(64)
    for batch in Stream(folder, 64).in_order(16):
        rows = Rows.of(batch, torch.device("cpu"))
        each, _ = objective.token_nats(rows.tokens, rows.targets, rows.reset, rows.valid)
        is_byte = rows.valid & (rows.targets < 256)
        nats += torch.where(is_byte, each, 0.0).sum(0)
        count += is_byte.sum(0)
    for row in found["positions"]:
        span = slice(row["from"], row["to"])
        expected = nats[span].sum() / count[span].sum() / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(expected.item(), rel=1e-6)


def test_lengths_are_the_same_over_any_number_of_processes(model: xLSTM, folder: TokenFolder) -> None:
    alone = by_length(model, folder, BYTES, [8, 32], tokens=640, batch_tokens=64)
    parts = torch.zeros(2, 2, 5, dtype=torch.float64)
    for rank in range(3):
        shared = by_length(
            model, folder, BYTES, [8, 32], tokens=640, batch_tokens=64, rank=rank, ranks=3,
            total=lambda sums: parts.add_(sums),
        )  # fmt: skip
    for one, other in zip(shared["lengths"], alone["lengths"], strict=True):
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-12)


def test_a_length_beyond_the_data_is_left_out(model: xLSTM, folder: TokenFolder) -> None:
    most = folder.total_tokens
    found = by_length(model, folder, BYTES, [most // 2, most, 2 * most], tokens=1, batch_tokens=1)
    assert [row["to"] for row in found["positions"]] == [most // 2, most]


def test_samples_keep_the_mode_and_name_their_prompt(model: xLSTM) -> None:
    model.train()
    modes = []

    def write(model, tokenizer, prompt, tokens):
        modes.append(model.training)
        return f"{prompt.upper()}{tokens}"

    assert continued(write, model, Tokenizer.bytes(), ["a", "b"], 5) == [
        {"prompt": "a", "text": "A5"},
        {"prompt": "b", "text": "B5"},
    ]
    assert modes == [False, False]
    assert model.training
    assert np.all(BYTES.numpy()[:256] == 1)
