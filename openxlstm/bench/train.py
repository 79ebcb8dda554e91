"""A training step of a whole NeurIPS model beside `xlstm` 2.0.6: the suite `train` of `xlstm bench`.

xLSTM[7:1], width 256, 8 blocks, 4 rows of 512 tokens: forward, loss, backward. The peer's sLSTM is its vanilla cell,
the one that needs no compiler; its weights are ours, converted, and its logits and its loss's gradients are compared
with ours first. bf16 is autocast over fp32 weights, on both sides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.bench.harness import OURS, Row, Side, check, measure, relative
from openxlstm.bench.peers import nx_model
from openxlstm.checkpoint.convert import export
from openxlstm.models.xlstm import xLSTM, xLSTMConfig

W, D, B, T = 512, 256, 4, 512
LIMITS = {"fp32": 1e-3, "bf16": 5e-2}  # relative rms between the two sides' logits, and of the embedding's gradient


def run(runs: int, say: Callable[[str], None]) -> list[Row]:
    """Rows in fp32 and bf16; `say` hears what comes next."""
    torch.manual_seed(0)
    model = xLSTM(xLSTMConfig(vocab_size=W, width=D, heads=4, pattern="mmmsmmmm"))
    peer = None
    if importlib.util.find_spec("xlstm") is not None:
        with TemporaryDirectory() as folder:
            export(model, f"{folder}/peer", to="nxai")
            peer = nx_model(f"{folder}/peer")
    x, y = (torch.randint(0, W, (B, T)) for _ in range(2))
    rows = []
    for precision in ("fp32", "bf16"):
        case = f"training step, {model.config.label}, D {D}, B {B}, T {T}, {precision}"
        say(case)
        ours = _step(model, lambda tokens: model(tokens)[0], x, y, precision)
        sides = [Side(OURS, ours)]
        if peer is not None:
            theirs = _step(peer, peer, x, y, precision)
            gradient = {name: call() for name, call in (("ours", ours), ("theirs", theirs))}
            error = max(relative(a, b) for a, b in zip(gradient["ours"], gradient["theirs"], strict=True))
            check("ours beside xlstm", case, error, LIMITS[precision])
            sides = [Side(OURS, ours, error), Side("xlstm, vanilla sLSTM", theirs, 0.0)]
        rows += measure(case, sides, runs)
    return rows


def _step(
    model: nn.Module, logits_of: Callable[[Tensor], Any], x: Tensor, y: Tensor, precision: str
) -> Callable[[], tuple[Tensor, Tensor]]:
    embedding = next(p for p in model.parameters() if p.shape == (W, D))

    def call() -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = logits_of(x)
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
        assert embedding.grad is not None, "the loss reaches the embedding"
        return logits.detach(), embedding.grad

    return call
