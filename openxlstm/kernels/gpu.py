"""The triton backend's door: what it refuses, without importing Triton, and the operations, which import it.

No kernel is chosen by "auto" before its gradients have been tested on the hardware: they are proved in Triton's
interpreter and compile for sm_80, sm_90 and sm_100, and both say nothing of a compiler's wrong code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openxlstm.cells import mLSTMState, sLSTMState

if TYPE_CHECKING:
    from openxlstm.kernels.dispatch import Call

OLDEST = (3, 6)
WIDEST = 512  # of K and V
ON_REQUEST = "not yet proved on a GPU, so only a call that names it gets it: backend='triton'"


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= OLDEST else f"Triton {version} is older than {OLDEST[0]}.{OLDEST[1]}"


def refuses(call: Call) -> str | None:
    """One sentence if this backend cannot serve the call."""
    if _MISSING:
        return _MISSING
    if call.device != "cuda" and not (call.device == "cpu" and _INTERPRETED):
        return f"the tensors are on {call.device}"
    if call.dtype == torch.float64:
        return "float64 is served by torch"
    if call.dtype == torch.bfloat16 and _INTERPRETED:
        return "Triton's interpreter multiplies the bits of bfloat16, not its values"
    if call.op == "mlstm" and call.forget_gate != "sigmoid":
        return "an exponential forget gate is served by torch: weights above 1 need another order of work"
    if call.op == "mlstm_step" and call.needs_grad:
        return "one step with gradients is served by torch"
    for name, width in (("K", call.K), ("V", call.V)):
        if width > WIDEST:
            return f"{name}={width} exceeds {WIDEST}"
    return None


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
    """See `openxlstm.kernels.mlstm`; here T >= 1, and the gates are those that `refuses` lets through."""
    from openxlstm.kernels.triton.mlstm import mlstm as launch

    return launch(
        q, k, v, i, f, state,
        reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps, chunk=chunk,
    )  # fmt: skip


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
    """See `openxlstm.kernels.mlstm_step`; no gradients."""
    from openxlstm.kernels.triton.recurrent import mlstm_step as launch

    return launch(q, k, v, i, f, state, reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps)


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
    """See `openxlstm.kernels.slstm`; here T >= 1."""
    from openxlstm.kernels.triton.recurrent import slstm as launch

    return launch(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


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
    from openxlstm.kernels.triton.recurrent import slstm_step as launch

    return launch(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


def about() -> str:
    """What serves, for people, or why nothing does."""
    return _MISSING or "Triton kernels of both cells; bfloat16, float16 and float32; not yet run on a GPU"


_MISSING = _missing()  # at import, so that a decision reads no file and no environment variable
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
