"""Runs whose gradients are no numbers: skipped, stopped or gone back before, by the recipe's guard."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from train.running import Train, curve, events, same_weights

from openxlstm.train import checkpoints, step
from openxlstm.train.run import Run


def spoil(monkeypatch: pytest.MonkeyPatch, sample: int = 30) -> None:
    """The gradient of the step that reads this sample, the sixth if nothing is skipped, is no number."""
    honest = step.gradient

    def spoilt(run: Run, *arguments: object) -> step.Found:
        found = honest(run, *arguments)
        return dataclasses.replace(found, norm=math.nan) if sample in run.feed.step(found.step).sample else found

    monkeypatch.setattr(step, "gradient", spoilt)


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
