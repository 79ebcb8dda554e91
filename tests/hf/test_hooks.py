"""The private parts of transformers that openxlstm.hf leans on, each by name, so that an upgrade fails with a name."""

from __future__ import annotations

import inspect

import torch
import transformers
from hf.tiny_hf import GREEDY, build, text
from transformers import GenerationMixin, PreTrainedModel, cache_utils, core_model_loading, monkey_patching

import openxlstm.hf as oxhf


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_prepare_cache_for_generation_is_called_with_what_we_take() -> None:
    ours, theirs = oxhf.xLSTMForCausalLM._prepare_cache_for_generation, GenerationMixin._prepare_cache_for_generation
    assert parameters(ours) == parameters(theirs)
    assert "_prepare_cache_for_generation" in inspect.getsource(GenerationMixin.generate)


def test_prefill_is_called_with_what_we_take() -> None:
    assert parameters(oxhf.xLSTMForCausalLM._prefill) == parameters(GenerationMixin._prefill)
    for search in (GenerationMixin._sample, GenerationMixin._beam_search):
        assert "self._prefill(" in inspect.getsource(search)


def test_prefill_slices_by_get_seq_length_and_the_length_of_the_mask() -> None:
    source = inspect.getsource(GenerationMixin._prefill)
    assert "cache.get_seq_length()" in source
    assert "_mask_length" in source
    assert "_mask_length" in inspect.getsource(GenerationMixin.generate)


def test_prepare_inputs_for_generation_takes_what_we_pass_on() -> None:
    ours = parameters(oxhf.xLSTMForCausalLM.prepare_inputs_for_generation)
    assert ours == parameters(GenerationMixin.prepare_inputs_for_generation)


def test_validate_generation_mode_refuses_in_our_words() -> None:
    ours, theirs = oxhf.xLSTMForCausalLM._validate_generation_mode, GenerationMixin._validate_generation_mode
    assert parameters(ours) == parameters(theirs)


def test_supports_default_dynamic_cache_is_asked() -> None:
    assert not oxhf.xLSTMForCausalLM._supports_default_dynamic_cache()
    assert not transformers.xLSTMForCausalLM._supports_default_dynamic_cache(), "excluded by its name"


def test_create_masks_for_generate_is_looked_up_on_the_model() -> None:
    source = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    assert 'getattr(self, "create_masks_for_generate"' in source
    mask = torch.ones(2, 5)
    assert build("large").create_masks_for_generate(None, torch.ones(2, 5, 0), mask, None, position_ids=None) is mask


def test_linear_attention_cache_layer_mixin_is_the_base_of_our_layer() -> None:
    layer = oxhf.StateLayer()
    assert isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin)
    for name in (
        "has_previous_state",
        "device",
        "record_past",
        "is_compileable",
        "is_croppable",
        "supports_early_init",
    ):
        assert hasattr(layer, name), name
    missing = oxhf.StateLayer.__abstractmethods__
    assert not missing, f"new abstract methods: {sorted(missing)}"


def test_every_method_of_cache_has_an_answer() -> None:
    """What Cache does with layers in general would raise for ours; a new method needs a decision."""
    known = {
        "early_initialization", "get_conv_state", "get_recurrent_state", "get_query_offset", "is_recording_past",
        "update", "update_conv_state", "update_indexer", "update_recurrent_state", "activate_past_recording",
    }  # fmt: skip
    public = {name for name, member in vars(cache_utils.Cache).items() if inspect.isfunction(member) and name[0] != "_"}
    assert not public - known - vars(oxhf.xLSTMCache).keys()


def test_is_user_defined_marks_a_cache_of_the_caller() -> None:
    cache = oxhf.xLSTMCache()
    build("large").generate(text(1, 4), past_key_values=cache, **GREEDY)
    assert cache._is_user_defined
    assert "_is_user_defined" in inspect.getsource(GenerationMixin)


def test_deferred_stopping_leaves_caches_alone_that_cannot_be_cropped() -> None:
    from transformers.generation.utils import DeferredStopCheck

    cache = build("large")(text(1, 4)).past_key_values
    assert not DeferredStopCheck.is_supported(torch.device("mps"), cache, True, False)


def test_initialize_weights_gives_modules_to_init_weights() -> None:
    assert parameters(PreTrainedModel._initialize_weights) == ["self", "module", "is_custom_code"]
    assert "is_custom_code" in inspect.getsource(PreTrainedModel.initialize_weights)


def test_set_gradient_checkpointing_takes_what_we_pass_on() -> None:
    ours = parameters(oxhf.xLSTMModel._set_gradient_checkpointing)
    assert ours == parameters(PreTrainedModel._set_gradient_checkpointing)


def test_register_patch_mapping_and_split_exist() -> None:
    assert callable(monkey_patching.register_patch_mapping)
    assert core_model_loading.Split


def test_save_original_format_is_an_option_that_we_turn_off() -> None:
    assert inspect.signature(PreTrainedModel.save_pretrained).parameters["save_original_format"].default is True
    ours = inspect.signature(oxhf.xLSTMForCausalLM.save_pretrained).parameters["save_original_format"]
    assert ours.default is False


def test_generate_reads_the_signature_of_forward() -> None:
    for name in ("attention_mask", "position_ids", "logits_to_keep", "past_key_values"):
        assert name in parameters(oxhf.xLSTMForCausalLM.forward)
        assert name in parameters(build("large").forward)


def test_auto_classes_give_ours_for_our_model_type_and_theirs_for_theirs() -> None:
    ours, theirs = build("large").config, transformers.xLSTMConfig(num_hidden_layers=1, hidden_size=64, vocab_size=9)
    for auto, cls in (
        (transformers.AutoModel, oxhf.xLSTMModel),
        (transformers.AutoModelForCausalLM, oxhf.xLSTMForCausalLM),
        (transformers.AutoModelForSequenceClassification, oxhf.xLSTMForSequenceClassification),
        (transformers.AutoModelForTokenClassification, oxhf.xLSTMForTokenClassification),
    ):
        assert type(auto.from_config(ours)) is cls
    assert type(transformers.AutoModelForCausalLM.from_config(theirs)) is transformers.xLSTMForCausalLM
    assert type(transformers.AutoConfig.for_model("xlstm")) is transformers.xLSTMConfig
