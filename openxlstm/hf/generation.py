"""What `generate` asks of a model that remembers a state instead of keys and values.

The library was written for caches that grow with the text. Five of its hooks are answered here: making the cache,
the first pass, the inputs of each step, masks, and the modes that need a cache which can be shortened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from openxlstm.hf import inputs
from openxlstm.hf.cache import ABSENT, xLSTMCache

REMEDIES = (
    "pass the whole text with the tokens that the state has read, or past_key_values=cache.detach_prefix() with new "
    "tokens only"
)


class StatefulGeneration(GenerationMixin):
    """`generate` with a state of constant size: greedy, sampling, beams, from any state, in chunks."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a DynamicCache holds keys and values

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Any, **kwargs: Any
    ) -> Tensor | None:
        """The mask as it is: a recurrent model has no mask between pairs of tokens."""
        return attention_mask

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted generation (an assistant_model, prompt_lookup_num_tokens) takes rejected tokens back, and a "
                "recurrent state cannot forget; generate without it"
            )
        mode = generation_mode, generation_config, generation_mode_kwargs
        super()._validate_generation_mode(*mode)  # type: ignore[misc]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the library's continuous batching pages keys and values, of which there are none."""
        raise ValueError(
            "continuous batching of transformers pages keys and values, and this model has none; use generate() with "
            "left padding, or openxlstm.generate(model.native(), ...)"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as `generate_batch`."""
        return self.generate_batch()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put an xLSTMCache of the right number of rows into `model_kwargs`: the caller's, or an empty one."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the state of this model has one "
                f"size whatever the length of the text, so there is nothing to make static, quantised or offloaded; "
                f"leave it out (cache.offload() moves a state to the host)"
            )
        cache = inputs.read_cache(model_kwargs.get("past_key_values"), model_kwargs.pop("cache_params", None))
        if generation_config.use_cache is False:
            if cache is not None:
                raise ValueError(
                    "use_cache=False reads the whole text at every step, so no past_key_values can be continued"
                )
            return
        if cache is None:
            cache = xLSTMCache()
        else:
            cache._is_user_defined = True
            _expand(cache, batch_size, max(generation_config.num_beams, generation_config.num_return_sequences))
        cache.ends = None
        model_kwargs["past_key_values"] = cache

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            mask = model_kwargs.get("attention_mask")
            columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if cache.get_seq_length() and model_kwargs.get("inputs_embeds") is None and columns == input_ids.shape[1]:
                _check_continuation(input_ids, cache)
            if generation_config._eos_token_tensor is not None and input_ids.shape[0] > 1:
                cache.ends = generation_config._eos_token_tensor, input_ids.shape[1]
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc,arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: xLSTMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; and a row that has ended reads no more of the padding that fills it up.

        The library feeds that padding as if it were text. Keys of it can be masked later; a state has read it.
        """
        if past_key_values is not None and past_key_values.ends is not None and not is_first_iteration:
            ids, first = past_key_values.ends
            ended = torch.isin(input_ids[:, first:-1], ids.to(input_ids.device)).any(dim=1)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            last = attention_mask[:, -1] * (~ended).to(attention_mask.dtype)
            attention_mask = torch.cat((attention_mask[:, :-1], last[:, None]), dim=1)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _expand(cache: xLSTMCache, batch: int, copies: int) -> None:
    """A row of the state for each row of the search: broadcasting would hide a mistake."""
    rows, wanted = cache.batch_size, batch * copies
    if rows in (-1, wanted):
        return
    if rows not in (1, batch):
        raise ValueError(
            f"past_key_values has {rows} rows, and {batch} prompts x {copies} beams or sequences need 1, {batch} or "
            f"{wanted}; cache.batch_select_indices(rows) picks rows"
        )
    cache.batch_repeat_interleave(wanted // rows)


def _check_continuation(input_ids: Tensor, cache: xLSTMCache) -> None:
    """The ids are the whole text, so they begin with what the state has read and go on.

    Raises:
        ValueError: they do not.
    """
    read = cache.get_seq_length()
    if input_ids.shape[1] <= read:
        raise ValueError(
            f"the state has read {read} tokens and input_ids has {input_ids.shape[1]}, so nothing new is left; "
            f"{REMEDIES}"
        )
    if cache.ids is None:
        return
    old = cache.ids.to(input_ids.device)
    differs = (old != input_ids[:, :read]) & (old != ABSENT)
    if bool(differs.any()):
        b, t = (int(index) for index in differs.nonzero()[0])
        raise ValueError(
            f"input_ids[{b}, {t}] is {int(input_ids[b, t])}, and the state has read {int(old[b, t])} there; the "
            f"library would drop the first {read} of these ids as already read: {REMEDIES}"
        )
