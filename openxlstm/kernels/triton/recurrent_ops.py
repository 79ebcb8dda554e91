"""The sLSTM's sweeps and the mLSTM's step as operators of PyTorch's dispatcher, as those of `kernels/torch/ops.py` are.

The sweeps save every state, as the torch backend's do: 16 bytes per element and step, a tenth of a millisecond of
writing at B = 16, T = 1,024, width 768.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.kernels.torch.ops import once
from openxlstm.kernels.triton import mlstm_step, slstm

_lib = torch.library.Library("openxlstm_triton", "FRAGMENT")
_lib.define(
    "slstm(Tensor gates, Tensor R, Tensor b, Tensor h, Tensor c, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str forget_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "slstm_backward(Tensor? dout, Tensor? dh, Tensor? dc, Tensor? dn, Tensor gates, Tensor R, Tensor b, Tensor states,"
    " Tensor? reset, Tensor? mask, str forget_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, Tensor? reset,"
    " Tensor? mask, str input_gate, str forget_gate, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _plain(function: Any) -> Any:
    """Run an operator's body without autograd and without autocast, which would round products that stay fp32."""

    def body(*args: Any) -> Any:
        device = next(x for x in args if isinstance(x, Tensor)).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args)

    return body


def _slstm_fake(gates: Any, R: Any, b: Any, h: Any, *rest: Any) -> tuple[Tensor, ...]:
    B, T, _, H, K = gates.shape
    state = [h.new_empty(B, H, K) for _ in range(4)]
    return gates.new_empty(B, T, H, K), *state, h.new_empty(T + 1, 4, H, B, K)


def _slstm_backward_fake(
    dout: Any, dh: Any, dc: Any, dn: Any, gates: Any, R: Any, b: Any, states: Any, *rest: Any
) -> tuple[Tensor, ...]:
    B, _, _, H, K = gates.shape
    state = [states.new_empty(B, H, K) for _ in range(3)]
    return torch.empty_like(gates), R.new_empty(R.shape), b.new_empty(b.shape), *state


def _mlstm_step_fake(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(v.shape), C.new_empty(C.shape), n.new_empty(n.shape), m.new_empty(m.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    gates, R, b, _h, _c, _n, _m, reset, mask, forget_gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gates, R, b, output[-1], reset, mask)
    ctx.forget_gate = forget_gate


def _gradient(ctx: Any, dout: Any, dh: Any, dc: Any, dn: Any, dm: Any, dstates: Any) -> tuple[Any, ...]:
    gradients = torch.ops.openxlstm_triton.slstm_backward(dout, dh, dc, dn, *ctx.saved_tensors, ctx.forget_gate)
    return *gradients, *([None] * 4)


for _name, _body, _fake in (
    ("slstm", slstm.forward, _slstm_fake),
    ("slstm_backward", slstm.backward, _slstm_backward_fake),
    ("mlstm_step", mlstm_step.functional, _mlstm_step_fake),
):
    _lib.impl(_name, _plain(_body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"openxlstm_triton::{_name}", _fake, lib=_lib)
torch.library.register_autograd("openxlstm_triton::slstm", _gradient, setup_context=_save, lib=_lib)
torch.library.register_autograd("openxlstm_triton::slstm_backward", once, lib=_lib)
