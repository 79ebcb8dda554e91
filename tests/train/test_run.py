"""Whole runs on a corpus of a few kilobytes: the curve, the folder, what continues and what is refused."""

import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openxlstm.checkpoint import store
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.train import checkpoints, loop, sitting, step
from openxlstm.train.folder import only_one
from openxlstm.train.log import Silent, read_journal
from openxlstm.train.rehearse import rehearse
from openxlstm.train.run import Run, read_recipe

Train = Callable[..., str]
CLOCK = (  # what no two runs have in common
    "elapsed", "tokens_per_second", "tokens_per_second_per_device", "data_wait", "step_p50", "step_p95", "mfu",
    "memory", "seconds_left", "evaluate_seconds", "save_seconds", "gates_seconds",
)  # fmt: skip


def curve(folder: Path) -> list[dict[str, float]]:
    """The journal without what the clock says."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_journal(folder / "train.jsonl")]


def same_weights(a: Path, b: Path) -> bool:
    pairs = zip(*(store.load(folder / "model").state_dict().values() for folder in (a, b)), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train_small: Train) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train_small(folder) == "done"
    return folder


@pytest.fixture
def whole(tmp_path: Path, trained: Path) -> Path:
    """A run that nothing interrupted; a copy that the test may spoil."""
    return shutil.copytree(trained, tmp_path / "whole")


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


def test_no_time_at_all_is_one_step(tmp_path: Path, train_small: Train) -> None:
    assert train_small(tmp_path / "run", "train.max_minutes=1e-9") == "out of time"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 1


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


def spoil(monkeypatch: pytest.MonkeyPatch, sample: int = 30) -> None:
    """The gradient of the step that reads this sample, the sixth if nothing is skipped, is no number."""
    honest = step.gradient

    def spoilt(run: Run, *arguments: object) -> step.Found:
        found = honest(run, *arguments)
        return dataclasses.replace(found, norm=math.nan) if sample in run.feed.step(found.step).sample else found

    monkeypatch.setattr(step, "gradient", spoilt)


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in names]


def test_a_gradient_that_is_no_number_is_not_taken(
    tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts, its rate is 0, and it is not hidden."""
    spoil(monkeypatch)
    assert train_small(tmp_path / "run") == "done"
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines if "skipped" in line] == [6]
    assert (lines[5]["grad_norm"], lines[5]["lr"]) == (None, 0.0)
    (event,) = events(tmp_path / "run", "skip")
    assert (event["step"], event["samples"], event["grad_norm"]) == (6, [30, 36], None)
    assert len(event["largest"]) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["skips"], summary["spikes"], summary["rollbacks"]) == (1, 0, 0)


def test_the_guard_stops_a_run_and_what_is_saved_is_sound(
    tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(ValueError, match=r"step 6: the gradient norm is nan; so the run stopped"):
            train_small(tmp_path / "run", "guard.nonfinite=stop")
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    assert events(tmp_path / "run", "stop")[0]["step"] == 6
    assert train_small(tmp_path / "run", "guard.nonfinite=stop") == "done"  # this time its gradients are numbers
    assert curve(tmp_path / "run") == curve(whole)


def test_a_rollback_never_reads_those_samples_again(
    tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the run that was told from the start to leave them out, to the bit."""
    spoil(monkeypatch)
    assert train_small(tmp_path / "back", "guard.nonfinite=rollback") == "done"
    assert train_small(tmp_path / "told", "data.skip=[[30, 36]]") == "done"
    assert curve(tmp_path / "back") == curve(tmp_path / "told")
    assert same_weights(tmp_path / "back", tmp_path / "told")
    (event,) = events(tmp_path / "back", "rollback")
    assert (event["step"], event["samples"]) == (6, [30, 36])
    progress = checkpoints.read_progress(checkpoints.latest(tmp_path / "back" / "checkpoints"))
    assert (progress.skipped, progress.rollbacks) == (((30, 36),), 1)
    assert train_small(tmp_path / "back", "guard.nonfinite=rollback", "train.steps=14") == "done"
    assert train_small(tmp_path / "told", "data.skip=[[30, 36]]", "train.steps=14") == "done"
    assert curve(tmp_path / "back") == curve(tmp_path / "told"), "and it remembers what it left out"


def test_rollbacks_are_limited(tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the very first step there is something to go back to."""
    honest = step.gradient
    monkeypatch.setattr(step, "gradient", lambda *given: dataclasses.replace(honest(*given), norm=math.inf))
    with pytest.raises(ValueError, match=r"2 rollbacks were made already, and guard.most_rollbacks = 2"):
        train_small(tmp_path / "run", "guard.nonfinite=rollback", "guard.most_rollbacks=2")
    assert [event["samples"] for event in events(tmp_path / "run", "rollback")] == [[0, 6], [6, 12]]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, whole: Path, train_small: Train) -> None:
    """The files of the second save may not grow beyond 10 kB; the run goes on when there is room again."""
    honest, saves = checkpoints.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*arguments: object, **options: object) -> checkpoints.Pending:
        saves.append(1)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            return honest(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        with pytest.raises(OSError, match="step-00000008 could not be saved: .*File too large"):
            train_small(tmp_path / "run", "checkpoint.asynchronous=false")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert train_small(tmp_path / "run") == "done"
    assert curve(tmp_path / "run") == curve(whole)
    assert same_weights(tmp_path / "run", whole)


class Impatient(Silent):
    """Somebody who wants the run to stop from its fifth step on."""

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        if line["step"] >= 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_wish_to_stop_is_granted_after_the_step(
    tmp_path: Path, whole: Path, recipe_file: Path, cache: Path, train_small: Train
) -> None:
    recipe, tokenizer = read_recipe(str(recipe_file))
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    assert loop.train(recipe, tokenizer, folder, cache, Impatient(), lambda model, tokenizer: "") == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.latest(folder / "checkpoints").name == "step-00000005"
    assert store.load(folder / "model").config.width == 16, "what there is can be used"
    assert not (folder / "summary.json").exists(), "the test split is for finished runs"
    assert train_small(folder) == "done"
    assert curve(folder) == curve(whole)


def test_a_limit_in_minutes_cuts_a_course_without_cool_down(tmp_path: Path, train_small: Train) -> None:
    folder = tmp_path / "run"
    assert train_small(folder, "train.steps=100_000", "train.max_minutes=0.01") == "out of time"
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["step"] < 100_000
    assert (
        f"The run ended early: it was out of time, at step {summary['step']:,} of 100,000."
        in (folder / "report.md").read_text()
    )
    assert train_small(folder, "train.steps=100_000", "train.max_minutes=0.01") == "already finished"
    minutes = summary["seconds"] / 60 + 0.01
    assert train_small(folder, "train.steps=100_000", f"train.max_minutes={minutes}") == "out of time"
    assert json.loads((folder / "summary.json").read_text())["step"] > summary["step"]


def test_a_limit_in_minutes_brings_the_cool_down_forward(
    tmp_path: Path, train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ticks(seconds: float) -> SimpleNamespace:  # a clock that goes on by so much at each look
        looks = itertools.count()
        return SimpleNamespace(perf_counter=lambda: seconds * next(looks), monotonic=time.monotonic)

    monkeypatch.setattr(sitting, "time", ticks(0.01))  # about 60 steps in 0.03 minutes
    folder = tmp_path / "run"
    course = ("optim.schedule.kind=constant", "optim.schedule.cooldown=50%", "train.steps=100_000")
    saves = ("train.max_minutes=0.03", "evaluate.every=1000", "checkpoint.every=10", "checkpoint.keep_last=1000")
    assert train_small(folder, *course, *saves) == "done"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    cut = next(event for event in events if event["event"] == "cools down early")
    first = curve(folder)
    rates = {line["step"]: line["lr"] for line in first if "lr" in line}
    assert rates[cut["step"]] == 1e-2
    assert all(rate < 1e-2 for step, rate in rates.items() if step >= cut["step"] + 2)
    assert max(rates) == cut["end"]
    assert rates[cut["end"]] < 5e-3
    assert json.loads((folder / "plan.json").read_text())["cool_down_from"] == cut["step"]
    assert "To end within 0.03 min, it cooled down early and took" in (folder / "report.md").read_text()

    # Killed in its cool-down, the run keeps to what was settled, however fast the clock runs now.
    for path in checkpoints.complete(folder / "checkpoints"):
        if int(path.name[5:]) > cut["step"] + 5:
            shutil.rmtree(path)
    monkeypatch.setattr(sitting, "time", ticks(0.001))
    assert train_small(folder, *course, *saves) == "done"
    assert [line for line in curve(folder) if "loss" in line] == [line for line in first if "loss" in line]


@pytest.mark.slow
def test_interrupted_in_every_way_the_curve_is_the_same(tmp_path: Path, recipe_file: Path, cache: Path) -> None:
    """Killed, stopped by Ctrl-C, killed: another process each time, the same bits.

    With dropout, with portions, and at steps that lie between two checkpoints.
    """
    course = ["train.steps=140", "checkpoint.every=7"]
    environment = os.environ | {"XLSTM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "openxlstm", "train", str(recipe_file), *course, "--out", str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    assert whole.wait() == 0, whole.stderr.read()
    for number, after in ((signal.SIGKILL, 11), (signal.SIGINT, 30), (signal.SIGKILL, 60)):
        run = start("cut")
        while len(read_journal(tmp_path / "cut" / "train.jsonl")) < after:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.002)
        run.send_signal(number)
        code, said = run.wait(), run.stderr.read()
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 130, said
            assert "the same command goes on from there" in said
            step = read_journal(tmp_path / "cut" / "train.jsonl")[-1]["step"]
            assert checkpoints.latest(tmp_path / "cut" / "checkpoints").name == f"step-{step:08d}"
            assert store.load(tmp_path / "cut" / "model").config.width == 16
    last = start("cut")
    assert last.wait() == 0, last.stderr.read()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


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


def test_a_sitting_can_be_limited(tmp_path: Path, whole: Path, train_small: Train) -> None:
    """It is saved and goes on, as often as it takes."""
    endings = []
    while not endings or endings[-1] == "paused":
        endings.append(train_small(tmp_path / "run", "train.stop_after=1e-9"))
    assert endings == ["paused"] * 11 + ["done"]
    assert curve(tmp_path / "run") == curve(whole)
    assert same_weights(tmp_path / "run", whole)


def test_everything_at_once(tmp_path: Path, texts: Path, recipe_file: Path, cache: Path) -> None:
    """Two sources in phases, a ramp, packed windows, an average, sets, lengths, samples, gates; interrupted, too."""
    more = tmp_path / "more"
    shutil.copytree(texts, more)
    for file in more.glob("*.txt"):
        file.write_text(file.read_text().upper())
    said = (
        f'data.sources=[{{ path = "{texts}", weight = 3 }}, {{ path = "{more}" }}]',
        "data.phase=[{ from_step = 6, weights = [1, 1] }]",
        "data.window=packed",
        "train.batch=[[0, 6], [8, 12]]",
        "optim.ema=0.9",
        "loss.z_loss=1e-4",
        "evaluate.lengths=[12, 48]",
        'evaluate.samples=["text"]',
        "log.every=2",
        "log.gates_every=5",
        "checkpoint.keep_best=true",
    )
    recipe, tokenizer = read_recipe(str(recipe_file), said)
    write = lambda model, tokenizer, prompt, tokens: f"{prompt} and {tokens} more"

    def go(name: str, display: Silent) -> str:
        return loop.train(recipe, tokenizer, tmp_path / name, cache, display, lambda *_: "", write=write)

    assert go("whole", Silent()) == "done"
    assert go("cut", Impatient()) == "interrupted"
    assert go("cut", Silent()) == "done"
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    lines = read_journal(tmp_path / "whole" / "train.jsonl")
    assert [line["step"] for line in lines if "gates" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "tokens_per_second" in line] == [2, 4, 6, 8, 10, 12]
    (valid, *_) = (line for line in lines if "valid_loss" in line)
    assert valid["sets"].keys() == {"more"}
    assert [row["length"] for row in valid["lengths"]] == [12, 24, 48]
    assert valid["samples"] == [{"prompt": "text", "text": "text and 64 more"}]
    assert all(line["z_loss"] > 0 for line in lines if "loss" in line)


def test_states_are_carried_from_step_to_step(tmp_path: Path, train_small: Train) -> None:
    """And through a stop; a skipped step hands on the state it came with."""
    lanes = ("data.window=lanes", "model.dropout=0.0")
    assert train_small(tmp_path / "stream", "model.dropout=0.0") == "done"
    assert train_small(tmp_path / "whole", *lanes) == "done"
    assert curve(tmp_path / "whole") != curve(tmp_path / "stream")
    while train_small(tmp_path / "cut", *lanes, "train.stop_after=1e-9") == "paused":
        pass
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


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
