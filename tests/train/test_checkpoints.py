"""A checkpoint is there completely or not at all, and what comes back is what went in, bit for bit."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from openxlstm.train import checkpoints
from openxlstm.train.checkpoints import Progress


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
