"""The torch backend's sweeps as operators of PyTorch's dispatcher: opaque to torch.compile, ordinary to autograd.

An operator rather than an `autograd.Function`: a compiler that traced through would unroll every chunk and compile
anew for every length. `register_fake` tells it the shapes, `register_autograd` the gradient. Differentiating a
gradient a second time is refused, and so is forward mode, whose tangents an operator would drop without a word.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from openxlstm.kernels.torch import mlstm, slstm

_lib = torch.library.Library("openxlstm", "DEF")
_lib.define(
    "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str input_gate, str forget_gate, float eps, int chunk, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "mlstm_backward(Tensor? dh, Tensor? dC, Tensor? dn, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor m,"
    " Tensor? reset, Tensor? mask, Tensor a, Tensor states,"
    " str input_gate, str forget_gate, float eps, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "slstm(Tensor gates, Tensor R, Tensor b, Tensor h, Tensor c, Tensor n, Tensor m, Tensor? reset, Tensor? mask,"
    " str forget_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "slstm_backward(Tensor? dout, Tensor? dh, Tensor? dc, Tensor? dn, Tensor gates, Tensor R, Tensor b, Tensor states,"
    " Tensor? reset, Tensor? mask, str forget_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def refuse_forward_mode(*inputs: Tensor) -> None:
    """RuntimeError if any input carries a tangent."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "xLSTM kernels have no forward-mode derivatives: call openxlstm.cells, the definition, which has"
        )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on x's device: it would round matrix products that must stay fp32."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _plain(function: Any) -> Any:
    """Run an operator's body without autograd and without autocast."""

    def body(*args: Any) -> Any:
        with torch.no_grad(), without_autocast(next(x for x in args if isinstance(x, Tensor))):
            return function(*args)

    return body


def _slstm(*args: Any) -> tuple[Tensor, ...]:
    out, states = slstm.forward(*args)
    m0, reset = args[6], args[7]
    return out, *slstm.final_state(states, m0, reset), states


def _mlstm_fake(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, *rest: Any) -> tuple[Tensor, ...]:
    *_, input_gate, _forget_gate, _eps, chunk, save = rest
    B, T, H, K = q.shape
    V = v.shape[-1]
    P = mlstm.saved_states(T, chunk) if save else 0
    states = C.new_empty(P * B * H, K, mlstm.width(V, input_gate))
    h = v.new_empty(B, T, H, V, dtype=q.dtype)
    return h, C.new_empty(C.shape), n.new_empty(n.shape), m.new_empty(m.shape), C.new_empty(B, T, H), states


def _mlstm_backward_fake(dh: Any, dC: Any, dn: Any, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, i, f = rest[:5]
    states = rest[9]
    B, _, H, K = q.shape
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    gates = [x.new_empty(x.shape) for x in (i, f)]
    return *gradients, *gates, states.new_empty(B, H, K, v.shape[-1]), states.new_empty(B, H, K)


def _slstm_fake(gates: Any, R: Any, b: Any, h: Any, *rest: Any) -> tuple[Tensor, ...]:
    B, T, _, H, K = gates.shape
    state = [h.new_empty(B, H, K) for _ in range(4)]
    return gates.new_empty(B, T, H, K), *state, h.new_empty(T + 1, 4, H, B, K)


def _slstm_backward_fake(
    dout: Any, dh: Any, dc: Any, dn: Any, gates: Any, R: Any, b: Any, states: Any, *rest: Any
) -> Any:
    B, _, _, H, K = gates.shape
    state = [states.new_empty(B, H, K) for _ in range(3)]
    return torch.empty_like(gates), R.new_empty(R.shape), b.new_empty(b.shape), *state


def _mlstm_save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, i, f, _C, _n, m, reset, mask, *options, _save = inputs
    _h, _, _, _, a, states = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, m, reset, mask, a, states)
    ctx.options = options


def _mlstm_gradient(ctx: Any, dh: Any, dC: Any, dn: Any, dm: Any, da: Any, dstates: Any) -> tuple[Any, ...]:
    gradients = torch.ops.openxlstm.mlstm_backward(dh, dC, dn, *ctx.saved_tensors, *ctx.options)
    return *gradients, *([None] * 8)


def _slstm_save(ctx: Any, inputs: Any, output: Any) -> None:
    gates, R, b, _h, _c, _n, _m, reset, mask, forget_gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gates, R, b, output[-1], reset, mask)
    ctx.forget_gate = forget_gate


def _slstm_gradient(ctx: Any, dout: Any, dh: Any, dc: Any, dn: Any, dm: Any, dstates: Any) -> tuple[Any, ...]:
    gates, R, b, states, reset, mask = ctx.saved_tensors
    gradients = torch.ops.openxlstm.slstm_backward(dout, dh, dc, dn, gates, R, b, states, reset, mask, ctx.forget_gate)
    return *gradients, *([None] * 4)


def once(ctx: Any, *gradients: Any) -> None:
    """The derivative of a gradient: refused."""
    raise RuntimeError(
        "xLSTM kernels can be differentiated once: for second derivatives call openxlstm.cells, the definition"
    )


for _name, _body, _fake in (
    ("mlstm", mlstm.forward, _mlstm_fake),
    ("mlstm_backward", mlstm.backward, _mlstm_backward_fake),
    ("slstm", _slstm, _slstm_fake),
    ("slstm_backward", slstm.backward, _slstm_backward_fake),
):
    _lib.impl(_name, _plain(_body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"openxlstm::{_name}", _fake, lib=_lib)
torch.library.register_autograd("openxlstm::mlstm", _mlstm_gradient, setup_context=_mlstm_save, lib=_lib)
torch.library.register_autograd("openxlstm::slstm", _slstm_gradient, setup_context=_slstm_save, lib=_lib)
for _name in ("mlstm_backward", "slstm_backward"):
    torch.library.register_autograd(f"openxlstm::{_name}", once, lib=_lib)
