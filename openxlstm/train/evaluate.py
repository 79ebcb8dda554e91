"""Bits per byte: of a model on a split, and of what needs no model on the same bytes."""

import json
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from openxlstm.data.tokens import TokenFolder, write_atomically
from openxlstm.data.windows import Stream
from openxlstm.data.yardsticks import compressor_bits_per_byte, ngram_bits_per_byte
from openxlstm.train.log import read_json
from openxlstm.train.loss import Rows, Score, score, token_nats

YARDSTICK_BYTES = 1 << 27  # n-grams need some 30 bytes of memory per byte of text: 4 GB for these 128 MB


def evaluate(
    model: torch.nn.Module,
    stream: Stream,
    bytes_of: Int[Tensor, " W"],
    *,
    batch: int,
    windows: int | None = None,
    autocast: torch.dtype | None = None,
) -> Score:
    """Score every window of a split once, each from an empty state; or `windows` of them, evenly spaced.

    The model is back in its training mode afterwards, and no random number is drawn: measuring changes no run.
    """
    total, training = Score(), model.training
    model.eval()
    try:
        with (
            torch.no_grad()
        ):  # not inference_mode: its tensors may not meet autograd later, in a compiled graph's cache
            for numpy_rows in stream.in_order(batch, limit=windows):
                rows = Rows.of(numpy_rows, bytes_of.device)
                total += score(token_nats(model, rows, autocast), rows, bytes_of)
    finally:
        model.train(training)
    return total


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
