"""Initialisation, saving and loading: every parameter by the published table, every file complete or refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from hf.tiny_hf import KINDS, W, build, config_of, native_config, text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import openxlstm as ox
import openxlstm.hf as oxhf

Auto = transformers.AutoModelForCausalLM


def stats(model):
    return {name: (round(p.mean().item(), 6), round(p.std().item(), 6)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_starts_by_the_native_table(kind):
    """The same table: constants are equal, random tensors have the deviation of the native model's."""
    sizes = {"width": 96} if kind == "large" else {"width": 96, "recurrent_init": "uniform"}
    config = config_of(kind, heads=3, **sizes)
    native = (ox.xLSTMLarge if kind == "large" else ox.xLSTM)(config.native())
    wrapped = oxhf.xLSTMForCausalLM.from_native(native)
    for (name, fresh), (again, want) in zip(
        oxhf.xLSTMForCausalLM(config).named_parameters(), wrapped.named_parameters(), strict=True
    ):
        assert name == again
        if want.unique().numel() < 8 and "gate_i.bias" not in name:
            torch.testing.assert_close(fresh, want, msg=name)
        elif fresh.numel() > 100:
            torch.testing.assert_close(fresh.std(), want.std(), rtol=0.12, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_all_missing_weights_can_be_initialised_and_none_that_was_loaded_is_touched(kind):
    with torch.device("meta"):
        model = oxhf.xLSTMForCausalLM(config_of(kind))
    model.to_empty(device="cpu")  # NaN: uninitialised memory is poison here
    kept = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if index % 2:
            parameter.data.fill_(0.7)
            parameter._is_hf_initialized = True
            kept[name] = parameter
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name in kept:
            assert (parameter == 0.7).all(), name


@pytest.mark.parametrize("shard", [None, "8KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_bits(kind, shard, tmp_path):
    model, x = build(kind), text(2, 9)
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard is not None)
    again, info = Auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is oxhf.xLSTMForCausalLM
    assert not any(info.values())
    assert torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(ox.load(tmp_path)(x)[0], model(x).logits), "our own loader reads it too"


@pytest.mark.parametrize("kind", KINDS)
def test_native_models_share_their_tensors_with_the_wrapper(kind, tmp_path):
    native = (ox.xLSTMLarge if kind == "large" else ox.xLSTM)(native_config(kind)).eval()
    wrapped, x = oxhf.xLSTMForCausalLM.from_native(native), text(2, 7)
    assert torch.equal(wrapped(x).logits, native(x)[0])
    assert {p.data_ptr() for p in wrapped.parameters()} == {p.data_ptr() for p in native.parameters()}
    back = wrapped.native()
    assert type(back) is type(native)
    assert torch.equal(back(x)[0], native(x)[0])
    ox.save(back, tmp_path)
    assert torch.equal(ox.load(tmp_path)(x)[0], native(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_one_tensor_in_memory_and_on_disk(kind, tmp_path):
    model, x = build(kind, tie_embeddings=True), text(2, 9)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names
    again = Auto.from_pretrained(tmp_path / "a")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(x).logits, model(x).logits)
    # a file that carries the tied copy as well
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    again = Auto.from_pretrained(tmp_path / "a")
    assert torch.equal(again(x).logits, model(x).logits)
    native = model.native()
    assert torch.equal(native(x)[0], model(x).logits)
    assert oxhf.xLSTMForCausalLM.from_native(native).lm_head.weight is model.lm_head.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_resize(kind, tied, tmp_path):
    model, x = build(kind, tie_embeddings=tied), text(2, 9)
    before = model(x).logits
    model.resize_token_embeddings(W + 6)
    assert model.config.vocab_size == W + 6
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(torch.full((1, 1), W + 5)).logits
    assert after.shape[-1] == W + 6
    torch.testing.assert_close(model(x).logits[..., :W], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(Auto.from_pretrained(tmp_path)(x).logits, model(x).logits)
    model.resize_token_embeddings(W - 4)
    torch.testing.assert_close(model(x % (W - 4)).logits, model(x % (W - 4)).logits)
    assert model.native()(x % (W - 4))[0].shape[-1] == W - 4


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_stay_fp32_when_the_rest_is_loaded_in_half(kind, dtype, tmp_path):
    build(kind).save_pretrained(tmp_path)
    for keyword in ("dtype", "torch_dtype"):
        model = Auto.from_pretrained(tmp_path, **{keyword: dtype})
        for name, parameter in model.named_parameters():
            is_gate = any(f".{gate}." in name for gate in ("igate_preact", "fgate_preact", "gate_i", "gate_f"))
            assert (parameter.dtype == torch.float32) == is_gate, name
        x = text(2, 9)
        late = build(kind).to(parameter.dtype)  # a later .to() rounds the gates' weights, and everything still runs
        assert all(torch.isfinite(m(x).logits).all() for m in (model, late))
        assert all(t.dtype == torch.float32 for t in model(x).past_key_values.to_state().tensors())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("backbone.out_norm.weight"), "lacks 'backbone.out_norm.weight', so the model"),
        (lambda t: t.pop("lm_head.weight"), "lacks 'lm_head.weight'"),
        (lambda t: t.__setitem__("backbone.extra", torch.ones(3)), "holds 'backbone.extra', which this model has not"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, sentence, tmp_path):
    build("large").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        Auto.from_pretrained(tmp_path)


def test_gguf_files_are_refused_with_the_way_out(tmp_path):
    build("large").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a folder of safetensors"):
        oxhf.xLSTMForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_on_a_pretrained_backbone_and_a_backbone_out_of_a_language_model(kind, tmp_path):
    model, x = build(kind), text(3, 9)
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(body) is oxhf.xLSTMModel
    assert torch.equal(body(x).last_hidden_state, model.backbone(x).last_hidden_state)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(x, attention_mask=torch.ones_like(x)).logits.shape == (3, 3)
    assert torch.isfinite(classifier.score.weight).all()
    classifier.save_pretrained(tmp_path / "c")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    assert torch.equal(again.score.weight, classifier.score.weight)


def test_only_safetensors_are_written_and_names_are_single(tmp_path):
    build("large").save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "backbone.blocks.1.mlstm_layer.igate_preact.bias" in names
    assert not any("qkv_opreact" in name or "ifgate" in name for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["xLSTMForCausalLM"]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    model, x = build(kind), text(2, 9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).logits, model(x).logits)
