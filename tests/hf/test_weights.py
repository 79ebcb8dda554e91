"""Files with other tensor names: fused, NX-AI's, in-tree; what is written has single names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from hf.tiny_hf import build, redraw, text
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import openxlstm.hf as oxhf
from openxlstm.hf import weights

close = torch.testing.assert_close
IN_TREE = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16}


def fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out by hand: the order of the published fused files is q, k, v, o; i, f; gate, up."""
    fused = dict(state)
    for block in sorted({name.split(".")[2] for name in state if ".blocks." in name}):
        layer, ffn = f"backbone.blocks.{block}.mlstm_layer.", f"backbone.blocks.{block}.ffn."
        qkvo = [fused.pop(f"{layer}{name}.weight") for name in ("q", "k", "v", "ogate_preact")]
        fused[f"{layer}qkv_opreact.weight"] = torch.cat(qkvo)
        for kind in ("weight", "bias"):
            gates = [fused.pop(f"{layer}{name}_preact.{kind}") for name in ("igate", "fgate")]
            fused[f"{layer}ifgate_preact.{kind}"] = torch.cat(gates)
        up = [fused.pop(f"{ffn}{name}.weight") for name in ("proj_up_gate", "proj_up")]
        fused[f"{ffn}proj_up_gate_z.weight"] = torch.cat(up)
    return fused


def rewrite(folder: Path, change: object) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})  # type: ignore[operator]


def in_tree_model() -> transformers.xLSTMForCausalLM:
    return redraw(transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**IN_TREE))).eval()


@pytest.mark.parametrize("dialect", ["openxlstm", "in-tree"])
def test_a_fused_file_loads_and_is_saved_with_single_names(dialect: str, tmp_path: Path) -> None:
    model, x = build("large"), text(2, 19)
    names = sorted(model.state_dict())
    model.save_pretrained(tmp_path / "fused", layout=dialect)
    rewrite(tmp_path / "fused", fuse)
    loaded, info = oxhf.xLSTMForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(x).logits, model(x).logits)
    loaded.save_pretrained(tmp_path / "single")
    assert sorted(load_file(tmp_path / "single" / "model.safetensors")) == names


def test_a_fused_file_of_the_in_tree_class_loads_by_registration(tmp_path: Path) -> None:
    model, x = in_tree_model(), text(2, 19)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, fuse)
    config = json.loads((tmp_path / "config.json").read_text()) | {"weight_mode": "fused"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    oxhf.register(override=True)
    try:
        ours = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    finally:
        oxhf.unregister()
    close(ours(x).logits, model(x, use_cache=False).logits, rtol=1e-5, atol=5e-5)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["weight_mode"] == "single"
    back = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(back(x, use_cache=False).logits, model(x, use_cache=False).logits)


@pytest.mark.parametrize("fused", [False, True])
def test_nxais_names_are_read(fused: bool, tmp_path: Path) -> None:
    model, x = build("large"), text(1, 9)
    model.save_pretrained(tmp_path)

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["embedding.weight"] = state.pop("backbone.embeddings.weight")
        return fuse(state) if fused else state

    rewrite(tmp_path, rename)
    assert torch.equal(oxhf.xLSTMForCausalLM.from_pretrained(tmp_path).eval()(x).logits, model(x).logits)


def test_a_fresh_model_is_written_with_single_names(tmp_path: Path) -> None:
    """transformers would apply the reverse of what is registered, and write it fused."""
    model = build("large")
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_the_in_tree_layout_is_read_by_the_in_tree_class_and_back(tied: bool, tmp_path: Path) -> None:
    config = oxhf.xLSTMConfig(
        vocab_size=64, width=128, blocks=2, heads=2, ffn_width=320, tie_embeddings=tied, pad_token_id=1
    )
    model, x = redraw(oxhf.xLSTMForCausalLM(config)).eval(), text(2, 19)
    model.save_pretrained(tmp_path, layout="in-tree")
    assert model.config is config
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("xlstm", ["xLSTMForCausalLM"])
    theirs, info = transformers.xLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    close(theirs.eval()(x, use_cache=False).logits, model(x).logits, rtol=1e-5, atol=5e-5)
    theirs.save_pretrained(tmp_path / "back")
    ours = oxhf.xLSTMForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(ours(x).logits, model(x).logits)


def test_an_in_tree_model_is_saved_in_our_layout_if_asked(tmp_path: Path) -> None:
    model, x = oxhf.accelerate(in_tree_model()), text(1, 9)
    model.save_pretrained(tmp_path, layout="openxlstm")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "openxlstm"
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(back(x).logits, model(x).logits)


def test_what_the_in_tree_class_has_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is the 7B architecture.*this model is xLSTM\[1:1\]"):
        build("neurips").save_pretrained(tmp_path / "a", layout="in-tree")
    with pytest.raises(ValueError, match=r"layout='intree' does not exist"):
        build("large").save_pretrained(tmp_path / "a", layout="intree")
    assert not (tmp_path / "a").exists()


def test_a_fused_file_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    build("large").save_pretrained(tmp_path)

    def cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = fuse(state)
        del state["backbone.blocks.1.mlstm_layer.qkv_opreact.weight"]
        return state

    rewrite(tmp_path, cut)
    with pytest.raises(ValueError, match=r"lacks 'backbone.blocks.1.mlstm_layer.k.weight' and 3 more"):
        oxhf.xLSTMForCausalLM.from_pretrained(tmp_path)


def test_conversions_are_registered_for_our_model_type_only() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    assert get_checkpoint_conversion_mapping("openxlstm")
    assert not get_checkpoint_conversion_mapping("xlstm")
    assert not get_checkpoint_conversion_mapping("xLSTMForCausalLM")
    assert len(weights.conversions()) == 5
