"""Experiments on files of the user: what is refused, what a result is named by, and how a page finds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from openxlstm.cli import main
from openxlstm.experiments import report, results
from openxlstm.experiments.catalogue import EXPERIMENTS
from openxlstm.experiments.plans import Plan
from openxlstm.tasks.images import RECORD, Cifar10

PLAN = EXPERIMENTS["cifar10"].profiles["smoke"]
assert isinstance(PLAN, Plan)


def cifar(folder: Path, seed: int = 0) -> Path:
    """Six files of random records."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for name in Cifar10().files:
        records = random.integers(0, 256, (20, RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_a_plan_without_files_says_what_it_needs_and_where_to_name_it(tmp_path: Path) -> None:
    refused = run("cifar10", "--profile", "smoke")
    assert refused.exit_code == 2
    said = " ".join(refused.output.split())
    assert "reads the binary version of CIFAR-10, which nothing here downloads" in said
    assert "test_batch.bin (--data)" in said
    empty = run("cifar10", "--profile", "smoke", "--data", tmp_path)
    assert "has no data_batch_1.bin" in empty.output
    assert "parity reads no files" in run("parity", "--profile", "smoke", "--data", tmp_path).output
    assert "is for one experiment" in run("all", "--profile", "smoke", "--data", tmp_path).output


def test_a_fingerprint_is_that_of_the_files_and_not_of_their_place(tmp_path: Path) -> None:
    here, there, other = cifar(tmp_path / "a"), cifar(tmp_path / "b"), cifar(tmp_path / "c", seed=1)
    first, second, third = (PLAN.reading(str(folder)).fingerprint for folder in (here, there, other))
    assert first == second != third
    assert first.startswith(PLAN.fingerprint + "-")
    assert PLAN.reading(str(here)).reading(None).fingerprint == PLAN.fingerprint
    (there / "test_batch.bin").write_bytes((other / "test_batch.bin").read_bytes())
    assert PLAN.reading(str(there)).fingerprint not in (first, third)


@pytest.mark.slow
def test_the_smoke_of_files_runs_on_them_and_the_page_shows_the_last_ones(tmp_path: Path) -> None:
    file, pairs = tmp_path / "lines.jsonl", tmp_path / "pairs"
    for seed in (0, 1):
        folder = cifar(tmp_path / str(seed), seed)
        done = run("cifar10", "--profile", "smoke", "--data", folder, "--results", file, "--json", "--jobs", 1)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["cifar10"]["verdict"] == "reported"
    pairs.mkdir()
    for part in ("train", "eval", "test"):
        (pairs / f"new_aan_pairs.{part}.tsv").write_text("1\t2\t3\tone text\tanother\n0\t4\t5\tmore\tless\n")
    done = run("retrieval", "--profile", "smoke", "--data", pairs, "--results", file, "--jobs", 1)
    assert done.exit_code == 0, done.output
    lines = results.read([file])
    assert len({line.plan for line in lines}) == 3
    page = report.page(EXPERIMENTS, lines, tmp_path / "images", "a test")
    assert "| [cifar10](#cifar10) | smoke | 2 | reported |" in page
    assert "| [retrieval](#retrieval) | smoke | 2 | reported |" in page
    assert "2 further lines" in page
    assert "`xlstm eval cifar10 --profile smoke --data FOLDER`" in page
