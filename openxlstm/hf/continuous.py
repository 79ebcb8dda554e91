"""The blocks of a Llama without vocabulary: [B, T, D] in, [B, T, D] out, for sequences of numbers.

B batch, T time, S places read so far and now, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import LlamaModel

from openxlstm.cells import State
from openxlstm.hf.baselines import LlamaConfig, transformers_config, visible_and_positions
from openxlstm.hf.compared import read_on
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, decay_matrices


@dataclass(frozen=True, slots=True)
class InputHistory(State):
    """All that was read. `begins` and `exists` are `reset` and `mask`."""

    x: Tensor  # [B, S, D]
    begins: Tensor  # bool [B, S]
    exists: Tensor  # bool [B, S]


@final
class LlamaStack(nn.Module):
    """The blocks of transformers' Llama and the norm behind them. A state is all that was read, and is read again."""

    def __init__(self, width: int, blocks: int, *, heads: int, ffn_width: int) -> None:
        super().__init__()
        self.width = width
        config = LlamaConfig(vocab_size=1, width=width, blocks=blocks, heads=heads, ffn_width=ffn_width)
        self.network = LlamaModel(transformers_config(config))
        self.network.set_attn_implementation("sdpa")
        del self.network.embed_tokens  # no token is ever looked up

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """All blocks, then the norm. The contract of `interface` holds."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"x must be [batch, time, {self.width}]; got {list(x.shape)}")
        B, T, _ = x.shape
        checks.check_flag("reset", reset, B, T)
        checks.check_flag("mask", mask, B, T)
        nothing = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        exists = ~nothing if mask is None else mask
        history = InputHistory(torch.where(exists[..., None], x, 0.0), nothing if reset is None else reset, exists)
        history = read_on(state, history)
        if not history.x.shape[1]:
            return x, ModelState((history,))
        visible_BSS, positions_BS = visible_and_positions(history.begins, history.exists)
        out = self.network(
            inputs_embeds=history.x, attention_mask=visible_BSS[:, None], position_ids=positions_BS, use_cache=False
        )
        return out.last_hidden_state[:, history.x.shape[1] - T :], ModelState((history,))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on every matrix."""
        return decay_matrices(self.parameters(), weight_decay)
