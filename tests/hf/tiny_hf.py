"""Tiny models of both architectures for the tests of openxlstm.hf, with weights that hide nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import openxlstm as ox
import openxlstm.hf as oxhf

W, PAD, BOS = 64, 1, 2
KINDS = ("large", "neurips")
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}


def native_config(kind: str, **changes: Any) -> ox.xLSTMConfig | ox.xLSTMLargeConfig:
    if kind == "large":
        return ox.xLSTMLargeConfig(**{"vocab_size": W, "width": 24, "blocks": 2, "heads": 3, "qk_width": 12} | changes)
    return ox.xLSTMConfig(**{"vocab_size": W, "width": 24, "pattern": "ms", "heads": 2, "ffn_width": 40} | changes)


def config_of(kind: str, **changes: Any) -> oxhf.xLSTMConfig:
    return oxhf.xLSTMConfig.from_native(native_config(kind, **changes), pad_token_id=PAD, bos_token_id=BOS)


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """Large random weights and lively gates: the paper's initialisation hides errors."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "igate_preact" in name or "gate_i" in name:
            torch.nn.init.normal_(parameter)
    return model


def build(kind: str, **changes: Any) -> oxhf.xLSTMForCausalLM:
    return redraw(oxhf.xLSTMForCausalLM(config_of(kind, **changes))).eval()


def text(rows: int, length: int) -> Tensor:
    """Ids without padding."""
    return torch.randint(3, W, (rows, length))


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows [T_r] as one batch and its mask; `middle` pads after the first token."""
    longest = max(len(row) for row in rows) + 2
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        gap, here = longest - len(row), torch.arange(len(row))
        where = {"left": here + gap, "right": here, "both": here + gap // 2, "middle": here + gap * (here > 0)}[side]
        ids[r, where], mask[r, where] = row, 1
    return ids, mask


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def forget_warnings() -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
