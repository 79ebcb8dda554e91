"""Files that are damaged, mislabelled or hostile: refused in a sentence that names them, and never executed."""

import contextlib
import dataclasses
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from checkpoint.peers import awake, nx_config
from safetensors.torch import load_file, save_file

from openxlstm.checkpoint.convert import convert, export
from openxlstm.checkpoint.store import load, load_config
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no config was given"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]

S = "xlstm_block_stack."


def refused(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder in several shards."""
    model = awake(xLSTMLarge(xLSTMLargeConfig(vocab_size=23, width=24, blocks=2, heads=3, ffn_width=64)))
    export(model, tmp_path / "one", to="hf")
    convert(tmp_path / "one", tmp_path / "hf", to="hf", shard_size=20_000)
    return tmp_path / "hf"


@pytest.fixture
def nx(tmp_path):
    """Tensors of NX-AI's xlstm."""
    model = xLSTM(xLSTMConfig(vocab_size=23, width=12, heads=3, pattern="ms", mlstm_width=24, ffn_width=20))
    export(awake(model), tmp_path / "nx", to="nxai")
    return load_file(tmp_path / "nx" / "model.safetensors")


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


def test_checkpoints_of_custom_code_that_call_themselves_xlstm(nx, tmp_path):
    folder = tmp_path / "community"
    folder.mkdir()
    config = {"model_type": "xlstm", "xlstm_cfg": {"embedding_dim": 12}, "auto_map": {"AutoModel": "evil.py"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"transformer.h.0.weight": torch.ones(2)}, folder / "model.safetensors")
    said = refused(load, folder)
    assert "a checkpoint of custom code under the name 'xlstm'" in said
    assert "auto_map, model_type, xlstm_cfg" in said
    assert "transformer.h.0.weight" in said
    save_file({f"model.{name}": tensor for name, tensor in nx.items()}, folder / "model.safetensors")
    said = refused(load, folder)  # NeurIPS tensors: read, and the nested config checked against them
    assert "the config says num_blocks=1, and the tensors 2" in said
    del config["xlstm_cfg"]
    (folder / "config.json").write_text(json.dumps(config | {"slstm_at": [1]}))
    assert load(folder).config.pattern == "ms"


def test_a_config_for_other_tensors(hf, nx, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    for change, sentence in (
        ({"num_heads": 2}, "the config means heads=2, and the tensors 3"),
        ({"num_hidden_layers": 3, "num_blocks": 3}, "the config means blocks=3, and the tensors 2"),
        ({"vocab_size": 50304}, "the config means vocab_size=50304, and the tensors 23"),
        ({"ffn_proj_factor": 5.0}, "feed-forward width of 128; the tensors have 64"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ):
        (hf / "config.json").write_text(json.dumps(config | change))
        assert sentence in refused(load, hf), change
    (hf / "config.json").write_text(json.dumps(config))
    for file in hf.glob("*.safe*"):
        file.unlink()
    save_file(nx, hf / "model.safetensors")
    assert "config.json describes transformers' own xLSTM, and the tensors are named as by NX-AI" in refused(load, hf)


def test_a_config_of_nx_for_other_tensors(tmp_path):
    model = awake(xLSTM(xLSTMConfig(vocab_size=31, width=64, heads=4, pattern="ms", mlstm_width=128, ffn_width=128)))
    export(model, tmp_path / "nx", to="nxai")
    file = tmp_path / "nx" / "model.safetensors"
    config = dataclasses.asdict(nx_config(pattern="ms"))
    assert load(file, config=config).config == model.config
    assert load(file, config={"model": config, "training": {"lr": 1}}).config == model.config
    for path, value, sentence in (
        (("embedding_dim",), 65, "embedding_dim=65, and the tensors 64"),
        (("slstm_at",), [0], "slstm_at=[0], and the tensors [1]"),
        (("bias",), True, "bias=True, and the tensors False"),
        (("embeding_dim",), 64, "the config's model has no field 'embeding_dim'; did you mean 'embedding_dim'?"),
        (("mlstm_block", "mlstm", "num_heads"), 8, "mlstm num_heads=8, and the tensors 4"),
        (("mlstm_block", "mlstm", "proj_factor"), 3.0, "inner width of mlstm=192, and the tensors 128"),
        (("slstm_block", "slstm", "function"), "lstm", "function='lstm'; only 'slstm' can be read"),
        (("slstm_block", "slstm", "gradient_recurrent_clipval"), 10.0, "it would train differently"),
        (("slstm_block", "slstm", "forward_clipval"), 1.0, "it changes what the cell computes"),
        (("slstm_block", "feedforward"), None, "feedforward: null"),
        (("slstm_block", "feedforward", "proj_factor"), 4.0, "inner width of feedforward=256"),
    ):
        changed = json.loads(json.dumps(config))
        at = changed
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert sentence in refused(load, file, config=changed), path
    changed = json.loads(json.dumps(config)) | {"dropout": 0.1, "add_embedding_dropout": True}
    with (
        pytest.warns(UserWarning, match="feed-forward layers of the peer; here it is 0.1 in both"),
        pytest.warns(UserWarning, match="add_embedding_dropout"),
    ):
        assert load(file, config=changed).config.dropout == 0.1


def test_what_no_config_says_is_said_in_a_warning(nx, tmp_path):
    save_file(nx, tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match="taken to be the peer's default: act_fn gelu, dropout 0"):
        load(tmp_path / "weights.safetensors")


def test_configs_that_are_none(nx, tmp_path):
    file = tmp_path / "nx" / "model.safetensors"
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.json").write_text("{")
    assert "there is no config" in refused(load, file, config=tmp_path / "b.json")
    assert "known are .json, .yaml and .yml" in refused(load, file, config=tmp_path / "a.txt")
    assert "is not JSON" in refused(load, file, config=tmp_path / "a.json")
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    assert "is not YAML" in refused(load, file, config=tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1")
    assert "must hold a mapping; it holds list" in refused(load, file, config=tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.system ['touch executed']")
    assert "is not YAML" in refused(load, file, config=tmp_path / "a.yaml")
    assert not (tmp_path / "executed").exists()


def test_a_config_is_read_without_the_weights(hf):
    assert load_config(hf) == xLSTMLargeConfig(vocab_size=23, width=24, blocks=2, heads=3, ffn_width=64)


def test_arguments_of_convert(hf, tmp_path):
    said = refused(getattr(convert, "__wrapped__", convert), hf, tmp_path / "b", to="gguf")
    assert said.startswith("to='gguf' must be one of hf, nxai, nxai-large, ours; of a model in one GGUF file, call")
    assert "shard_size=0 must be at least 1 byte" in refused(convert, hf, tmp_path / "b", to="hf", shard_size=0)
    assert "there is no file or folder" in refused(convert, tmp_path / "x.pt", tmp_path / "b", to="hf")


LARGE_KINDS = (
    ("hidden_size", "24", "embedding_dim must be a whole number; got '24'"),
    ("hidden_size", 24.0, "embedding_dim must be a whole number; got 24.0"),
    ("num_heads", "3", "num_heads must be a whole number"),
    ("vocab_size", [23], "vocab_size must be a whole number"),
    ("qk_dim_factor", "half", "qk_dim_factor must be a finite number; got 'half'"),
    ("qk_dim_factor", float("nan"), "qk_dim_factor must be a finite number; got nan"),
    ("ffn_round_up_to_multiple_of", 0, "ffn_round_up_to_multiple_of must be a whole number above 0"),
    ("eps", float("inf"), "eps must be a finite number"),
    ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false; got 'no'"),
)


@pytest.mark.parametrize(("field", "value", "sentence"), LARGE_KINDS)
def test_values_of_another_kind_in_the_config_of_a_large_model(field, value, sentence, hf):
    config = json.loads((hf / "config.json").read_text()) | {field: value}
    if field == "hidden_size":
        config["embedding_dim"] = value
    (hf / "config.json").write_text(json.dumps(config))
    assert sentence in refused(load, hf)
    config |= {"hidden_size": 24, "embedding_dim": 24, "num_heads": 3, "vocab_size": 23, "qk_dim_factor": 0.5,
               "ffn_round_up_to_multiple_of": 64, "eps": "1e-6", "tie_word_embeddings": False}  # fmt: skip
    (hf / "config.json").write_text(json.dumps(config))
    assert load(hf).config.eps == 1e-6  # YAML writes numbers so


NX_KINDS = (
    ("num_blocks", 0, "slstm_at has block 1, and num_blocks=0"),
    ("slstm_at", [7], "slstm_at has block 7, and num_blocks=2"),
    ("slstm_at", 1, "slstm_at must be a list of whole numbers, or 'all'; got 1"),
    ("slstm_at", ["1"], "slstm_at must be a list of whole numbers"),
    ("dropout", None, "dropout must be a finite number; got None"),
    ("tie_weights", "yes", "tie_weights must be true or false"),
    ("slstm_block", None, "has no slstm_block, and the tensors have such blocks"),
    ("mlstm_block", "x", "mlstm_block must hold fields; got 'x'"),
    ("slstm_block.feedfoward", {}, "has no field 'feedfoward'; did you mean 'feedforward'?"),
    ("mlstm_block.mlstm", [4], "mlstm must hold fields; got [4]"),
    ("mlstm_block.mlstm.proj_factor", "two", "proj_factor must be a finite number; got 'two'"),
    ("mlstm_block.mlstm.proj_factor", float("inf"), "proj_factor must be a finite number; got inf"),
    (
        "mlstm_block.mlstm.round_proj_up_to_multiple_of",
        0,
        "round_proj_up_to_multiple_of must be a whole number above 0",
    ),
    ("mlstm_block.mlstm.qkv_proj_blocksize", 2, "qkv_proj_blocksize=2, and the tensors 4"),
    ("slstm_block.slstm.group_norm_weight", False, "group_norm_weight=False, and the tensors True"),
    ("slstm_block.feedforward.bias", True, "feedforward bias=True, and the tensors False"),
)


@pytest.mark.parametrize(("path", "value", "sentence"), NX_KINDS)
def test_fields_of_another_kind_or_for_others_in_the_config_of_nx(path, value, sentence, nx, tmp_path):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((tmp_path / "nx" / "config.yaml").read_text())
    *above, last = path.split(".")
    level = config
    for key in above:
        level = level[key]
    level[last] = value
    assert sentence in refused(load, tmp_path / "nx" / "model.safetensors", config=config)


def test_slstm_blocks_may_be_counted_from_the_end(nx, tmp_path):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((tmp_path / "nx" / "config.yaml").read_text()) | {"slstm_at": [-1]}
    assert load(tmp_path / "nx" / "model.safetensors", config=config).config.pattern == "ms"


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
