"""sLSTM over a whole sequence in plain PyTorch with a hand-written backward: any device, any dtype.

The equations are those of `cells/slstm.py` (arXiv:2405.04517, Sec. 2.2). Memory mixing makes the sweep sequential, so
its cost is the number of calls per step: both sweeps write into buffers laid out beforehand, the backward computes all
that does not depend on the sweep for SPAN steps at once, and dR is one matrix product per span.

Backward, t = T..1, m held constant, GC and GN the gradients of c_t and n_t:

    dh = dh_ext + GH ;  do = dh (c/n) so (1 - so) ;  GC += dh so/n ;  GN -= dh h/n
    di = I (GC tz + GN) ;  dz = GC I (1 - tz^2) ;  df = F (GC c_prev + GN n_prev) sig(-f)
    GH[d] = sum_ge R[d,g,e] (di,df,dz,do)[g,e] ;  GC <- F GC ;  GN <- F GN

Buffers are [T, H, B, ...]: heads first, because R is applied head by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 256  # steps whose coefficients are laid out together in the backward: bounds its memory for any T


@dataclass(frozen=True, slots=True)
class _Events:
    """Which rows reset or pause at a step, [T, 1, B, 1] each; `None` at a step where no row does."""

    resets: list[Tensor | None]
    pauses: list[Tensor | None]

    @classmethod
    def read(cls, reset: Tensor | None, mask: Tensor | None, T: int) -> _Events:
        return cls(cls._steps(reset, T), cls._steps(None if mask is None else ~mask, T))

    @staticmethod
    def _steps(flags: Tensor | None, T: int) -> list[Tensor | None]:
        if flags is None:
            return [None] * T
        steps = flags.t()[:, None, :, None].unbind(0)
        if flags.device.type != "cpu":
            return list(steps)  # asking which steps have none would wait for the device
        return [step if some else None for step, some in zip(steps, flags.any(0).tolist())]


def forward(
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    h0: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    forget_gate: str,
) -> tuple[Tensor, Tensor]:
    """h [B,T,H,K] in the gates' dtype, and every state h, c, n, m as [T+1, 4, H, B, K]. T >= 1."""
    B, T, _, H, K = gates.shape
    events = _Events.read(reset, mask, T)
    states = h0.new_empty(T + 1, 4, H, B, K)
    for part, x in zip(states[0], (h0, c0, n0, m0)):
        part.copy_(x.transpose(0, 1))
    no_memory = n0.transpose(0, 1) == 0
    states[0, 3].masked_fill_(no_memory, -torch.inf)  # m of an empty element is ignored: m_t = max(-inf, i_t)
    raw_all = _pre_activations(gates, b, mask, h0.dtype)
    R_flat = R.to(h0.dtype).reshape(H, K, 4 * K)
    l, keep_write = h0.new_empty(H, B, K), h0.new_empty(2, H, B, K)
    keep, write = keep_write.unbind(0)
    for t in range(T):
        before, after = states[t], states[t + 1]
        if (fresh := events.resets[t]) is not None:
            before = torch.where(fresh, 0.0, before)
            before[3].masked_fill_(fresh, -torch.inf)
        h, c, n, m = before.unbind(0)
        h_next, c_next, n_next, m_next = after.unbind(0)
        raw = raw_all[t]
        raw.flatten(2).baddbmm_(h, R_flat)
        i, f, z, o = raw.unbind(2)
        log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f
        torch.add(log_f, m, out=l)
        torch.maximum(l, i, out=m_next)
        torch.sub(l, m_next, out=keep)
        torch.sub(i, m_next, out=write)
        keep_write.exp_()
        torch.mul(keep, c, out=c_next).addcmul_(write, z.tanh_())
        torch.addcmul(write, keep, n, out=n_next)
        torch.mul(o.sigmoid_(), c_next, out=h_next).div_(n_next)
        if (paused := events.pauses[t]) is not None:
            torch.where(paused, before, after, out=after)
    h_BTHK = states[1:, 0].permute(2, 0, 1, 3)
    if mask is not None:
        h_BTHK = torch.where(mask[..., None, None], h_BTHK, 0.0)
    return h_BTHK.to(gates.dtype, memory_format=torch.contiguous_format, copy=True), states


def final_state(states: Tensor, m0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, c, n, m [B, H, K] after the last step. Elements that are still empty keep their m, or 0 after a reset."""
    h, c, n, m = (part.transpose(0, 1).clone(memory_format=torch.contiguous_format) for part in states[-1])
    if reset is not None:
        m0 = torch.where(reset.any(1)[:, None, None], 0.0, m0)
    return h, c, n, torch.where(n == 0, m0, m)


def backward(
    dout: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    dn: Tensor | None,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    forget_gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, R, b and of the initial h, c, n, for cotangents of h and of the final h, c, n."""
    B, T, _, H, K = gates.shape
    events = _Events.read(reset, mask, T)
    R_flat = R.to(states.dtype).reshape(H, K, 4 * K)
    R_back = R_flat.mT.contiguous()
    dgates, dR, db = torch.empty_like(gates), torch.zeros_like(R_flat), states.new_zeros(4, H, K)
    GH = states.new_zeros(H, B, K) if dh is None else dh.transpose(0, 1).clone()
    G = states.new_zeros(H, B, 2, K)
    for part, x in zip(G.unbind(2), (dc, dn)):
        if x is not None:
            part.copy_(x.transpose(0, 1))
    for first in reversed(range(0, T, SPAN)):
        last = min(first + SPAN, T)
        span = slice(first, last)
        before, after = states[first:last], states[first + 1 : last + 1]
        if reset is not None:
            fresh = reset[:, span].t()[:, None, None, :, None]
            before = torch.where(fresh, 0.0, before)
            before[:, 3].masked_fill_(fresh[:, 0], -torch.inf)
        h_prev, c_prev, n_prev, m_prev = before.unbind(1)
        h, c, n, m = after.unbind(1)
        raw = _pre_activations(gates[:, span], b, None if mask is None else mask[:, span], states.dtype)
        h_heads = h_prev.transpose(0, 1).flatten(1, 2)  # [H, S B, K]; matmul would copy R for every step instead
        raw.flatten(3).add_(torch.bmm(h_heads, R_flat).view(H, last - first, B, 4 * K).transpose(0, 1))
        i, f, z, o = raw.unbind(3)
        log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f
        keep, write = torch.exp(log_f + m_prev - m), torch.exp(i - m)
        z, o = torch.tanh(z), torch.sigmoid(o)
        df = keep * torch.sigmoid(-f) if forget_gate == "sigmoid" else keep
        into_state = torch.stack((o / n, -h / n), dim=3)  # [S, H, B, 2, K]: what dh adds to GC, GN
        from_state = states.new_zeros(last - first, H, B, 3, 2, K)  # what GC, GN give to i, f, z
        for gate, (of_c, of_n) in enumerate(
            ((write * z, write), (df * c_prev, df * n_prev), (write * (1 - z * z), None))
        ):
            from_state[:, :, :, gate, 0] = of_c
            if of_n is not None:
                from_state[:, :, :, gate, 1] = of_n
        from_h = (c / n) * o * (1 - o)
        keep = keep[:, :, :, None]
        draw = states.new_empty(last - first, H, B, 4, K)
        dh_out = states.new_zeros(1, 1, 1, 1).expand(last - first, H, B, K)
        if dout is not None:
            dh_out = dout[:, span].to(states.dtype).permute(1, 2, 0, 3)  # of paused steps too: nothing of it is kept
        for s in reversed(range(last - first)):
            paused, fresh_now = events.pauses[first + s], events.resets[first + s]
            G_after, GH_after = G, GH
            total = GH + dh_out[s]
            G = torch.addcmul(G, total[:, :, None], into_state[s])
            torch.sum(G[:, :, None] * from_state[s], dim=3, out=draw[s, :, :, :3])
            torch.mul(total, from_h[s], out=draw[s, :, :, 3])
            if paused is not None:
                draw[s].masked_fill_(paused[..., None], 0.0)
            GH = torch.bmm(draw[s].flatten(2), R_back)
            G = G * keep[s]
            if paused is not None:
                G, GH = torch.where(paused[..., None], G_after, G), torch.where(paused, GH_after, GH)
            if fresh_now is not None:  # what came before was emptied
                G, GH = G.masked_fill(fresh_now[..., None], 0.0), GH.masked_fill(fresh_now, 0.0)
        dgates[:, span] = draw.permute(2, 0, 3, 1, 4).to(gates.dtype)
        db += draw.sum((0, 2)).transpose(0, 1)
        dR.baddbmm_(h_heads.mT, draw.permute(1, 0, 2, 3, 4).flatten(3).flatten(1, 2))
    dh0, dc0, dn0 = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (GH, *G.unbind(2)))
    return dgates, dR.view_as(R).to(R.dtype), db.to(b.dtype), dh0, dc0, dn0


def _pre_activations(gates: Tensor, b: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gates + b as a fresh [T, H, B, 4, K]; 0 + b where masked, since a masked gate may hold NaN."""
    B, T, _, H, K = gates.shape
    out = torch.empty(T, H, B, 4, K, dtype=dtype, device=gates.device)
    out.copy_(gates.permute(1, 3, 0, 2, 4))
    if mask is not None:
        out.masked_fill_(~mask.t()[:, None, :, None, None], 0.0)
    return out.add_(b.to(dtype).transpose(0, 1)[:, None])
