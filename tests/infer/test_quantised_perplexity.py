"""What a trained model loses when it decodes from a quantised file: 8 bits at most 0.1 % of its perplexity, 4 bits 3 %.

Through the whole path that a user takes: the file as `xlstm convert --quant` writes it, `ox.load`, which packs it, and
the native step, where activations meet packed rows as integers of 15 bits.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("gguf")
import openxlstm as ox
from openxlstm.checkpoint.gguf_write import to_gguf
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.infer.decoder import NativeDecoder
from openxlstm.kernels.cpu import library
from openxlstm.models.interface import LanguageModel

needs_library = pytest.mark.skipif(isinstance(library.native(), str), reason=str(library.native()))
TEXT = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8).long()
ROWS, LENGTH, STEPS = 16, 64, 60


def windows(text: Tensor, rows: int) -> Tensor:
    first = torch.randint(0, len(text) - LENGTH, (rows,)).tolist()
    return torch.stack([text[at : at + LENGTH + 1] for at in first])


@pytest.fixture(scope="module")
def trained() -> ox.xLSTMLarge:
    """Some seconds of training: far better than guessing among bytes, so that its perplexity has something to lose."""
    torch.manual_seed(0)
    model = ox.xLSTMLarge(ox.xLSTMLargeConfig(vocab_size=257, width=64, blocks=2, heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        tokens = windows(TEXT[:80_000], ROWS)
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: LanguageModel) -> float:
    """Of text that was not trained on, a token at a time."""
    torch.manual_seed(1)
    nats, count = 0.0, 0
    for _ in range(4):
        tokens = windows(TEXT[80_000:], ROWS)
        native = NativeDecoder(model, model.empty_state(ROWS))
        for t in range(LENGTH):
            nats += float(F.cross_entropy(native.step(tokens[:, t]), tokens[:, t + 1], reduction="sum"))
            count += ROWS
    return float(torch.tensor(nats / count, dtype=torch.float64).exp())


@needs_library
def test_packed_files_lose_no_more_perplexity_than_promised(trained: ox.xLSTMLarge, tmp_path: Path) -> None:
    ox.save(trained, tmp_path / "model")
    Tokenizer.bytes().save(tmp_path / "model" / "tokenizer.json")
    found = {}
    for kind in ("bf16", "q8_0", "q4_0"):
        to_gguf(tmp_path / "model", tmp_path / f"{kind}.gguf", quant=kind)
        found[kind] = perplexity(ox.load(tmp_path / f"{kind}.gguf"))
    assert 1 < found["bf16"] < 40, "it has learnt: guessing is 257"
    for kind, limit in (("q8_0", 1e-3), ("q4_0", 3e-2)):
        assert abs(found[kind] / found["bf16"] - 1) <= limit, found
    assert found["q8_0"] != found["bf16"], "another model was measured"
