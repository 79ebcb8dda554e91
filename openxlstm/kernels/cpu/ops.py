"""The native sweeps as operators of PyTorch's dispatcher, as those of `kernels/torch/ops.py` are.

The forward operator keeps a tape: what the backward sweep needs of each step, so that it computes no exponential twice.
Without a gradient to come there is none, and the memory of a call does not grow with T beyond its inputs and outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.kernels.cpu.library import TAPE, MlstmStep, Native, SlstmBackward, SlstmForward, native, pointer, threads
from openxlstm.kernels.torch.ops import once

_lib = torch.library.Library("openxlstm_cpu", "DEF")
_lib.define(
    "slstm(Tensor gates, Tensor R, Tensor b, Tensor h, Tensor c, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str forget_gate, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "slstm_backward(Tensor? dout, Tensor? dh, Tensor? dc, Tensor? dn, Tensor gates, Tensor R, Tensor b, Tensor c,"
    " Tensor n, Tensor? reset, Tensor? mask, Tensor tape) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, Tensor? reset,"
    " Tensor? mask, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _library() -> Native:
    found = native()
    assert isinstance(found, Native), "dispatch refuses a call that the library cannot serve"
    return found


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _slstm(
    gates: Tensor, R: Tensor, b: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, mask: Tensor | None, forget_gate: str, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, _, H, K = gates.shape
    if gates.stride(-1) != 1:
        gates = gates.contiguous()
    R32, b32 = _fp32(R), _fp32(b)
    before = [part.contiguous() for part in (h, c, n, m)]
    there = (_plain(reset), _plain(mask))
    out = gates.new_empty(B, T, H, K)
    after = [h.new_empty(B, H, K) for _ in range(4)]
    tape = h.new_empty(H, B, T, TAPE, K) if save else h.new_empty(0)
    call = SlstmForward(
        B, T, H, K, threads(), gates.dtype == torch.bfloat16, forget_gate == "exp",
        (gates.stride(0), gates.stride(1), gates.stride(2), gates.stride(3)),
        *(pointer(x) for x in (gates, R32, b32, *there, *before, out, *after)), pointer(tape) if save else None,
    )  # fmt: skip
    _library().slstm_forward(call)
    return out, *after, tape


def _slstm_backward(
    dout: Tensor | None, dh: Tensor | None, dc: Tensor | None, dn: Tensor | None,
    gates: Tensor, R: Tensor, b: Tensor, c: Tensor, n: Tensor,
    reset: Tensor | None, mask: Tensor | None, tape: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, _, H, K = gates.shape
    R32 = _fp32(R)
    cotangents = [_plain(x) for x in (dout, dh, dc, dn)]
    read = [_plain(x) for x in (reset, mask, c, n)]  # kept alive until the sweep is done
    draw = tape.new_empty(B, T, 4, H, K)
    starts = [tape.new_empty(B, H, K) for _ in range(3)]
    call = SlstmBackward(
        B, T, H, K, threads(), gates.dtype == torch.bfloat16,
        *(pointer(x) for x in (*cotangents, R32, *read, tape, draw, *starts)),
    )  # fmt: skip
    _library().slstm_backward(call)
    h_in = tape[:, :, :, TAPE - 1].flatten(1, 2)  # [H, B T, K]: h as it entered each step
    dR = tape.new_empty(H, K, 4, K)
    for gate in range(4):
        torch.bmm(h_in.mT, draw[:, :, gate].flatten(0, 1).transpose(0, 1), out=dR[:, :, gate])
    db = draw.sum((0, 1))
    return draw.to(gates.dtype), dR.to(R.dtype), db.to(b.dtype), *starts


def _mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, mask: Tensor | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, H, K = q.shape
    V = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    read = [_fp32(i), _fp32(f), _plain(reset), _plain(mask), C.contiguous(), n.contiguous(), m.contiguous()]
    written = [q.new_empty(B, H, V), C.new_empty(B, H, K, V), n.new_empty(B, H, K), m.new_empty(B, H)]
    call = MlstmStep(
        B, H, K, V, threads(), q.dtype == torch.bfloat16, *(x.stride()[:2] for x in (q, k, v)), eps,
        *(pointer(x) for x in (q, k, v, *read, *written)),
    )  # fmt: skip
    _library().mlstm_step(call)
    return tuple(written)


def _mlstm_step_fake(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(v.shape), C.new_empty(C.shape), n.new_empty(n.shape), m.new_empty(m.shape)


def _slstm_fake(gates: Any, R: Any, b: Any, h: Any, *rest: Any) -> tuple[Tensor, ...]:
    B, T, _, H, K = gates.shape
    state = [h.new_empty(B, H, K) for _ in range(4)]
    return gates.new_empty(B, T, H, K), *state, h.new_empty(H, B, T, TAPE, K) if rest[-1] else h.new_empty(0)


def _slstm_backward_fake(
    dout: Any, dh: Any, dc: Any, dn: Any, gates: Any, R: Any, b: Any, c: Any, n: Any, reset: Any, mask: Any, tape: Any
) -> tuple[Tensor, ...]:
    state = [c.new_empty(c.shape) for _ in range(3)]
    return gates.new_empty(gates.shape), R.new_empty(R.shape), b.new_empty(b.shape), *state


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    gates, R, b, _h, c, n, _m, reset, mask, _forget_gate, _save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gates, R, b, c, n, reset, mask, output[-1])


def _gradient(ctx: Any, dout: Any, dh: Any, dc: Any, dn: Any, dm: Any, dtape: Any) -> tuple[Any, ...]:
    gradients = torch.ops.openxlstm_cpu.slstm_backward(dout, dh, dc, dn, *ctx.saved_tensors)
    return *gradients, *([None] * 5)


for _name, _body, _fake in (
    ("slstm", _slstm, _slstm_fake),
    ("slstm_backward", _slstm_backward, _slstm_backward_fake),
    ("mlstm_step", _mlstm_step, _mlstm_step_fake),
):
    _lib.impl(_name, _body, "CPU")
    torch.library.register_fake(f"openxlstm_cpu::{_name}", _fake, lib=_lib)
torch.library.register_autograd("openxlstm_cpu::slstm", _gradient, setup_context=_save, lib=_lib)
torch.library.register_autograd("openxlstm_cpu::slstm_backward", once, lib=_lib)
