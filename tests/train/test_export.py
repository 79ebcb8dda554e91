"""What comes out of a checkpoint is what was trained: `xlstm export` and `xlstm ckpt`, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

import openxlstm
from openxlstm.cli import main
from openxlstm.train import checkpoints, examine
from openxlstm.train import export as exports


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, train_small: Callable[..., str]) -> Path:
    """Twelve steps with an average of the weights; checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert train_small(folder, "optim.ema=0.5") == "done"
    return folder


def xlstm(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def weights(path: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return checkpoints.read_tensors(exports.choose(path), part)


@pytest.mark.parametrize("ema", [False, True])
def test_an_export_is_the_checkpoints_model_with_its_tokenizer_and_origin(run: Path, tmp_path: Path, ema: bool) -> None:
    exports.export(run, tmp_path / "out", to="ours", ema=ema, step=8)
    model = openxlstm.load(tmp_path / "out")
    want = weights(run / "checkpoints" / "step-00000008", "ema" if ema else "model")
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "model" / "tokenizer.json").read_bytes()
    resolved = json.loads((tmp_path / "out" / "resolved.json").read_text())
    assert resolved["exported"] == {"step": 8, "weights": "running average" if ema else "as trained"}
    assert resolved["recipe"] == json.loads((run / "resolved.json").read_text())["recipe"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_average_is_not_the_weights(run: Path) -> None:
    a, b = weights(run), weights(run, "ema")
    assert a.keys() == b.keys()
    assert not any(torch.equal(a[name], b[name]) for name in a if a[name].std() > 0)


@pytest.mark.parametrize("to", ["hf", "nxai"])
def test_other_layouts_come_back_the_same(run: Path, tmp_path: Path, to: str) -> None:
    done = xlstm("export", run, tmp_path / "out", "--to", to, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert set(said["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in said["files"]
    model = openxlstm.load(tmp_path / "out")
    want = weights(run)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=said["rounded"], msg=name)


def test_a_run_that_is_going_on_is_exported_from_what_is_complete(run: Path, tmp_path: Path) -> None:
    """No model/ yet, and a save in flight."""
    going = tmp_path / "going"
    (going / "checkpoints" / "step-00000099.tmp").mkdir(parents=True)
    (going / "checkpoints" / "step-00000012").symlink_to(run / "checkpoints" / "step-00000012")
    (going / "resolved.json").write_bytes((run / "resolved.json").read_bytes())
    report = exports.export(going, tmp_path / "out", to="ours")
    assert report.source.endswith("step-00000012")
    assert openxlstm.Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").vocab_size == 257


def test_refusals_of_export(run: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        done = xlstm("export", *words)
        assert done.exit_code == 2, done.output
        return " ".join(done.output.split())

    assert "there is no" in said(tmp_path / "none", tmp_path / "out")
    assert "holds no complete checkpoint" in said(tmp_path, tmp_path / "out")
    assert "has no checkpoint of step 7; there are 8, 12" in said(run, tmp_path / "out", "--step", 7)
    assert said(run, tmp_path / "out", "--to", "nxai-large")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "exists and holds letter.txt" in said(run, tmp_path / "full")
    assert not (tmp_path / "out").exists()
    bare = tmp_path / "bare"
    (bare / "model").mkdir(parents=True)
    (bare / "model" / "config.json").write_text("{}")
    assert "`xlstm convert` takes" in said(bare, tmp_path / "out")


def test_no_average_no_export_of_it(tmp_path: Path, train_small: Callable[..., str]) -> None:
    train_small(tmp_path / "run", "train.steps=4")
    with pytest.raises(ValueError, match=r"keeps no running average.*without --ema"):
        exports.export(tmp_path / "run", tmp_path / "out", to="ours", ema=True)


def test_ckpt_info(run: Path) -> None:
    said = json.loads(xlstm("ckpt", "info", run, "--json").output)
    assert said["progress"]["step"] == 12
    assert said["beside"] == ["step-00000008"]
    assert said["processes"] == 1
    numbers = sum(value.numel() for value in weights(run).values())
    assert said["parts"]["model"]["numbers"] == said["parts"]["ema"]["numbers"] == numbers
    assert said["parts"]["optimiser"]["numbers"] == 2 * numbers + said["parts"]["model"]["tensors"]
    shown = xlstm("ckpt", "info", run / "checkpoints" / "step-00000008")
    assert shown.exit_code == 0
    assert "step" in shown.output
    assert "optimiser" in shown.output


def test_ckpt_diff(run: Path) -> None:
    before = run / "checkpoints" / "step-00000008"
    rows = examine.difference(before, run)
    a, b = weights(before), weights(run)
    assert {row["name"] for row in rows} == a.keys()
    assert [row["change"] for row in rows] == sorted((row["change"] for row in rows), reverse=True)
    for row in rows:
        change = (b[row["name"]].double() - a[row["name"]].double()).norm() / a[row["name"]].double().norm()
        assert row["change"] == pytest.approx(change.item(), rel=1e-12) or row["change"] in (0.0, float("inf"))
    assert all(row["change"] == row["largest"] == 0 for row in examine.difference(run, run, "optimiser"))
    shown = xlstm("ckpt", "diff", before, run, "--most", 3)
    assert shown.exit_code == 0
    assert "more; --most 0 shows all" in shown.output


def test_ckpt_diff_with_a_model_and_its_refusals(run: Path, tmp_path: Path) -> None:
    exports.export(run, tmp_path / "ours", to="ours")
    assert all(row["change"] == 0 for row in examine.difference(run, tmp_path / "ours"))
    other = openxlstm.xLSTM(openxlstm.xLSTMConfig(vocab_size=257, width=8, heads=2, pattern="m"))
    openxlstm.save(other, tmp_path / "other")
    with pytest.raises(ValueError, match="two different models"):
        examine.difference(run, tmp_path / "other")
    with pytest.raises(ValueError, match="has no part 'ema'"):
        examine.difference(tmp_path / "ours", tmp_path / "ours", "ema")
    with pytest.raises(ValueError, match="holds a part 'extras'"):
        examine.difference(run, run, "extras")


def test_ckpt_consolidate(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "all.safetensors"
    done = xlstm("ckpt", "consolidate", run, file, "--json")
    assert done.exit_code == 0, done.output
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        assert json.loads(opened.metadata()["meta"])["progress"]["step"] == 12
        for part in ("model", "ema", "optimiser"):
            for name, value in weights(run, part).items():
                assert torch.equal(opened.get_tensor(f"{part}.{name}"), value)
                names.discard(f"{part}.{name}")
    assert not names
    assert [path.name for path in file.parent.iterdir()] == ["all.safetensors"]
    again = xlstm("ckpt", "consolidate", run, file)
    assert again.exit_code == 2
    assert "exists; name a new file" in again.output
    nothing = xlstm("ckpt", "consolidate", run, tmp_path / "b", "--part", "extra")
    assert "holds no part 'extra'" in nothing.output
