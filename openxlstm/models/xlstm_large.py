"""xLSTM-7B's architecture: matrix memory only, at model width, with a gated feed-forward layer in every block.

Beck et al. 2025, arXiv:2503.13427, Sec. 3 and App. A-B.

B batch, T time, D model width, H heads, K query/key width, V value width, U_f feed-forward width, W vocabulary.

Modules and parameters carry the names of the published checkpoint (and of transformers' `xlstm`), so its files load
without renaming: backbone.blocks.0.mlstm_layer.igate_preact.weight and so on.

Where the checkpoint differs from the paper's text, we follow the checkpoint: the norm over heads is a LayerNorm, not
an RMSNorm.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.cells import mLSTMState
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, Unit, decay_groups, run_blocks, state_shapes
from openxlstm.nn.functional import soft_cap, widened
from openxlstm.nn.gates import GateLinear, project_gates
from openxlstm.nn.init import forget_bias_per_head, init_leaf, residual_std
from openxlstm.nn.linear import Embedding, Linear
from openxlstm.nn.norm import HeadNorm, RMSNorm
from openxlstm.nn.quant import project


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class xLSTMLargeConfig:
    """An xLSTM of the 7B architecture. Facts about the model, none about the machine."""

    vocab_size: int  # W
    width: int  # D
    blocks: int
    heads: int  # H
    qk_width: int | None = None  # H K; None: D / 2
    v_width: int | None = None  # H V; None: D
    ffn_width: int | None = None  # U_f; None: 2.667 D, up to the next multiple of 64
    gate_soft_cap: float = 15.0
    logit_soft_cap: float = 30.0
    input_gate: str = "exp"  # "sigmoid", "sigmoid_normalized": arXiv:2503.14376
    forget_gate: str = "sigmoid"  # "exp" needs eps=0
    tie_embeddings: bool = False  # the head is the embedding: one tensor, without weight decay
    norm_eps: float = 1e-6
    eps: float = 1e-6  # of the mLSTM's denominator; 0 in the paper, 1e-6 in every checkpoint

    def __post_init__(self) -> None:
        """Refuse what cannot be built, by name, with the nearest fix."""
        where = type(self).__name__
        checks.check_positive(where, vocab_size=self.vocab_size, width=self.width, blocks=self.blocks, heads=self.heads)
        checks.check_positive(where, qk_width=self.QK, v_width=self.HV, ffn_width=self.U_f)
        checks.check_multiple(where, "v_width" if self.v_width else "width", self.HV, heads=self.heads)
        checks.check_multiple(where, "qk_width", self.QK, heads=self.heads)
        checks.check_head_width(where, "v_width", self.HV, self.heads)
        checks.check_gates(where, self.input_gate, self.forget_gate, self.eps)
        for name in ("gate_soft_cap", "logit_soft_cap", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{where}: {name}={getattr(self, name)} must be positive and finite")

    @property
    def QK(self) -> int:
        """Width of all queries, or keys, of a token."""
        return self.width // 2 if self.qk_width is None else self.qk_width

    @property
    def HV(self) -> int:
        """Width of all values of a token."""
        return self.width if self.v_width is None else self.v_width

    @property
    def U_f(self) -> int:
        """Inner width of the feed-forward layer: the true ceiling, which gives 2112 at D = 768 (peers: 2048)."""
        return -(-2667 * self.width // 64_000) * 64 if self.ffn_width is None else self.ffn_width

    @property
    def label(self) -> str:
        """The name of the architecture, with its number of blocks: "xLSTM-large, 32 blocks"."""
        return f"xLSTM-large, {self.blocks} block{'s' if self.blocks > 1 else ''}"

    def __eq__(self, other: object) -> bool:
        """Equal configs build the same model: a size left to its rule equals the number that the rule gives."""
        return isinstance(other, xLSTMLargeConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def to_dict(self) -> dict[str, Any]:
        """Every field, sizes as numbers: what `from_dict` reads back, and what a saved model says about itself."""
        return asdict(self) | {"qk_width": self.QK, "v_width": self.HV, "ffn_width": self.U_f}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> xLSTMLargeConfig:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(xLSTMLargeConfig, data, "xLSTMLargeConfig")


class mLSTMLayer(nn.Module):
    """Dense projections, the cell, and an output gate."""

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        D, H, QK, HV = config.width, config.heads, config.QK, config.HV
        self.heads, self.gate_soft_cap = H, config.gate_soft_cap
        self.input_gate, self.forget_gate, self.eps = config.input_gate, config.forget_gate, config.eps
        self.q = Linear(D, QK, bias=False)
        self.k = Linear(D, QK, bias=False)
        self.v = Linear(D, HV, bias=False)
        self.ogate_preact = Linear(D, HV, bias=False)
        self.igate_preact = GateLinear(D, H)
        self.fgate_preact = GateLinear(D, H)
        self.multihead_norm = HeadNorm(H, HV // H, config.norm_eps)
        self.out_proj = Linear(HV, D, bias=False)

    def forward(
        self,
        g: Float[Tensor, "B T D"],
        state: mLSTMState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], mLSTMState]:
        q, k, v = (part(g).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v))
        i, f = (soft_cap(raw, self.gate_soft_cap) for raw in project_gates((g,), self.igate_preact, self.fgate_preact))
        h, state = kernels.mlstm(
            q, k, v, i, f, state, reset=reset, mask=mask,
            input_gate=self.input_gate, forget_gate=self.forget_gate, eps=self.eps,
        )  # fmt: skip
        return self.out_proj(torch.sigmoid(self.ogate_preact(g)) * self.multihead_norm(h)), state


class FeedForward(nn.Module):
    """down(silu(gate) * up)."""

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        self.proj_up_gate = Linear(config.width, config.U_f, bias=False)
        self.proj_up = Linear(config.width, config.U_f, bias=False)
        self.proj_down = Linear(config.U_f, config.width, bias=False)

    def forward(self, g: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.proj_down(F.silu(self.proj_up_gate(g)) * self.proj_up(g))


class mLSTMBlock(nn.Module):
    """The cell's layer and the feed-forward layer, each behind a norm, each added to the residual stream."""

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        self.norm_mlstm = RMSNorm(config.width, config.norm_eps)
        self.mlstm_layer = mLSTMLayer(config)
        self.norm_ffn = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    @torch.no_grad()
    def init_roles(self, D: int, blocks: int) -> None:
        """The rows of the model's table that are about a weight's role, not about its kind."""
        layer = self.mlstm_layer
        nn.init.normal_(layer.out_proj.weight, std=residual_std(D, blocks))
        nn.init.normal_(self.ffn.proj_down.weight, std=residual_std(D, blocks))
        for gate in (layer.ogate_preact, layer.igate_preact, layer.fgate_preact):
            nn.init.zeros_(gate.weight)
        layer.igate_preact.bias.fill_(-10.0)
        layer.fgate_preact.bias.copy_(forget_bias_per_head(layer.heads))

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> mLSTMState:
        """Nothing seen yet."""
        layer = self.mlstm_layer
        K, V = (part.out_features // layer.heads for part in (layer.k, layer.v))
        return mLSTMState.empty(batch, layer.heads, K, V, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: mLSTMState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], mLSTMState]:
        h, state = self.mlstm_layer(self.norm_mlstm(x), state, reset, mask)
        x = x + h
        return x + self.ffn(self.norm_ffn(x)), state


class Backbone(nn.Module):
    """Embedding, blocks and the last norm; a module of its own because the checkpoint's names say so."""

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(mLSTMBlock(config) for _ in range(config.blocks))
        self.out_norm = RMSNorm(config.width, config.norm_eps)


class xLSTMLarge(nn.Module):
    """A language model of the 7B architecture. No positions, no limit of length."""

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        self.config = config
        self.checkpoint_every = 0  # n > 0: recompute every n-th block's activations in the backward pass
        self.backbone = Backbone(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self._state_shapes = state_shapes(self.empty_state(1, device="meta"))
        self.reset_parameters()

    @staticmethod
    def from_preset(name: str) -> xLSTMLarge:
        """A freshly initialised model of a published configuration, such as "xlstm-7b"; see `presets`."""
        from openxlstm.models import presets

        return xLSTMLarge(presets.config_of(name, xLSTMLargeConfig))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The recipe of xLSTM-7B. small: N(0, sqrt(2/(5D))); residual: N(0, 2/(blocks sqrt(D))), D even for proj_down.

        embeddings, lm_head, q, k, v, proj_up_gate, proj_up    small
        out_proj, proj_down                                    residual
        ogate_preact                                           0: every output gate starts at 1/2
        igate_preact.weight, fgate_preact.weight               0: every gate starts as a constant
        igate_preact.bias                                      -10: removes spikes of the gradient norm (Sec. 3.2)
        fgate_preact.bias                                      linspace(3, 6) over heads
        every norm weight                                      1
        """
        D, blocks = self.config.width, self.config.blocks
        for module in self.modules():
            init_leaf(module, D)
        for block in self.backbone.blocks:
            assert isinstance(block, mLSTMBlock)
            block.init_roles(D, blocks)

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> ModelState:
        """Nothing seen yet, for `batch` sequences, on the model's device unless another is given."""
        weight = self.backbone.out_norm.weight
        device, dtype = weight.device if device is None else device, torch.promote_types(weight.dtype, torch.float32)
        states = []
        for block in self.backbone.blocks:
            assert isinstance(block, mLSTMBlock)
            states.append(block.empty_state(batch, device, dtype))
        return ModelState(tuple(states))

    def features(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """What the head reads: hidden states behind the last norm."""
        checks.check_tokens(tokens, self.config.vocab_size, reset, mask)
        if mask is not None:
            tokens = torch.where(mask, tokens, 0)  # padding may carry any id
        x = self.backbone.embeddings(tokens)
        if state is not None:
            checks.check_state(state, self._state_shapes, tokens.shape[0], x)
        x, state = run_blocks(self.backbone.blocks, x, state, reset, mask, self.checkpoint_every)
        return self.backbone.out_norm(x), state

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]:
        """What `logits` multiplies by, and the soft cap of the product: all that a loss needs."""
        return (self.backbone.embeddings if self.lm_head is None else self.lm_head).weight, self.config.logit_soft_cap

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, softly capped, in fp32 (fp64)."""
        matrix = self.backbone.embeddings if self.lm_head is None else self.lm_head
        return soft_cap(widened(project(hidden, matrix)), self.config.logit_soft_cap)

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

    def units(self) -> list[Unit]:
        """The blocks, first to last. The gates of the cell and all norms are islands of fp32."""
        found = []
        for block in self.backbone.blocks:
            assert isinstance(block, mLSTMBlock)
            layer, ffn = block.mlstm_layer, block.ffn
            projections = [layer.q, layer.k, layer.v, layer.ogate_preact, layer.out_proj]
            found.append(Unit(block, [*projections, ffn.proj_up_gate, ffn.proj_up, ffn.proj_down]))
        return found

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on every matrix but the embedding (also as a tied head); none on biases and norms."""
        embedding = self.backbone.embeddings.weight
        decayed = [p for p in self.parameters() if p.ndim > 1 and p is not embedding]
        return decay_groups(decayed, [p for p in self.parameters() if p.ndim == 1 or p is embedding], weight_decay)
