"""Configs that are damaged, of another kind or for other tensors: refused in a sentence that names the field."""

import dataclasses
import json

import pytest
import torch
from checkpoint.peers import awake, nx_config
from safetensors.torch import save_file
from support import refused

from openxlstm.checkpoint.convert import export
from openxlstm.checkpoint.store import load, load_config
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no config was given"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


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
