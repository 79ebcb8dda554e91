"""Other architectures behind the interface of our language models, so that one loop trains and measures all of them.

A baseline is the implementation of transformers, unchanged. What is ours is the border: documents of a packed row do
not see each other, and what has been read can be carried on from. It is trained, evaluated and sampled as our models
are; it is no model of this library, so its files are those of transformers.

B batch, T time, S tokens seen so far and now, D width, W vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig as HuggingFaceLlamaConfig
from transformers import LlamaForCausalLM

from openxlstm.cells import State
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, Unit, decay_groups


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A Llama: pre-norm blocks of causal attention with rotary positions, and gated feed-forward layers.

    `kv_heads` below `heads` shares keys and values among heads. There is no limit of length; what the model makes of
    positions that it was not trained on is another matter.
    """

    vocab_size: int
    width: int
    blocks: int
    heads: int
    ffn_width: int
    kv_heads: int | None = None  # None: as many as heads
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        where = "LlamaConfig"
        for name in ("vocab_size", "width", "blocks", "heads", "ffn_width", "KV"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name}={getattr(self, name)} must be at least 1")
        checks.check_multiple(where, "width", self.width, heads=self.heads)
        if self.heads % self.KV:
            raise ValueError(f"{where}: kv_heads={self.KV} must divide heads={self.heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"{where}: rotary positions need an even head width; {self.width} / {self.heads} is odd")

    @property
    def KV(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def label(self) -> str:
        """The architecture and its number of blocks."""
        return f"Llama, {self.blocks} block{'s' if self.blocks > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self) | {"kv_heads": self.KV}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LlamaConfig:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(LlamaConfig, data, "LlamaConfig")

    def count_parameters(self) -> int:
        """Every number that training can change; a tied head counts once."""
        ends = self.vocab_size * self.width * (1 if self.tie_embeddings else 2) + self.width
        return ends + self.blocks * (self._matrices() + 2 * self.width)

    def flops_per_token(self) -> int:
        """Of a forward pass, 2 per weight of every matrix. Attention's own products grow with the context: left out."""
        return 2 * (self.vocab_size * self.width + self.blocks * self._matrices())

    def state_bytes(self) -> int:
        """Bytes of keys and values in fp32, per token that was read: unlike an xLSTM's, the memory grows."""
        return 4 * self.blocks * 2 * self.KV * (self.width // self.heads)

    def _matrices(self) -> int:
        D, shared = self.width, self.KV * (self.width // self.heads)
        return 2 * D * D + 2 * D * shared + 3 * D * self.ffn_width


@dataclass(frozen=True, slots=True)
class History(State):
    """All that was read: an attention model remembers nothing less. `begins` and `exists` are `reset` and `mask`."""

    tokens: Tensor  # int64 [B, S]
    begins: Tensor  # bool [B, S]
    exists: Tensor  # bool [B, S]


@final
class Llama(nn.Module):
    """transformers' LlamaForCausalLM as a `LanguageModel`.

    A call with a state reads the whole history again: right, and slow. It is here to be compared with, not to serve.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every = 0
        self.network = LlamaForCausalLM(
            HuggingFaceLlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.ffn_width,
                num_hidden_layers=config.blocks,
                num_attention_heads=config.heads,
                num_key_value_heads=config.KV,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_embeddings,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.network.set_attn_implementation("sdpa")

    def empty_state(self, batch: int) -> ModelState:
        """Nothing read yet, for `batch` sequences."""
        device = self.network.lm_head.weight.device
        nothing = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return ModelState((History(nothing.long(), nothing, nothing),))

    def features(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """What the head reads, of the new tokens only."""
        checks.check_tokens(tokens, self.config.vocab_size, reset, mask)
        begins = torch.zeros_like(tokens, dtype=torch.bool) if reset is None else reset
        exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        history = History(torch.where(exists, tokens, 0), begins, exists)
        if state is not None:
            (before,) = state.blocks
            assert isinstance(before, History), "the state of another architecture"
            pairs = zip(before.tensors(), history.tensors(), strict=True)
            history = History(*(torch.cat(pair, dim=1) for pair in pairs))
        if self.checkpoint_every and self.training:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        visible_BSS, positions_BS = _documents(history)
        out = self.network.model(
            input_ids=history.tokens, attention_mask=visible_BSS[:, None], position_ids=positions_BS, use_cache=False
        )
        return out.last_hidden_state[:, history.tokens.shape[1] - tokens.shape[1] :], ModelState((history,))

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]:
        """What `logits` multiplies by; there is no soft cap."""
        return self.network.lm_head.weight, None

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, in fp32 (fp64)."""
        scores = F.linear(hidden, self.network.lm_head.weight)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T W"], ModelState]:
        """Scores of every next token, and what was read. The contract of `interface` holds."""
        hidden, state = self.features(tokens, state, reset=reset, mask=mask)
        return self.logits(hidden), state

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As ours: weight decay on every matrix but the embedding."""
        embedding = self.network.model.embed_tokens.weight
        kept = [p for p in self.parameters() if p.ndim == 1 or p is embedding]
        return decay_groups([p for p in self.parameters() if p.ndim > 1 and p is not embedding], kept, weight_decay)

    def units(self) -> list[Unit]:
        """The blocks, first to last; norms are islands of fp32."""
        return [
            Unit(layer, [part for part in layer.modules() if isinstance(part, nn.Linear)])
            for layer in self.network.model.layers
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of transformers: its Auto classes read them."""
        self.network.save_pretrained(folder)


def _documents(history: History) -> tuple[Bool[Tensor, "B S S"], Int[Tensor, "B S"]]:
    """Who sees whom, and where in its document a token stands. A token that does not exist sees only itself."""
    document_BS = history.begins.cumsum(1)
    S = document_BS.shape[1]
    causal_SS = torch.ones(S, S, dtype=torch.bool, device=document_BS.device).tril()
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    itself_SS = torch.eye(S, dtype=torch.bool, device=document_BS.device)
    visible_BSS = (same_BSS & causal_SS & history.exists[:, None, :]) | itself_SS
    count_BS = history.exists.cumsum(1)
    start_BS = torch.where(history.begins, count_BS - history.exists.long(), 0).cummax(1).values
    return visible_BSS, (count_BS - 1 - start_BS).clamp(min=0)
