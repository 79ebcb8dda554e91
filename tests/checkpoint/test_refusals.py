"""Files that are damaged, mislabelled or hostile: refused in a sentence that names them, and never executed."""

import contextlib
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import refused

from openxlstm.checkpoint.convert import convert, export
from openxlstm.checkpoint.store import load
from openxlstm.models.xlstm import xLSTM, xLSTMConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no config was given"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]

S = "xlstm_block_stack."


def change_index(folder, change):
    file = folder / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    change(data["weight_map"])
    file.write_text(json.dumps(data))


def test_a_shard_cut_anywhere(hf):
    shard = sorted(hf.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for keep in (0, 3, 8, 20, 300, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        assert f"{shard.name} is damaged or incomplete" in refused(load, hf), keep
    shard.write_bytes(whole + b"x")
    assert f"{shard.name} is damaged or incomplete" in refused(load, hf)
    shard.unlink()
    assert f"points to {shard.name}, which is missing" in refused(load, hf)


@pytest.mark.parametrize("place", ["../one/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", ""])
def test_an_index_that_leads_out_of_the_folder(place, hf):
    change_index(hf, lambda names: names.update({"lm_head.weight": place}))
    assert "a shard must be a file of the same folder" in refused(load, hf)


def test_an_index_that_leads_to_something_else(hf):
    (hf / "evil.bin").write_bytes(b"")
    change_index(hf, lambda names: names.update({"lm_head.weight": "evil.bin"}))
    assert "'evil.bin', which is no safetensors file" in refused(load, hf)


def test_an_index_that_is_none(hf):
    for text, sentence in (("{", "is not JSON"), ("[]", "must hold an object"), ("{}", "has no weight_map")):
        (hf / "model.safetensors.index.json").write_text(text)
        assert sentence in refused(load, hf)


def test_an_index_and_shards_that_disagree(hf):
    place = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    change_index(hf, lambda names: names.pop("lm_head.weight"))
    assert "'lm_head.weight', and the index does not know it" in refused(load, hf)
    change_index(hf, lambda names: names.update({"lm_head.weight": place}))
    last = "backbone.out_norm.weight"
    change_index(hf, lambda names: names.update({last: names["backbone.embeddings.weight"]}))
    assert f"says {last!r} is in" in refused(load, hf)
    change_index(hf, lambda names: names.update({"extra": place}))
    assert "should hold 'extra', and does not" in refused(load, hf)


def test_a_tensor_in_two_shards(hf):
    first, second = sorted(hf.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    assert f"is in {first.name} and again in {second.name}" in refused(load, hf)


def test_a_gap_between_shards(hf, tmp_path):
    pytest.importorskip("yaml")
    convert(hf, tmp_path / "large", to="nxai-large", shard_size=20_000)
    (tmp_path / "large" / "model_1.safetensors").unlink()
    assert "but no model_1.safetensors" in refused(load, tmp_path / "large")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update({"lm_haed.weight": t.pop("lm_head.weight")}), "'lm_haed.weight'"),
        (lambda t: t.update({"lm_haed.weight": t.pop("lm_head.weight")}), "did you mean 'lm_head.weight'?"),
        (lambda t: t.pop(f"{S}blocks.1.ffn_norm.weight"), "lacks 'xlstm_block_stack.blocks.1.ffn_norm.weight'"),
        (lambda t: t.update({f"{S}blocks.0.xlstm.learnable_skip": torch.ones(25)}), "has shape [25]"),
        (lambda t: t.update({f"{S}blocks.0.xlstm.learnable_skip": torch.ones(24, 1)}), "has shape [24, 1]"),
        (lambda t: t.update({f"{S}blocks.0.xlstm.learnable_skip": torch.ones(24).int()}), "is torch.int32"),
        (lambda t: t.update({f"{S}blocks.0.xlstm.learnable_skip": [1.0]}), "is a list; a state dict holds tensors"),
        (lambda t: t.pop(f"{S}post_blocks_norm.weight"), "add_post_blocks_norm: false"),
        (lambda t: t.pop(f"{S}blocks.1.ffn.proj_up.weight"), "has no feed-forward layer"),
        (lambda t: t.update({f"{S}blocks.3.xlstm_norm.weight": torch.ones(12)}), "a block 3 but no block 2"),
        (
            lambda t: t.update({f"{S}blocks.1.xlstm.slstm_cell._recurrent_kernel_": torch.ones(3, 5, 7)}),
            "one of the two must be 4 times the other",
        ),
        (
            lambda t: t.update({f"{S}blocks.1.xlstm.conv1d.conv.weight": torch.ones(12, 1, 2)}),
            "mLSTM blocks have 4 convolution taps and sLSTM blocks 2",
        ),
        (
            lambda t: t.update({f"{S}blocks.1.xlstm.slstm_cell._recurrent_kernel_": torch.ones(2, 24, 6)}),
            "mLSTM blocks have 3 heads and sLSTM blocks 2",
        ),
    ],
)
def test_a_state_dict_that_is_not_quite_one(change, sentence, nx, tmp_path):
    change(nx)
    torch.save(nx, tmp_path / "weights.pt")
    assert sentence in refused(load, tmp_path / "weights.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_pickle_is_refused_and_not_run(nx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nx | {"evil": Evil()}, tmp_path / "zip.pt")
    torch.save(nx | {"evil": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"evil": Evil()}))
    for name in ("zip.pt", "old.pth", "plain.bin"):
        said = refused(load, tmp_path / name)
        assert f"{name} holds more than tensors" in said or f"{name} is damaged, incomplete or no PyTorch" in said
    torch.save(xLSTM(xLSTMConfig(vocab_size=5, width=8, heads=2, pattern="m")), tmp_path / "module.pt")
    assert "module.pt holds more than tensors" in refused(load, tmp_path / "module.pt")
    assert not (tmp_path / "executed").exists()


def test_a_state_dict_cut_anywhere(nx, tmp_path):
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save(nx, tmp_path / name, _use_new_zipfile_serialization=new)
        whole = (tmp_path / name).read_bytes()
        for keep in (0, 3, 20, 300, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:keep])
            assert f"{name} is damaged, incomplete" in refused(load, tmp_path / name), keep


def test_files_by_other_names(nx, tmp_path):
    save_file(nx, tmp_path / "weights.pt")
    assert "is a safetensors file by another name; rename it to weights.safetensors" in refused(
        load, tmp_path / "weights.pt"
    )
    torch.save(nx, tmp_path / "weights.safetensors")
    assert "weights.safetensors is damaged or incomplete" in refused(load, tmp_path / "weights.safetensors")
    (tmp_path / "weights.ckpt").write_text("hello, I am no checkpoint")
    assert "no PyTorch file" in refused(load, tmp_path / "weights.ckpt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no PyTorch file" in refused(load, tmp_path / "archive.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds list, not a state dict" in refused(load, tmp_path / "list.pt")
    assert "there is no" in refused(load, tmp_path / "nowhere.safetensors")


def test_a_header_that_lies(tmp_path):
    """Offsets beyond the file, overlaps, shapes that do not fit: what a hostile file would try."""
    for header in (
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
        {"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
    ):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        assert "a.safetensors is damaged or incomplete" in refused(load, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "a.safetensors is damaged or incomplete" in refused(load, tmp_path / "a.safetensors")


def test_bytes_changed_at_random_are_read_as_numbers_or_refused(nx, tmp_path):
    """Whatever a damaged file makes the reader do, a person sees a sentence and no traceback of another library."""
    torch.save(nx, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    save_file(nx, tmp_path / "a.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in ("a.pt", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(40):
            place = int(torch.randint(min(4000, len(whole)), (), generator=generator))
            broken = bytearray(whole)
            broken[place] ^= int(torch.randint(1, 256, (), generator=generator))
            (tmp_path / name).write_bytes(broken)
            with contextlib.suppress(ValueError):  # anything else fails the test
                load(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_weights(dtype, hf):
    shard = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(dtype)}, shard)
    assert f"{name} is stored as" in refused(load, hf)


def test_wrappers_are_seen_through_but_must_cover_everything(nx, tmp_path):
    want = load(tmp_path / "nx")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model."):
        renamed = {prefix + name: tensor for name, tensor in nx.items()}
        torch.save({"epoch": 3, "state_dict": renamed}, tmp_path / "wrapped.ckpt")
        got = load(tmp_path / "wrapped.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    torch.save(renamed | {"loss.weight": torch.ones(1)}, tmp_path / "wrapped.ckpt")
    assert "holds 'loss.weight'; all other names begin with 'model.'" in refused(load, tmp_path / "wrapped.ckpt")


def test_a_bare_stack_is_known_as_one(nx, tmp_path):
    stack = {name.removeprefix(S): tensor for name, tensor in nx.items() if name.startswith(S)}
    torch.save(stack, tmp_path / "stack.pt")
    assert "is a bare block stack, without embedding and head" in refused(load, tmp_path / "stack.pt")
    assert "only language models can be converted" in refused(convert, tmp_path / "stack.pt", tmp_path / "b", to="ours")
    assert not (tmp_path / "b").exists()


def test_a_backbone_without_a_head_is_known_as_one(hf, tmp_path):
    tensors = {}
    for file in hf.glob("*.safetensors"):
        tensors |= load_file(file)
    bare = {name.removeprefix("backbone."): t for name, t in tensors.items() if name != "lm_head.weight"}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text((hf / "config.json").read_text())
    assert "a backbone without a head (saved from AutoModel)" in refused(load, tmp_path / "bare")


def test_arguments_of_convert(hf, tmp_path):
    said = refused(getattr(convert, "__wrapped__", convert), hf, tmp_path / "b", to="gguf")
    assert said.startswith("to='gguf' must be one of hf, nxai, nxai-large, ours; of a model in one GGUF file, call")
    assert "shard_size=0 must be at least 1 byte" in refused(convert, hf, tmp_path / "b", to="hf", shard_size=0)
    assert "there is no file or folder" in refused(convert, tmp_path / "x.pt", tmp_path / "b", to="hf")


@pytest.mark.parametrize("shape", [(), (23,)])
def test_embeddings_of_another_shape_are_named(shape, nx, hf, tmp_path):
    torch.save(nx | {"token_embedding.weight": torch.ones(shape)}, tmp_path / "nx.pt")
    assert "token_embedding.weight has shape" in refused(load, tmp_path / "nx.pt")
    large = {"embedding.weight": torch.ones(shape)}
    for file in hf.glob("*.safetensors"):
        large |= {name: tensor for name, tensor in load_file(file).items() if "embeddings" not in name}
    torch.save(large, tmp_path / "large.pt")
    assert "embedding.weight has shape" in refused(load, tmp_path / "large.pt")


def test_what_cannot_be_exported(tmp_path):
    plain = getattr(export, "__wrapped__", export)
    model = xLSTM(xLSTMConfig(vocab_size=5, width=8, heads=2, pattern="m"))
    compiled = torch.compile(model, backend="eager")
    assert "export() takes an xLSTM or an xLSTMLarge; got Linear" in refused(
        plain, torch.nn.Linear(1, 1), tmp_path / "a", to="ours"
    )
    assert "pass the model inside" in refused(plain, compiled, tmp_path / "a", to="ours")
    (tmp_path / "words").mkdir()
    assert "is a folder without a tokenizer" in refused(
        export, model, tmp_path / "a", to="ours", tokenizer=tmp_path / "words"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words"]
