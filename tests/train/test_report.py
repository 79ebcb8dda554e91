"""The report and its pictures, from a run folder that is made up: everything recorded is shown, nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from openxlstm.train.report import write_report

pytest.importorskip("matplotlib")

RECIPE = {
    "train": {"steps": 40, "batch": [[0, 8], [10, 16]], "max_minutes": None},
    "data": {"context": 64},
}
SUMMARY = {
    "title": "Made up",
    "ending": "done",
    "step": 40,
    "tokens": 40_000,
    "seconds": 61.0,
    "model": {"label": "xLSTM[1:1]", "parameters": 1234, "state_bytes": 99, "flops_per_token": 5000},
    "machine": {
        "precision": "fp32", "threads": 2, "device": "CPU", "system": "Linux", "openxlstm": "0.1", "torch": "2.13",
        "numpy": "2.4", "python": "3.11",
    },
    "data": {
        "corpus": "stdlib", "fingerprint": {"train": "f" * 64}, "train_tokens": 20_000, "test_documents": 3,
    },
    "valid_bits_per_byte": 2.5,
    "held_out": {"bits_per_byte": 2.6, "loss": 1.8, "bytes": 5000, "tokens": 5003, "context": 64},
    "yardsticks": {"gzip -9": 2.9},
    "sample": "import this",
}  # fmt: skip


def step(number: int, **more) -> dict:
    loss = 1.5 + 3 * math.exp(-number / 9)
    return {
        "step": number,
        "loss": loss,
        "bits_per_byte": loss / math.log(2),
        "lr": 1e-3,
        "grad_norm": 1 / number,
    } | more


def layer(index: int, kind: str, x: float) -> dict:
    return {
        "layer": index, "kind": kind, "forget_mean": x, "forgetful": 1 - x, "input_max": 3 * x, "m_min": -x, "m_max": x,
        "state_log10": None if index == 0 else x, "floor": None if kind == "s" else x,
    }  # fmt: skip


def folder(path: Path, lines: list[dict], events: list[dict] = [], **summary) -> Path:  # noqa: B006
    path.mkdir(exist_ok=True)
    (path / "summary.json").write_text(json.dumps(SUMMARY | summary))
    (path / "resolved.json").write_text(json.dumps({"recipe": RECIPE}))
    for name, rows in (("train", lines), ("events", events)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_plain_run_has_a_plain_report(tmp_path: Path) -> None:
    report = write_report(folder(tmp_path, [step(number) for number in range(1, 41)])).read_text()
    for words in (
        "# Made up", "**2.600 bits per byte** on 5,000 bytes", "(3 documents that training never sees)", "1m01s",
        "| gzip -9 | 2.900 |", "| **this model** | **2.600** |", "Every step was taken", "steps of 8 to 16 x 64 tokens",
        "2.00 epochs", "train `ffffffffffffffff`", "torch 2.13",
    ):  # fmt: skip
        assert words in report, words
    assert "further validation set" not in report
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"bits_per_byte.png", "loss.png", "learning_rate.png", "gradient_norm.png"}
    assert all(f"({name})" in report for name in pictures)


def test_everything_that_was_recorded_is_shown(tmp_path: Path) -> None:
    lines = []
    for number in range(1, 41):
        meters = {"tokens_per_second": 1000.0 + number, "mfu": 0.31, "data_wait": 0.02, "memory": {"resident": 2**30}}
        lines.append(step(number, **meters))
        if number % 10 == 0:
            x = 0.5 + number / 100
            lines.append({"step": number, "gates": [layer(0, "m", x), layer(1, "s", x)], "logit_max": 4.0})
            lines.append({
                "step": number, "valid_loss": 2.0, "valid_bits_per_byte": 2.9, "elapsed": 1.0,
                "sets": {"wiki": {"loss": 1.0, "bits_per_byte": 3.25}},
                "lengths": [{"length": length, "bits_per_byte": 4 - length / 300} for length in (32, 64, 256)],
                "positions": [{"from": low, "to": 2 * low + 32, "bits_per_byte": 3.0} for low in (0, 32, 96)],
                "samples": [{"prompt": "def ", "text": f"at_{number}():"}],
            })  # fmt: skip
    report = write_report(folder(tmp_path, lines)).read_text()
    for words in (
        "1,020 tokens per second in the median", "31.0 % of the device's peak", "2.0 % of the time spent waiting",
        "1.00 GiB of memory", "| wiki | 3.250 |", "| 256 | 3.147 |", "At step 40 it continued", "def at_40():",
        "![context](context.png)", "![gates](gates.png)",
    ):  # fmt: skip
        assert words in report, words
    assert "at_30" not in report, "the last samples, not all"
    assert (tmp_path / "gates.png").stat().st_size > 10_000


def test_what_the_guard_did_is_part_of_the_result(tmp_path: Path) -> None:
    lines = [step(number) for number in range(1, 41)]
    lines[6] |= {"loss": None, "bits_per_byte": None, "grad_norm": None, "skipped": "step 7: the loss is nan"}
    lines[19] |= {"skipped": "step 20: the loss | is far above"}
    events = [{"event": "start", "step": 0}, {"event": "skip", "step": 7, "reason": "step 7: the loss is nan"}]
    events += [{"event": "skip", "step": 20, "reason": "step 20: the loss | is far above"}]
    events += [{"event": "spike", "step": number, "reason": "high"} for number in range(21, 41)]
    report = write_report(folder(tmp_path, lines, events)).read_text()
    assert "**The guard intervened**: 20 spikes, 2 skips. Of the steps that count, 2 were skipped." in report
    assert "| 7 | skip | step 7: the loss is nan |" in report
    assert "far above" in report
    assert "the loss \\| is" in report, "a bar in a cell would end it"
    assert "The first 20 of 22" in report
    assert "| 40 | spike | high |" not in report


def test_without_a_test_split_nothing_is_claimed(tmp_path: Path) -> None:
    lines = [step(number) for number in range(1, 4)]
    report = write_report(folder(tmp_path, lines, held_out=None, yardsticks={})).read_text()
    assert "**2.500 bits per byte** at best on the validation windows" in report
    assert "held-out" not in report
    assert "no test split" in report


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    report = write_report(folder(tmp_path, [step(1)], ending="out of time", step=30)).read_text()
    assert "it was out of time, at step 30 of 40" in report


def test_a_damaged_summary_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary.json or resolved.json lacks a field"):
        write_report(folder(tmp_path, [step(1)], model={}))
