"""xLSTM[a:b]: residual blocks with matrix memory (m) and scalar memory (s), in any order.

Beck et al. 2024, arXiv:2405.04517, Sec. 2.4, Fig. 10 (s) and 11 (m), App. B.

B batch, T time, D model width, H heads, U_m inner width of an m block, K = V = U_m / H there, U_f feed-forward width,
K = D / H in an s block, J convolution taps, P width of the blocks of q, k, v, W vocabulary.

Where the checkpoints differ from the paper's text, we follow the checkpoints:
  the output gate of an m block is silu(z), after norm and skip, not sigmoid(o) on h;
  v has a projection of its own, block-diagonal like those of q and k;
  the feed-forward factor is 1.3, not 4/3 (only 1.3 gives the printed sizes);
  the recurrent gradient is not clipped.
Ours alone: `bias` and `dropout` reach the feed-forward too; without taps (conv=0) the SiLU behind them is gone as well.
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
from openxlstm.cells import State, mLSTMState, sLSTMState
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, Unit, decay_groups, run_blocks, state_shapes
from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.functional import widened, without_autocast
from openxlstm.nn.fused import conv_qkv_gates, norm_skip_gate
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.init import forget_bias_per_head, forget_bias_within_head, init_leaf, residual_std, small_std
from openxlstm.nn.linear import Embedding, HeadwiseLinear, Linear
from openxlstm.nn.norm import HeadNorm, LayerNorm
from openxlstm.nn.quant import project


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class xLSTMStackConfig:
    """The blocks of an xLSTM, without embedding and head. Facts about the model, none about the machine."""

    width: int  # D
    pattern: str  # a letter per block, first to last: m matrix memory, s scalar memory
    heads: int = 4  # H, of both kinds of block
    mlstm_width: int | None = None  # U_m; None: 2 D, up to the next multiple of 64
    ffn_width: int | None = None  # U_f; None: 1.3 D, up to the next multiple of 64
    conv: int = 4  # J; 0: no convolution
    proj_block: int = 4  # P
    bias: bool = False  # of the linear layers; gates always have one, embedding and head never
    dropout: float = 0.0  # on every branch, before it joins the residual stream
    recurrent_init: str = "zeros"  # of the sLSTM's R; "uniform": in +-1/sqrt(D)
    input_gate: str = "exp"  # of the mLSTM; "sigmoid", "sigmoid_normalized": arXiv:2503.14376
    forget_gate: str = "sigmoid"  # of both cells; "exp" needs eps=0
    norm_eps: float = 1e-5
    eps: float = 1e-6  # of the mLSTM's denominator; 0 in the paper, 1e-6 in every checkpoint

    def __post_init__(self) -> None:
        """Refuse what cannot be built, by name, with the nearest fix."""
        where = type(self).__name__
        if not self.pattern or set(self.pattern) - set("ms"):
            raise ValueError(
                f"{where}: pattern={self.pattern!r} must name one block per letter, m (matrix memory) or s "
                f"(scalar memory), such as 'mmmsmmmm'"
            )
        checks.check_positive(where, width=self.width, heads=self.heads, proj_block=self.proj_block)
        checks.check_positive(where, mlstm_width=self.U_m, ffn_width=self.U_f)
        if self.conv < 0:
            raise ValueError(f"{where}: conv={self.conv} must be a number of taps; 0 means no convolution")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}: dropout={self.dropout} must be at least 0 and below 1")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(
                f"{where}: norm_eps={self.norm_eps} must be positive and finite; published models use 1e-5"
            )
        checks.check_choice(where, "recurrent_init", self.recurrent_init, ("zeros", "uniform"))
        checks.check_gates(where, self.input_gate, self.forget_gate, self.eps)
        if "m" in self.pattern:
            checks.check_multiple(where, "mlstm_width", self.U_m, heads=self.heads, proj_block=self.proj_block)
            checks.check_head_width(where, "mlstm_width", self.U_m, self.heads)
        if "s" in self.pattern:
            checks.check_multiple(where, "width", self.width, heads=self.heads)
            checks.check_head_width(where, "width", self.width, self.heads)

    @property
    def U_m(self) -> int:
        """Inner width of an m block."""
        return -(-2 * self.width // 64) * 64 if self.mlstm_width is None else self.mlstm_width

    @property
    def U_f(self) -> int:
        """Inner width of the feed-forward layer of an s block; 1.3 D in whole numbers, which never round wrongly."""
        return -(-13 * self.width // 640) * 64 if self.ffn_width is None else self.ffn_width

    @property
    def label(self) -> str:
        """The paper's name for the ratio of m to s blocks: "xLSTM[7:1]"."""
        m, s = self.pattern.count("m"), self.pattern.count("s")
        return f"xLSTM[{m // math.gcd(m, s)}:{s // math.gcd(m, s)}]"

    def __eq__(self, other: object) -> bool:
        """Equal configs build the same model: a size left to its rule equals the number that the rule gives."""
        return isinstance(other, xLSTMStackConfig) and type(self) is type(other) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def to_dict(self) -> dict[str, Any]:
        """Every field, sizes as numbers: what `from_dict` reads back, and what a saved model says about itself."""
        return asdict(self) | {"mlstm_width": self.U_m, "ffn_width": self.U_f}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class xLSTMConfig(xLSTMStackConfig):
    """An xLSTM language model."""

    vocab_size: int  # W
    tie_embeddings: bool = False  # the head is the embedding: one tensor, without weight decay

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        xLSTMStackConfig.__post_init__(self)  # a slotted dataclass is a new class, which super() does not know
        checks.check_positive(type(self).__name__, vocab_size=self.vocab_size)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> xLSTMConfig:
        """Read strictly: an unknown, missing or mistyped field is a ValueError by name."""
        return checks.read_config(xLSTMConfig, data, "xLSTMConfig")


@dataclass(frozen=True, slots=True)
class mLSTMBlockState(State):
    """What an m block remembers: the last J-1 inputs of its convolution, and its cell."""

    conv: Float[Tensor, "B tail U"]
    cell: mLSTMState


@dataclass(frozen=True, slots=True)
class sLSTMBlockState(State):
    """What an s block remembers: the last J-1 inputs of its convolution, and its cell."""

    conv: Float[Tensor, "B tail D"]
    cell: sLSTMState


class mLSTMBlock(nn.Module):
    """Fig. 11: the cell works between an up- and a down-projection."""

    def __init__(self, config: xLSTMStackConfig):
        super().__init__()
        D, U, H, bias = config.width, config.U_m, config.heads, config.bias
        self.heads = H
        self.input_gate, self.forget_gate, self.eps = config.input_gate, config.forget_gate, config.eps
        self.norm = LayerNorm(D, config.norm_eps)
        self.up = Linear(D, 2 * U, bias=bias)
        self.conv = ConvSiLU(U, config.conv)
        self.q = HeadwiseLinear(U // config.proj_block, config.proj_block, bias=bias)
        self.k = HeadwiseLinear(U // config.proj_block, config.proj_block, bias=bias)
        self.v = HeadwiseLinear(U // config.proj_block, config.proj_block, bias=bias)
        self.gate_i = GateLinear(3 * U, H)
        self.gate_f = GateLinear(3 * U, H)
        self.head_norm = HeadNorm(H, U // H, config.norm_eps)
        self.skip = nn.Parameter(torch.ones(U))
        self.down = Linear(U, D, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def init_roles(self, D: int, blocks: int) -> None:
        """The rows of the stack's table that are about a weight's role, not about its kind."""
        nn.init.normal_(self.down.weight, std=residual_std(D, blocks))
        nn.init.zeros_(self.gate_i.weight)
        nn.init.zeros_(self.gate_f.weight)
        nn.init.normal_(self.gate_i.bias, std=0.1)
        self.gate_f.bias.copy_(forget_bias_per_head(self.heads))
        nn.init.ones_(self.skip)

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> mLSTMBlockState:
        """Nothing seen yet."""
        K = self.conv.width // self.heads
        cell = mLSTMState.empty(batch, self.heads, K, K, device=device, dtype=dtype)
        return mLSTMBlockState(self.conv.empty_state(batch, device, dtype), cell)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: mLSTMBlockState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], mLSTMBlockState]:
        tail, memory = (None, None) if state is None else (state.conv, state.cell)
        xu, z = self.up(self.norm(x, for_matmul=True)).chunk(2, dim=-1)
        c, q, k, v, i, f, tail = conv_qkv_gates(
            xu, self.conv, (self.q, self.k, self.v), (self.gate_i, self.gate_f), tail, reset, mask
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        h, memory = kernels.mlstm(
            q, k, v, i, f, memory, reset=reset, mask=mask,
            input_gate=self.input_gate, forget_gate=self.forget_gate, eps=self.eps,
        )  # fmt: skip
        y = norm_skip_gate(h, c, z, self.head_norm, self.skip)
        return x + self.dropout(self.down(y)), mLSTMBlockState(tail, memory)


class sLSTMBlock(nn.Module):
    """Fig. 10: the cell works at model width, and a gated feed-forward layer follows."""

    def __init__(self, config: xLSTMStackConfig, depth: float):
        """depth: 0 for the first block of the stack, 1 for the last; it shapes the forget gates' bias."""
        super().__init__()
        D, H, bias = config.width, config.heads, config.bias
        self.heads, self.depth, self.forget_gate = H, depth, config.forget_gate
        self.recurrent_init = config.recurrent_init
        self.norm = LayerNorm(D, config.norm_eps)
        self.conv = ConvSiLU(D, config.conv)
        self.gate_i = HeadwiseLinear(H, D // H)
        self.gate_f = HeadwiseLinear(H, D // H)
        self.gate_z = HeadwiseLinear(H, D // H)
        self.gate_o = HeadwiseLinear(H, D // H)
        self.R = nn.Parameter(torch.empty(H, D // H, 4, D // H))
        self.b = nn.Parameter(torch.empty(4, H, D // H))
        self.head_norm = HeadNorm(H, D // H, config.norm_eps)
        self.norm_ffn = LayerNorm(D, config.norm_eps)
        self.ffn_up = Linear(D, 2 * config.U_f, bias=bias)
        self.ffn_down = Linear(config.U_f, D, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def init_roles(self, D: int, blocks: int) -> None:
        """The rows of the stack's table that are about a weight's role, not about its kind."""
        nn.init.normal_(self.ffn_down.weight, std=residual_std(D, blocks))
        spread = D**-0.5 if self.recurrent_init == "uniform" else 0.0
        nn.init.uniform_(self.R, -spread, spread)
        nn.init.zeros_(self.b)
        self.b[1] = forget_bias_within_head(D // self.heads, self.depth)

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> sLSTMBlockState:
        """Nothing seen yet."""
        cell = sLSTMState.empty(batch, self.heads, self.conv.width // self.heads, device=device, dtype=dtype)
        return sLSTMBlockState(self.conv.empty_state(batch, device, dtype), cell)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: sLSTMBlockState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], sLSTMBlockState]:
        tail, memory = (None, None) if state is None else (state.conv, state.cell)
        xi = self.norm(x)
        c, tail = self.conv(xi, tail, reset, mask)
        h, memory = kernels.slstm(
            self._gates(c, xi), self.R, self.b, memory, reset=reset, mask=mask, forget_gate=self.forget_gate
        )
        x = x + self.head_norm(self.dropout(h)).to(x.dtype)
        gate, up = self.ffn_up(self.norm_ffn(x, for_matmul=True)).chunk(2, dim=-1)
        return x + self.dropout(self.ffn_down(F.gelu(gate) * up)), sLSTMBlockState(tail, memory)

    def _gates(self, c: Float[Tensor, "B T D"], xi: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 4 H K"]:
        """Pre-activations of i, f, z, o without bias and recurrence, in fp32: i and f are exponents."""
        with without_autocast(xi):
            c, xi = widened(c), widened(xi)
            gates = torch.stack((self.gate_i(c), self.gate_f(c), self.gate_z(xi), self.gate_o(xi)), dim=2)
        return gates.unflatten(-1, (self.heads, -1))


def build_blocks(config: xLSTMStackConfig) -> nn.ModuleList:
    """A block per letter of the pattern, parameters not yet initialised."""
    last = max(len(config.pattern) - 1, 1)
    return nn.ModuleList(
        mLSTMBlock(config) if kind == "m" else sLSTMBlock(config, index / last)
        for index, kind in enumerate(config.pattern)
    )


class xLSTMStack(nn.Module):
    """The blocks and the norm behind them: [B, T, D] in, [B, T, D] out. A backbone for any project."""

    def __init__(self, config: xLSTMStackConfig):
        super().__init__()
        self.config = config
        self.checkpoint_every = 0  # n > 0: recompute every n-th block's activations in the backward pass
        self.blocks = build_blocks(config)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self._state_shapes = state_shapes(self.empty_state(1, device="meta"))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initialisation. small: N(0, sqrt(2/(5D))); residual: N(0, 2/(blocks sqrt(D))).

        matrices that read: up, q, k, v (D, not P), gates of s, ffn_up    small
        matrices that write: down, ffn_down                               residual
        biases of these matrices                                          0
        conv.weight, conv.bias                                            uniform +-1/sqrt(J)
        m: gate_i.weight, gate_f.weight                                   0: every gate starts as a constant
        m: gate_i.bias                                                    N(0, 0.1)
        m: gate_f.bias                                                    linspace(3, 6) over heads
        s: R                                                              0, or uniform +-1/sqrt(D)
        s: b                                                              i, z, o: 0; f: 5 .. -7, by power law
        skip, every norm weight                                           1
        """
        D, blocks = self.config.width, len(self.blocks)
        for module in self.modules():
            init_leaf(module, D)
        for block in self.blocks:
            assert isinstance(block, (mLSTMBlock, sLSTMBlock))
            block.init_roles(D, blocks)

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> ModelState:
        """Nothing seen yet, for `batch` sequences, on the model's device unless another is given."""
        device = self.norm.weight.device if device is None else device
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        states = []
        for block in self.blocks:
            assert isinstance(block, (mLSTMBlock, sLSTMBlock))
            states.append(block.empty_state(batch, device, dtype))
        return ModelState(tuple(states))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """All blocks, then the norm. The contract of `interface` holds."""
        checks.check_input(x, self.norm.weight)
        checks.check_flag("reset", reset, x.shape[0], x.shape[1])
        checks.check_flag("mask", mask, x.shape[0], x.shape[1])
        if state is not None:
            checks.check_state(state, self._state_shapes, x.shape[0], x)
        x, state = run_blocks(self.blocks, x, state, reset, mask, self.checkpoint_every)
        return self.norm(x), state

    def units(self) -> list[Unit]:
        """The blocks, first to last. Gates, norms, convolutions, skips, and the sLSTM's R and b are islands of fp32.

        So are q, k and v of an m block: FSDP would wrap them, and what is wrapped is called by itself instead of in one
        pass with the convolution (nn/fused.py). They are 3 P U_m numbers beside the 3 D U_m of up and down.
        """
        found = []
        for block in self.blocks:
            if isinstance(block, mLSTMBlock):
                found.append(Unit(block, [block.up, block.down]))
            else:
                assert isinstance(block, sLSTMBlock)
                found.append(Unit(block, [block.ffn_up, block.ffn_down]))
        return found

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on matrices and convolution kernels; none on biases, norms, skips, and the sLSTM's R and b."""
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight") and p.ndim > 1]
        chosen = {id(p) for p in decayed}
        return decay_groups(decayed, (p for p in self.parameters() if id(p) not in chosen), weight_decay)


class xLSTM(nn.Module):
    """An xLSTM language model: embedding, blocks, norm, head. No positions, no limit of length."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.stack = xLSTMStack(config)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self._reset_ends()

    @staticmethod
    def from_preset(name: str) -> xLSTM:
        """A freshly initialised model of a published configuration, such as "xlstm-125m"; see `presets`."""
        from openxlstm.models import presets

        return xLSTM(presets.config_of(name, xLSTMConfig))

    def reset_parameters(self) -> None:
        """The stack's table, and N(0, sqrt(2/(5D))) for embedding and head."""
        self.stack.reset_parameters()
        self._reset_ends()

    def _reset_ends(self) -> None:
        nn.init.normal_(self.embedding.weight, std=small_std(self.config.width))
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=small_std(self.config.width))

    @property
    def checkpoint_every(self) -> int:
        """n > 0: recompute every n-th block's activations in the backward pass. About the run, not the model."""
        return self.stack.checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, every: int) -> None:
        self.stack.checkpoint_every = every

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> ModelState:
        """Nothing seen yet, for `batch` sequences, on the model's device unless another is given."""
        return self.stack.empty_state(batch, device=device)

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
        return self.stack(self.embedding(tokens), state, reset=reset, mask=mask)

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]:
        """What `logits` multiplies by, and the soft cap of the product (None: no cap): all that a loss needs."""
        return (self.embedding if self.head is None else self.head).weight, None

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, in fp32 (fp64)."""
        return widened(project(hidden, self.embedding if self.head is None else self.head))

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
        """Those of the stack. Embedding, last norm and head belong to none of them."""
        return self.stack.units()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the stack, the head with weight decay, the embedding (also as a tied head) without."""
        decayed, kept = (group["params"] for group in self.stack.parameter_groups(weight_decay))
        head = [] if self.head is None else [self.head.weight]
        return decay_groups([*decayed, *head], [*kept, self.embedding.weight], weight_decay)
