"""The torch backend: plain PyTorch, hand-written gradients, any device and any dtype. It never refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.cells import mlstm as mlstm_cell
from openxlstm.cells import mLSTMState, sLSTMState
from openxlstm.cells import slstm as slstm_cell
from openxlstm.kernels.torch import ops as ops
from openxlstm.kernels.torch import step as step
from openxlstm.kernels.torch.mlstm import best_chunk


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: mLSTMState,
    *,
    reset: Tensor | None,
    mask: Tensor | None,
    input_gate: str,
    forget_gate: str,
    eps: float,
    chunk: int | None,
) -> tuple[Tensor, mLSTMState]:
    """See `openxlstm.kernels.mlstm`; here T >= 1 and the arguments are checked."""
    inputs = (q, k, v, i, f, state.C, state.n)
    ops.refuse_forward_mode(*inputs)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    length = best_chunk(q.shape[-1], v.shape[-1]) if chunk is None else chunk
    h, C, n, m, _a, _states = torch.ops.openxlstm.mlstm(
        *inputs, state.m.detach(), reset, mask, input_gate, forget_gate, eps, length, save
    )
    return h, mLSTMState(C, n, m.detach())


def slstm(
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    state: sLSTMState,
    *,
    reset: Tensor | None,
    mask: Tensor | None,
    forget_gate: str,
) -> tuple[Tensor, sLSTMState]:
    """See `openxlstm.kernels.slstm`; here T >= 1 and the arguments are checked."""
    inputs = (gates, R, b, state.h, state.c, state.n)
    ops.refuse_forward_mode(*inputs)
    out, h, c, n, m, _states = torch.ops.openxlstm.slstm(*inputs, state.m.detach(), reset, mask, forget_gate)
    return out, sLSTMState(h, c, n, m.detach())


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: mLSTMState,
    *,
    reset: Tensor | None,
    mask: Tensor | None,
    input_gate: str,
    forget_gate: str,
    eps: float,
) -> tuple[Tensor, mLSTMState]:
    """One step has nothing to gain from a hand-written gradient: the definition serves it, and nothing rounds it."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, i, f, state.C, state.n))
    with ops.without_autocast(q):
        if not needs_grad and reset is None and mask is None and (input_gate, forget_gate) == ("exp", "sigmoid"):
            return step.mlstm_step(q, k, v, i, f, state, eps)
        return mlstm_cell.step(
            q, k, v, i, f, state,
            reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps,
        )  # fmt: skip


def slstm_step(
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    state: sLSTMState,
    *,
    reset: Tensor | None,
    mask: Tensor | None,
    forget_gate: str,
) -> tuple[Tensor, sLSTMState]:
    """As `mlstm_step`."""
    with ops.without_autocast(gates):
        return slstm_cell.step(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)
