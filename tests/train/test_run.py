"""Whole runs on a corpus of a few kilobytes: the curve, the folder, what continues and what is refused."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from train.running import Train, curve, events

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.train import checkpoints, loop
from openxlstm.train.folder import only_one
from openxlstm.train.log import Silent
from openxlstm.train.rehearse import rehearse
from openxlstm.train.run import Run, read_recipe


def test_a_run_folder_has_all_its_parts(whole: Path) -> None:
    lines = curve(whole)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "valid_loss" in line] == [5, 10, 12]
    assert [path.name for path in checkpoints.complete(whole / "checkpoints")] == ["step-00000008", "step-00000012"]
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=1e-12)
    assert rates[-1] < 2e-3
    assert all(0 < line["utilisation"] <= 1 for line in lines if "loss" in line)
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["ending"], summary["step"]) == ("done", 12)
    assert summary["tokens"] == sum(line["tokens"] for line in lines if "loss" in line)
    events = [json.loads(line)["event"] for line in (whole / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "done"]
    resolved = json.loads((whole / "resolved.json").read_text())
    assert resolved["recipe"]["train"]["steps"] == 12
    assert resolved["machine"]["torch"] == torch.__version__
    assert Tokenizer.from_file(whole / "model" / "tokenizer.json").sha256 == Tokenizer.bytes().sha256


def test_the_report_says_everything(whole: Path) -> None:
    report = (whole / "report.md").read_text()
    summary = json.loads((whole / "summary.json").read_text())
    for part in (
        "# A run for tests",
        "xLSTM[1:1]",
        f"{summary['held_out']['bits_per_byte']:.3f} bits per byte",
        "fp32",
    ):
        assert part in report
    assert "````text\na sample ``` of text\n````" in report, "the fence outgrows what the text holds"
    for name in ("bits_per_byte", "loss", "learning_rate"):
        assert f"({name}.png)" in report
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_how_to_get_pictures(
    whole: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("openxlstm.train.plots", raising=False)
    monkeypatch.setitem(sys.modules, "openxlstm.train.plots", None)  # as if importing it had failed
    assert train_small(whole) == "already finished"
    assert "pip install 'openxlstm[report]'" in (whole / "report.md").read_text()


def test_a_finished_run_rewrites_only_its_report(whole: Path, train_small: Train) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert train_small(whole) == "already finished"
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    touched = {path.name for path in after if after[path] != before.get(path)}
    assert touched == {"report.md", "bits_per_byte.png", "loss.png", "learning_rate.png", "gradient_norm.png"}


def test_the_report_compares_with_yardsticks(tmp_path: Path, train_small: Train, cache: Path) -> None:
    assert train_small(tmp_path / "run", "evaluate.yardsticks=true", "train.steps=3") == "done"
    report = (tmp_path / "run" / "report.md").read_text()
    for name in ("byte n-gram, order 0", "byte n-gram, order 4", "gzip -9", "xz -9", "**this model**"):
        assert f"| {name} |" in report
    assert list(cache.glob("*/yardsticks.json")), "kept with the corpus"


def test_micro_batches_change_the_curve_by_rounding_only(tmp_path: Path, whole: Path, train_small: Train) -> None:
    """Without dropout, whose masks belong to the portions."""
    for rows in (6, 2):
        train_small(tmp_path / f"cut{rows}", "model.dropout=0.0", f"train.micro_batch={rows}", "train.steps=6")
    for one, other in zip(curve(tmp_path / "cut6"), curve(tmp_path / "cut2"), strict=True):
        assert one == pytest.approx(other, rel=2e-5)


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew(whole: Path, train_small: Train) -> None:
    """Somebody needed the room; the model, the curve and the report must survive the same command."""
    shutil.rmtree(whole / "checkpoints")
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"its checkpoints are gone.*another --out"):
        train_small(whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("resolved.json", b"\xff\xfe"),
        ("resolved.json", b"[1]"),
        ("resolved.json", b"{}"),
        ("resolved.json", b'{"recipe": 3, "machine": {}, "data": {}}'),
        ("summary.json", b'{"st'),
        ("summary.json", b"3"),
        ("summary.json", b'{"step": 12}'),
        ("train.jsonl", b'3\n{"step": 1}\n'),
        ("train.jsonl", b'{"loss": 1}\n'),
        ("checkpoints/step-00000012/meta.json", b"\xff"),
        ("checkpoints/step-00000012/meta.json", b"[]"),
        ("checkpoints/step-00000012/.metadata", b""),
        ("checkpoints/step-00000012/.metadata", b"garbage"),
        ("checkpoints/step-00000012/__0_0.distcp", b""),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_lost(
    whole: Path, train_small: Train, name: str, content: bytes
) -> None:
    (whole / name).write_bytes(content)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{name.split('/')[-1]}|{Path(name).parent.name}"):
        train_small(whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_plan_that_is_none_is_named(whole: Path, train_small: Train) -> None:
    (whole / "plan.json").write_text('{"steps": 12, "max_minutes": 5.0, "cool_down_from": "x"}')
    with pytest.raises(ValueError, match=r"plan.json: cool_down_from = 'x' must be a step in 1\.\.12"):
        train_small(whole, "train.max_minutes=5")


def test_without_its_curve_a_finished_run_still_reports(whole: Path, train_small: Train) -> None:
    (whole / "train.jsonl").unlink()
    assert train_small(whole) == "already finished"
    assert "*No pictures: `train.jsonl` holds no step.*" in (whole / "report.md").read_text()


def test_a_longer_run_continues_a_finished_one(whole: Path, train_small: Train) -> None:
    before = curve(whole)
    assert train_small(whole, "train.steps=15") == "done"
    assert curve(whole)[: len(before)] == before
    assert curve(whole)[-1]["step"] == 15
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert events[2]["event"] == "resume"
    assert events[2]["changes"]["recipe.train.steps"] == [12, 15]


def test_what_belongs_to_another_run_is_refused(whole: Path, train_small: Train, tmp_path: Path) -> None:
    before = (whole / "resolved.json").read_bytes()
    with pytest.raises(ValueError, match=r"model\.width was 16, is 32.*optim\.lr was 0\.01, is 0\.1.*another --out"):
        train_small(whole, "model.width=32", "optim.lr=0.1")
    assert (whole / "resolved.json").read_bytes() == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no run folder"):
        train_small(tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_a_refused_run_leaves_no_folder(tmp_path: Path, train_small: Train, texts: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text("one document makes no three splits")
    with pytest.raises(ValueError, match="none of them falls into"):
        train_small(tmp_path / "runs" / "r", f"data.corpus={few}")
    assert not (tmp_path / "runs").exists()


def test_two_commands_on_one_run_are_refused(tmp_path: Path, train_small: Train) -> None:
    with only_one(tmp_path / "run"), pytest.raises(ValueError, match="another command is training this run"):
        train_small(tmp_path / "run")


@pytest.mark.compile
@pytest.mark.skipif(not shutil.which("g++"), reason="the default compiler of torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_same_curve(tmp_path: Path, train_small: Train) -> None:
    """Without dropout, whose masks a compiler draws in its own order."""
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        course = ("model.pattern=m", "model.dropout=0.0", "train.steps=3", f"train.compile={compiled}")
        assert train_small(tmp_path / name, *course) == "done"
    for one, other in zip(curve(tmp_path / "plain"), curve(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_without_a_compiler_nothing_is_begun(
    tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"train.compile = true needs a C\+\+ compiler.*'no-such-compiler'"):
        train_small(tmp_path / "run", "train.compile=true")
    assert not (tmp_path / "run").exists()


def test_it_learns(tmp_path: Path, train_small: Train) -> None:
    """Sixty short documents nearly by heart: 0.45 nats, where guessing by frequency costs about 3."""
    course = ("train.steps=90", "model.dropout=0.0", "model.width=32", "train.micro_batch=6", "evaluate.every=90")
    assert train_small(tmp_path / "run", *course, "data.context=48", "checkpoint.every=90") == "done"
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    assert lines[0]["loss"] < math.log(257) + 0.3, "the first guess is no prejudice"
    assert lines[-1]["loss"] < 0.6, lines[-1]


def test_what_is_allowed_by_name_may_change_and_is_written_down(
    whole: Path, train_small: Train, recipe_file: Path, cache: Path
) -> None:
    recipe, tokenizer = read_recipe(str(recipe_file), ["optim.lr=1e-3", "train.steps=14"])
    write = lambda model, tokenizer: ""
    with pytest.raises(ValueError, match=r"or insist with --allow optim.lr$"):
        loop.train(recipe, tokenizer, whole, cache, Silent(), write)
    with pytest.raises(ValueError, match=r"--allow = 'optim.lrr' is unknown; did you mean 'optim.lr'"):
        loop.train(recipe, tokenizer, whole, cache, Silent(), write, allowed=["optim.lrr"])
    assert loop.train(recipe, tokenizer, whole, cache, Silent(), write, allowed=["optim.lr"]) == "done"
    assert [(event["key"], event["old"], event["new"]) for event in events(whole, "allowed")] == [
        ("optim.lr", 1e-2, 1e-3)
    ]
    assert curve(whole)[-1]["step"] == 14


def test_another_batch_size_is_a_ramp(whole: Path, recipe_file: Path, cache: Path) -> None:
    """So that it stays known which rows every step has read."""
    write = lambda model, tokenizer: ""
    recipe, tokenizer = read_recipe(str(recipe_file), ["train.batch=9", "train.steps=14"])
    with pytest.raises(ValueError, match=r"has read 72 rows in 12 steps.*it would be 108; say where.*\[12, NEW\]"):
        loop.train(recipe, tokenizer, whole, cache, Silent(), write, allowed=["train.batch"])
    recipe, tokenizer = read_recipe(str(recipe_file), ["train.batch=[[0, 6], [12, 9]]", "train.steps=14"])
    assert loop.train(recipe, tokenizer, whole, cache, Silent(), write, allowed=["train.batch"]) == "done"
    assert checkpoints.read_progress(checkpoints.latest(whole / "checkpoints")).consumed == 72 + 2 * 9


def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path, recipe_file: Path, cache: Path) -> None:
    recipe, tokenizer = read_recipe(str(recipe_file))
    facts = rehearse(recipe, tokenizer, tmp_path / "runs" / "r", cache, Silent())
    assert not (tmp_path / "runs").exists()
    assert 4 < facts["loss"] < 7
    assert facts["checkpoint_bytes"] > 3 * 4 * 17_000, "parameters and two moments"
    assert min(facts["tokens_per_second"], facts["seconds_per_step"], facts["valid_bits_per_byte"]) > 0


def test_a_rehearsal_notices_a_run_that_does_not_continue(
    tmp_path: Path, recipe_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tokenizer = read_recipe(str(recipe_file))
    honest = Run.restore

    def forgetful(run: Run, path: Path) -> checkpoints.Progress:
        progress = honest(run, path)
        run.optimiser.state.clear()  # the moments are lost
        return progress

    monkeypatch.setattr(Run, "restore", forgetful)
    with pytest.raises(ValueError, match="the step after a checkpoint is another one from memory than from the disk"):
        rehearse(recipe, tokenizer, tmp_path / "r", cache, Silent())
