"""xLSTMConfig of Hugging Face: two languages, one meaning, and nothing swallowed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hf.tiny_hf import KINDS, config_of, forget_warnings, native_config, said

import openxlstm.hf as oxhf
from openxlstm.checkpoint import hf_layout
from openxlstm.hf import xLSTMConfig
from openxlstm.models import presets


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_goes_there_and_back(name):
    native = presets.PRESETS[name].config
    config = xLSTMConfig.from_native(native)
    assert config.native() == native
    assert hf_layout.from_hf_config(json.loads(config.to_json_string(use_diff=True))) == native
    assert (config.hidden_size, config.num_heads) == (native.width, native.heads)
    assert config.num_hidden_layers == (native.blocks if config.architecture == "xlstm_large" else len(native.pattern))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_config_is_read_by_everyone(kind, tmp_path):
    config = config_of(kind)
    config.save_pretrained(tmp_path)
    for again in (xLSTMConfig.from_pretrained(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is xLSTMConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "openxlstm"
    assert not {*hf_layout.MACHINE_FIELDS} - {"use_cache"} & stored.keys(), "facts about a machine"
    foreign = {"large": "pattern", "neurips": "qk_width"}[kind]
    assert foreign not in stored, "a fact of the other architecture"


def test_types_are_strict():
    for wrong in ({"width": "64"}, {"pattern": 3}, {"use_cache": "yes"}, {"architecture": "lstm"}):
        with pytest.raises(Exception, match=next(iter(wrong))):
            xLSTMConfig(**{"vocab_size": 64, "blocks": 1, "heads": 2} | wrong)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"witdh": 64}, "no field 'witdh'; did you mean 'width'"),
        ({"hidden_sizes": 64}, "did you mean 'hidden_size'"),
        ({"width": 64, "hidden_size": 65}, "two names of one fact"),
        ({"hidden_size": 64, "embedding_dim": 65}, "contradicts itself"),
        ({"vocab_size": 9, "pattern": "ms", "width": 64, "num_hidden_layers": 3}, "'ms' has 2"),
        (
            {"vocab_size": 9, "width": 64, "pattern": "m", "qk_width": 4},
            "qk_width is no fact of the architecture 'xlstm'",
        ),
        ({"width": 64, "qk_dim_factor": 0.5}, "in one language"),
        ({"vocab_size": 9, "width": 64, "heads": 2}, "lacks blocks"),
        ({"vocab_size": 9, "width": 64, "heads": 5, "blocks": 1}, "multiple of heads=5"),
        ({"hidden_size": 64, "use_bias": True}, "use_bias"),
        ({"hidden_size": 64, "add_out_norm": False}, "add_out_norm"),
        ({"xlstm_cfg": {"num_blocks": 4}}, "xlstm_cfg"),
        ({"model_type": "xlstm", "vocab_size": 9, "xlstm_cfg": {}, "pad_token_id": 1}, "Its keys are .*vocab_size"),
        ({"model_type": "xlstm", "vocab_size": 9}, "lacks 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": 64}, "model_type is 'llama'|reads 'openxlstm'"),
    ],
)
def test_what_cannot_be_meant_is_refused(keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        xLSTMConfig(**keywords)


def test_an_unknown_keyword_far_from_every_known_one_is_said_and_kept(caplog):
    forget_warnings()
    config = xLSTMConfig(hidden_size=64, zzz=3)
    assert config.zzz == 3
    assert "no field 'zzz'" in said(caplog)


def test_names_of_the_in_tree_class_mean_what_they_mean_there(caplog):
    """Its rounding too: 2048 for a feed-forward factor of 2.667 at width 768, where our own rule says 2112."""
    forget_warnings()
    for sizes in (
        {"hidden_size": 768, "num_heads": 4},
        {"hidden_size": 128, "num_heads": 2, "qk_dim_factor": 0.25},
        {},
    ):
        theirs = transformers.xLSTMConfig(**sizes)
        ours = xLSTMConfig(**sizes)
        assert ours.hidden_size == theirs.hidden_size
        assert ours.num_hidden_layers == theirs.num_hidden_layers
        model = transformers.xLSTMForCausalLM
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in model(type(theirs)(**sizes, num_hidden_layers=1)).named_parameters()}
            mine = oxhf.xLSTMForCausalLM(xLSTMConfig(**sizes, num_hidden_layers=1)).named_parameters()
        assert {n: p.shape for n, p in mine} == shapes
    xLSTMConfig(hidden_size=64, chunk_size=16, mode="train")
    assert "chunk_size, mode" in said(caplog)


def test_an_in_tree_file_becomes_ours(tmp_path, caplog):
    forget_warnings()
    theirs = transformers.xLSTMConfig(vocab_size=64, hidden_size=96, num_hidden_layers=3, num_heads=2, chunk_size=32)
    theirs.save_pretrained(tmp_path)
    config = xLSTMConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.source_layout) == ("openxlstm", "in-tree")
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert config._machine_fields["chunk_size"] == 32
    assert said(caplog).count("nothing here reads them") == 1
    config.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert stored["model_type"] == "openxlstm"
    assert hf_layout.from_hf_config(stored) == config.native()


def test_aliases_read_and_write_one_fact():
    config = config_of("large")
    config.hidden_size, config.tie_word_embeddings = 48, True
    assert (config.width, config.tie_embeddings) == (48, True)
    assert config.native().width == 48
    config.num_heads = 7
    with pytest.raises(ValueError, match="multiple of heads=7"):
        config.native()
    config = config_of("neurips")
    config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="blocks=5"):
        config.native()


def test_the_length_in_training_is_advice():
    config = xLSTMConfig.from_native(native_config("large"), max_position_embeddings=8)
    assert config.max_position_embeddings == 8
    assert oxhf.xLSTMForCausalLM(config)(torch.ones(1, 12, dtype=int)).logits.shape[1] == 12
