"""TensorBoard files are read back; W&B is a module that remembers, and, where it is installed, itself offline."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from openxlstm.train import writers
from openxlstm.train.config import load
from openxlstm.train.recipe import Recipe

LINE = {"step": 7, "loss": 1.5, "memory": {"resident": 4}, "mfu": None, "skipped": "spike"}
GATES = {"step": 8, "logit_max": 3.0, "gates": [{"layer": 0, "kind": "m", "floor": 0.25, "state_log10": None}]}
VALID = {
    "step": 9, "valid_loss": 1.25, "sets": {"wiki": {"loss": 2.0}},
    "lengths": [{"length": 512, "bits_per_byte": 1.0}], "positions": [{"from": 64, "to": 512, "bits_per_byte": 0.5}],
    "samples": [{"prompt": "def ", "text": "f(x):"}],
}  # fmt: skip


def with_log(recipe_file: Path, *overrides: str) -> Recipe:
    return load(recipe_file, overrides)[0]


def test_lines_become_names_and_values() -> None:
    assert dict(writers.flat(LINE)) == {"loss": 1.5, "memory/resident": 4, "skipped": "spike"}
    assert dict(writers.flat(GATES)) == {"logit_max": 3.0, "gates/0/kind": "m", "gates/0/floor": 0.25}
    assert dict(writers.flat(VALID)) == {
        "valid_loss": 1.25,
        "sets/wiki/loss": 2.0,
        "lengths/512/bits_per_byte": 1.0,
        "positions/64/to": 512,
        "positions/64/bits_per_byte": 0.5,
        "samples/0/prompt": "def ",
        "samples/0/text": "f(x):",
    }


def test_a_recipe_that_asks_for_nothing_gets_nothing(recipe_file: Path, tmp_path: Path) -> None:
    assert writers.open(with_log(recipe_file), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_files_hold_the_lines_and_a_resumed_run_replaces_them(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = with_log(recipe_file, "log.tensorboard=true")
    (first,) = writers.open(said, tmp_path)
    assert isinstance(first, writers.Writer)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        first.write({"step": step, "loss": loss})
    first.close()
    (second,) = writers.open(said, tmp_path, step=2)
    for line in ({"step": 3, "loss": 1.5}, GATES, VALID):
        second.write(line)
    second.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert read.Scalars("gates/0/floor")[0].value == 0.25
    assert "samples/0/text/text_summary" in read.Tags()["tensors"]


class FakeRun:
    """What wandb.init returns, as far as we use it."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_every_line_and_keeps_its_id(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict] = []
    run = FakeRun()
    fake = SimpleNamespace(init=lambda **said: begun.append(said) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said = with_log(recipe_file, 'log.wandb="a-project"')
    for step in (0, 7):
        (writer,) = writers.open(said, tmp_path, step=step)
        writer.write(LINE)
        writer.close()
    assert run.logged == [{"step": 7, "loss": 1.5, "memory/resident": 4, "skipped": "spike"}] * 2
    assert run.finished
    assert run.metrics[0] == ("*", "step")
    assert len(begun) == 2
    assert begun[0]["id"] == begun[1]["id"] != "", "a resumed run is the same run"
    assert begun[0]["project"] == "a-project"
    assert begun[0]["config"]["train"]["batch"] == 6


def test_weights_and_biases_offline(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (writer,) = writers.open(with_log(recipe_file, 'log.wandb="a-project"'), tmp_path)
    writer.write(LINE)
    writer.write(VALID)
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("override", "module", "sentence"),
    [
        ("log.tensorboard=true", "torch.utils.tensorboard", r"pip install 'openxlstm\[tensorboard\]'"),
        ('log.wandb="p"', "wandb", r"pip install 'openxlstm\[wandb\]'"),
    ],
)
def test_a_missing_package_is_a_sentence(
    override: str, module: str, sentence: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=sentence):
        writers.open(with_log(recipe_file, override), tmp_path)
