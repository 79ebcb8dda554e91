"""Llama behind the interface of our language models, so that one loop trains and measures both.

Touvron et al. 2023, arXiv:2302.13971; the implementation is `LlamaForCausalLM` of transformers. The recurrent
architectures that we compare with are in `recurrent_baselines`.

B batch, S tokens seen so far and now, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig as HuggingFaceLlamaConfig
from transformers import LlamaForCausalLM

from openxlstm.hf.compared import Compared, History
from openxlstm.models import checks


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


@final
class Llama(Compared):
    """transformers' LlamaForCausalLM as a `LanguageModel`."""

    def __init__(self, config: LlamaConfig) -> None:
        network = LlamaForCausalLM(transformers_config(config))
        network.set_attn_implementation("sdpa")
        super().__init__(config, network)

    def layers(self) -> nn.ModuleList:
        """The network's blocks."""
        return self.network.model.layers

    def read(self, history: History) -> Float[Tensor, "B S D"]:
        """One pass over all that was read: attention sees the documents of a row through a mask."""
        visible_BSS, positions_BS = visible_and_positions(history.begins, history.exists)
        out = self.network.model(
            input_ids=history.tokens, attention_mask=visible_BSS[:, None], position_ids=positions_BS, use_cache=False
        )
        return out.last_hidden_state


def transformers_config(config: LlamaConfig) -> HuggingFaceLlamaConfig:
    """What transformers calls these sizes."""
    return HuggingFaceLlamaConfig(
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


def visible_and_positions(
    begins: Bool[Tensor, "B S"], exists: Bool[Tensor, "B S"]
) -> tuple[Bool[Tensor, "B S S"], Int[Tensor, "B S"]]:
    """Who sees whom, and where in its document a token stands. A token that does not exist sees only itself."""
    document_BS = begins.cumsum(1)
    S = document_BS.shape[1]
    causal_SS = torch.ones(S, S, dtype=torch.bool, device=document_BS.device).tril()
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    itself_SS = torch.eye(S, dtype=torch.bool, device=document_BS.device)
    visible_BSS = (same_BSS & causal_SS & exists[:, None, :]) | itself_SS
    count_BS = exists.cumsum(1)
    start_BS = torch.where(begins, count_BS - exists.long(), 0).cummax(1).values
    return visible_BSS, (count_BS - 1 - start_BS).clamp(min=0)
