"""`xlstm train` from the outside: what it prints, what it writes, and what it refuses without writing."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from openxlstm.cli import main
from openxlstm.train import checkpoints


@pytest.fixture
def xlstm(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """xlstm(*words) runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLSTM_CACHE", str(cache))

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, ["train", *map(str, words)])

    return run


def test_print_shows_a_recipe_that_can_be_read(xlstm, recipe_file: Path, tmp_path: Path) -> None:
    shown = xlstm(recipe_file, "optim.lr=0.5", "--print")
    assert shown.exit_code == 0
    assert tomllib.loads(shown.output)["optim"]["lr"] == 0.5
    (tmp_path / "again.toml").write_text(shown.output)
    assert xlstm("again.toml", "--print").output == shown.output
    assert json.loads(xlstm("again.toml", "--print", "--json").output)["optim"]["lr"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["again.toml"]


def test_a_run_is_announced_and_says_where_its_report_is(xlstm, recipe_file: Path, tmp_path: Path) -> None:
    said = xlstm(recipe_file, "train.steps=4")
    assert said.exit_code == 0, said.output
    first, *_, report, write = said.output.splitlines()
    assert first.startswith("xLSTM[1:1]  ")
    assert report == "report: runs/small/report.md"
    assert write == "write:  xlstm generate runs/small --prompt 'def '"
    assert "step 4  validation" in said.output
    again = xlstm(recipe_file, "train.steps=4")
    assert "runs/small is finished; nothing was trained" in again.output
    whole = json.loads(xlstm(recipe_file, "train.steps=4", "--json").output)
    assert (whole["folder"], whole["ending"], whole["summary"]["step"]) == ("runs/small", "already finished", 4)
    assert whole["summary"]["sample"].startswith("def ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.lrr=1"], "command line: optim has no field 'lrr'; did you mean 'lr'?"),
        (["optim.lr"], "'optim.lr' is no override"),
        (["model.heads=3"], "model: "),
        (["data.context=0"], "command line: data.context=0 must be at least 1"),
    ],
)
def test_a_bad_recipe_stops_before_anything_is_written(
    xlstm, recipe_file: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    said = xlstm(recipe_file, *words)
    assert said.exit_code == 2
    assert sentence in said.output
    assert "Traceback" not in said.output
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence(xlstm, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("step-00000004 could not be saved: No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    said = xlstm(recipe_file, "--out", "there")
    assert said.exit_code == 1
    assert (
        "No space left on device. What was saved before is untouched; the same command goes on from there"
        in said.output
    )
