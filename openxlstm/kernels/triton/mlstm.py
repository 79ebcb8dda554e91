"""The mLSTM over a sequence on a GPU: plans, launches, and the operators that autograd and torch.compile know.

A fixed table of tiles, no tuning at run time: a tile that was never tested is never chosen. Saved for backward are the
inputs, h and a; gates, memory and its gradient at the chunk borders are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from openxlstm.cells import mLSTMState
from openxlstm.kernels.torch.ops import once, refuse_forward_mode
from openxlstm.kernels.triton import mlstm_backward, mlstm_forward
from openxlstm.kernels.triton.layout import readable, strides

LAUNCH = {"num_warps": 4, "num_stages": 2}  # more than 4 warps have miscompiled on Hopper: not without a gradient test

MOST = 65_535  # programs along the second and third axis of a CUDA grid


@dataclass(frozen=True, slots=True)
class Plan:
    """Compile-time numbers of a call."""

    L: int
    TILE_K: int
    TILE_V: int

    @classmethod
    def of(cls, K: int, V: int, dtype: torch.dtype, chunk: int | None) -> Plan:
        """Tiles of 64 (fp32: 32, whose dots do not use tensor cores); L is a power of two from 16 to 64."""
        widest = 32 if dtype == torch.float32 else 64
        L = widest if chunk is None else max(16, min(64, 1 << (chunk.bit_length() - 1)))
        return cls(L, *(max(16, min(widest, triton.next_power_of_2(width))) for width in (K, V)))


class _Gates:
    """The gate pre-pass and what every kernel of a call shares."""

    def __init__(self, q: Tensor, i: Tensor, f: Tensor, m: Tensor, reset: Any, mask: Any, gate: str, plan: Plan):
        self.B, self.T, self.H, _ = q.shape
        self.N, self.Z = triton.cdiv(self.T, plan.L), self.B * self.H
        for what, count in (("rows times heads", self.Z), (f"chunks of {plan.L}", self.N)):
            if count > MOST:
                raise ValueError(
                    f"{count} {what} are more than a launch takes, {MOST}: split the call, or backend='torch'"
                )
        self.reset, self.mask = (None if x is None else x.contiguous() for x in (reset, mask))
        self.exp, self.plan = gate == "exp", plan
        self.key, self.row, self.m, self.enter, self.write = m.new_empty(5, self.Z, self.N * plan.L).unbind(0)
        self.segment = torch.empty_like(self.key, dtype=torch.int32)
        self.decay, self.m_out = m.new_empty(self.Z, self.N), m.new_empty(m.shape)
        mlstm_forward.gates[(self.Z,)](
            i, f, m.contiguous(), self.flag(reset), self.flag(mask), self.key, self.row, self.m, self.enter, self.write,
            self.segment, self.decay, self.m_out, self.T, self.N, self.H, *i.stride(), *f.stride(),
            L=plan.L, EXP=self.exp, RESET=reset is not None, MASK=mask is not None, num_warps=1,
        )  # fmt: skip

    def flag(self, x: Tensor | None) -> Tensor:
        """A bool tensor as bytes; anything at all where there is none, since the kernel then does not read it."""
        return self.decay if x is None else x.contiguous().view(torch.uint8)

    def borders(self, C: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for C at every border: in bf16 if it enters products as bf16 anyway."""
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return C.new_empty(self.Z, self.N + 1, *C.shape[2:], dtype=kept)

    def sweep(
        self, x: Tensor, y: Tensor, weight: Tensor, column: Tensor, C: Tensor, n: Tensor, normalised: bool,
        other: tuple[Tensor, Tensor] | None = None, rest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Borders of C and n, the last C and n, and rho. `rest` is written, or in reverse read."""
        K, V, plan = x.shape[-1], y.shape[-1], self.plan
        grid = (triton.cdiv(K, plan.TILE_K), triton.cdiv(V, plan.TILE_V), self.Z)
        states = self.borders(C, x.dtype)
        columns, rho = C.new_empty(self.Z, self.N + 1, K), C.new_empty(grid[0] * grid[1], self.Z, self.N)
        C_out, n_out = C.new_empty(C.shape), n.new_empty(n.shape)
        mlstm_forward.sweep[grid](
            x, y, weight, column, self.decay, self.flag(self.mask), C.contiguous(), n.contiguous(), states, columns,
            C_out, n_out, *(other or (states, columns)), states if rest is None else rest, rho, self.T, self.N, self.H,
            *strides(x), *strides(y), K=K, V=V, L=plan.L, TILE_K=plan.TILE_K, TILE_V=plan.TILE_V,
            REVERSE=other is not None, REST=rest is not None, NORMALISED=normalised, MASK=self.mask is not None,
            IEEE=x.dtype == torch.float32, **LAUNCH,
        )  # fmt: skip
        return states, columns, C_out, n_out, rho


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, mask: Tensor | None, input_gate: str, eps: float, chunk: int | None, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """h [B,T,H,V]; C, n, m after the last step; a [Z, N L]; what h lost by rounding, if asked to save it."""
    K, V, normalised = q.shape[-1], v.shape[-1], input_gate != "sigmoid"
    plan = Plan.of(K, V, q.dtype, chunk)
    q, k, v = (readable(x.to(q.dtype)) for x in (q, k, v))
    g = _Gates(q, i, f, m, reset, mask, input_gate, plan)
    states, columns, C_out, n_out, _ = g.sweep(k, v, g.write, g.write, C, n, normalised)
    h, a = q.new_empty(g.B, g.T, g.H, V), m.new_zeros(g.Z, g.N * plan.L)
    rest = h.new_empty(h.shape if _has_rest(q.dtype, input_gate, save) else (0,))
    mlstm_forward.output[(triton.cdiv(V, plan.TILE_V), g.N, g.Z)](
        q, k, v, g.key, g.row, g.m, g.enter, g.segment, g.flag(mask), states, columns, h, rest, a, g.T, g.N, g.H,
        *strides(q), *strides(k), *strides(v), *strides(h), eps, K**-0.5,
        K=K, V=V, L=plan.L, TILE_K=plan.TILE_K, TILE_V=plan.TILE_V, NORMALISED=normalised, MASK=mask is not None,
        IEEE=q.dtype == torch.float32, REST=rest.numel() > 0, **LAUNCH,
    )  # fmt: skip
    return h, C_out, n_out, g.m_out, a, rest


def _has_rest(dtype: torch.dtype, input_gate: str, save: bool) -> bool:
    """Whether h keeps what its rounding loses: e = dh . h needs it in bf16, and only a normaliser needs e."""
    return save and dtype == torch.bfloat16 and input_gate != "sigmoid"


def backward(
    dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor, n: Tensor, m: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, a: Tensor,
    rest: Tensor, input_gate: str, eps: float, chunk: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, i, f and of the initial C and n."""
    K, V, normalised, v_dtype, k_dtype = q.shape[-1], v.shape[-1], input_gate != "sigmoid", v.dtype, k.dtype
    plan = Plan.of(K, V, q.dtype, chunk)
    q, k, v = (readable(x.to(q.dtype)) for x in (q, k, v))
    dh = torch.zeros_like(h) if dh is None else readable(dh.to(q.dtype))
    g = _Gates(q, i, f, m, reset, mask, input_gate, plan)
    lost = g.borders(C, q.dtype) if _has_rest(q.dtype, input_gate, save=True) else None
    states, columns, *_ = g.sweep(k, v, g.write, g.write, C, n, normalised, rest=lost)
    sizes = dict(K=K, V=V, L=plan.L, TILE_K=plan.TILE_K, TILE_V=plan.TILE_V)
    flags = dict(MASK=mask is not None, IEEE=q.dtype == torch.float32)
    inverse, da = torch.ones_like(g.m), torch.zeros_like(g.m)
    if normalised:
        e = torch.empty_like(g.m)
        mlstm_backward.row_dot[(g.N, g.Z)](
            dh, h, rest, g.flag(mask), e, g.T, g.N, g.H, *strides(dh), *strides(h),
            V=V, L=plan.L, TILE_V=plan.TILE_V, MASK=mask is not None, REST=rest.numel() > 0, num_warps=4,
        )  # fmt: skip
        floor = torch.exp(-g.m.clamp(-80.0, 80.0))
        inverse = 1.0 / (torch.maximum(a.abs(), floor) + eps)
        da = torch.where(a.abs() > floor, -a.sign() * e * inverse, 0.0)
    scaled = g.enter * K**-0.5
    dC = torch.zeros_like(C) if dC is None else dC
    dn = torch.zeros_like(n) if dn is None or not normalised else dn
    GC, Gn, dC0, dn0, rho = g.sweep(
        q, dh, scaled * inverse, scaled * da, dC, dn, normalised, other=(states, columns), rest=lost
    )
    # torch.empty_like keeps strides, which may be anything; the operator promises what register_fake promises
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    tiles_k, tiles_v = triton.cdiv(K, plan.TILE_K), triton.cdiv(V, plan.TILE_V)
    q_dq, k_dk = m.new_empty(2, tiles_k, g.Z, g.N * plan.L).unbind(0)
    shared = (g.segment, inverse, da, g.flag(mask))
    for kernel, weight, memory, out, sums in (
        (mlstm_backward.dq, g.enter, (states, columns), dq, q_dq),
        (mlstm_backward.dk, g.write, (GC, Gn), dk, k_dk),
    ):
        kernel[(tiles_k, g.N, g.Z)](
            q, k, v, dh, g.key, g.row, weight, *shared, *memory, out, sums, g.T, g.N, g.H, *strides(q),
            *strides(k), *strides(v), *strides(dh), *strides(out), K**-0.5,
            **sizes, NORMALISED=normalised, **flags, **LAUNCH,
        )  # fmt: skip
    mlstm_backward.dv[(tiles_v, g.N, g.Z)](
        q, k, dh, g.key, g.row, g.write, g.segment, inverse, g.flag(mask), GC, dv, g.T, g.N, g.H, *strides(q),
        *strides(k), *strides(dh), *strides(dv), K**-0.5, **sizes, **flags, **LAUNCH,
    )  # fmt: skip
    di, df = i.new_empty(i.shape), f.new_empty(f.shape)
    mlstm_backward.dgates[(g.N, g.Z)](
        i, f, g.flag(reset), g.flag(mask), g.segment, q_dq, k_dk, rho, di, df, g.T, g.N, g.H, tiles_k,
        tiles_k * tiles_v, *i.stride(), *f.stride(),
        L=plan.L, EXP=g.exp, RESET=reset is not None, MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return dq, dk.to(k_dtype), dv.to(v_dtype), di, df, dC0, dn0


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: mLSTMState, *, reset: Tensor | None,
    mask: Tensor | None, input_gate: str, forget_gate: str, eps: float, chunk: int | None,
) -> tuple[Tensor, mLSTMState]:  # fmt: skip
    """See `openxlstm.kernels.mlstm`; here T >= 1, the arguments are checked, and the forget gate is a sigmoid."""
    inputs = (q, k, v, i, f, state.C, state.n)
    refuse_forward_mode(*inputs)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, C, n, m, _a, _rest = torch.ops.openxlstm_triton.mlstm(
        *inputs, state.m.detach(), reset, mask, input_gate, eps, chunk, save
    )
    return h, mLSTMState(C, n, m.detach())


_lib = torch.library.Library("openxlstm_triton", "FRAGMENT")
_lib.define(
    "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str input_gate, float eps, int? chunk, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "mlstm_backward(Tensor? dh, Tensor? dC, Tensor? dn, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C,"
    " Tensor n, Tensor m, Tensor? reset, Tensor? mask, Tensor h, Tensor a, Tensor rest, str input_gate, float eps,"
    " int? chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, *rest: Any) -> tuple[Tensor, ...]:
    B, T, H, _ = q.shape
    _reset, _mask, input_gate, _eps, chunk, save = rest
    L = Plan.of(q.shape[-1], v.shape[-1], q.dtype, chunk).L
    state = (x.new_empty(x.shape) for x in (C, n, m))
    h = q.new_empty(B, T, H, v.shape[-1])
    lost = h.new_empty(h.shape if _has_rest(q.dtype, input_gate, save) else (0,))
    return h, *state, m.new_empty(B * H, -(-T // L) * L), lost


def _backward_fake(
    dh: Any, dC: Any, dn: Any, q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, i, f, C, n))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, input_gate, eps, chunk, _save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0], output[-2], output[-1])
    ctx.options = (input_gate, eps, chunk)


def _gradient(ctx: Any, dh: Any, dC: Any, dn: Any, dm: Any, da: Any, drest: Any) -> tuple[Any, ...]:
    gradients = torch.ops.openxlstm_triton.mlstm_backward(dh, dC, dn, *ctx.saved_tensors, *ctx.options)
    return *gradients, *([None] * 7)


for _name, _body, _shapes in (("mlstm", forward, _fake), ("mlstm_backward", backward, _backward_fake)):
    _lib.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"openxlstm_triton::{_name}", _shapes, lib=_lib)
torch.library.register_autograd("openxlstm_triton::mlstm", _gradient, setup_context=_save, lib=_lib)
torch.library.register_autograd("openxlstm_triton::mlstm_backward", once, lib=_lib)
