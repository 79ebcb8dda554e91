"""The stopwatches of bench/overhead.py: parts of a step that add up to it, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from openxlstm.bench import overhead


def test_parts_add_up_and_the_stopwatches_are_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"text {number}: {'word ' * (3 + number)}\n")
    monkeypatch.setenv("XLSTM_CACHE", str(tmp_path / "cache"))
    plain = torch.Tensor.backward
    said = [
        "--steps", "20", "--json", str(tmp_path / "found.json"), "model.width=16", f'data.corpus="{texts}"',
        "data.context=32", "train.batch=2",
    ]  # fmt: skip
    done = CliRunner().invoke(overhead.main, said)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["steps"]) == 20 - 1 - overhead.WARM_UP
    for parts in found["steps"]:
        assert all(seconds > 0 for seconds in parts.values()), parts
    assert 0 < found["overhead"] < 1
    assert "everything else" in done.output
    assert torch.Tensor.backward is plain
