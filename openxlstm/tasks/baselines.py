"""What xLSTM came from, to be compared with: torch's nn.LSTM, bare and in residual blocks.

Hochreiter and Schmidhuber 1997; the cell is `nn.LSTM`, unchanged. "LSTM (Block)" of arXiv:2405.04517: pre-norm, LSTM at
model width, residual, then a gated feed-forward layer as behind an sLSTM. Without the feed-forward layer it is the
second rung of that paper's ladder (Table 2), and `lstm` the first.

Here, too, documents of a packed row do not see each other, padding does not exist, and a prefix and its state are the
whole: every document becomes a row of its own (`nn.documents`), and the LSTM stops where it ends.

B batch, T time, N documents, L length of the longest one, D model width, U_f feed-forward width, W vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from openxlstm.cells import State
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, Unit, decay_groups, decay_matrices, state_shapes
from openxlstm.nn.documents import Documents
from openxlstm.nn.functional import widened, without_autocast
from openxlstm.nn.init import residual_std, small_std
from openxlstm.nn.linear import Embedding, Linear
from openxlstm.nn.norm import LayerNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMConfig:
    """An LSTM language model: embedding, `nn.LSTM` layers of model width, head. No norm, no residual."""

    vocab_size: int
    width: int
    blocks: int  # layers
    dropout: float = 0.0  # behind every layer
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        checks.check_positive("LSTMConfig", vocab_size=self.vocab_size, width=self.width, blocks=self.blocks)
        _check_dropout("LSTMConfig", self.dropout)

    @property
    def label(self) -> str:
        """The architecture and its number of layers."""
        return f"LSTM, {self.blocks} layer{'s' if self.blocks > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LSTMConfig:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(LSTMConfig, data, "LSTMConfig")

    def count_parameters(self) -> int:
        """Every number that training can change; a tied head counts once."""
        ends = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return ends + self.blocks * _cell_parameters(self.width)

    def flops_per_token(self) -> int:
        """Of a forward pass, 2 per weight of every matrix."""
        return 2 * (self.vocab_size * self.width + self.blocks * 8 * self.width**2)

    def state_bytes(self) -> int:
        """Bytes of h and c in fp32."""
        return 4 * 2 * self.blocks * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMBlockConfig:
    """A language model of residual LSTM blocks."""

    vocab_size: int
    width: int
    blocks: int
    ffn_width: int | None = None  # U_f; None: 1.3 D, up to the next multiple of 64, as in an s block; 0: no such layer
    dropout: float = 0.0  # on every branch, before it joins the residual stream
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        where = "LSTMBlockConfig"
        checks.check_positive(where, vocab_size=self.vocab_size, width=self.width, blocks=self.blocks)
        if self.U_f < 0:
            raise ValueError(f"{where}: ffn_width={self.ffn_width} must be at least 0; 0 means no feed-forward layer")
        _check_dropout(where, self.dropout)

    @property
    def U_f(self) -> int:
        """Inner width of the feed-forward layer."""
        return -(-13 * self.width // 640) * 64 if self.ffn_width is None else self.ffn_width

    @property
    def label(self) -> str:
        """The architecture and its number of blocks."""
        return f"LSTM (Block), {self.blocks} block{'s' if self.blocks > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, sizes as numbers."""
        return asdict(self) | {"ffn_width": self.U_f}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LSTMBlockConfig:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(LSTMBlockConfig, data, "LSTMBlockConfig")

    def count_parameters(self) -> int:
        """Every number that training can change; a tied head counts once."""
        D, U = self.width, self.U_f
        ends = self.vocab_size * D * (1 if self.tie_embeddings else 2) + D
        return ends + self.blocks * (_cell_parameters(D) + D + (3 * D * U + D if U else 0))

    def flops_per_token(self) -> int:
        """Of a forward pass, 2 per weight of every matrix."""
        D = self.width
        return 2 * (self.vocab_size * D + self.blocks * (8 * D * D + 3 * D * self.U_f))

    def state_bytes(self) -> int:
        """Bytes of h and c in fp32."""
        return 4 * 2 * self.blocks * self.width


Config = LSTMConfig | LSTMBlockConfig
NAMES: dict[str, type[Config]] = {"lstm": LSTMConfig, "lstm_block": LSTMBlockConfig}


@dataclass(frozen=True, slots=True)
class LSTMState(State):
    """What an LSTM remembers: its output, which the next step mixes in, and its cell."""

    h: Float[Tensor, "B D"]
    c: Float[Tensor, "B D"]


@final
class LSTMLayer(nn.Module):
    """One layer of nn.LSTM over documents that stop at different places. Gates and state are fp32 (fp64)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "N L D"], state: LSTMState, lengths: Int[Tensor, "N"] | None
    ) -> tuple[Float[Tensor, "N L D"], LSTMState]:
        """lengths None: all documents are L tokens long."""
        dtype = next(self.lstm.parameters()).dtype
        before = tuple(part.to(dtype)[None] for part in (state.h, state.c))
        with without_autocast(x):
            if lengths is None:
                y, (h, c) = self.lstm(x.to(dtype), before)
            else:
                packed = pack_padded_sequence(x.to(dtype), lengths.cpu(), batch_first=True, enforce_sorted=False)
                packed, (h, c) = self.lstm(packed, before)
                y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        return self.dropout(y).to(x.dtype), LSTMState(widened(h[0]), widened(c[0]))


@final
class LSTMBlock(nn.Module):
    """The LSTM on a residual stream, and a gated feed-forward layer behind it."""

    def __init__(self, width: int, ffn_width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(width, norm_eps)
        self.cell = LSTMLayer(width, dropout)
        self.ffn = FeedForward(width, ffn_width, dropout, norm_eps) if ffn_width else None

    def forward(
        self, x: Float[Tensor, "N L D"], state: LSTMState, lengths: Int[Tensor, "N"] | None
    ) -> tuple[Float[Tensor, "N L D"], LSTMState]:
        """As the layer."""
        h, state = self.cell(self.norm(x), state, lengths)
        x = x + h
        return x if self.ffn is None else x + self.ffn(x), state


@final
class FeedForward(nn.Module):
    """As behind an sLSTM: norm, down(gelu(gate) * up)."""

    def __init__(self, width: int, inner: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(width, norm_eps)
        self.up = Linear(width, 2 * inner, bias=False)
        self.down = Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.dropout(self.down(F.gelu(gate) * up))


@final
class LSTMStack(nn.Module):
    """LSTM layers, or LSTM blocks and the norm behind them: [B, T, D] in, [B, T, D] out, as `xLSTMStack`."""

    def __init__(self, width: int, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.width = width
        self.checkpoint_every = 0
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self._state_shapes = state_shapes(self.empty_state(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """small: N(0, sqrt(2/(5D))); residual: N(0, 2/(blocks sqrt(D))).

        weights of nn.LSTM    uniform +-1/sqrt(D), torch's own
        biases of nn.LSTM     0; of the forget gate 1 (Jozefowicz et al. 2015), else memory starts half shut
        ffn.up, ffn.down      small, residual
        every norm weight     1
        """
        D = self.width
        for module in self.modules():
            if isinstance(module, nn.LSTM):
                module.reset_parameters()
                inputs, outputs = (bias for name, bias in module.named_parameters() if name.startswith("bias"))
                nn.init.zeros_(outputs)
                nn.init.zeros_(inputs)
                nn.init.ones_(inputs[D : 2 * D])
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.up.weight, std=small_std(D))
                nn.init.normal_(module.down.weight, std=residual_std(D, len(self.blocks)))
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> ModelState:
        """Nothing seen yet."""
        weight = next(self.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(batch, self.width, device=device or weight.device, dtype=dtype)
        return ModelState(tuple(LSTMState(zeros, zeros.clone()) for _ in self.blocks))

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
        checks.check_flag("reset", reset, x.shape[0], x.shape[1])
        checks.check_flag("mask", mask, x.shape[0], x.shape[1])
        if state is None:
            state = self.empty_state(x.shape[0])
        else:
            checks.check_state(state, self._state_shapes, x.shape[0], x)
        documents = Documents.of(reset, mask, x[..., 0])
        before, after = state.map(documents.before), []
        rows = documents.split(x)
        if not rows.numel():
            nothing = [block.map(lambda part: part[:0]) for block in state.blocks]
            pairs = zip(state.blocks, nothing, strict=True)
            return documents.join(rows), ModelState(tuple(_after(documents, *pair) for pair in pairs))
        lengths = None if documents.exists.all() else documents.lengths
        for index, (block, memory) in enumerate(zip(self.blocks, before.blocks, strict=True)):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                rows, final = checkpoint(block, rows, memory, lengths, use_reentrant=False)
            else:
                rows, final = block(rows, memory, lengths)
            after.append(_after(documents, state.blocks[index], final))
        return documents.join(self.norm(rows)), ModelState(tuple(after))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on every matrix."""
        return decay_matrices(self.parameters(), weight_decay)


def lstm_layers(width: int, blocks: int, *, dropout: float = 0.0) -> LSTMStack:
    """nn.LSTM of `blocks` layers."""
    return LSTMStack(width, [LSTMLayer(width, dropout) for _ in range(blocks)], nn.Identity())


def lstm_blocks(width: int, blocks: int, *, ffn_width: int, dropout: float = 0.0, norm_eps: float = 1e-5) -> LSTMStack:
    """Residual LSTM blocks and the norm behind them. ffn_width 0: no feed-forward layers."""
    made = [LSTMBlock(width, ffn_width, dropout, norm_eps) for _ in range(blocks)]
    return LSTMStack(width, made, LayerNorm(width, norm_eps))


@final
class LSTM(nn.Module):
    """An LSTM language model, bare or of blocks, as its config says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.embedding = Embedding(config.vocab_size, D)
        if isinstance(config, LSTMConfig):
            self.stack = lstm_layers(D, config.blocks, dropout=config.dropout)
        else:
            self.stack = lstm_blocks(
                D, config.blocks, ffn_width=config.U_f, dropout=config.dropout, norm_eps=config.norm_eps
            )
        self.head = None if config.tie_embeddings else Linear(D, config.vocab_size, bias=False)
        for end in (self.embedding, self.head):
            if end is not None:
                nn.init.normal_(end.weight, std=small_std(D))

    @property
    def checkpoint_every(self) -> int:
        """n > 0: recompute every n-th block's activations in the backward pass. About the run, not the model."""
        return self.stack.checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, every: int) -> None:
        self.stack.checkpoint_every = every

    def empty_state(self, batch: int) -> ModelState:
        """Nothing seen yet, for `batch` sequences."""
        return self.stack.empty_state(batch)

    def features(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """What the head reads."""
        checks.check_tokens(tokens, self.config.vocab_size, reset, mask)
        if mask is not None:
            tokens = torch.where(mask, tokens, 0)  # padding may carry any id
        return self.stack(self.embedding(tokens), state, reset=reset, mask=mask)

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]:
        """What `logits` multiplies by; there is no soft cap."""
        return (self.embedding if self.head is None else self.head).weight, None

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, in fp32 (fp64)."""
        return widened(F.linear(hidden, self.readout()[0]))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T W"], ModelState]:
        """Scores of every next token, and what the model remembers. The contract of `interface` holds."""
        hidden, state = self.features(tokens, state, reset=reset, mask=mask)
        return self.logits(hidden), state

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on every matrix but the embedding, also as a tied head."""
        kept = [p for p in self.parameters() if p.ndim == 1 or p is self.embedding.weight]
        matrices = [p for p in self.parameters() if p.ndim > 1 and p is not self.embedding.weight]
        return decay_groups(matrices, kept, weight_decay)

    def units(self) -> list[Unit]:
        """The blocks, first to last; LSTMs and norms are islands of fp32."""
        return [
            Unit(block, [part for part in block.modules() if isinstance(part, nn.Linear)])
            for block in self.stack.blocks
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, and model.safetensors, which `restore` reads."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        name = next(name for name, kind in NAMES.items() if isinstance(self.config, kind))
        said = {"model_type": f"openxlstm_{name}", **self.config.to_dict()}
        (path / "config.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, path / "model.safetensors")

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """The weights that `save` wrote."""
        self.load_state_dict(load_file(Path(folder) / "model.safetensors"))


def _after(documents: Documents, before: State, final: State) -> State:
    """What each row's memory becomes, tensor by tensor."""
    pairs = zip(before.tensors(), final.tensors(), strict=True)
    return type(before)(*(documents.after(*pair) for pair in pairs))


def _cell_parameters(D: int) -> int:
    return 8 * D * D + 8 * D  # input and recurrent matrices of four gates; nn.LSTM keeps two biases


def _check_dropout(where: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout={dropout} must be at least 0 and below 1")
