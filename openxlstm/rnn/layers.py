"""What one layer of a recurrent module is made of: [B, T, D_in] and a state in, [B, T, width] and a state out.

A cell reads x, and c, which is x behind a short convolution or x itself; Beck et al. 2024, arXiv:2405.04517, Sec. 2.
B batch, T time, D input width, U hidden width, H heads, K = V = U / H head width, J convolution taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from openxlstm import kernels
from openxlstm.cells import State, mLSTMState, sLSTMState
from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.functional import widened, without_autocast
from openxlstm.nn.init import forget_bias_per_head, forget_bias_within_head, residual_std, small_std
from openxlstm.nn.linear import Linear
from openxlstm.nn.norm import HeadNorm, LayerNorm


class sLSTMCell(nn.Module):
    """Sec. 2.2: four gates from the input, and from the cell's own last output through R."""

    def __init__(self, inputs: int, width: int, heads: int, bias: bool, forget_gate: str):
        super().__init__()
        self.heads, self.width, self.forget_gate = heads, width, forget_gate
        self.W_if = Linear(inputs, 2 * width, bias=False)
        self.W_zo = Linear(inputs, 2 * width, bias=False)
        self.R = nn.Parameter(torch.empty(heads, width // heads, 4, width // heads))
        self.b = nn.Parameter(torch.empty(4, heads, width // heads)) if bias else None

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> sLSTMState:
        """Nothing seen yet."""
        return sLSTMState.empty(batch, self.heads, self.width // self.heads, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        c: Float[Tensor, "B T D"],
        state: sLSTMState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T H K"], sLSTMState]:
        gates = torch.cat((in_fp32(self.W_if, c), in_fp32(self.W_zo, x)), dim=-1)
        b = self.R.new_zeros(4, *self.R.shape[::3]) if self.b is None else self.b
        h, state = kernels.slstm(
            gates.unflatten(-1, (4, self.heads, -1)), self.R, b, state,
            reset=reset, mask=mask, forget_gate=self.forget_gate,
        )  # fmt: skip
        return h.to(x.dtype), state


class mLSTMCell(nn.Module):
    """Sec. 2.3: keys, values and queries, two gates per head."""

    def __init__(
        self, inputs: int, width: int, heads: int, bias: bool, input_gate: str, forget_gate: str, eps: float
    ):  # fmt: skip
        super().__init__()
        self.heads, self.width = heads, width
        self.input_gate, self.forget_gate, self.eps = input_gate, forget_gate, eps
        self.q = Linear(inputs, width, bias=bias)
        self.k = Linear(inputs, width, bias=bias)
        self.v = Linear(inputs, width, bias=bias)
        self.W_if = Linear(inputs, 2 * heads, bias=bias)

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> mLSTMState:
        """Nothing seen yet."""
        K = self.width // self.heads
        return mLSTMState.empty(batch, self.heads, K, K, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        c: Float[Tensor, "B T D"],
        state: mLSTMState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T H V"], mLSTMState]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.q(c), self.k(c), self.v(x)))
        i, f = in_fp32(self.W_if, c).chunk(2, dim=-1)
        return kernels.mlstm(
            q, k, v, i, f, state, reset=reset, mask=mask,
            input_gate=self.input_gate, forget_gate=self.forget_gate, eps=self.eps,
        )  # fmt: skip


def in_fp32(linear: nn.Linear, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any U"]:
    """linear(x) in fp32 (fp64), whatever autocast says: gates are exponents, and bf16 has 8 bits."""
    with without_autocast(x):
        bias = None if linear.bias is None else widened(linear.bias)
        return F.linear(widened(x), widened(linear.weight), bias)


@dataclass(frozen=True, slots=True)
class ProjectedState(State):
    """A cell's state behind a projection, where the cell's h is not the layer's output."""

    cell: State


class CellLayer(nn.Module):
    """A bare cell: no norm, no residual. The mLSTM's output gate, eq. (27), stands here; the sLSTM's is in its cell."""

    def __init__(self, cell: sLSTMCell | mLSTMCell, inputs: int, bias: bool, proj: int):
        super().__init__()
        self.cell = cell
        self.out_gate = Linear(inputs, cell.width, bias=bias) if isinstance(cell, mLSTMCell) else None
        self.proj = Linear(cell.width, proj, bias=False) if proj else None

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        """Nothing seen yet."""
        cell = self.cell.empty_state(batch, device, dtype)
        return cell if self.proj is None else ProjectedState(cell)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T width"], State]:
        h, after = self.cell(x, x, state.cell if isinstance(state, ProjectedState) else state, reset, mask)
        y = h.flatten(-2)
        if self.out_gate is not None:
            y = torch.sigmoid(self.out_gate(x)) * y
        if self.proj is None:
            return y.to(x.dtype), after
        return self.proj(y).to(x.dtype), ProjectedState(after)


@dataclass(frozen=True, slots=True)
class BlockState(State):
    """What a block remembers: the last J-1 inputs of its convolution, and its cell."""

    conv: Float[Tensor, "B tail U"]
    cell: State


@dataclass(frozen=True, slots=True)
class BlocksState(State):
    """One state per block of a layer."""

    blocks: tuple[BlockState, ...]


class Block(nn.Module):
    """A cell at hidden width and a feed-forward layer, each behind a norm and beside the residual stream.

    Fig. 10 of arXiv:2405.04517; with a matrix memory the block of xLSTM-7B, arXiv:2503.13427, with a convolution.
    """

    def __init__(self, kind: str, width: int, heads: int, bias: bool, taps: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.conv = ConvSiLU(width, taps)
        self.cell = (
            mLSTMCell(width, width, heads, bias, "exp", "sigmoid", 1e-6)
            if kind == "m"
            else sLSTMCell(width, width, heads, bias, "sigmoid")
        )
        self.head_norm = HeadNorm(heads, width // heads, 1e-5)
        self.out_gate = Linear(width, width, bias=bias) if kind == "m" else None
        self.out = Linear(width, width, bias=bias) if kind == "m" else None
        self.norm_ffn = LayerNorm(width)
        inner = -(-4 * width // 24) * 8  # 4/3 of the width, up to the next multiple of 8
        self.ffn_up = Linear(width, 2 * inner, bias=bias)
        self.ffn_down = Linear(inner, width, bias=bias)

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> BlockState:
        """Nothing seen yet."""
        return BlockState(self.conv.empty_state(batch, device, dtype), self.cell.empty_state(batch, device, dtype))

    def forward(
        self,
        x: Float[Tensor, "B T U"],
        state: BlockState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T U"], BlockState]:
        tail, memory = (None, None) if state is None else (state.conv, state.cell)
        xi = self.norm(x)
        c, tail = self.conv(xi, tail, reset, mask)
        h, memory = self.cell(xi, c, memory, reset, mask)
        y = self.head_norm(h)
        if self.out_gate is not None and self.out is not None:
            y = self.out(torch.sigmoid(self.out_gate(xi)) * y)
        x = x + y.to(x.dtype)
        gate, up = self.ffn_up(self.norm_ffn(x)).chunk(2, dim=-1)
        return x + self.ffn_down(F.gelu(gate) * up).to(x.dtype), BlockState(tail, memory)


class BlockLayer(nn.Module):
    """The blocks of one layer, in order; a projection to their width before them, a norm behind the last layer's."""

    def __init__(self, inputs: int | None, width: int, blocks: list[Block], bias: bool, last: bool):
        """inputs: features to project from; None if the layer below is the residual stream itself."""
        super().__init__()
        self.inputs = None if inputs is None else Linear(inputs, width, bias=bias)
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(width) if last else None

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> BlocksState:
        """Nothing seen yet."""
        states = []
        for block in self.blocks:
            assert isinstance(block, Block)
            states.append(block.empty_state(batch, device, dtype))
        return BlocksState(tuple(states))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: BlocksState | None,
        reset: Bool[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T U"], BlocksState]:
        dtype = x.dtype
        x = x if self.inputs is None else self.inputs(x).to(dtype)
        after = []
        for index, block in enumerate(self.blocks):
            x, block_state = block(x, None if state is None else state.blocks[index], reset, mask)
            after.append(block_state)
        return x if self.norm is None else self.norm(x), BlocksState(tuple(after))


@torch.no_grad()
def initialise(layer: CellLayer | BlockLayer, depth: float, blocks: int) -> None:
    """The papers' table (arXiv:2405.04517, App. B; openxlstm.models.xlstm), for inputs of any width D.

    matrices that read: W, q, k, v, out_gate, inputs, proj, ffn_up    N(0, sqrt(2/(5D)))
    matrices that write to a residual stream: out, ffn_down           N(0, 2/(blocks sqrt(U)))
    biases of these matrices                                          0
    conv                                                              uniform +-1/sqrt(J)
    mLSTM W_if.weight                                                 0: every gate starts as a constant
    mLSTM W_if.bias                                                   i: N(0, 0.1); f: linspace(3, 6) over heads
    sLSTM R                                                           0
    sLSTM b                                                           i, z, o: 0; f: see `slstm_forget_bias`
    norms                                                             1

    Args:
        depth: 0 for the first layer, 1 for the last.
        blocks: how many blocks write to the residual stream.
    """
    for module in layer.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=small_std(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (LayerNorm, HeadNorm)):
            nn.init.ones_(module.weight)
        elif isinstance(module, ConvSiLU):
            module.reset_parameters()
    for module in layer.modules():
        if isinstance(module, Block):
            for written in (module.out, module.ffn_down):
                if written is not None:
                    nn.init.normal_(written.weight, std=residual_std(module.ffn_down.out_features, blocks))
        elif isinstance(module, mLSTMCell):
            nn.init.zeros_(module.W_if.weight)
            if module.W_if.bias is not None:
                nn.init.normal_(module.W_if.bias[: module.heads], std=0.1)
                module.W_if.bias[module.heads :] = forget_bias_per_head(module.heads)
        elif isinstance(module, sLSTMCell):
            nn.init.zeros_(module.R)
            if module.b is not None:
                nn.init.zeros_(module.b)
                in_blocks = isinstance(layer, BlockLayer)
                K = module.width // module.heads
                module.b[1] = forget_bias_within_head(K, depth) if in_blocks else slstm_forget_bias(K)


def slstm_forget_bias(K: int) -> Float[Tensor, "K"]:
    """linspace(0, 6) over the units of a head: memories of 2 to 400 steps.

    The papers' power law, 5 .. -7, is made for many blocks: at depth 0 it keeps one unit in twenty above 1/2.
    """
    return torch.linspace(0.0, 6.0, K)
