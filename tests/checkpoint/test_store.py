"""Saving and loading: exact, atomic, strict."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.small_models import CONFIGS, KINDS, assert_same_memory, build, tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openxlstm.checkpoint import store
from openxlstm.checkpoint.store import load, save
from openxlstm.models.xlstm import xLSTM, xLSTMConfig, xLSTMStack, xLSTMStackConfig


def refusal(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


def rewrite(folder, change):
    """Change the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_saved_one_to_the_bit(kind, dtype, tmp_path):
    model = build(kind, dtype)
    save(model, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    x = tokens(2, 5)
    got, want = loaded(x), model(x)
    assert torch.equal(got[0], want[0])
    assert_same_memory(got[1], want[1], tolerance=0)
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert a.dtype == dtype, name
        assert a.requires_grad, name
        assert torch.equal(a, b), name


def test_a_loaded_model_trains_without_touching_its_file(tmp_path):
    save(build("xlstm", torch.float32), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    model(tokens(2, 5))[0].sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save(model, tmp_path)
    assert torch.equal(load(tmp_path).embedding.weight, model.embedding.weight)


def test_dtype_on_request(tmp_path):
    save(build("xlstm", torch.float32), tmp_path)
    assert {p.dtype for p in load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_loading_draws_no_random_numbers(tmp_path):
    save(build("xlstm"), tmp_path)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_model_is_stored_once_and_loaded_tied(tmp_path):
    model = xLSTM(dataclasses.replace(CONFIGS["xlstm"], tie_embeddings=True))
    save(model, tmp_path)
    shapes = [t.shape for t in load_file(tmp_path / "model.safetensors").values()]
    assert shapes.count(model.embedding.weight.shape) == 1
    loaded = load(tmp_path)
    assert loaded.head is None
    x = tokens(1, 4)
    with torch.no_grad():
        loaded.embedding.weight *= 2
        assert not torch.equal(loaded(x)[0], model(x)[0])


def test_foreign_files_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save(build("xlstm"), tmp_path)
    save(build("xlstm"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_config_is_plain_json_with_every_size(tmp_path):
    save(build("xlstm_large"), tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["architecture"] == "xlstm_large"
    assert data["v_width"] == 12


def half_written(tensors, path, metadata):
    """What a full disk does: some bytes, then an error."""
    Path(path).write_bytes(b"\x00" * 100)
    raise SafetensorError("No space left on device")


@pytest.mark.parametrize("failure", ["weights", "config", "interrupt"])
def test_a_failing_save_leaves_the_previous_model(failure, tmp_path, monkeypatch):
    old, new = build("xlstm"), build("xlstm")
    save(old, tmp_path)
    want = OSError
    if failure == "weights":
        monkeypatch.setattr(store, "save_file", half_written)
    elif failure == "config":
        monkeypatch.setattr(store.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("I/O error")))
    else:
        want = KeyboardInterrupt
        monkeypatch.setattr(store, "save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(want) as error:
        save(new, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load(tmp_path).embedding.weight, old.embedding.weight)
    if failure == "weights":
        assert "the previous file is untouched" in str(error.value)


def test_who_reads_the_old_file_keeps_the_old_file(tmp_path):
    """The new file takes the name in one step; it is never written over the old one's bytes."""
    save(build("xlstm"), tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    with (tmp_path / "model.safetensors").open("rb") as reader:
        save(build("xlstm"), tmp_path)
        assert reader.read() == old
    assert (tmp_path / "model.safetensors").read_bytes() != old


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from openxlstm.checkpoint import store
from openxlstm.models.xlstm import xLSTM, xLSTMConfig

def save_file(tensors, path, metadata):
    Path(path).write_bytes(b"half of a model")
    os.kill(os.getpid(), signal.SIGKILL)

store.save_file = save_file
store.save(xLSTM(xLSTMConfig(vocab_size=23, width=12, heads=2, pattern="s")), sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_save_leaves_the_previous_model_and_the_next_save_cleans_up(tmp_path):
    old = build("xlstm")
    save(old, tmp_path)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert torch.equal(load(tmp_path).embedding.weight, old.embedding.weight)
    save(old, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_crash_between_the_two_files_is_noticed_and_can_be_mended(tmp_path):
    save(build("xlstm"), tmp_path)
    old_config = (tmp_path / "config.json").read_text()
    other = build("xlstm_sigmoid")
    save(other, tmp_path)
    (tmp_path / "config.json").write_text(old_config)
    said = refusal(load, tmp_path)
    assert "config.json says conv=4, and model.safetensors was saved with conv=1 (and more differs)" in said
    assert "delete config.json" in said
    (tmp_path / "config.json").unlink()
    assert load(tmp_path).config == other.config


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(keep, tmp_path):
    save(build("xlstm"), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors is damaged or incomplete" in refusal(load, tmp_path)


def test_tensors_that_do_not_belong(tmp_path):
    save(build("xlstm"), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"embeding.weight": torch.ones(1)}))
    assert "'embeding.weight', which this model has not; did you mean 'embedding.weight'?" in refusal(load, tmp_path)


def test_tensors_that_are_missing(tmp_path):
    save(build("xlstm"), tmp_path)
    rewrite(tmp_path, lambda t: (t.pop("head.weight"), t.pop("stack.norm.weight")))
    assert "lacks 'head.weight' and 1 more" in refusal(load, tmp_path)


def test_tensors_of_another_shape_or_kind(tmp_path):
    save(build("xlstm"), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"stack.norm.weight": torch.ones(13)}))
    assert "stack.norm.weight has shape [13], and config.json describes [12]" in refusal(load, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"stack.norm.weight": torch.ones(12, dtype=torch.int8)}))
    assert "stack.norm.weight is stored as I8; a model's tensors are floating-point" in refusal(load, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"widht": 3}, "config.json: xLSTMConfig has no field 'widht'; did you mean 'width'?"),
        ({"architecture": "lstm"}, "must name its architecture, one of xlstm, xlstm_large; it says 'lstm'"),
        ({"width": "wide"}, "width must be int; got 'wide'"),
    ],
)
def test_a_config_that_was_changed(change, sentence, tmp_path):
    save(build("xlstm"), tmp_path)
    rewrite(tmp_path, lambda t: None)  # weights from elsewhere carry no copy of the config
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | change))
    assert sentence in refusal(load, tmp_path)


def test_a_config_that_is_no_config(tmp_path):
    save(build("xlstm"), tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(load, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json must hold an object; it holds list" in refusal(load, tmp_path)
    (tmp_path / "config.json").unlink()
    rewrite(tmp_path, lambda t: None)
    assert "lacks config.json, and model.safetensors carries no copy of it" in refusal(load, tmp_path)


def test_folders_that_hold_no_model(tmp_path):
    assert "there is no file or folder" in refusal(load, tmp_path / "nowhere")
    assert "model.safetensors is missing; found nothing" in refusal(load, tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "found notes.txt" in refusal(load, tmp_path)
    assert "is a file; load() takes the folder" in refusal(load, tmp_path / "notes.txt")
    model = build("xlstm")
    save(model, tmp_path / "model")
    x = tokens(1, 5)
    assert torch.equal(load(tmp_path / "model" / "model.safetensors")(x)[0], model(x)[0])  # it carries its config
    save(build("xlstm"), tmp_path / "model")
    assert f"did you mean {tmp_path / 'model'}?" in refusal(load, tmp_path)


def test_what_cannot_be_saved(tmp_path):
    """Asked without the shape checker's help: users have none."""
    said = refusal(
        save.__wrapped__ if hasattr(save, "__wrapped__") else save,
        xLSTMStack(xLSTMStackConfig(width=8, pattern="m")),
        tmp_path,
    )
    assert "save() takes an xLSTM or an xLSTMLarge; got xLSTMStack" in said
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_is_ready_for_use_and_its_files_are_readable(tmp_path: Path) -> None:
    model = xLSTM(xLSTMConfig(vocab_size=11, width=16, heads=2, pattern="ms", dropout=0.5))
    store.save(model, tmp_path)
    assert not store.load(tmp_path).training
    expected = 0o666 & ~store._umask()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {expected}
