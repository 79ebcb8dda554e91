"""Runs that are killed, stopped, limited or out of room go on to the bit."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.running import Train, curve, same_weights

from openxlstm.checkpoint import store
from openxlstm.train import checkpoints, loop, sitting
from openxlstm.train.log import Silent, read_journal
from openxlstm.train.run import read_recipe


class Impatient(Silent):
    """Somebody who wants the run to stop from its fifth step on."""

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        if line["step"] >= 5:
            os.kill(os.getpid(), signal.SIGTERM)


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


def test_no_time_at_all_is_one_step(tmp_path: Path, train_small: Train) -> None:
    assert train_small(tmp_path / "run", "train.max_minutes=1e-9") == "out of time"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 1


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
