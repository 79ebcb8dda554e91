"""A model's decoding step as a list of native operations (kernels/cpu/csrc/decode.cpp runs it, one call per token).

The list is derived from the modules themselves, so what they are is what is computed; a module that somebody has
replaced, wrapped or hooked is a reason to refuse. Large matrices are used where they lie, in fp32, bf16
or a GGUF file's blocks; everything small is copied to fp32. Activations and states are fp32.

Waiting for each other is most of a small model's token, so the list is written for few barriers: every thread norms
the whole row for itself, a chain of operations on columns is divided alike throughout, and a thread keeps its heads
from the gates to the end of the cell. That leaves three barriers for a block of `xlstm.xLSTM` and five or six for one
of `xLSTMLarge`.
Where everyone waits for a product, threads that have finished take rows from the others; so a chain that begins with
a large product has a barrier after it nevertheless, since processors are rarely equally fast.

D model width, U inner width, H heads, K and V head widths, P width of a diagonal block, W vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.kernels.cpu.library import Native, Operation
from openxlstm.models import xlstm, xlstm_large
from openxlstm.models.interface import LanguageModel, ModelState
from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.linear import Embedding, HeadwiseLinear, Linear
from openxlstm.nn.norm import HeadNorm, LayerNorm, RMSNorm
from openxlstm.nn.quant import QuantEmbedding, QuantLinear

KINDS = (
    "embed", "norm", "linear", "headwise", "conv", "soft_cap", "gate", "mlstm_gate", "mlstm", "slstm", "gated",
    "sigmoid", "swiglu", "geglu",
)  # fmt: skip  # by number, as csrc/openxlstm.h has them
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
BLOCKS = {"f32": 0, "bf16": 1, "q8_0": 2, "q4_0": 3, "q4_1": 4}
SIDE_BY_SIDE = {"q8_0": 5, "q4_0": 6}
NOBODY, EVERYONE, UNLESS_KEPT = range(3)  # who waits: XL_NOBODY and so on
LARGE = 1 << 20  # bytes of a matrix, from which on to share its rows evenly is worth a barrier
GRAIN = 16  # columns are divided in multiples of this: rows of a packed matrix that are computed together
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
    """The operations of one model for some number of rows, bound to states that they write to.

    `size` numbers of working memory are shared; every thread has `own` more, of which the last are `scratch`.
    """

    def __init__(self, model: LanguageModel, state: ModelState, rows: int, library: Native):
        self.rows, self.size, self.own, self.steals = rows, 0, 0, 0
        self.operations: list[Operation] = []
        self.alive: list[Tensor] = []  # what the operations point to
        self._library, self._widest = library, 1
        self.logits = self._build(model, state)
        self.array = (Operation * len(self.operations))(*self.operations)
        self.scratch, self.own = self.own, self.own + _rounded(rows * self._widest)

    def buffer(self, width: int) -> Operand:
        """Working memory for a row of each sequence."""
        operand = Operand(self.size, _rounded(width), width)
        self.size += self.rows * operand.ld
        return operand

    def own_buffer(self, width: int) -> Operand:
        """The same that every thread has for itself."""
        operand = Operand(-1 - self.own, _rounded(width), width)
        self.own += self.rows * operand.ld
        return operand

    def _add(self, kind: str, to: Operand, *sources: Operand, barrier: int, **fields: Any) -> Operand:
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
        self.operations.append(
            Operation(kind=KINDS.index(kind), barrier=barrier, **places, **{"grain": GRAIN} | fields)
        )
        return to

    def _linear(
        self, x: Operand, module: nn.Module, to: Operand | None = None, *,
        rows: tuple[int, int] | None = None, barrier: int = NOBODY, kept: bool = False, **fields: Any,
    ) -> Operand:  # fmt: skip
        """A matrix product with the module's weight as it is stored, or with some of its rows: the first, and how many.

        `kept`: a thread goes on with the columns of its share, before a barrier.
        """
        weight, stored, out = self._matrix(module)
        bias = getattr(module, "bias", None)
        bias = None if bias is None else _small(bias)
        if rows is not None:
            first, out = rows
            height = GRAIN if stored in SIDE_BY_SIDE.values() else 1
            weight = weight[first // height : -(-(first + out) // height)]
            bias = None if bias is None else bias[first : first + out]
        to = self.buffer(out) if to is None else to
        self._widest = max(self._widest, x.width)
        if not kept:
            self.steals += 1
            fields["steal"] = self.steals
        return self._add(
            "linear", to, x, barrier=barrier, width=x.width, out=out, weight=weight, format=stored, bias=bias, **fields
        )

    def _halves(self, x: Operand, module: nn.Module, half: int, grain: int) -> tuple[Operand, Operand]:
        """Both halves of a product's columns, each divided among the threads by itself, in multiples of `grain`."""
        weight, stored, _ = self._matrix(module)
        within_a_group = stored in SIDE_BY_SIDE.values() and half % GRAIN
        if within_a_group or weight.nbytes >= 2 * LARGE:
            both = self._linear(x, module, barrier=EVERYONE)
            return both.part(0, half), both.part(half, half)
        first, second = (self._linear(x, module, rows=(part * half, half), grain=grain, kept=True) for part in range(2))
        return first, second

    def _norm(self, x: Operand, module: LayerNorm | RMSNorm) -> Operand:
        """The norm of whole rows, by every thread for itself."""
        weight, mode = _small(module.weight), isinstance(module, RMSNorm)
        to = self.own_buffer(x.width)
        return self._add("norm", to, x, x, barrier=NOBODY, width=x.width, mode=mode, eps=module.eps, weight=weight)

    def _head_norm(
        self, h: Operand, module: HeadNorm, heads: int, barrier: int, residual: Operand | None = None
    ) -> Operand:
        """The norm of every head, plus what stands elsewhere."""
        return self._add(
            "norm", self.buffer(h.width), h, h if residual is None else residual, barrier=barrier, width=h.width,
            parts=heads, eps=module.eps, weight=_small(module.weight), add=residual is not None,
        )  # fmt: skip

    def _build(self, model: LanguageModel, state: ModelState) -> Operand:
        if isinstance(model, xlstm.xLSTM):
            x = self._embed(model.embedding)
            for block, memory in zip(model.stack.blocks, state.blocks, strict=True):
                if isinstance(block, xlstm.mLSTMBlock):
                    self._m_block(x, block, memory)
                else:
                    assert isinstance(block, xlstm.sLSTMBlock), "a stack has m and s blocks"
                    x = self._s_block(x, block, memory)
            hidden = self._norm(x, model.stack.norm)
            return self._linear(hidden, model.embedding if model.head is None else model.head)
        assert isinstance(model, xlstm_large.xLSTMLarge)
        x = self._embed(model.backbone.embeddings)
        for block, memory in zip(model.backbone.blocks, state.blocks, strict=True):
            self._large_block(x, block, memory)
        hidden = self._norm(x, model.backbone.out_norm)
        head = model.backbone.embeddings if model.lm_head is None else model.lm_head
        logits = self._linear(hidden, head, barrier=EVERYONE)
        cap = model.config.logit_soft_cap
        return self._add("soft_cap", logits, barrier=NOBODY, width=logits.width, scale=cap)

    def _embed(self, module: nn.Module) -> Operand:
        weight, stored, _ = self._matrix(module)
        width = module.embedding_dim
        assert isinstance(width, int)
        return self._add("embed", self.buffer(width), barrier=EVERYONE, width=width, weight=weight, format=stored)

    def _cell(
        self, q: Operand, k: Operand, v: Operand, i: Operand, f: Operand, heads: int, block: Any, memory: Any
    ) -> Operand:
        factors, h = self.buffer(3 * heads), self.buffer(v.width)
        exp_forget = block.forget_gate == "exp"
        self._add(
            "mlstm_gate", factors, i, f, q, k, barrier=UNLESS_KEPT, width=q.width, parts=heads, eps=block.eps,
            mode=GATES[block.input_gate], exp_forget=exp_forget, state2=memory.n, state3=memory.m,
        )  # fmt: skip
        return self._add(
            "mlstm", h, q, k, v, factors, barrier=UNLESS_KEPT, width=q.width, out=v.width, parts=heads, state=memory.C
        )

    def _gate(self, x: Operand, module: GateLinear, heads: int, barrier: int, soft_cap: float = 0.0) -> Operand:
        bias = None if module.bias is None else _small(module.bias)
        return self._add(
            "gate", self.buffer(heads), x, barrier=barrier, width=x.width, parts=heads, weight=_small(module.weight),
            bias=bias, scale=soft_cap,
        )  # fmt: skip

    def _m_block(self, x: Operand, block: xlstm.mLSTMBlock, memory: Any) -> None:
        H, U = block.heads, block.down.in_features
        grain = math.lcm(GRAIN, block.q.weight.shape[1])
        xu, z = self._halves(self._norm(x, block.norm), block.up, U, grain)
        c = self._conv(xu, block.conv, memory.conv, barrier=NOBODY, grain=grain)
        qkv = self.buffer(3 * U)
        q, k, v = (qkv.part(part * U, U) for part in range(3))
        for to, source, module in ((q, c, block.q), (k, c, block.k), (v, xu, block.v)):
            self._headwise(source, module, to, barrier=EVERYONE if module is block.v else NOBODY, grain=grain)
        i = self._gate(qkv, block.gate_i, H, NOBODY)
        f = self._gate(qkv, block.gate_f, H, UNLESS_KEPT)
        h = self._cell(q, k, v, i, f, H, block, memory.cell)
        y = self._head_norm(h, block.head_norm, H, UNLESS_KEPT)
        y = self._add("gated", self.buffer(U), y, c, z, barrier=EVERYONE, width=U, parts=H, weight=_small(block.skip))
        self._linear(y, block.down, to=x, add=1, barrier=EVERYONE)

    def _s_block(self, x: Operand, block: xlstm.sLSTMBlock, memory: Any) -> Operand:
        H, D = block.heads, x.width
        xi = self._norm(x, block.norm)
        c = self._conv(xi, block.conv, memory.conv, barrier=UNLESS_KEPT, parts=H)
        gates = self.buffer(4 * D)
        modules = ((c, block.gate_i), (c, block.gate_f), (xi, block.gate_z), (xi, block.gate_o))
        for index, (source, module) in enumerate(modules):
            barrier = UNLESS_KEPT if index == 3 else NOBODY
            self._headwise(source, module, gates.part(index * D, D), barrier=barrier, parts=H)
        cell = memory.cell
        h = self._add(
            "slstm", self.buffer(D), gates, barrier=UNLESS_KEPT, width=D, parts=H, weight=_small(block.R),
            exp_forget=block.forget_gate == "exp", bias=_small(block.b),
            state=cell.h, state2=cell.c, state3=cell.n, state4=cell.m,
        )  # fmt: skip
        x = self._head_norm(
            h, block.head_norm, H, EVERYONE, residual=x
        )  # in a new place: others may still read the old
        F = block.ffn_down.in_features
        gate, up = self._halves(self._norm(x, block.norm_ffn), block.ffn_up, F, GRAIN)
        y = self._add("geglu", self.buffer(F), gate, up, barrier=EVERYONE, width=F)
        return self._linear(y, block.ffn_down, to=x, add=1, barrier=EVERYONE)

    def _large_block(self, x: Operand, block: nn.Module, memory: Any) -> None:
        assert isinstance(block, xlstm_large.mLSTMBlock)
        layer, ffn = block.mlstm_layer, block.ffn
        g, H = self._norm(x, block.norm_mlstm), layer.heads
        q, k, v, o = (self._linear(g, module) for module in (layer.q, layer.k, layer.v, layer.ogate_preact))
        i = self._gate(g, layer.igate_preact, H, NOBODY, layer.gate_soft_cap)
        f = self._gate(g, layer.fgate_preact, H, EVERYONE, layer.gate_soft_cap)
        h = self._cell(q, k, v, i, f, H, layer, memory)
        y = self._head_norm(h, layer.multihead_norm, H, UNLESS_KEPT)
        y = self._add("sigmoid", self.buffer(y.width), y, o, barrier=EVERYONE, width=y.width, parts=H)
        self._linear(y, layer.out_proj, to=x, add=1, barrier=EVERYONE)
        g = self._norm(x, block.norm_ffn)
        kept = self._matrix(ffn.proj_up)[0].nbytes < LARGE
        gate = self._linear(g, ffn.proj_up_gate, kept=kept)
        up = self._linear(g, ffn.proj_up, kept=kept, barrier=NOBODY if kept else EVERYONE)
        y = self._add("swiglu", self.buffer(up.width), gate, up, barrier=EVERYONE, width=up.width)
        self._linear(y, ffn.proj_down, to=x, add=1, barrier=EVERYONE)

    def _conv(self, x: Operand, module: ConvSiLU, tail: Tensor, **fields: Any) -> Operand:
        if module.weight is None or module.bias is None:
            return x
        weight = module.weight.detach().float().t().contiguous()
        return self._add(
            "conv", self.buffer(x.width), x, width=x.width, taps=module.taps, weight=weight, bias=_small(module.bias),
            state=tail, **fields,
        )  # fmt: skip

    def _headwise(self, x: Operand, module: HeadwiseLinear, to: Operand, **fields: Any) -> None:
        bias = None if module.bias is None else _small(module.bias)
        blocks, P, _ = module.weight.shape
        weight = _small(module.weight.permute(2, 0, 1).reshape(P, blocks * P))  # a row for every place in a block
        self._add("headwise", to, x, width=x.width, heads=blocks, weight=weight, bias=bias, **fields)

    def _matrix(self, module: nn.Module) -> tuple[Tensor, int, int]:
        """A large matrix where it lies, its format, and its number of rows."""
        if isinstance(module, QuantLinear):
            if module.packed and self._library.multiplies_bytes:
                return module.blocks, SIDE_BY_SIDE[module.kind], module.out_features
            return module.rows(), BLOCKS[module.kind], module.out_features
        if isinstance(module, QuantEmbedding):
            return module.blocks, BLOCKS[module.kind], module.num_embeddings
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().contiguous(), FORMATS[weight.dtype], weight.shape[0]


def foreign_module(model: nn.Module) -> str | None:
    """The first module that is not exactly one of ours, or that has a hook: it may compute anything."""
    for name, module in model.named_modules():
        if type(module) not in PLAIN or "forward" in vars(module):
            return f"{name or 'the model'} is a {type(module).__name__} of another kind than the model was built with"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
    return None


def _small(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _rounded(numbers: int) -> int:
    """To whole lines of the cache."""
    return -(-numbers // 16) * 16
