"""What the triton backend serves step by step: the sLSTM, and decoding with the mLSTM. Signatures as the doors'."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.cells import mLSTMState, sLSTMState
from openxlstm.kernels.in_place import may_overwrite
from openxlstm.kernels.torch.ops import refuse_forward_mode
from openxlstm.kernels.triton import recurrent_ops as recurrent_ops
from openxlstm.kernels.triton.mlstm_step import step_in_place, updatable


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
    refuse_forward_mode(*inputs)
    out, h, c, n, m, _states = torch.ops.openxlstm_triton.slstm(*inputs, state.m.detach(), reset, mask, forget_gate)
    return out, sLSTMState(h, c, n, m.detach())


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
    """A sequence of one."""
    flags = {"reset": None if reset is None else reset[:, None], "mask": None if mask is None else mask[:, None]}
    out, state = slstm(gates[:, None], R, b, state, **flags, forget_gate=forget_gate)
    return out[:, 0], state


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
    """See `openxlstm.kernels.mlstm_step`; no gradients. Where states may be overwritten, this one is, and returned."""
    refuse_forward_mode(q, k, v, i, f, state.C, state.n)
    if may_overwrite() and all(map(updatable, state.tensors())):
        h = step_in_place(
            q, k, v, i, f, state.C, state.n, state.m, reset, mask,
            input_gate=input_gate, forget_gate=forget_gate, eps=eps,
        )  # fmt: skip
        return h, state
    h, C, n, m = torch.ops.openxlstm_triton.mlstm_step(
        q, k, v, i, f, state.C, state.n, state.m, reset, mask, input_gate, forget_gate, eps
    )
    return h, mLSTMState(C, n, m)
