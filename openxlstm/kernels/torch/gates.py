"""The gate pre-pass of the mLSTM: every row maximum of the sequence from gate values alone.

With b_j the sum of log forget gates inside a chunk, and

    key_l = i_l - b_l        row_j = m_j - b_j

the recursion m_j = max(lf_j + m_{j-1}, i_j) of arXiv:2405.04517 (15) reads row_j = max(row_{j-1}, key_j): a prefix
maximum that starts from m of the incoming state. So all stabilisers are known before any score is, and every weight
follows with an exponent <= 0:

    w_jl = exp(key_l - row_j)     weight of key l in row j
    g_j  = exp(m_in - row_j)      weight of the incoming state in row j

At a reset lf is left out of b, which keeps b finite whatever the gate holds, and the running maximum restarts from
the empty state's exponent 0. A masked step has lf = 0 and key = -inf: it passes everything through.

N chunks, B batch, H heads, L chunk length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GatePass:
    """What the chunks need to know about the gates, all [N, B, H, L] (`m_out`: [B, H]; `segment`: [N, B, 1, L])."""

    key: Tensor
    row: Tensor
    m: Tensor  # the stabiliser of (15), b + row
    enter: Tensor  # g_j, 0 after a reset
    write: Tensor  # exp(key_l - row_L): weight of key l in the chunk's final state, 0 before its last reset
    m_out: Tensor
    segment: Tensor | None  # resets in the chunk up to and including j; None if there can be none

    @property
    def decay(self) -> Tensor:
        """Weight of the incoming state in the chunk's final state, [N, B, H]."""
        return self.enter[..., -1]


def to_chunks(x_BTH: Tensor, chunk: int, fill: float) -> Tensor:
    """[B, T, H] -> [N, B, H, L]; a shorter last chunk is filled up (with gates that do nothing)."""
    B, T, H = x_BTH.shape
    N = -(-T // chunk)
    x_BTH = F.pad(x_BTH, (0, 0, 0, N * chunk - T), value=fill)
    return x_BTH.reshape(B, N, chunk, H).permute(1, 0, 3, 2).contiguous()


def from_chunks(x_NBHL: Tensor, T: int) -> Tensor:
    """[N, B, H, L] -> [B, T, H]: the inverse of `to_chunks`."""
    N, B, H, L = x_NBHL.shape
    return x_NBHL.permute(1, 0, 3, 2).reshape(B, N * L, H)[:, :T]


def gate_pass(
    i: Tensor,
    f: Tensor,
    m_in: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    *,
    input_gate: str,
    forget_gate: str,
    chunk: int,
) -> GatePass:
    """Pre-activations i, f [B, T, H] (T >= 1), incoming m [B, H] -> stabilisers and weights, in the dtype of m."""
    i, f = i.to(m_in.dtype), f.to(m_in.dtype)
    log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f
    log_i = i if input_gate == "exp" else F.logsigmoid(i)
    if mask is not None:  # a masked gate may hold NaN
        log_f = torch.where(mask[..., None], log_f, 0.0)
        log_i = torch.where(mask[..., None], log_i, -torch.inf)
    log_f, log_i = to_chunks(log_f, chunk, 0.0), to_chunks(log_i, chunk, -torch.inf)

    segment = starts = None
    decay = log_f
    if reset is not None:
        starts = to_chunks(reset[..., None], chunk, 0.0)
        segment = starts.cumsum(-1)
        decay = torch.where(starts, 0.0, log_f)
    b = decay.cumsum(-1)  # restarts in every chunk: one sum over the sequence loses precision
    key = log_i - b
    if input_gate == "exp":
        row, m_into, m_out = _rows(key, b, log_f, m_in, segment, starts)
    else:
        row, m_into, m_out = -b, torch.zeros_like(b[..., 0]), m_in.new_zeros(m_in.shape)  # nothing is stabilised: m = 0
        m_into[0] = m_in  # 0 as well, unless another gate left this state
    enter = torch.exp(m_into[..., None] - row)
    write = torch.exp(key - row[..., -1:])
    if segment is not None:
        enter = torch.where(segment == 0, enter, 0.0)
        write = torch.where(segment == segment[..., -1:], write, 0.0)
    return GatePass(key, row, b + row, enter, write, m_out, segment)


def _rows(
    key: Tensor, b: Tensor, log_f: Tensor, m_in: Tensor, segment: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """row [N, B, H, L], the m that enters each chunk [N, B, H], and the m that leaves the last one [B, H]."""
    if segment is None or starts is None:
        local = key.cummax(-1).values
    else:  # a segmented running maximum, one position at a time in all chunks at once
        restart = torch.maximum(log_f - b, key)  # m_j = max(lf_j + 0, i_j) after a reset
        running, columns = torch.full_like(key[..., 0], -torch.inf), []
        for j in range(key.shape[-1]):
            running = torch.where(starts[..., j], restart[..., j], torch.maximum(running, key[..., j]))
            columns.append(running)
        local = torch.stack(columns, dim=-1)
    first = None if segment is None else (segment == 0).expand_as(local)
    m, entering = m_in, []
    for n in range(key.shape[0]):  # (max, +) is associative, but N is small and this order is the recursion's own
        entering.append(m)
        last = torch.maximum(m, local[n, ..., -1])
        if first is not None:
            last = torch.where(first[n, ..., -1], last, local[n, ..., -1])
        m = b[n, ..., -1] + last
    m_into = torch.stack(entering)
    row = torch.maximum(m_into[..., None], local)
    return (row if first is None else torch.where(first, row, local)), m_into, m
