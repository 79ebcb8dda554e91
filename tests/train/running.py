"""What the tests of whole runs share: how to look at a run folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openxlstm.checkpoint import store
from openxlstm.train.log import read_journal

Train = Callable[..., str]
CLOCK = (  # what no two runs have in common
    "elapsed", "tokens_per_second", "tokens_per_second_per_device", "data_wait", "step_p50", "step_p95", "mfu",
    "memory", "seconds_left", "evaluate_seconds", "save_seconds", "gates_seconds",
)  # fmt: skip


def curve(folder: Path) -> list[dict[str, float]]:
    """The journal without what the clock says."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_journal(folder / "train.jsonl")]


def same_weights(a: Path, b: Path) -> bool:
    """To the bit, of the models that two runs leave."""
    pairs = zip(*(store.load(folder / "model").state_dict().values() for folder in (a, b)), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in names]
