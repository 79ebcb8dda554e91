"""A sweep is plain loops: every combination once, results a line each, interrupted and continued like a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from openxlstm.cli import main
from openxlstm.train import sweep
from openxlstm.train.log import Silent


def test_a_grid_is_read_and_commas_in_brackets_stay() -> None:
    assert sweep.read_grid(["optim.lr=1e-2,1e-3", "optim.betas=[0.9,0.95],[0.9,0.99]"]) == {
        "optim.lr": ["1e-2", "1e-3"],
        "optim.betas": ["[0.9,0.95]", "[0.9,0.99]"],
    }


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["optim.lr"], r"--grid 'optim.lr' must be KEY=VALUE,VALUE"),
        (["optim.lr=1,,2"], r"must be KEY=VALUE,VALUE"),
        (["a=1", "a=2"], r"a is given twice; list all"),
        (["a=1,1"], r"names a value twice; a second seed is --seeds 2"),
        (["train.seed=1,2"], r"--seeds says how many"),
    ],
)
def test_a_wrong_grid_is_refused(said: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sweep.read_grid(said)


def test_every_combination_has_every_seed() -> None:
    jobs = list(sweep.combinations({"a": ["1", "2"], "b": ["x", "y"]}, 2))
    assert len(jobs) == 8
    assert jobs[:3] == [({"a": "1", "b": "x"}, 0), ({"a": "1", "b": "x"}, 1), ({"a": "1", "b": "y"}, 0)]
    assert [sweep.folder_name(*job) for job in sweep.combinations({}, 1)] == ["seed=0"]
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        sweep.folder_name({"data.corpus": "a/b"}, 0)


def test_a_sweep_trains_and_goes_on(recipe_file: Path, cache: Path, tmp_path: Path) -> None:
    said, grid, out = ["train.steps=4"], {"optim.lr": ["1e-2"]}, tmp_path / "sweep"
    rows = sweep.sweep(str(recipe_file), said, grid, 2, out, Silent(), cache)
    assert [(row["values"]["optim.lr"], row["seed"]) for row in rows] == [("1e-2", 0), ("1e-2", 1)]
    assert [json.loads(line) for line in (out / sweep.RESULTS).read_text().splitlines()] == rows
    assert all(row["ending"] == "done" and row["step"] == 4 for row in rows)
    assert rows[0]["valid_bits_per_byte"] != rows[1]["valid_bits_per_byte"], "seeds are seeds"
    journal = out / "optim.lr=1e-2,seed=0" / "train.jsonl"
    before = journal.read_bytes()
    again = sweep.sweep(str(recipe_file), said, grid, 2, out, Silent(), cache)
    assert {row["ending"] for row in again} == {"already finished"}
    assert [row["valid_bits_per_byte"] for row in again] == [row["valid_bits_per_byte"] for row in rows]
    assert journal.read_bytes() == before


def test_an_interrupted_run_ends_the_sweep(recipe_file: Path, cache: Path, tmp_path: Path) -> None:
    """`train.stop_after` is the interruption that a test can have without a signal; the second run never begins."""
    said = ["train.stop_after=1e-9"]
    rows = sweep.sweep(str(recipe_file), said, {"optim.lr": ["1e-2", "1e-3"]}, 1, tmp_path / "s", Silent(), cache)
    assert [row["ending"] for row in rows] == ["paused"]
    assert rows[0]["valid_bits_per_byte"] is None
    assert not (tmp_path / "s" / "optim.lr=1e-3,seed=0").exists()


def test_a_mistake_in_the_last_combination_costs_nothing(recipe_file: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        sweep.sweep(str(recipe_file), [], {"optim.lr": ["1e-2", "-1.0"]}, 1, tmp_path / "s", Silent(), cache)
    assert not (tmp_path / "s").exists()


def test_the_verb_prints_a_table(
    recipe_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLSTM_CACHE", str(cache))
    said = ["sweep", str(recipe_file), "train.steps=3", "--grid", "optim.lr=1e-2", "--out", str(tmp_path / "s")]
    shown = CliRunner().invoke(main, said)
    assert shown.exit_code == 0, shown.output
    table = shown.output.split("Runs, the best first")[1].split()
    assert table[:2] == ["optim.lr", "seed"]
    assert len(json.loads(CliRunner().invoke(main, [*said, "--json"]).output)["runs"]) == 1
