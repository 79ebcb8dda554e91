"""The cpu backend: native kernels behind a plain C interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openxlstm.cells import mLSTMState, sLSTMState
from openxlstm.kernels.cpu import glue_ops as glue_ops
from openxlstm.kernels.cpu import mlstm_ops as mlstm_ops
from openxlstm.kernels.cpu import ops as ops
from openxlstm.kernels.cpu.library import LONGEST_CHUNK, native
from openxlstm.kernels.torch.ops import refuse_forward_mode

if TYPE_CHECKING:
    from openxlstm.kernels.dispatch import Call


def refuses(call: Call) -> str | None:
    """One sentence if this backend cannot serve the call."""
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if call.op == "mlstm" and call.forget_gate != "sigmoid":
        return "an exponential forget gate is served by torch: weights above 1 need another order of work"
    if call.op == "mlstm_step" and (call.input_gate, call.forget_gate) != ("exp", "sigmoid"):
        return "a step with other gates than an exponential input and a sigmoid forget gate is served by torch"
    if call.op.endswith("_step") and call.needs_grad:
        return "one step with gradients is served by torch"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return (
            f"{str(call.dtype).removeprefix('torch.')} is served by torch; the native kernels take float32 and bfloat16"
        )
    return _MISSING


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
    """See `openxlstm.kernels.mlstm`; here T >= 1, the arguments are checked, and the forget gate is a sigmoid.

    A chunk is at most 256 steps long; a longer one that was asked for is cut, which changes rounding alone.
    """
    inputs = (q, k, v, i, f, state.C, state.n)
    refuse_forward_mode(*inputs)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    length = mlstm_ops.best_chunk(q.shape[-1], v.shape[-1], q.dtype) if chunk is None else min(chunk, LONGEST_CHUNK)
    h, C, n, m, *_kept = torch.ops.openxlstm_cpu.mlstm(
        *inputs, state.m.detach(), reset, mask, input_gate, eps, length, save
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
    refuse_forward_mode(*inputs)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out, h, c, n, m, _tape = torch.ops.openxlstm_cpu.slstm(*inputs, state.m.detach(), reset, mask, forget_gate, save)
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
    """See `openxlstm.kernels.mlstm_step`; no gradients, and the gates that `refuses` lets through."""
    refuse_forward_mode(q, k, v, i, f, state.C, state.n)
    h, C, n, m = torch.ops.openxlstm_cpu.mlstm_step(q, k, v, i, f, state.C, state.n, state.m, reset, mask, eps)
    return h, mLSTMState(C, n, m)


def missing() -> str | None:
    """One sentence about why there is no native library; None where there is one."""
    return _MISSING


def about() -> str:
    """What serves, for people: the instruction set, or why there is none."""
    if isinstance(_FOUND, str):
        return _FOUND
    refused = "; AMX is there, and the operating system does not grant it" if _FOUND.refused_amx else ""
    what = "native kernels of both cells and of what surrounds them"
    return f"{what}, {_FOUND.name} instructions; float32 and bfloat16{refused}"


_FOUND = native()  # at import, so that a decision reads no file and no environment variable
_MISSING = _FOUND if isinstance(_FOUND, str) else None
