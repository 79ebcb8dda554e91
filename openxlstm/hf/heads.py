"""Classification of sequences and of tokens on the backbone.

B batch, T time, D model width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from openxlstm.hf import inputs
from openxlstm.hf.config import xLSTMConfig
from openxlstm.hf.modeling import xLSTMModel, xLSTMPreTrainedModel


class xLSTMForSequenceClassification(xLSTMPreTrainedModel):
    """One score per class for a sequence, read from its last token."""

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.backbone = xLSTMModel(config)
        self.score = nn.Linear(config.native().width, self.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores [B, C], and the loss of `labels` [B] (regression for one class, or [B, C] for several at once).

        The last token is the last that the mask keeps; without a mask, the last that is not `config.pad_token_id`.
        """
        outputs = self.backbone(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        last = self._last_token(input_ids, attention_mask, hidden)
        scores = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=scores, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=scores, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _last_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
        """[B], the column of the last token that exists."""
        batch, time, _ = hidden.shape
        exists = inputs.read_mask(attention_mask, batch, time)
        if attention_mask is None and batch > 1:
            pad = self.config.pad_token_id
            if pad is None or input_ids is None:
                raise ValueError(
                    f"where do the {batch} sequences end? Pass attention_mask, or set config.pad_token_id "
                    f"and pass input_ids"
                )
            exists = input_ids != pad
        if exists is None:
            return torch.full((batch,), time - 1, device=hidden.device)
        columns = torch.arange(time, device=hidden.device)
        return torch.where(exists.to(hidden.device), columns, 0).amax(dim=1)


class xLSTMForTokenClassification(xLSTMPreTrainedModel):
    """One score per class for every token; each token has seen those before it only."""

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.backbone = xLSTMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.native().width, self.num_labels)
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
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Scores [B, T, C], and the loss of `labels` [B, T] (-100 is not counted)."""
        outputs = self.backbone(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        scores = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(scores, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=scores, hidden_states=outputs.hidden_states)
