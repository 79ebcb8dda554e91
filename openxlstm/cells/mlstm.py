"""mLSTM, the definition: slow, plain, and the ground truth for every kernel.

Beck et al. 2024, arXiv:2405.04517, Sec. 2.3 and App. A. Numbers at the right margin are the paper's equations.
B batch, T time, H heads, K query/key width, V value width, L chunk length; j is a row (query), l <= j a key.

i and f are pre-activations. Where the letter differs from the paper, and why nothing changes:
  C and n hold unscaled keys, and C is stored K x V; the 1/sqrt(K) of (23) is applied to q, when it reads;
  gates are stabilised by m, eqs. (15)-(17), so the bound 1 of (21) reads exp(-m) here;
  m is an exponent and carries no gradient: the true memory exp(m) * C does not depend on it;
  eps, 0 in the paper and 1e-6 in every published checkpoint, is added outside the maximum of (21).
The output gate of (21) belongs to the block, not to the cell.

Beyond the paper: `reset` (a new sequence starts at this step) and `mask` (False: this step does not exist) are
arguments, because a very negative gate leaks and minus infinity is NaN in differences of sums. Reset acts first:
a masked reset still empties the state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from openxlstm.cells.state import mLSTMState

INPUT_GATES = ("exp", "sigmoid", "sigmoid_normalized")  # arXiv:2405.04517 (25); arXiv:2503.14376 (mLSTMsig), twice
FORGET_GATES = ("sigmoid", "exp")  # arXiv:2405.04517 (26) allows both

FLOOR_EXPONENT = 80.0  # exp(-m) overflows fp32 below m = -88, and its gradient is then 0 * inf


def check_gates(input_gate: str, forget_gate: str, eps: float) -> None:
    """ValueError unless both activations exist, suit each other, and eps suits them."""
    if input_gate not in INPUT_GATES:
        raise ValueError(f"input_gate={input_gate!r} must be one of {', '.join(INPUT_GATES)}")
    if forget_gate not in FORGET_GATES:
        raise ValueError(f"forget_gate={forget_gate!r} must be one of {', '.join(FORGET_GATES)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be at least 0 and finite; published checkpoints use 1e-6, the paper 0")
    if forget_gate == "exp" and input_gate != "exp":
        raise ValueError(
            f"forget_gate='exp' needs input_gate='exp', given {input_gate!r}: it has no stabiliser, and a memory that "
            "grows by exp(f) at every step overflows"
        )
    if forget_gate == "exp" and eps != 0:
        raise ValueError(
            f"forget_gate='exp' needs eps=0, given eps={eps}: eps counts exp(m) times, and m of the empty state then "
            "grows with the sum of the forget gates"
        )


def step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    i: Float[Tensor, "B H"],
    f: Float[Tensor, "B H"],
    state: mLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "B"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B H V"], mLSTMState]:
    """One time step: keep some of the memory, write one association, read with the query."""
    check_gates(input_gate, forget_gate, eps)
    state = _start(q, k, v, state)
    if reset is not None:
        state = state.map(lambda old: torch.where(_like(reset, old), 0.0, old))
    before, dtype = state, q.dtype
    q, k, v, i, f = (x.to(state.m.dtype) for x in (q, k, v, i, f))
    if mask is not None:
        q, k, v, i, f = (torch.where(_like(mask, x), x, 0.0) for x in (q, k, v, i, f))  # 0 * NaN is NaN

    # fmt: off
    log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f                                            # (26)
    log_i = i if input_gate == "exp" else F.logsigmoid(i)                                                 # (25)
    m = torch.maximum(log_f + state.m, log_i) if input_gate == "exp" else torch.zeros_like(state.m)       # (15)
    m = m.detach()
    write_BH = torch.exp(log_i - m)                                                                       # (16)
    keep_BH = torch.exp(log_f + state.m - m)                                                              # (17)
    kv_BHKV = k[..., :, None] * v[..., None, :]
    C = keep_BH[..., None, None] * state.C + write_BH[..., None, None] * kv_BHKV                          # (19)
    n = keep_BH[..., None] * state.n + write_BH[..., None] * k                                            # (20)
    q = q * q.shape[-1] ** -0.5                                                                           # (23)
    h = torch.einsum("bhk,bhkv->bhv", q, C)
    if input_gate == "sigmoid":
        n = torch.zeros_like(n)
    else:
        a_BH = (q * n).sum(-1)
        h = h / denominator(a_BH, m, eps)[..., None]                                                      # (21)
    # fmt: on

    after = mLSTMState(C, n, m)
    if mask is not None:
        h = torch.where(_like(mask, h), h, 0.0)
        after = mLSTMState(*(torch.where(_like(mask, x), x, y) for x, y in zip(after.tensors(), before.tensors())))
    return h.to(dtype), after


def recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    i: Float[Tensor, "B T H"],
    f: Float[Tensor, "B T H"],
    state: mLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B T H V"], mLSTMState]:
    """The definition: `step`, T times."""
    check_gates(input_gate, forget_gate, eps)
    state = _start(q, k, v, state)
    h_TBHV = []
    for t in range(q.shape[1]):
        h_BHV, state = step(
            q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], state,
            reset=None if reset is None else reset[:, t],
            mask=None if mask is None else mask[:, t],
            input_gate=input_gate, forget_gate=forget_gate, eps=eps,
        )  # fmt: skip
        h_TBHV.append(h_BHV)
    return torch.stack(h_TBHV, dim=1) if h_TBHV else torch.zeros_like(v, dtype=q.dtype), state


def chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    i: Float[Tensor, "B T H"],
    f: Float[Tensor, "B T H"],
    state: mLSTMState | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    eps: float = 1e-6,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B T H V"], mLSTMState]:
    """The same function in parallel over `chunk` steps at a time; chunk = T is the paper's parallel form (App. A.3).

    The last chunk is simply shorter.
    """
    B, T = q.shape[:2]
    reset_BT = q.new_zeros(B, T, dtype=torch.bool) if reset is None else reset
    mask_BT = q.new_ones(B, T, dtype=torch.bool) if mask is None else mask
    check_gates(input_gate, forget_gate, eps)
    state = _start(q, k, v, state)
    parts = []
    for start in range(0, T, chunk):
        q_BLHK, k_BLHK, v_BLHV, i_BLH, f_BLH, reset_BL, mask_BL = (
            x[:, start : start + chunk] for x in (q, k, v, i, f, reset_BT, mask_BT)
        )
        h, state = _one_chunk(
            q_BLHK, k_BLHK, v_BLHV, i_BLH, f_BLH, reset_BL, mask_BL, state, input_gate, forget_gate, eps
        )
        parts.append(h)
    return torch.cat(parts, dim=1) if parts else torch.zeros_like(v, dtype=q.dtype), state


def _one_chunk(
    q: Float[Tensor, "B L H K"],
    k: Float[Tensor, "B L H K"],
    v: Float[Tensor, "B L H V"],
    i: Float[Tensor, "B L H"],
    f: Float[Tensor, "B L H"],
    reset: Bool[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    state: mLSTMState,
    input_gate: str,
    forget_gate: str,
    eps: float,
) -> tuple[Float[Tensor, "B L H V"], mLSTMState]:
    """Unroll (15)-(20) inside the chunk: row j sees key l <= j of its own segment with weight exp(log_w[j, l] - m[j]).

    b_j is the sum of the log forget gates from the start of j's segment up to j. In the first segment the incoming
    state has decayed by exp(b_j); after a reset the empty state has, and only its exponent m = 0 is left of it.
    """
    L, dtype = q.shape[1], q.dtype
    q, k, v, i, f = (x.to(state.m.dtype) for x in (q, k, v, i, f))
    q, k, v, f = (torch.where(_like(mask, x), x, 0.0) for x in (q, k, v, f))
    # fmt: off
    log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f                                            # (26)
    log_i = i if input_gate == "exp" else F.logsigmoid(i)                                                 # (25)
    log_f_BHL = torch.where(mask[..., None], log_f, 0.0).transpose(1, 2)
    log_i_BHL = torch.where(mask[..., None], log_i, -torch.inf).transpose(1, 2)

    segment_BL = reset.cumsum(dim=1)
    same_BHLL = (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    first_BHL = (segment_BL == 0)[:, None]
    b_BHL = torch.einsum("bhl,bhjl->bhj", log_f_BHL, (same_BHLL & causal_LL).to(log_f.dtype))
    log_w = b_BHL[..., :, None] - b_BHL[..., None, :] + log_i_BHL[..., None, :]
    log_w = torch.where(same_BHLL & causal_LL, log_w, -torch.inf)
    log_g = b_BHL + torch.where(first_BHL, state.m[..., None], 0.0)
    m_BHL = torch.maximum(log_w.amax(-1), log_g) if input_gate == "exp" else torch.zeros_like(log_g)      # (15)
    m_BHL = m_BHL.detach()
    w_BHLL = torch.exp(log_w - m_BHL[..., None])                                                          # (16)
    g_BHL = torch.where(first_BHL, torch.exp(log_g - m_BHL), 0.0)                                         # (17)

    q = q * q.shape[-1] ** -0.5                                                                           # (23)
    S_BHLL = torch.einsum("bjhk,blhk->bhjl", q, k) * w_BHLL
    h = torch.einsum("bhjl,blhv->bhjv", S_BHLL, v)
    h = h + g_BHL[..., None] * torch.einsum("bjhk,bhkv->bhjv", q, state.C)
    C = torch.einsum("bhl,blhk,blhv->bhkv", w_BHLL[:, :, -1], k, v) + g_BHL[..., -1, None, None] * state.C  # (19)
    n = torch.einsum("bhl,blhk->bhk", w_BHLL[:, :, -1], k) + g_BHL[..., -1, None] * state.n               # (20)
    if input_gate == "sigmoid":
        n = torch.zeros_like(n)
    else:
        a_BHL = S_BHLL.sum(-1) + g_BHL * torch.einsum("bjhk,bhk->bhj", q, state.n)
        h = h / denominator(a_BHL, m_BHL, eps)[..., None]                                                 # (21)
    # fmt: on
    h = torch.where(mask[..., None, None], h.transpose(1, 2), 0.0)
    return h.to(dtype), mLSTMState(C, n, m_BHL[..., -1])


def denominator(a: Float[Tensor, "*any"], m: Float[Tensor, "*any"], eps: float) -> Float[Tensor, "*any"]:
    """max(|a|, 1) of (21), in the frame where a is divided by exp(m); a is the query's product with n."""
    return torch.maximum(a.abs(), torch.exp(-m.clamp(-FLOOR_EXPONENT, FLOOR_EXPONENT))) + eps


def _start(q: Tensor, k: Tensor, v: Tensor, state: mLSTMState | None) -> mLSTMState:
    """The given state, its m without history, or the empty one, in fp32 (fp64 for fp64 inputs)."""
    if state is not None:
        return mLSTMState(state.C, state.n, state.m.detach())
    dtype = torch.promote_types(q.dtype, torch.float32)
    return mLSTMState.empty(q.shape[0], q.shape[-2], k.shape[-1], v.shape[-1], device=q.device, dtype=dtype)


def _like(flag: Tensor, x: Tensor) -> Tensor:
    """Append axes to a flag over [B] or [B, L] until it broadcasts against x."""
    return flag.reshape(flag.shape + (1,) * (x.ndim - flag.ndim))
