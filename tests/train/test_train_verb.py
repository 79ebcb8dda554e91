"""`xlstm train` from the outside: what it prints, what it writes, and what it refuses without writing."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from openxlstm.cli import main
from openxlstm.data.tokenizer import Tokenizer
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
    *before, report, write = said.output.splitlines()
    assert any(line.startswith("xLSTM[1:1]  ") for line in before)
    assert report == "report: runs/small/report.md"
    assert write == "write:  xlstm generate runs/small --prompt 'The '"
    assert "step 4  validation" in said.output
    again = xlstm(recipe_file, "train.steps=4")
    assert "runs/small is finished; nothing was trained" in again.output
    whole = json.loads(xlstm(recipe_file, "train.steps=4", "--json").output)
    assert (whole["folder"], whole["ending"], whole["summary"]["step"]) == ("runs/small", "already finished", 4)
    assert whole["summary"]["sample"].startswith("\n"), "nobody said that these texts are Python"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.lrr=1"], "command line: optim has no field 'lrr'; did you mean 'lr'?"),
        (["optim.lr"], "'optim.lr' is no override"),
        (["model.heads=3"], "model: "),
        (["data.context=0"], "command line: data.context=0 must be at least 1"),
        (["train.seed=-1"], "command line: train.seed=-1 must be at least 0"),
        (["train.batch=4294967296"], "command line: train.batch=4294967296 must be at most 2147483647"),
        (["optim.lr=inf"], "command line: optim.lr=inf must be above 0 and finite"),
        (["optim.weight_decay=nan"], "command line: optim.weight_decay=nan must be at least 0 and finite"),
        (["model.norm_eps=inf"], "model: xLSTMConfig: norm_eps=inf must be positive and finite"),
        (["model.eps=nan"], "model: xLSTMConfig: eps=nan must be at least 0 and finite"),
        (["model.width=1000000000000000000000000000000"], "model: xLSTMConfig: width must be int"),
        (["model.width=1000000000000"], "not enough memory ("),
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
    def full(*_: object, **__: object) -> None:
        raise OSError("step-00000004 could not be saved: No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    said = xlstm(recipe_file, "--out", "there")
    assert said.exit_code == 1
    assert (
        "No space left on device. What was saved before is untouched; the same command goes on from there"
        in said.output
    )


def test_a_run_folder_inside_the_corpus_is_refused(xlstm, recipe_file: Path, texts: Path, tmp_path: Path) -> None:
    """What the run writes would be a document of the next sitting."""
    mine = tmp_path / "mine"
    shutil.copytree(texts, mine)
    said = xlstm(recipe_file, "data.corpus=mine", "--out", "mine/run")
    assert said.exit_code == 2
    assert "the run folder mine/run lies inside the corpus" in said.output
    assert not (mine / "run").exists()


def test_a_run_folder_is_no_recipe(xlstm, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "run is a folder, not a recipe; to go on with a run, give the recipe it began with" in xlstm("run").output


def test_what_was_refused_at_once_may_be_corrected(xlstm, recipe_file: Path) -> None:
    """Before the first checkpoint there is nothing that a frozen key protects."""
    said = xlstm(recipe_file, "optim.lr=1e300", "train.steps=4", "guard.nonfinite=stop")
    assert said.exit_code == 2
    assert "the loss is nan" in said.output
    assert xlstm(recipe_file, "optim.lr=1e-3", "train.steps=4").exit_code == 0
    assert "optim.lr was 0.001, is 0.01" in xlstm(recipe_file, "train.steps=4").output


def test_a_tokenizer_that_cannot_be_measured_in_bytes_is_refused_before_anything_is_read(
    xlstm, recipe_file: Path, tmp_path: Path
) -> None:
    table = json.loads(Tokenizer.bytes().json)
    words = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 256}, "unk_token": "a"}
    for name, change, sentence in (
        ("words", {"model": words, "pre_tokenizer": None, "decoder": None}, "does not spell bytes"),
        ("endless", {"added_tokens": []}, "has no token that ends a document"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(table | change))
        said = xlstm(recipe_file, f"data.tokenizer={name}.json", "--print")
        assert said.exit_code == 2
        assert sentence in said.output, said.output
    (tmp_path / "more.json").write_text(json.dumps(table | {"normalizer": {"type": "Prepend", "prepend": "_"}}))
    said = xlstm(recipe_file, "data.tokenizer=more.json", "--out", "there")
    assert said.exit_code == 2
    assert "do not spell the texts" in said.output
    assert not (tmp_path / "there").exists()
