"""Smoke profiles: each comes out by its own rules. `xlstm eval all --profile smoke` runs those that are not here, too.

One of every kind; of the kinds that only run for a while (`test_experiments.UNJUDGED`) the one that generates. Those
that read files are in `test_files.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openxlstm.experiments import choice, grid, report
from openxlstm.experiments.catalogue import EXPERIMENTS

SMOKE = (
    "parity", "even-pairs", "reverse-string", "mqar-64-4", "nns", "listops", "digits", "duplicates", "language-stdlib",
    "generation",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two of these run side by side, and small models gain nothing from more
    try:
        said: list[str] = []
        lines = grid.go(grid.runs(EXPERIMENTS[name], "smoke"), tmp_path / "lines.jsonl", jobs=1, show=said.append)
    finally:
        torch.set_num_threads(threads)
    assert len(said) == len(lines), "every run is told of once"
    views = [one for one in EXPERIMENTS.values() if one.name == name or one.runs_of == name]
    for experiment in views:
        if experiment.rules.get("smoke"):
            assert choice.verdict(experiment, "smoke", lines) == "reproduced", "\n".join(said)
    page = report.page({one.name: one for one in views}, lines, tmp_path / "images", "a test")
    assert f"## {name}" in page
    assert "![" in page
