"""A model's decoding step as a list of native operations (kernels/cpu/csrc/decode.cpp runs it, one call per token).

The list is derived from the modules themselves, so what they are is what is computed; a module that somebody has
replaced, wrapped or hooked is a reason to refuse. Large matrices are used where they lie, in fp32, bf16
or a GGUF file's blocks; everything small is copied to fp32. Activations and states are fp32.

D model width, U inner width, H heads, K and V head widths, W vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.kernels.cpu.library import Operation
from openxlstm.models import xlstm, xlstm_large
from openxlstm.models.interface import LanguageModel, ModelState
from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.linear import Embedding, HeadwiseLinear, Linear
from openxlstm.nn.norm import HeadNorm, LayerNorm, RMSNorm
from openxlstm.nn.quant import QuantEmbedding, QuantLinear

KINDS = (
    "embed", "norm", "linear", "headwise", "conv", "soft_cap", "mlstm_gate", "mlstm", "slstm", "gated", "sigmoid",
    "swiglu", "geglu",
)  # fmt: skip  # by number, as csrc/openxlstm.h has them
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
BLOCKS = {"f32": 0, "bf16": 1, "q8_0": 2, "q4_0": 3, "q4_1": 4}
NAMES = {name for name, *_ in Operation._fields_}
GATES = {"exp": 0, "sigmoid": 1, "sigmoid_normalized": 2}
PLAIN = (
    *(Linear, GateLinear, Embedding, HeadwiseLinear, QuantLinear, QuantEmbedding),
    *(LayerNorm, RMSNorm, HeadNorm, ConvSiLU, nn.Dropout, nn.ModuleList),
    *(xlstm.xLSTM, xlstm.xLSTMStack, xlstm.mLSTMBlock, xlstm.sLSTMBlock),
    *(xlstm_large.xLSTMLarge, xlstm_large.Backbone, xlstm_large.mLSTMBlock, xlstm_large.mLSTMLayer),
    xlstm_large.FeedForward,
)


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows of `width` numbers in the working memory, `ld` apart, from `offset` on."""

    offset: int
    ld: int
    width: int

    def part(self, first: int, width: int) -> Operand:
        """Some columns."""
        return replace(self, offset=self.offset + first, width=width)


class Program:
    """The operations of one model for some number of rows, bound to states that they write to."""

    def __init__(self, model: LanguageModel, state: ModelState, rows: int):
        self.rows, self.size = rows, 0
        self.operations: list[Operation] = []
        self.alive: list[Tensor] = []  # what the operations point to
        self.logits = self._build(model, state)
        self.array = (Operation * len(self.operations))(*self.operations)

    def buffer(self, width: int) -> Operand:
        """Working memory for a row of each sequence."""
        ld = -(-width // 16) * 16
        operand = Operand(self.size, ld, width)
        self.size += self.rows * ld
        return operand

    def _add(self, kind: str, to: Operand, *sources: Operand, barrier: bool = True, **fields: Any) -> Operand:
        """Append an operation. `sources` are from, other, third, fourth; tensors become their addresses."""
        places: dict[str, int] = {"to": to.offset, "to_ld": to.ld}
        for name, operand in zip(("from_", "other", "third", "fourth"), sources, strict=False):
            places |= {name: operand.offset, f"{name.rstrip('_')}_ld": operand.ld}
        for name, value in fields.items():
            assert name in NAMES, f"an operation has no field {name!r}"  # ctypes would not notice
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name} is read as one piece of memory"
                self.alive.append(value)
                fields[name] = value.data_ptr()
        self.operations.append(Operation(kind=KINDS.index(kind), barrier=barrier, **places, **fields))
        return to

    def _linear(self, x: Operand, module: nn.Module, to: Operand | None = None, **fields: Any) -> Operand:
        """A matrix product with the module's weight as it is stored."""
        weight, stored, out = _matrix(module)
        bias = getattr(module, "bias", None)
        to = self.buffer(out) if to is None else to
        return self._add(
            "linear", to, x, width=x.width, out=out, weight=weight, format=stored,
            bias=None if bias is None else _small(bias), **fields,
        )  # fmt: skip

    def _norm(self, x: Operand, module: LayerNorm | RMSNorm | HeadNorm, heads: int = 1, **fields: Any) -> Operand:
        """A norm over each of `heads` parts."""
        to = fields.pop("to", None) or self.buffer(x.width)
        mode = isinstance(module, RMSNorm)
        return self._add(
            "norm", to, x, width=x.width, heads=heads, mode=mode, eps=module.eps, weight=_small(module.weight), **fields
        )

    def _build(self, model: LanguageModel, state: ModelState) -> Operand:
        if isinstance(model, xlstm.xLSTM):
            x = self._embed(model.embedding)
            for block, memory in zip(model.stack.blocks, state.blocks, strict=True):
                if isinstance(block, xlstm.mLSTMBlock):
                    self._m_block(x, block, memory)
                else:
                    assert isinstance(block, xlstm.sLSTMBlock), "a stack has m and s blocks"
                    self._s_block(x, block, memory)
            hidden = self._norm(x, model.stack.norm)
            return self._linear(hidden, model.embedding if model.head is None else model.head)
        assert isinstance(model, xlstm_large.xLSTMLarge)
        x = self._embed(model.backbone.embeddings)
        for block, memory in zip(model.backbone.blocks, state.blocks, strict=True):
            self._large_block(x, block, memory)
        hidden = self._norm(x, model.backbone.out_norm)
        logits = self._linear(hidden, model.backbone.embeddings if model.lm_head is None else model.lm_head)
        return self._add("soft_cap", logits, width=logits.width, scale=model.config.logit_soft_cap)

    def _embed(self, module: nn.Module) -> Operand:
        weight, stored, _ = _matrix(module)
        width = module.embedding_dim
        assert isinstance(width, int)
        return self._add("embed", self.buffer(width), width=width, weight=weight, format=stored)

    def _cell(
        self, q: Operand, k: Operand, v: Operand, i: Operand, f: Operand, heads: int, gate: str, eps: float, memory: Any
    ) -> Operand:
        factors = self.buffer(3 * heads)
        mode = GATES[gate]
        self._add(
            "mlstm_gate", factors, i, f, q, k, width=q.width, heads=heads, mode=mode, eps=eps,
            state2=memory.n, state3=memory.m,
        )  # fmt: skip
        h = self.buffer(v.width)
        return self._add("mlstm", h, q, k, v, factors, width=q.width, out=v.width, heads=heads, state=memory.C)

    def _m_block(self, x: Operand, block: xlstm.mLSTMBlock, memory: Any) -> None:
        H, U = block.heads, block.down.in_features
        up = self._linear(self._norm(x, block.norm), block.up)
        xu, z = up.part(0, U), up.part(U, U)
        c = self._conv(xu, block.conv, memory.conv)
        qkv = self.buffer(3 * U)
        q, k, v = (qkv.part(part * U, U) for part in range(3))
        for to, source, module in ((q, c, block.q), (k, c, block.k), (v, xu, block.v)):
            self._headwise(source, module, to, barrier=module is block.v)
        i = self._linear(qkv, block.gate_i, barrier=False)
        f = self._linear(qkv, block.gate_f)
        h = self._cell(q, k, v, i, f, H, block.input_gate, block.eps, memory.cell)
        y = self._norm(h, block.head_norm, H)
        y = self._add("gated", self.buffer(U), y, c, z, width=U, weight=_small(block.skip))
        self._linear(y, block.down, to=x, add=1)

    def _s_block(self, x: Operand, block: xlstm.sLSTMBlock, memory: Any) -> None:
        H, D = block.heads, x.width
        xi = self._norm(x, block.norm)
        c = self._conv(xi, block.conv, memory.conv)
        gates = self.buffer(4 * D)
        modules = ((c, block.gate_i), (c, block.gate_f), (xi, block.gate_z), (xi, block.gate_o))
        for index, (source, module) in enumerate(modules):
            self._headwise(source, module, gates.part(index * D, D), barrier=index == 3)
        cell = memory.cell
        h = self._add(
            "slstm", self.buffer(D), gates, width=D, heads=H, mode=block.forget_gate == "exp",
            weight=_small(block.R), bias=_small(block.b), state=cell.h, state2=cell.c, state3=cell.n, state4=cell.m,
        )  # fmt: skip
        self._norm(h, block.head_norm, H, to=x, add=1)
        up = self._linear(self._norm(x, block.norm_ffn), block.ffn_up)
        F = block.ffn_down.in_features
        y = self._add("geglu", self.buffer(F), up.part(0, F), up.part(F, F), width=F)
        self._linear(y, block.ffn_down, to=x, add=1)

    def _large_block(self, x: Operand, block: nn.Module, memory: Any) -> None:
        assert isinstance(block, xlstm_large.mLSTMBlock)
        layer, ffn = block.mlstm_layer, block.ffn
        g, H = self._norm(x, block.norm_mlstm), layer.heads
        q, k, v, o, i = (
            self._linear(g, module, barrier=False)
            for module in (layer.q, layer.k, layer.v, layer.ogate_preact, layer.igate_preact)
        )
        f = self._linear(g, layer.fgate_preact)
        self._add("soft_cap", i, width=H, scale=layer.gate_soft_cap, barrier=False)
        self._add("soft_cap", f, width=H, scale=layer.gate_soft_cap)
        h = self._cell(q, k, v, i, f, H, layer.input_gate, layer.eps, memory)
        y = self._norm(h, layer.multihead_norm, H)
        y = self._add("sigmoid", self.buffer(y.width), y, o, width=y.width)
        self._linear(y, layer.out_proj, to=x, add=1)
        g = self._norm(x, block.norm_ffn)
        gate = self._linear(g, ffn.proj_up_gate, barrier=False)
        up = self._linear(g, ffn.proj_up)
        y = self._add("swiglu", self.buffer(up.width), gate, up, width=up.width)
        self._linear(y, ffn.proj_down, to=x, add=1)

    def _conv(self, x: Operand, module: ConvSiLU, tail: Tensor) -> Operand:
        if module.weight is None or module.bias is None:
            return x
        weight = module.weight.detach().float().t().contiguous()
        return self._add(
            "conv", self.buffer(x.width), x, width=x.width, taps=module.taps, weight=weight, bias=_small(module.bias),
            state=tail,
        )  # fmt: skip

    def _headwise(self, x: Operand, module: HeadwiseLinear, to: Operand, barrier: bool) -> None:
        bias = None if module.bias is None else _small(module.bias)
        heads, weight = module.weight.shape[0], _small(module.weight)
        self._add("headwise", to, x, width=x.width, heads=heads, weight=weight, bias=bias, barrier=barrier)


def foreign_module(model: nn.Module) -> str | None:
    """The first module that is not exactly one of ours, or that has a hook: it may compute anything."""
    for name, module in model.named_modules():
        if type(module) not in PLAIN or "forward" in vars(module):
            return f"{name or 'the model'} is a {type(module).__name__} of another kind than the model was built with"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
    return None


def _matrix(module: nn.Module) -> tuple[Tensor, int, int]:
    """A large matrix where it lies, its format, and its number of rows."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.blocks, BLOCKS[module.kind], module.blocks.shape[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if isinstance(module, GateLinear):
        weight = weight.float()  # small, and an island of fp32
    return weight.contiguous(), FORMATS[weight.dtype], weight.shape[0]


def _small(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()
