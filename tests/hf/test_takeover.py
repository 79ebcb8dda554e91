"""The in-tree model of transformers taken over: live, by registration, and inside code that is not ours."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from hf.defects import CHECKS, CONFIG, GREEDY, Kit, padded, text
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    monkey_patching,
)
from transformers.models.xlstm import modeling_xlstm

import openxlstm.hf as oxhf
from openxlstm.hf import in_tree

close = torch.testing.assert_close


def tensors(cache: Any) -> list[torch.Tensor]:
    return cache.to_state().tensors()


def in_tree_model(**changes: Any) -> transformers.xLSTMForCausalLM:
    torch.manual_seed(0)
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**CONFIG | changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def in_tree_file(folder: Path) -> transformers.xLSTMForCausalLM:
    model = in_tree_model()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def registered() -> Iterator[None]:
    oxhf.register(override=True)
    yield
    oxhf.unregister()


@pytest.fixture
def patched() -> Iterator[None]:
    oxhf.patch_transformers()
    yield
    oxhf.unpatch_transformers()


# Tier C: a live model


def read(cache: Any) -> int:
    return cache.seen_tokens + cache.get_seq_length()


TAKEN_OVER = Kit(
    config=transformers.xLSTMConfig,
    build=lambda config: oxhf.accelerate(transformers.xLSTMForCausalLM(config)),
    module=oxhf,
    tensors=tensors,
    read=read,
)
NOT_THE_MODELS = {  # what happens before there is a live model, so no takeover of one can mend it
    "09": "the in-tree class cannot build it",
    "21": "the in-tree config",
    "24": "weights stay as they are",
    "25": "heads are made by the Auto classes: register(override=True)",
    "27": "the in-tree config",
    "29": "the in-tree config",
    "23": "refused below",
}


@pytest.mark.parametrize("number", sorted(CHECKS.keys() - NOT_THE_MODELS.keys()))
def test_a_model_taken_over_is_free_of_defect(number: str) -> None:
    CHECKS[number](TAKEN_OVER)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"embedding_dim": 256}, "contradicts itself: hidden_size is 128 and embedding_dim, its other name, is 256"),
        ({"tie_word_embeddings": True}, "the in-tree class does not tie"),
        ({"xlstm_cfg": {"num_blocks": 4}}, "holds xlstm_cfg"),
        ({"add_out_norm": False}, "add_out_norm is false"),
        ({"use_bias": True}, "use_bias is true"),
    ],
)
def test_a_config_that_does_not_say_what_the_model_is_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"):
        model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**CONFIG | fields))
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=sentence):
        oxhf.accelerate(model)
    assert before == [(type(module), dict(vars(module))) for module in model.modules()]


def test_fused_matrices_are_refused_with_the_way_out() -> None:
    model = in_tree_model()
    model.backbone.blocks[1].mlstm_layer.qkv_opreact = nn.Linear(128, 384)
    with pytest.raises(ValueError, match="from_pretrained, which splits them"):
        oxhf.accelerate(model)


def test_a_tied_model_is_taken_over_once_it_is_tied() -> None:
    model = in_tree_model(tie_word_embeddings=True)
    model.lm_head.weight = model.backbone.embeddings.weight
    want = model(text(), use_cache=False).logits
    assert oxhf.accelerate(model).lm_head.weight is model.backbone.embeddings.weight
    close(model(text()).logits, want, rtol=1e-5, atol=3e-5)


def test_names_and_tensors_stay_and_logits_agree() -> None:
    model, x = in_tree_model(), text(83)
    names, parameters = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    bits = copy.deepcopy(model.state_dict())
    want = model(x, use_cache=False).logits
    assert oxhf.accelerate(model) is model
    assert type(model) is oxhf.xLSTMForCausalLM
    assert oxhf.accelerate(model) is model
    assert names == list(model.state_dict())
    assert modules == [id(module) for module in model.modules()]
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    assert all(torch.equal(bits[name], tensor) for name, tensor in model.state_dict().items())
    close(model(x).logits, want, rtol=1e-5, atol=5e-5)


def test_double_precision_agrees_to_its_digits() -> None:
    model, x = in_tree_model(num_hidden_layers=1).double(), text(40)
    for norm in (m for m in model.modules() if "Norm" in type(m).__name__):
        norm.force_float32_reductions = False
    want = model(x, use_cache=False).logits
    close(oxhf.accelerate(model)(x).logits.float(), want, rtol=1e-5, atol=1e-5)


def test_restore_gives_the_same_bits_and_the_same_attributes() -> None:
    model, x = in_tree_model(), text()
    want = model(x, use_cache=False).logits
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    config = model.config
    assert oxhf.restore(oxhf.accelerate(model)) is model
    assert before == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    assert model.config is config
    assert model.backbone.config is config
    assert torch.equal(model(x, use_cache=False).logits, want)
    with pytest.raises(ValueError, match="was not taken over"):
        oxhf.restore(model)


def test_a_backbone_alone() -> None:
    model, x = in_tree_model().backbone, text()
    want = model(x, use_cache=False)[0]
    assert type(oxhf.accelerate(model)) is oxhf.xLSTMModel
    close(model(x).last_hidden_state, want, rtol=1e-5, atol=1e-5)
    assert type(oxhf.restore(model)) is modeling_xlstm.xLSTMModel


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_taken_over_are_restored_by_themselves(copied: Any) -> None:
    model, x = in_tree_model(), text()
    want = model(x, use_cache=False).logits
    oxhf.accelerate(model)
    other = oxhf.restore(copied(model))
    assert torch.equal(other(x, use_cache=False).logits, want)
    assert type(model) is oxhf.xLSTMForCausalLM
    assert type(other) is modeling_xlstm.xLSTMForCausalLM


def test_hidden_states_are_recorded_whoever_recorded_first() -> None:
    x = text()
    for first in (False, True):
        model = in_tree_model()
        if first:
            model(x, output_hidden_states=True, use_cache=False)
        states = oxhf.accelerate(model)(x, output_hidden_states=True).hidden_states
        assert [tuple(state.shape) for state in states] == [(1, 20, 128)] * 3
        assert not torch.equal(states[0], states[1])


def test_training_goes_on_with_the_same_optimiser_and_checkpointing() -> None:
    model, x = in_tree_model().train(), text()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.gradient_checkpointing_enable()
    oxhf.accelerate(model)
    assert model.backbone.gradient_checkpointing
    assert model.backbone.checkpoint_every == 1
    before = copy.deepcopy(model.state_dict())
    model(x, labels=x).loss.backward()
    optimiser.step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    oxhf.restore(model)
    assert all(block.gradient_checkpointing for block in model.backbone.blocks)


def test_what_was_saved_after_loads_in_tree(tmp_path: Path) -> None:
    model, x = in_tree_model(chunk_size=32), text()
    want = model(x, use_cache=False).logits
    oxhf.accelerate(model).save_pretrained(tmp_path)
    back = transformers.xLSTMForCausalLM.from_pretrained(tmp_path)
    assert (back.config.model_type, back.config.chunk_size, back.config.architectures) == (
        "xlstm",
        32,
        ["xLSTMForCausalLM"],
    )
    assert torch.equal(back.eval()(x, use_cache=False).logits, want)


def test_compiled_or_patched_models_and_strangers_are_refused() -> None:
    compiled = torch.compile(in_tree_model())
    with pytest.raises(ValueError, match="OptimizedModule is compiled; take the model over first"):
        oxhf.accelerate(compiled)
    model = in_tree_model()
    model.compile()
    with pytest.raises(ValueError, match="xLSTMForCausalLM is compiled"):
        oxhf.accelerate(model)
    model = in_tree_model()
    model.backbone.forward = torch.compile(model.backbone.forward)
    with pytest.raises(ValueError, match="xLSTMModel 'backbone' has a forward of its own"):
        oxhf.accelerate(model)
    with pytest.raises(ValueError, match="there is none in this Linear"):
        oxhf.accelerate(nn.Linear(2, 2))


def test_behind_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model, x = in_tree_model(), text()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q", "igate_preact", "proj_up"], task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    want, plain = wrapped(x, use_cache=False).logits, model.config
    assert oxhf.accelerate(wrapped) is wrapped
    close(wrapped(x).logits, want, rtol=1e-5, atol=5e-5)
    ids, mask = padded(x, 5, 0)
    alone = wrapped.generate(input_ids=x, **GREEDY)
    assert torch.equal(wrapped.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 5:], alone)
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(x).logits, want, atol=1e-2)
    oxhf.restore(wrapped)
    assert wrapped.config is plain
    assert torch.equal(wrapped(x, use_cache=False).logits, want)


@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
def test_a_dispatched_model(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = in_tree_model(), text()
    want = model(x, use_cache=False).logits
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        parts = {"backbone.embeddings": "cpu", "backbone.blocks.0": "disk", "backbone.blocks.1": "cpu"}
        parts |= {"backbone.out_norm": "cpu", "lm_head": "disk"}
        accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    hooked = {name for name, module in model.named_modules() if "_hf_hook" in vars(module)}
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    oxhf.accelerate(model)
    assert hooked == {name for name, module in model.named_modules() if "_hf_hook" in vars(module)} != set()
    ids, mask = padded(x, 5, 0)
    close(model(ids, attention_mask=mask).logits[:, 5:], want, rtol=1e-5, atol=5e-5)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **GREEDY)[:, 5:],
        oxhf.accelerate(in_tree_model()).generate(x, **GREEDY),
    )
    oxhf.restore(model)
    assert before == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    assert torch.equal(model(x, use_cache=False).logits, want)


# Tier A: registration


REGISTERED = Kit(
    config=lambda **fields: AutoConfig.for_model("xlstm", **fields),  # type: ignore[arg-type]
    build=AutoModelForCausalLM.from_config,
    module=oxhf,
    tensors=tensors,
    read=read,
)


@pytest.mark.parametrize("number", CHECKS)
@pytest.mark.usefixtures("registered")
def test_a_model_by_registration_is_free_of_defect(number: str) -> None:
    CHECKS[number](REGISTERED)


@pytest.mark.usefixtures("registered")
def test_files_of_the_in_tree_model_become_ours_and_are_saved_as_theirs(tmp_path: Path) -> None:
    want = in_tree_file(tmp_path / "theirs")(text(), use_cache=False).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(model) is oxhf.xLSTMForCausalLM
    assert type(model.config) is in_tree.xLSTMConfig
    close(model(text()).logits, want, rtol=1e-5, atol=5e-5)
    model.save_pretrained(tmp_path / "ours")
    back = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(text(), use_cache=False).logits, want)
    assert type(AutoModel.from_pretrained(tmp_path / "theirs")) is oxhf.xLSTMModel
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    assert type(head) is oxhf.xLSTMForSequenceClassification


def test_unregister_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    in_tree_file(tmp_path)
    for _ in range(2):
        oxhf.register(override=True)
        assert type(AutoConfig.from_pretrained(tmp_path)) is in_tree.xLSTMConfig
        oxhf.unregister()
        oxhf.unregister()
        assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.xLSTMConfig
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is modeling_xlstm.xLSTMForCausalLM
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_config(transformers.xLSTMConfig(**CONFIG))
    assert type(AutoConfig.for_model("openxlstm", **CONFIG)) is oxhf.xLSTMConfig


# Tier B: patching


PATCHED = Kit(
    config=transformers.xLSTMConfig,
    build=AutoModelForCausalLM.from_config,
    module=oxhf,
    tensors=tensors,
    read=read,
)
MENDED_BELOW_THE_HEAD = ["01", "02", "04", "05", "06", "07", "08", "10", "11", "15", "16", "17", "22"]


@pytest.mark.parametrize("number", MENDED_BELOW_THE_HEAD)
@pytest.mark.usefixtures("patched")
def test_a_patched_backbone_is_free_of_defect(number: str) -> None:
    CHECKS[number](PATCHED)


@pytest.mark.usefixtures("patched")
def test_patching_replaces_the_backbone_where_others_load(tmp_path: Path) -> None:
    in_tree_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model) is modeling_xlstm.xLSTMForCausalLM
    assert isinstance(model.backbone, oxhf.xLSTMModel)
    want = in_tree_model()(text(), use_cache=False).logits
    close(model(text()).logits, want, rtol=1e-5, atol=5e-5)
    model.save_pretrained(tmp_path / "again")
    again = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "again").eval()
    close(again(text()).logits, want, rtol=1e-5, atol=5e-5)
    beams = GREEDY | {"num_beams": 2}
    assert torch.equal(model.generate(text(), **beams), model.generate(text(), use_cache=False, **beams))
    assert type(in_tree_model().backbone) is modeling_xlstm.xLSTMModel  # a plain constructor call is not touched


def test_unpatching_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    in_tree_file(tmp_path)
    original = modeling_xlstm.xLSTMModel
    oxhf.patch_transformers()
    oxhf.patch_transformers()
    oxhf.unpatch_transformers()
    oxhf.unpatch_transformers()
    assert modeling_xlstm.xLSTMModel is original is transformers.xLSTMModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path).backbone) is original


def test_a_load_that_fails_leaves_transformers_as_it_was() -> None:
    """transformers does not: it puts originals back only behind a constructor that returns."""
    original = modeling_xlstm.xLSTMModel
    oxhf.patch_transformers()
    with pytest.raises(ValueError, match="use_bias is true"):
        AutoModelForCausalLM.from_config(transformers.xLSTMConfig(**CONFIG, use_bias=True))
    assert modeling_xlstm.xLSTMModel is original
    with pytest.raises(TypeError):  # a failure that is not ours stays until the undoing
        AutoModelForCausalLM.from_config(transformers.xLSTMConfig(**CONFIG), no_such_argument=1)
    oxhf.unpatch_transformers()
    assert modeling_xlstm.xLSTMModel is original is transformers.xLSTMModel


def test_only_the_backbone_matches_the_pattern() -> None:
    from openxlstm.hf.takeover import PATTERN

    names = [name for name in dir(modeling_xlstm) if monkey_patching._compile_pattern(PATTERN).search(name)]
    assert names == ["xLSTMModel"]


@pytest.mark.slow
def test_importing_us_changes_nothing_of_theirs() -> None:
    code = (
        "import sys, transformers, openxlstm.hf; from transformers import AutoConfig; "
        "print('transformers.models.xlstm.modeling_xlstm' in sys.modules, "
        "type(AutoConfig.for_model('xlstm')).__module__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "transformers.models.xlstm.configuration_xlstm"]
