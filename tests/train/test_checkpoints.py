"""A checkpoint is there completely or not at all, and what comes back is what went in, bit for bit."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from openxlstm.train import checkpoints
from openxlstm.train.checkpoints import Progress
from openxlstm.train.ema import EMA
from openxlstm.train.recipe import CheckpointRecipe


def pair(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    groups = [{"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}]
    groups.append({"params": [model[0].bias, model[2].bias], "weight_decay": 0.0})
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(7, 3)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def test_prefix_and_checkpoint_are_the_whole(tmp_path: Path) -> None:
    whole = pair()
    train(*whole, range(6))
    first = pair()
    train(*first, range(4))
    at = Progress(step=4, consumed=28, elapsed=1.5, best=0.1 + 0.2)
    path = checkpoints.save(tmp_path, *first, at, {"title": "a"}).wait()
    second = pair(seed=9)
    assert checkpoints.load(path, *second) == at
    train(*second, range(4, 6))
    assert all(map(torch.equal, weights(second[0]), weights(whole[0])))
    assert [group["weight_decay"] for group in second[1].param_groups] == [0.1, 0.0]


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "none") is None
    model, optimiser = pair()
    for step in (2, 10, 4):
        checkpoints.save(tmp_path, model, optimiser, Progress(step=step), {})
    (tmp_path / "step-00000099.tmp").mkdir()
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000004", "step-00000010"]
    checkpoints.tidy(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_failed_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    model, optimiser = pair()
    before = checkpoints.save(tmp_path, model, optimiser, Progress(step=1), {}).wait()
    train(model, optimiser, range(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[moment], full)
    with pytest.raises(OSError, match=r"step-00000002 could not be saved: .*No space left"):
        checkpoints.save(tmp_path, model, optimiser, Progress(step=2), {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "a full disk needs the room"
    assert checkpoints.load(before, *pair()).step == 1


def test_damage_is_named(tmp_path: Path) -> None:
    model, optimiser = pair()
    path = checkpoints.save(tmp_path, model, optimiser, Progress(step=1), {}).wait()
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-00000001: cannot be read"):
        checkpoints.load(path, *pair())
    (path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"its meta.json is damaged"):
        checkpoints.load(path, *pair())
    (path / "meta.json").write_text(json.dumps({"format": "other/9", "progress": {}}))
    with pytest.raises(ValueError, match="its format is 'other/9'"):
        checkpoints.load(path, *pair())


def test_ctrl_c_during_a_save_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distributed format wraps whatever is raised inside it."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, *pair(), Progress(step=1), {})
    assert checkpoints.latest(tmp_path) is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, *pair(), Progress(step=1), {}).wait()
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.load(path, other, torch.optim.AdamW(other.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["once", "asynchronous"])
def test_killed_at_every_point_inside_a_save(tmp_path: Path, manner: str, record_property) -> None:
    """See killed_saves.py: the newest complete checkpoint loads, and the next save leaves no leftovers."""
    program = Path(__file__).with_name("killed_saves.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "checkpoints"), manner],
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["points"] >= 20
    assert 0 < seen["complete"] < seen["points"], "killed before the rename, and after it"
    record_property("measured", f"killed at {seen['points']} points inside a save ({manner}), no checkpoint lost")


def test_what_changes_after_an_asynchronous_save_does_not_reach_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Isolation, bit for bit, with the writer held back until everything has changed."""
    model, optimiser = pair()
    train(model, optimiser, range(3))
    ema, extra = EMA(model, 0.5), {"lanes": torch.arange(6.0)}
    go, write = threading.Event(), checkpoints._write

    def held(*arguments: object) -> None:
        assert go.wait(30)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "_write", held)
    want = weights(model)
    moments = [value.clone() for state in optimiser.state.values() for value in state.values()]
    pending = checkpoints.save(
        tmp_path, model, optimiser, Progress(step=3), {}, ema=ema, extra=extra, asynchronous=True
    )
    assert not pending.done
    train(model, optimiser, range(3, 5))
    ema.update(0)
    extra["lanes"].zero_()
    go.set()
    path = pending.wait()
    assert pending.done
    assert path == tmp_path / "step-00000003"
    again, again_ema = pair(seed=9), EMA(pair(seed=9)[0], 0.5)
    checkpoints.load(path, *again, ema=again_ema)
    assert all(map(torch.equal, weights(again[0]), want))
    assert all(map(torch.equal, again_ema.tensors.values(), want))
    assert checkpoints.read_tensors(path, "extra")["lanes"].tolist() == [0, 1, 2, 3, 4, 5]
    got = [value for state in again[1].state.values() for value in state.values()]
    assert all(map(torch.equal, got, moments))


def test_one_save_at_a_time(tmp_path: Path) -> None:
    model, optimiser = pair()
    saves = []
    for step in range(1, 6):
        saves.append(checkpoints.save(tmp_path, model, optimiser, Progress(step=step), {}, asynchronous=True))
        there = {path.name for path in checkpoints.complete(tmp_path)}  # a thread may outlive its write by a moment
        assert {f"step-{earlier:08d}" for earlier in range(1, step)} <= there
    assert [path.wait().name for path in saves] == [path.name for path in checkpoints.complete(tmp_path)]


def test_a_full_disk_is_heard_of_later_and_does_not_end_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimiser = pair()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    pending = checkpoints.save(tmp_path, model, optimiser, Progress(step=1), {}, asynchronous=True)
    with pytest.raises(OSError, match=r"step-00000001 could not be saved: .*No space left"):
        pending.wait()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(tmp_path, model, optimiser, Progress(step=2), {}, asynchronous=True).wait()
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002"]


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    at = Progress(
        step=7, consumed=56, elapsed=0.1, best=1.5, best_step=6, skipped=((8, 16), (24, 32)), skips=2, rollbacks=1
    )
    path = checkpoints.save(tmp_path, *pair(), at, {"title": "a"}).wait()
    assert checkpoints.read_progress(path) == at
    assert checkpoints.read_meta(path)["recipe"] == {"title": "a"}


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    model, optimiser = pair()
    keep = CheckpointRecipe(keep_last=2, keep_every=4, keep_best=True)
    for step in range(1, 12):
        best = min(step, 3)
        checkpoints.save(
            tmp_path, model, optimiser, Progress(step=step, best=1.0, best_step=best), {}, keep=keep, asynchronous=True
        ).wait()
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints.complete(tmp_path)]
    assert steps == [3, 4, 8, 10, 11], "the best, every fourth, the last two"
    assert len(list(tmp_path.iterdir())) == 5


def test_parts_are_read_without_model_and_optimiser(tmp_path: Path) -> None:
    model, optimiser = pair()
    train(model, optimiser, range(2))
    path = checkpoints.save(tmp_path, model, optimiser, Progress(step=2), {}).wait()
    got = checkpoints.read_tensors(path, "model")
    assert list(got) == list(model.state_dict())
    assert all(map(torch.equal, got.values(), weights(model)))
    assert checkpoints.read_tensors(path, "ema") == {}
    assert len(checkpoints.read_tensors(path, "optimiser")) == 3 * 4, "step and two moments of every parameter"
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="step-00000002: cannot be read"):
        checkpoints.read_tensors(path, "model")


def test_an_average_that_was_not_saved_is_named(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, *pair(), Progress(step=1), {}).wait()
    model, optimiser = pair()
    with pytest.raises(ValueError, match=r"cannot be read: .*ema"):
        checkpoints.load(path, model, optimiser, ema=EMA(model, 0.9))
