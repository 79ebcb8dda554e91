"""The thirty defects of transformers' in-tree xLSTM (5.23.0), as what a model must do instead.

A check takes a `Kit`: how a model of some origin is made. It raises where the model has the defect. `huggingface.md`
numbers them; the numbers are the names here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "chunk_size": 16,
}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
close = torch.testing.assert_close


@dataclass(frozen=True)
class Kit:
    """One origin of models."""

    config: type  # of its configs
    build: Callable[[Any], nn.Module]  # a language model from a config
    module: Any  # where its classes live
    tensors: Callable[[Any], list[Tensor]]  # everything that a cache holds
    read: Callable[[Any], int]  # how many tokens a cache says it has read

    def fresh(self, **changes: Any) -> Any:
        """A model as its own initialisation leaves it."""
        torch.manual_seed(0)
        return self.build(self.config(**{**CONFIG, **changes})).eval()

    def new(self, **changes: Any) -> Any:
        """With large random matrices: the in-tree initialisation hides errors (24)."""
        model = self.fresh(**changes)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        return model


def text(length: int = 20) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 64, (1, length))


def padded(x: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    ids = nn.functional.pad(x, (left, right), value=1)
    return ids, (ids != 1).long()


def check_01_padding_changes_nothing(kit: Kit) -> None:
    m, x = kit.new(), text()
    want = m(x).logits
    for left, right in ((5, 0), (0, 5), (2, 3)):
        ids, mask = padded(x, left, right)
        close(m(ids, attention_mask=mask).logits[:, left : left + 20], want, rtol=1e-4, atol=1e-4)
    middle = torch.cat((x[:, :7], torch.ones(1, 4, dtype=torch.long), x[:, 7:]), 1)
    close(m(middle, attention_mask=(middle != 1).long()).logits[:, 11:], want[:, 7:], rtol=1e-4, atol=1e-4)
    ids, mask = padded(x, 5, 0)
    assert torch.equal(m.generate(ids, attention_mask=mask, **GREEDY)[:, 5:], m.generate(x, **GREEDY))


def check_02_packed_is_separate(kit: Kit) -> None:
    m, x = kit.new(), text()
    for how in ({"cu_seq_lens_q": torch.tensor([0, 20, 40])}, {"position_ids": torch.arange(20).repeat(2)[None]}):
        close(m(torch.cat((x, x), 1), **how).logits[:, 20:], m(x).logits, rtol=1e-4, atol=1e-4)


def check_03_beam_search_equals_the_one_without_a_cache(kit: Kit) -> None:
    m, x = kit.new(), text()
    beams = GREEDY | {"num_beams": 2}
    assert torch.equal(m.generate(x, **beams), m.generate(x, use_cache=False, **beams))


def check_04_half_precision_runs_without_a_cache(kit: Kit) -> None:
    m, x = kit.new(), text()
    want = m(x).logits
    for dtype in (torch.bfloat16, torch.float16):
        for use in (False, True):
            got = copy.deepcopy(m).to(dtype)(x, use_cache=use).logits.float()
            assert (got - want).norm() < 0.1 * want.norm(), (dtype, use)


def check_05_pure_half_precision_trains(kit: Kit) -> None:
    m, x = kit.new().bfloat16().train(), text()
    m(x, labels=x, use_cache=False).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())


def check_06_the_default_call_trains(kit: Kit) -> None:
    m, x = kit.new().train(), text()
    m(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in m.parameters())


def check_07_no_mode_breaks_training(kit: Kit) -> None:
    x = text(16)
    for mode in ("train", "train_with_padding"):
        kit.new(mode=mode, return_last_states=False).train()(x, labels=x).loss.backward()


def check_08_any_length(kit: Kit) -> None:
    m = kit.new(mode="train")
    for length in (1, 15, 16, 17, 20):
        assert m(text(length)).logits.shape == (1, length, 64)


def check_09_a_config_of_fused_weights_builds(kit: Kit) -> None:
    assert kit.new(weight_mode="fused")(text()).logits.shape == (1, 20, 64)


def check_10_states_are_fp32_in_a_half_precision_model(kit: Kit) -> None:
    cache = kit.new().bfloat16()(text()).cache_params
    assert all(tensor.dtype == torch.float32 for tensor in kit.tensors(cache))


def _with_a_small_chunk(m: Any) -> Any:
    q = copy.deepcopy(m)
    q.config.max_inference_chunksize = 16
    return q


def check_11_a_long_text_takes_the_same_path(kit: Kit) -> None:
    m, x = kit.new(), text()
    close(_with_a_small_chunk(m)(x, use_cache=False).logits, m(x, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def check_12_gradients_do_not_depend_on_the_length(kit: Kit) -> None:
    q = _with_a_small_chunk(kit.new())
    q(text(), use_cache=False).logits.sum().backward()
    assert q.backbone.blocks[0].ffn.proj_up.weight.grad is not None


def check_13_logits_to_keep(kit: Kit) -> None:
    m, x = kit.new(), text()
    whole = m(x).logits
    close(m(x, logits_to_keep=1).logits, whole[:, -1:])
    close(m(x, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])
    close(m(x, logits_to_keep=torch.tensor([[2, 5]])).logits, whole[:, [2, 5]])
    close(m(x, logits_to_keep=torch.arange(20)[None] > 15).logits, whole[0, 16:])


def check_14_generation_goes_on_from_a_state(kit: Kit) -> None:
    m, x = kit.new(), text()
    assert torch.equal(m.generate(x, cache_params=m(x[:, :-1]).cache_params, **GREEDY), m.generate(x, **GREEDY))


def check_15_a_cache_can_be_copied(kit: Kit) -> None:
    cache = kit.new()(text()).cache_params
    assert all(torch.equal(a, b) for a, b in zip(kit.tensors(copy.deepcopy(cache)), kit.tensors(cache), strict=True))


def check_16_tensors_of_the_caller_are_not_written(kit: Kit) -> None:
    m, x = kit.new(), text()
    cache = m(x).cache_params
    held = kit.tensors(cache)
    bits = [tensor.clone() for tensor in held]
    m(x, cache_params=cache)
    assert all(torch.equal(a, b) for a, b in zip(held, bits, strict=True))


def check_17_reset_is_a_new_cache(kit: Kit) -> None:
    cache = kit.new()(text()).cache_params
    cache.reset()
    assert kit.read(cache) == 0


def check_18_prompt_lookup_is_refused_with_the_reason(kit: Kit) -> None:
    with pytest.raises(ValueError, match="cannot forget"):
        kit.new().generate(text(), prompt_lookup_num_tokens=2, **GREEDY)


def check_19_paged_batching_is_refused_with_the_way_out(kit: Kit) -> None:
    with pytest.raises(ValueError, match="openxlstm.generate"):
        kit.new().generate_batch([[3, 4], [5]])


def check_20_a_prompt_in_chunks(kit: Kit) -> None:
    m, x = kit.new(), text()
    assert torch.equal(m.generate(x, prefill_chunk_size=8, **GREEDY), m.generate(x, **GREEDY))


def check_21_two_names_of_one_fact_agree(kit: Kit) -> None:
    config = kit.config(embedding_dim=256, num_blocks=2)
    assert (config.hidden_size, config.num_hidden_layers) == (256, 2)
    with pytest.raises(ValueError, match="contradicts"):
        kit.config(embedding_dim=256, hidden_size=128)


def check_22_any_width_that_heads_divide(kit: Kit) -> None:
    for width in (96, 64, 80):
        assert kit.new(hidden_size=width, num_heads=1)(text()).logits.shape == (1, 20, 64)


def check_23_tied_embeddings_are_tied(kit: Kit) -> None:
    m = kit.new(tie_word_embeddings=True)
    assert m.lm_head.weight is m.get_input_embeddings().weight


def check_24_the_published_initialisation(kit: Kit) -> None:
    block = kit.fresh().backbone.blocks[0]
    small, residual = (2 / (5 * 128)) ** 0.5, 2 / (2 * 128**0.5)
    layer = block.mlstm_layer
    for part in (block.ffn.proj_up_gate, block.ffn.proj_up, layer.q, layer.k, layer.v):
        close(part.weight.std(), torch.tensor(small), rtol=0.05, atol=0)
    for part in (block.ffn.proj_down, layer.out_proj):
        close(part.weight.std(), torch.tensor(residual), rtol=0.05, atol=0)
    assert layer.ogate_preact.weight.abs().max() == 0
    close(layer.igate_preact.bias, torch.full((2,), -10.0))
    close(layer.fgate_preact.bias, torch.tensor([3.0, 6.0]))


def check_25_heads_exist(kit: Kit) -> None:
    from transformers import AutoModelForSequenceClassification

    head = AutoModelForSequenceClassification.from_config(kit.config(**CONFIG))
    assert head(text()).logits.shape == (1, 2)


def check_26_an_unknown_keyword_is_said(kit: Kit) -> None:
    m, said = kit.new(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        for _ in range(2):
            m(text(), not_an_argument=1)
    finally:
        root.removeHandler(handler)
    assert len([line for line in said if "not_an_argument" in line]) == 1


def check_27_a_config_of_custom_code_is_refused(kit: Kit) -> None:
    with pytest.raises(ValueError, match="xlstm_cfg"):
        kit.config(xlstm_cfg={"num_blocks": 4})


def check_28_the_cache_class_is_public(kit: Kit) -> None:
    assert kit.module.xLSTMCache


def check_29_a_field_means_something_or_does_not_exist(kit: Kit) -> None:
    for field in ({"add_out_norm": False}, {"use_bias": True}):
        with pytest.raises(ValueError, match=next(iter(field))):
            kit.config(**CONFIG | field)


class _Count(TorchDispatchMode):
    """How many operations a call runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def check_30_one_token_less_than_a_chunk_costs_no_more(kit: Kit) -> None:
    m, counts = kit.new(chunk_size=64), []
    for length in (63, 64, 65):
        with torch.no_grad(), _Count() as count:
            m(text(length))
        counts.append(count.calls)
    assert max(counts) < 1.5 * counts[1], counts


CHECKS = {name[6:8]: check for name, check in sorted(globals().items()) if name.startswith("check_")}
