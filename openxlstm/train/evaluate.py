"""Bits per byte: of a model on a split, by length of context, and of what needs no model on the same bytes."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_atomically
from openxlstm.data.windows import Batch, Stream
from openxlstm.data.yardsticks import compressor_bits_per_byte, ngram_bits_per_byte
from openxlstm.train.log import read_json
from openxlstm.train.loss import Rows, Score
from openxlstm.train.objective import Objective

YARDSTICK_BYTES = 1 << 27  # n-grams need some 30 bytes of memory per byte of text: 4 GB for these 128 MB
Sum = Callable[[Tensor], Tensor]  # over all processes
Write = Callable[[Any, Tokenizer, str, int], str]  # (model, tokenizer, prompt, tokens) -> what follows the prompt


def evaluate(
    model: torch.nn.Module,
    stream: Stream,
    bytes_of: Int[Tensor, " W"],
    *,
    batch: int,
    windows: int | None = None,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    ranks: int = 1,
    total: Sum | None = None,
) -> Score:
    """Score every window of a split once, each from an empty state; or `windows` of them, evenly spaced.

    The model is back in its training mode afterwards, and no random number is drawn: measuring changes no run.

    Args:
        model: a language model, or its Objective.
        batch: rows per forward pass.
        autocast: the dtype of matrix products, None for that of the weights.
        rank, ranks: this process scores every `ranks`-th batch; all processes make equally many forward passes.
        total: adds the sums of all processes, where there are several.
    """
    objective = model if isinstance(model, Objective) else Objective(model)
    sums = torch.zeros(5, dtype=torch.float64, device=bytes_of.device)
    with _measuring(objective, autocast, bytes_of.device):
        for rows in _dealt(stream.in_order(batch, limit=windows), rank, ranks):
            sums += _sums(objective, Rows.of(rows, bytes_of.device), bytes_of)[0]
    return Score.of(sums if total is None else total(sums))


def by_length(
    model: torch.nn.Module,
    folder: TokenFolder,
    bytes_of: Int[Tensor, " W"],
    lengths: Iterable[int],
    *,
    tokens: int,
    batch_tokens: int,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    ranks: int = 1,
    total: Sum | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Does the model use more context than it was trained on? Two curves over the same targets.

    Rows of the longest of `lengths`, evenly spaced over the split, are scored once per length, cut into windows of
    that length which all begin with an empty state; and the longest by the position of the target in its row. The
    second costs nothing: the row is read piece by piece, the state carried, and a prefix and its state are the whole.

    Args:
        tokens: how many are scored per length, at least one row.
        batch_tokens: how many in one forward pass at most, at least one row.

    Returns:
        {"lengths": [{"length", "bits_per_byte"}], "positions": [{"from", "to", "bits_per_byte"}]}, ready for the
        journal; a bucket without a byte is left out.
    """
    objective = model if isinstance(model, Objective) else Objective(model)
    edges = sorted(set(lengths))
    longest = edges[-1]
    sums = torch.zeros(2, len(edges), 5, dtype=torch.float64, device=bytes_of.device)
    rows_at_once, windows = max(1, batch_tokens // longest), max(1, tokens // longest)
    with _measuring(objective, autocast, bytes_of.device):
        for numbers in _dealt(Stream(folder, longest).in_order(rows_at_once, limit=windows), rank, ranks):
            rows = Rows.of(numbers, bytes_of.device)
            for index, length in enumerate(edges[:-1]):
                for part in _cut(rows, length):
                    sums[0, index] += _sums(objective, part, bytes_of)[0]
            state = None
            for index, (begin, end) in enumerate(pairwise([0, *edges])):
                found, state = _sums(objective, _part(rows, begin, end), bytes_of, state)
                sums[1, index] += found
    sums[0, -1] = sums[1].sum(0)
    sums = sums if total is None else total(sums)
    scores = [[Score.of(one) for one in curve] for curve in sums]
    return {
        "lengths": [
            {"length": length, "bits_per_byte": score.bits_per_byte}
            for length, score in zip(edges, scores[0], strict=True)
            if score.bytes
        ],
        "positions": [
            {"from": begin, "to": end, "bits_per_byte": score.bits_per_byte}
            for (begin, end), score in zip(pairwise([0, *edges]), scores[1], strict=True)
            if score.bytes
        ],
    }


def continued(
    write: Write, model: Any, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int
) -> list[dict[str, str]]:
    """What the model makes of each prompt, for the journal. The training mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        return [{"prompt": prompt, "text": write(model, tokenizer, prompt, tokens)} for prompt in prompts]
    finally:
        model.train(training)


@contextmanager
def _measuring(objective: Objective, autocast: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, products in `autocast`; the training mode comes back."""
    training = objective.training
    objective.eval()
    try:
        # Not inference_mode: its tensors may not meet autograd later, in a compiled graph's cache.
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        objective.train(training)


def _sums(
    objective: Objective, rows: Rows, bytes_of: Int[Tensor, " W"], state: Any = None
) -> tuple[Float64[Tensor, "5"], Any]:
    """Sums of one portion, and the state behind it."""
    scale = torch.ones((), device=bytes_of.device)
    _, sums, state = objective(rows.tokens, rows.targets, rows.reset, rows.valid, bytes_of, scale, state)
    return sums, state


def _part(rows: Rows, begin: int, end: int) -> Rows:
    return Rows(*(part[:, begin:end] for part in (rows.tokens, rows.targets, rows.reset, rows.valid)))


def _cut(rows: Rows, length: int) -> list[Rows]:
    """Windows of `length`, all side by side where it divides the rows; else one column after the other."""
    longest = rows.tokens.shape[1]
    if longest % length:
        return [_part(rows, begin, begin + length) for begin in range(0, longest, length)]
    return [Rows(*(part.reshape(-1, length) for part in (rows.tokens, rows.targets, rows.reset, rows.valid)))]


def _dealt(batches: Iterable[Batch], rank: int, ranks: int) -> Iterator[Batch]:
    """Every `ranks`-th batch, from `rank` on; at the end one in which nothing counts, for those who came away empty."""
    turn: list[Batch] = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == ranks:
            yield turn[rank]
            turn = []
    if turn:
        yield turn[rank] if rank < len(turn) else replace(turn[0], valid=np.zeros_like(turn[0].valid))


def yardsticks(prepared: Path) -> dict[str, float]:
    """Bits per byte on the test split without a neural network: byte n-grams fitted on train, and compressors.

    `prepared` holds the token folders `train` and `test`. Computed once and kept there, since the n-grams take half a
    minute on the default corpus; the fingerprints say what they belong to. Empty where the training split is too
    large for n-grams in memory.
    """
    train, test = TokenFolder.open(prepared / "train"), TokenFolder.open(prepared / "test")
    owner = f"{train.fingerprint} {test.fingerprint}"
    file = prepared / "yardsticks.json"
    if file.exists() and (kept := read_json(file, "fingerprints", "bits_per_byte"))["fingerprints"] == owner:
        return kept["bits_per_byte"]
    if train.total_bytes > YARDSTICK_BYTES:
        return {}
    held_out = list(test.texts())
    ngrams = ngram_bits_per_byte(list(train.texts()), held_out)
    found = {f"byte n-gram, order {order}": bits for order, bits in ngrams.items()}
    found |= compressor_bits_per_byte(b"".join(held_out))
    write_atomically(file, json.dumps({"fingerprints": owner, "bits_per_byte": found}, indent=1) + "\n")
    return found
