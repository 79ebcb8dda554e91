"""sLSTM, the definition: slow, plain, and the ground truth for every kernel.

Beck et al. 2024, arXiv:2405.04517, Sec. 2.2 and App. A.2. Numbers at the right margin are the paper's equations.
B batch, T time, H heads, K head width; axis 4 holds the gates in the order i, f, z, o.

`gates` are the input's share of the pre-activations, W x. Where the letter differs from the paper:
  c, n are stabilised by m, eqs. (15)-(17), which cancels in h = o c / n;
  an element that has seen nothing (n = 0) keeps nothing, and takes m from its input gate alone, whatever m says;
  m is an exponent and carries no gradient.

Beyond the paper: `reset` (a new sequence starts at this step) and `mask` (False: this step does not exist).
Reset acts first: a masked reset still empties the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from openxlstm.cells.mlstm import FORGET_GATES
from openxlstm.cells.state import sLSTMState


def check_gate(forget_gate: str) -> None:
    """ValueError unless the activation exists."""
    if forget_gate not in FORGET_GATES:
        raise ValueError(f"forget_gate={forget_gate!r} must be one of {', '.join(FORGET_GATES)}")


def step(
    gates: Float[Tensor, "B 4 H K"],
    R: Float[Tensor, "H K 4 K"],
    b: Float[Tensor, "4 H K"],
    state: sLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "B"] | None = None,
    forget_gate: str = "sigmoid",
) -> tuple[Float[Tensor, "B H K"], sLSTMState]:
    """One time step. R[head, input, gate, output] mixes memory inside a head, never across heads."""
    check_gate(forget_gate)
    state = _start(gates, state)
    if reset is not None:
        state = state.map(lambda old: torch.where(reset[:, None, None], 0.0, old))
    before, dtype = state, gates.dtype
    gates, R, b = (x.to(state.h.dtype) for x in (gates, R, b))
    if mask is not None:
        gates = torch.where(mask[:, None, None, None], gates, 0.0)  # 0 * NaN is NaN

    # fmt: off
    raw = gates + torch.einsum("bhd,hdge->bghe", state.h, R) + b                                     # (11)-(14)
    i, f, z, o = raw.unbind(1)
    log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f                                            # (13)
    l = log_f + state.m
    empty = state.n == 0
    m = torch.where(empty, i, torch.maximum(l, i)).detach()                                               # (15)
    write = torch.exp((i - m).clamp(max=0.0))                                                             # (16)
    keep = torch.where(empty, 0.0, torch.exp((l - m).clamp(max=0.0)))                                     # (17)
    c = keep * state.c + write * torch.tanh(z)                                                             # (8)
    n = keep * state.n + write                                                                             # (9)
    h = torch.sigmoid(o) * c / n                                                                          # (10)
    # fmt: on

    after = sLSTMState(h, c, n, m)
    if mask is not None:
        keep_old = mask[:, None, None]
        after = sLSTMState(*(torch.where(keep_old, x, y) for x, y in zip(after.tensors(), before.tensors())))
        h = torch.where(keep_old, h, 0.0)
    return h.to(dtype), after


def recurrent(
    gates: Float[Tensor, "B T 4 H K"],
    R: Float[Tensor, "H K 4 K"],
    b: Float[Tensor, "4 H K"],
    state: sLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    forget_gate: str = "sigmoid",
) -> tuple[Float[Tensor, "B T H K"], sLSTMState]:
    """The definition: `step`, T times. Memory mixing leaves no parallel form."""
    check_gate(forget_gate)
    state = _start(gates, state)
    h_TBHK = []
    for t in range(gates.shape[1]):
        h_BHK, state = step(
            gates[:, t], R, b, state,
            reset=None if reset is None else reset[:, t],
            mask=None if mask is None else mask[:, t],
            forget_gate=forget_gate,
        )  # fmt: skip
        h_TBHK.append(h_BHK)
    return torch.stack(h_TBHK, dim=1) if h_TBHK else gates[:, :, 0], state


def _start(gates: Tensor, state: sLSTMState | None) -> sLSTMState:
    """The given state, its m without history, or the empty one, in fp32 (fp64 for fp64 inputs)."""
    if state is not None:
        return sLSTMState(state.h, state.c, state.n, state.m.detach())
    dtype = torch.promote_types(gates.dtype, torch.float32)
    return sLSTMState.empty(gates.shape[0], *gates.shape[-2:], device=gates.device, dtype=dtype)
