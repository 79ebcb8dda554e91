"""xLSTMModel and xLSTMForCausalLM: our blocks behind the arguments of transformers. No second copy of the mathematics.

The backbone holds the native blocks themselves, so tensor names are those of the native block behind
`backbone.blocks.N.`, for the large architecture the names of the published files and of the in-tree class. Every
module that owns a weight is called, so adapters, quantisers and offloading hooks work on any of them.

B batch, T time, D model width, W vocabulary.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from openxlstm.cells import State
from openxlstm.hf import in_tree, inputs
from openxlstm.hf.cache import xLSTMCache
from openxlstm.hf.config import xLSTMConfig
from openxlstm.hf.generation import StatefulGeneration
from openxlstm.models import checks, xlstm, xlstm_large
from openxlstm.models.interface import ModelState, state_shapes
from openxlstm.models.xlstm import xLSTM
from openxlstm.models.xlstm_large import xLSTMLarge
from openxlstm.nn.functional import soft_cap, widened
from openxlstm.nn.init import init_leaf
from openxlstm.nn.linear import Embedding, Linear
from openxlstm.nn.norm import LayerNorm, RMSNorm

logger = logging.get_logger(__name__)

BLOCKS = (xlstm_large.mLSTMBlock, xlstm.mLSTMBlock, xlstm.sLSTMBlock)
GATES = ["igate_preact", "fgate_preact", "gate_i", "gate_f"]  # stay fp32: the 7B was trained so
CACHES = ["past_key_values", "cache_params"]  # not moved between devices: every state lives with its block
RECORDED: dict[str, Any] = {"hidden_states": list(BLOCKS)}
TIED = {"lm_head.weight": "backbone.embeddings.weight"}
PASSED_ON = {  # keywords that other models read and ours may be given
    *TransformersKwargs.__optional_keys__, "return_dict", "shift_labels", "ignore_index", "logits_to_keep",
}  # fmt: skip


@no_type_check  # in tests: accelerate makes one from a dict in place of its first field
class Output(BaseModelOutputWithPast):
    """Of the backbone. `cache_params` is another name of `past_key_values`, for reading."""

    @property
    def cache_params(self) -> Cache | None:
        """The in-tree name of the cache."""
        return self.past_key_values


@no_type_check  # as above
class CausalLMOutput(CausalLMOutputWithPast):
    """Of the language model. `cache_params` is another name of `past_key_values`, for reading."""

    @property
    def cache_params(self) -> Cache | None:
        """The in-tree name of the cache."""
        return self.past_key_values


class xLSTMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, as transformers asks for them."""

    config_class = xLSTMConfig
    base_model_prefix = "backbone"
    _input_embed_layer = "embeddings"
    _no_split_modules = sorted({block.__name__ for block in BLOCKS})
    _skip_keys_device_placement = CACHES
    _keep_in_fp32_modules_strict = GATES
    _can_record_outputs = RECORDED
    _is_stateful = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The native tables: leaves by their kind, then each block by the roles of its weights."""
        loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        kept = [p.detach().clone() for p in loaded]
        if isinstance(module, BLOCKS):
            native = self.config.native()
            module.init_roles(native.width, self.config.blocks)
        else:
            init_leaf(module, self.config.width)
        for parameter, value in zip(loaded, kept, strict=True):
            parameter.copy_(value)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # "Custom code" is skipped where a module's own parameters are all loaded, and a block has none of its own
        super()._initialize_weights(module, is_custom_code=False)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for module in self.modules():
            if isinstance(module, xLSTMModel):
                module.checkpoint_every = every_n_layers if enable else 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that a file which does not fit is an error.

        Raises:
            ValueError: a tensor of the model is missing, or one in the file is unknown. A new head on a pretrained
                backbone, and a backbone from a file with a head, are meant.
        """
        if kwargs.get("gguf_file") is not None:
            raise ValueError(
                "transformers reads no xLSTM from GGUF files; give from_pretrained a folder of safetensors"
            )
        asked = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for kind, found in (("lacks", info["missing_keys"]), ("holds", info["unexpected_keys"])):
            if wrong := sorted(name for name in found if model.is_of_body(name)):
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                other = "so the model would be incomplete" if kind == "lacks" else "which this model has not"
                raise ValueError(f"{pretrained_model_name_or_path} {kind} {wrong[0]!r}{more}, {other}")
        return (model, info) if asked else model

    def is_of_body(self, name: str) -> bool:
        """Whether a checkpoint must hold this tensor: the backbone's, and the readout of a language model."""
        return not name.startswith(("lm_head.", "score."))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        layout: str | None = None,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; names are written as the model has them.

        Args:
            layout: "in-tree" writes what transformers' own xLSTM reads: `model_type: "xlstm"` and a head of its own.
                None: as the model's config says, in-tree for a model that was taken over from there.

        Raises:
            ValueError: there is no such layout, or the in-tree class has no such model.
        """
        if layout not in (None, "openxlstm", "in-tree"):
            raise ValueError(f'layout={layout!r} does not exist; there are "openxlstm" and "in-tree"')
        config: Any = self.config
        theirs = isinstance(config, in_tree.xLSTMConfig) if layout is None else layout == "in-tree"
        if theirs and config.tie_embeddings and isinstance(self, xLSTMForCausalLM):
            # The in-tree class does not tie, so the file repeats the embedding
            state = dict(kwargs.pop("state_dict", None) or self.state_dict())
            kwargs["state_dict"] = state | {"lm_head.weight": state["backbone.embeddings.weight"].clone()}
        try:
            self.config = in_tree.of_ours(config) if theirs else in_tree.as_ours(config)
            kwargs["save_original_format"] = save_original_format
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config


class xLSTMModel(xLSTMPreTrainedModel):
    """Embedding, blocks and the last norm, of either architecture."""

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        native = config.native()
        self.embeddings = Embedding(native.vocab_size, native.width)
        if isinstance(native, xlstm.xLSTMConfig):
            self.blocks = xlstm.build_blocks(native)
            self.out_norm: nn.Module = LayerNorm(native.width, native.norm_eps)
        else:
            self.blocks = nn.ModuleList(xlstm_large.mLSTMBlock(native) for _ in range(native.blocks))
            self.out_norm = RMSNorm(native.width, native.norm_eps)
        empty = [block.empty_state(1, "meta", torch.float32) for block in self.blocks if isinstance(block, BLOCKS)]
        self._state_shapes = state_shapes(ModelState(tuple(empty)))
        self.gradient_checkpointing = False
        self.checkpoint_every = 0  # n > 0: under gradient checkpointing, every n-th block is recomputed
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_params: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        """Hidden states [B, T, D] behind the last norm.

        Args:
            input_ids: [B, T]. Or
            inputs_embeds: [B, T, D].
            attention_mask: [B, >= T], 0 where a token does not exist; see `inputs`.
            past_key_values: the state to continue from; it is advanced if `use_cache`. Also called `cache_params`.
            use_cache: None: as the config says in evaluation, False in training.
            cu_seq_lens_q, seq_idx, position_ids: where documents of a packed row start; see `inputs`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        warn_of_unknown(kwargs)
        cache = inputs.read_cache(past_key_values, cache_params)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        batch, time = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        mask = inputs.read_mask(attention_mask, batch, time)
        reset = inputs.read_documents(
            cu_seq_lens_q, seq_idx, position_ids, attention_mask,
            batch=batch, time=time, continued=cache is not None and cache.has_previous_state(),
        )  # fmt: skip
        x = self._embed(input_ids, inputs_embeds, mask)
        before = [None] * len(self.blocks) if cache is None else cache.states(len(self.blocks))
        held = tuple(state for state in before if state is not None)
        if held:
            one_device = not hasattr(self, "_hf_hook") and getattr(self, "hf_device_map", None) is None
            checks.check_state(ModelState(held), self._state_shapes, batch, x, one_device=one_device)

        after = []
        for index, block in enumerate(self.blocks):
            x, state = self._run(index, block, x, before[index], reset, mask)
            after.append(state)
        if use_cache:
            cache = xLSTMCache() if cache is None else cache
            cache.advance(after, time, None if input_ids is None else inputs.recorded(input_ids, mask))
        return Output(last_hidden_state=self.out_norm(x), past_key_values=cache if use_cache else None)

    def _embed(self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None) -> Float[Tensor, "B T D"]:
        """Hidden states before the first block, 0 where nothing exists, because 0 * NaN is NaN."""
        if ids is not None:
            checks.check_tokens(ids, self.embeddings.num_embeddings, None, mask)
            embeds = self.embeddings(ids if mask is None else torch.where(mask, ids, 0))
        assert embeds is not None, "one of the two is given"
        inputs.check_embeds(embeds, self.config.width)
        return embeds if mask is None else torch.where(mask[..., None], embeds, 0.0)

    def _run(
        self, index: int, block: nn.Module, x: Tensor, state: State | None, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """One block, recomputed in the backward pass if its turn has come."""
        every = self.checkpoint_every or 1
        if self.gradient_checkpointing and self.training and index % every == 0:
            return self._gradient_checkpointing_func(block.__call__, x, state, reset, mask)
        return block(x, state, reset, mask)


class xLSTMForCausalLM(xLSTMPreTrainedModel, StatefulGeneration, GenerationMixin):
    """A language model of either architecture."""

    _tied_weights_keys = TIED

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.backbone = xLSTMModel(config)
        native = config.native()
        self.lm_head = Linear(native.width, native.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache_params: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Scores of every next token [B, T, W], in fp32, and the loss if `labels` [B, T] are given.

        Labels are the tokens themselves (they are shifted inside); -100 is not counted, and neither is a token that
        nothing predicts: the first of a document, a padding column, one behind a padding column.

        Args:
            logits_to_keep: which positions to score; n: the last n, 0: all; or a tensor, see `slice_logits_to_keep`.

        The others are those of `xLSTMModel.forward`; further keywords go to the loss (`num_items_in_batch`).
        """
        warn_of_unknown(kwargs)
        outputs = self.backbone(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, cache_params=cache_params, cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx, **kwargs,
        )  # fmt: skip
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            batch, time = labels.shape
            if tuple(logits.shape[:-1]) != (batch, time):
                raise ValueError(
                    f"labels are {list(labels.shape)} and logits {list(logits.shape)}; leave logits_to_keep at 0"
                )
            mask = inputs.read_mask(attention_mask, batch, time)
            continued = past_key_values is not None or cache_params is not None
            reset = inputs.read_documents(
                cu_seq_lens_q, seq_idx, position_ids, attention_mask, batch=batch, time=time, continued=continued
            )
            kept = inputs.read_labels(labels, mask, reset)
            loss = self.loss_function(logits=logits, labels=kept, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, softly capped where the architecture says so, in fp32 (fp64)."""
        scores = widened(self.lm_head(hidden))
        cap = self.config.logit_soft_cap
        return scores if cap is None else soft_cap(scores, float(cap))

    def is_of_body(self, name: str) -> bool:
        """A language model needs its readout."""
        return not name.startswith("score.")

    @staticmethod
    def from_native(model: xLSTM | xLSTMLarge) -> xLSTMForCausalLM:
        """The same model for transformers; both share every tensor."""
        with torch.device("meta"):
            wrapped = xLSTMForCausalLM(xLSTMConfig.from_native(model.config))
        parts: tuple[nn.Module, nn.Module, nn.Module]
        if isinstance(model, xLSTM):
            parts, head = (model.embedding, model.stack.blocks, model.stack.norm), model.head
        else:
            body = model.backbone
            parts, head = (body.embeddings, body.blocks, body.out_norm), model.lm_head
        wrapped.backbone.embeddings, wrapped.backbone.blocks, wrapped.backbone.out_norm = parts
        if head is None:
            wrapped.lm_head.weight = parts[0].weight
        else:
            wrapped.lm_head = head
        return wrapped.train(model.training)

    def native(self) -> xLSTM | xLSTMLarge:
        """The same model for the rest of openxlstm (`ox.generate`, `ox.save`); both share every tensor."""
        native = self.config.native()
        parts = self.backbone.embeddings, self.backbone.blocks, self.backbone.out_norm
        head = None if native.tie_embeddings else self.lm_head
        model: Any
        with torch.device("meta"):
            model = xLSTM(native) if isinstance(native, xlstm.xLSTMConfig) else xLSTMLarge(native)
        if isinstance(native, xlstm.xLSTMConfig):
            model.embedding, model.stack.blocks, model.stack.norm = parts
            model.head = head
        else:
            model.backbone.embeddings, model.backbone.blocks, model.backbone.out_norm = parts
            model.lm_head = head
        return model.train(self.training)


def warn_of_unknown(kwargs: dict[str, Any]) -> None:
    """One warning per keyword that nothing reads, with the nearest that something does."""
    if torch.compiler.is_compiling():
        return
    for name in kwargs.keys() - PASSED_ON:
        known = PASSED_ON | inspect.signature(xLSTMForCausalLM.forward).parameters.keys()
        near = difflib.get_close_matches(name, sorted(known), n=1)
        logger.warning_once(f"an xLSTM does not read {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if kwargs.get("output_attentions"):
        logger.warning_once("an xLSTM has no attentions to return: a recurrent model keeps none")
