"""Mamba-2 and RWKV-4 behind the interface of our language models.

Dao and Gu 2024, arXiv:2405.21060; Peng et al. 2023, arXiv:2305.13048. The implementations are `Mamba2ForCausalLM` and
`RwkvForCausalLM` of transformers, on whatever kernels it finds for Mamba-2, else on plain PyTorch; RWKV-4's loop over
tokens is replaced by an equal scan.

Neither network knows `reset` or `mask`. Every document of a row becomes a row of its own (`nn.documents`), which is
exact for whatever is causal. Their own states are of no use to that, because padding on the right would enter them.

S tokens seen so far and now, D width, U inner width, H heads, N state per channel, G groups, J convolution taps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, final

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Mamba2Config as HuggingFaceMamba2Config
from transformers import Mamba2ForCausalLM, RwkvForCausalLM
from transformers import RwkvConfig as HuggingFaceRwkvConfig

from openxlstm.hf.compared import Compared, History
from openxlstm.hf.rwkv_scan import ScannedAttention
from openxlstm.models import checks
from openxlstm.nn.documents import Documents

MAMBA2_CHUNK = 64  # tokens; rounds a sequence up to whole chunks, and transformers' 256 would double many short ones


@dataclass(frozen=True, slots=True)
class Mamba2Config:
    """A Mamba-2: pre-norm blocks of a state-space layer and nothing else; U = expand D."""

    vocab_size: int
    width: int
    blocks: int
    heads: int
    state: int = 128  # N, of every channel; the published models use 128
    groups: int = 1  # G: heads share what is written and read, as keys and values may in attention
    expand: int = 2
    conv: int = 4  # J
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        where = "Mamba2Config"
        for name in ("vocab_size", "width", "blocks", "heads", "state", "groups", "expand", "conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name}={getattr(self, name)} must be at least 1")
        checks.check_multiple(where, "expand * width", self.U, heads=self.heads)
        checks.check_multiple(where, "heads", self.heads, groups=self.groups)
        checks.check_multiple(where, "expand * width", self.U, groups=self.groups)

    @property
    def U(self) -> int:
        """Inner width."""
        return self.expand * self.width

    @property
    def label(self) -> str:
        """The architecture and its number of blocks."""
        return f"Mamba-2, {self.blocks} block{'s' if self.blocks > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Mamba2Config:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(Mamba2Config, data, "Mamba2Config")

    def count_parameters(self) -> int:
        """Every number that training can change; a tied head counts once."""
        ends = self.vocab_size * self.width * (1 if self.tie_embeddings else 2) + self.width
        vectors = self._conv_width() + 3 * self.heads + self.U + self.width  # biases; A, D, dt; two norms
        return ends + self.blocks * (self._matrices() + vectors)

    def flops_per_token(self) -> int:
        """Of a forward pass: 2 per weight of every matrix and convolution, and writing and reading the state."""
        return 2 * self.vocab_size * self.width + self.blocks * (2 * self._matrices() + 4 * self.U * self.state)

    def state_bytes(self) -> int:
        """Bytes that the architecture remembers, in fp32. (This wrapper keeps the tokens and reads them again.)"""
        return 4 * self.blocks * (self.U * self.state + (self.conv - 1) * self._conv_width())

    def _conv_width(self) -> int:
        return self.U + 2 * self.groups * self.state

    def _matrices(self) -> int:
        D, U = self.width, self.U
        return D * (U + self._conv_width() + self.heads) + self.conv * self._conv_width() + U * D


@final
class Mamba2(Compared):
    """transformers' Mamba2ForCausalLM as a `LanguageModel`.

    Initialised as its authors do (state-spaces/mamba, `_init_weights`), which transformers does not by default:
    embedding N(0, 0.02), projections as torch's Linear, what writes to the residual stream divided by sqrt(blocks).
    """

    def __init__(self, config: Mamba2Config) -> None:
        network = Mamba2ForCausalLM(
            HuggingFaceMamba2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                num_hidden_layers=config.blocks,
                num_heads=config.heads,
                head_dim=config.U // config.heads,
                state_size=config.state,
                n_groups=config.groups,
                expand=config.expand,
                conv_kernel=config.conv,
                layer_norm_epsilon=config.norm_eps,
                initializer_range=0.02,
                residual_in_fp32=False,  # it is fp32 under autocast anyway, and with this fp64 stays fp64
                chunk_size=MAMBA2_CHUNK,
                tie_word_embeddings=config.tie_embeddings,
                use_cache=False,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        for name, weight in network.named_parameters():
            if name.endswith("in_proj.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if name.endswith("out_proj.weight"):  # not by rescale_prenorm_residual, which rescales what is loaded, too
                weight.data /= math.sqrt(config.blocks)
        super().__init__(config, network)

    def layers(self) -> nn.ModuleList:
        """The network's blocks."""
        return self.network.backbone.layers

    def read(self, history: History) -> Float[Tensor, "B S D"]:
        """One pass over all that was read, a row per document."""
        return _document_by_document(
            history, lambda tokens_NL: self.network.backbone(input_ids=tokens_NL, use_cache=False).last_hidden_state
        )


@dataclass(frozen=True, slots=True)
class RWKV4Config:
    """An RWKV-4: pre-norm blocks of time mixing and channel mixing."""

    vocab_size: int
    width: int
    blocks: int
    ffn_width: int | None = None  # None: 4 D
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        where = "RWKV4Config"
        for name in ("vocab_size", "width", "blocks", "U_f"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name}={getattr(self, name)} must be at least 1")
        if self.blocks < 2:
            raise ValueError(
                f"{where}: blocks={self.blocks} must be at least 2: its initialisation divides by one less"
            )

    @property
    def U_f(self) -> int:
        """Inner width of channel mixing."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    @property
    def label(self) -> str:
        """The architecture and its number of blocks."""
        return f"RWKV-4, {self.blocks} blocks"

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self) | {"ffn_width": self.U_f}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> RWKV4Config:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(RWKV4Config, data, "RWKV4Config")

    def count_parameters(self) -> int:
        """Every number that training can change; a tied head counts once."""
        ends = self.vocab_size * self.width * (1 if self.tie_embeddings else 2) + 4 * self.width  # first and last norm
        vectors = 11 * self.width  # two norms; decay, first; three and two mixtures
        return ends + self.blocks * (self._matrices() + vectors)

    def flops_per_token(self) -> int:
        """Of a forward pass, 2 per weight of every matrix; the rest is elementwise."""
        return 2 * (self.vocab_size * self.width + self.blocks * self._matrices())

    def state_bytes(self) -> int:
        """Bytes that the architecture remembers, in fp32. (This wrapper keeps the tokens and reads them again.)"""
        return 4 * self.blocks * 5 * self.width

    def _matrices(self) -> int:
        return 5 * self.width**2 + 2 * self.width * self.U_f


@final
class RWKV4(Compared):
    """transformers' RwkvForCausalLM as a `LanguageModel`. Its sums over time are at least fp32."""

    def __init__(self, config: RWKV4Config) -> None:
        network = RwkvForCausalLM(
            HuggingFaceRwkvConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                attention_hidden_size=config.width,
                intermediate_size=config.U_f,
                num_hidden_layers=config.blocks,
                layer_norm_epsilon=config.norm_eps,
                rescale_every=0,  # else weights are divided whenever the model goes from training to evaluation
                tie_word_embeddings=config.tie_embeddings,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        super().__init__(config, network)
        self._scan()

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """The weights that `save` wrote."""
        super().restore(folder)
        self._scan()

    def _scan(self) -> None:
        for block in self.layers():
            block.attention.__class__ = ScannedAttention  # the same weights, names and draws, another `forward`

    def layers(self) -> nn.ModuleList:
        """The network's blocks."""
        return self.network.rwkv.blocks

    def read(self, history: History) -> Float[Tensor, "B S D"]:
        """One pass over all that was read, a row per document."""
        return _document_by_document(
            history, lambda tokens_NL: self.network.rwkv(input_ids=tokens_NL, use_cache=False).last_hidden_state
        )


def _document_by_document(
    history: History, network: Callable[[Int[Tensor, "N L"]], Float[Tensor, "N L D"]]
) -> Float[Tensor, "B S D"]:
    if not history.begins.any() and history.exists.all():
        return network(history.tokens)
    documents = Documents.of(history.begins, history.exists, history.tokens)
    tokens_NL = documents.split(history.tokens)
    if not tokens_NL.numel():  # nothing exists: any token will do for a shape and a dtype
        return network(history.tokens) * 0
    return documents.join(network(tokens_NL))
