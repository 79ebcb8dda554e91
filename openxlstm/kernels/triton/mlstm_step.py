"""One decoding step of the mLSTM on a GPU: the memory is read once and written once.

The equations of `cells/mlstm.py` (arXiv:2405.04517, Sec. 2.3). Grid (V tile, head of a row): a program owns K x TILE_V
of C, so C may be updated where it lies. n and m may not: every program of a head needs the old ones, and the first
would have overwritten them for the others. They are written elsewhere, by the program of the first V tile;
`step_in_place` copies them back when the kernel is done, K / (K V) of the traffic.

B batch, H heads, K query/key width, V value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openxlstm.kernels.triton.layout import RUNTIME, numbers, readable, strides
from openxlstm.kernels.triton.slstm_cell import logsigmoid

TILE_V = 32
TILE_K = 256  # C's tile is 256 x 32 fp32: 64 registers of each of 128 threads. Wider keys take several turns.


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_i", "p_f", "p_n", "p_m", "p_reset", "p_mask"])
def step(
    p_q, p_k, p_v, p_i, p_f, p_C, p_n, p_m, p_reset, p_mask, p_h, p_C_out, p_n_out, p_m_out, B, H,
    s_qB, s_qH, s_kB, s_kH, s_vB, s_vH, eps, scale,
    K: tl.constexpr, V: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    INPUT_GATE: tl.constexpr, EXP_FORGET: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """C, n, m fp32 contiguous [B,H,..]; i, f fp32 [B,H]; p_C_out may be p_C, p_n_out and p_m_out may not be theirs."""
    i_v = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)  # b H + h
    i_b, i_h = row // H, row % H
    s_qB, s_qH, s_kB, s_kH = numbers(s_qB, K), numbers(s_qH, K), numbers(s_kB, K), numbers(s_kH, K)
    s_vB, s_vH = numbers(s_vB, V), numbers(s_vH, V)
    o_v = i_v * TILE_V + tl.arange(0, TILE_V)
    in_v = o_v < V
    kept = 1.0  # 0 where the state was emptied before this step
    if RESET:
        kept = tl.where(tl.load(p_reset + i_b) != 0, 0.0, 1.0)
    awake = True
    if MASK:
        awake = tl.load(p_mask + i_b) != 0
    # Widths where something is read, 0 where there is no step; Triton 3.9's interpreter takes no product of masks here.
    read_K, read_V = tl.where(awake, K, 0), tl.where(awake, V, 0)
    write_K = tl.where(i_v == 0, K, 0)
    b_i = tl.load(p_i + row, mask=awake, other=0.0)
    b_f = tl.load(p_f + row, mask=awake, other=0.0)
    m = tl.load(p_m + row)
    if RESET:
        m = tl.where(kept == 0.0, 0.0, m)
    log_f = b_f if EXP_FORGET else logsigmoid(b_f)  # (26)
    log_i = b_i if INPUT_GATE == "exp" else logsigmoid(b_i)  # (25)
    m_new = tl.maximum(log_f + m, log_i) if INPUT_GATE == "exp" else m * 0.0  # (15)
    write = tl.exp(log_i - m_new)  # (16)
    keep = tl.exp(log_f + m - m_new)  # (17)
    v = tl.load(p_v + i_b * s_vB + i_h * s_vH + o_v, mask=o_v < read_V, other=0.0).to(tl.float32)
    acc = tl.zeros((TILE_V,), dtype=tl.float32)
    a = 0.0
    for k0 in range(0, K, TILE_K):
        o_k = k0 + tl.arange(0, TILE_K)
        in_k = o_k < K
        q = tl.load(p_q + i_b * s_qB + i_h * s_qH + o_k, mask=o_k < read_K, other=0.0).to(tl.float32) * scale  # (23)
        k = tl.load(p_k + i_b * s_kB + i_h * s_kH + o_k, mask=o_k < read_K, other=0.0).to(tl.float32)
        n = tl.load(p_n + row * K + o_k, mask=in_k, other=0.0)
        o_C = row * K * V + o_k[:, None] * V + o_v[None, :]
        inside = in_k[:, None] & in_v[None, :]
        C = tl.load(p_C + o_C, mask=inside, other=0.0)
        if RESET:  # where, not times: what is emptied may hold anything
            n, C = tl.where(kept == 0.0, 0.0, n), tl.where(kept == 0.0, 0.0, C)
        C_new = keep * C + (write * k)[:, None] * v[None, :]  # (19)
        n_new = keep * n + write * k  # (20)
        acc += tl.sum(q[:, None] * C_new, axis=0)
        a += tl.sum(q * n_new, axis=0)
        if INPUT_GATE == "sigmoid":
            n_new = n * 0.0
        if MASK:
            C_new, n_new = tl.where(awake, C_new, C), tl.where(awake, n_new, n)
        tl.store(p_C_out + o_C, C_new, mask=inside)
        tl.store(p_n_out + row * K + o_k, n_new, mask=o_k < write_K)
    h = acc
    if INPUT_GATE != "sigmoid":
        floor = tl.exp(-tl.minimum(tl.maximum(m_new, -80.0), 80.0))
        h = acc / (tl.maximum(tl.abs(a), floor) + eps)  # (21)
    if MASK:
        h = tl.where(awake, h, 0.0)
        m_new = tl.where(awake, m_new, m)
    tl.store(p_h + row * V + o_v, h.to(p_h.dtype.element_ty), mask=in_v)
    tl.store(p_m_out + row, m_new, mask=i_v == 0)


def functional(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, mask: Tensor | None, input_gate: str, forget_gate: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h [B,H,V] in q's dtype and the new C, n, m. Nothing that came in is written."""
    C_out = torch.empty_like(C, memory_format=torch.contiguous_format)
    h, n_out, m_out = _launch(q, k, v, i, f, C.contiguous(), n, m, C_out, reset, mask, input_gate, forget_gate, eps)
    return h, C_out, n_out, m_out


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None = None, mask: Tensor | None = None, *, input_gate: str = "exp", forget_gate: str = "sigmoid",
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """h [B,H,V]; the step is written into C, n and m, at the addresses where they lie. No gradients.

    Raises:
        ValueError: a state that is not fp32 and contiguous, which could not be updated where it lies.
    """
    for name, x in (("C", C), ("n", n), ("m", m)):
        if not updatable(x):
            raise ValueError(f"state.{name} must be fp32 and contiguous, given {x.dtype}, strides {x.stride()}")
    with torch.no_grad():
        h, n_out, m_out = _launch(q, k, v, i, f, C, n, m, C, reset, mask, input_gate, forget_gate, eps)
        n.copy_(n_out)
        m.copy_(m_out)
    return h


def updatable(x: Tensor) -> bool:
    """Whether a kernel can write the new values where x lies."""
    return x.dtype == torch.float32 and x.is_contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, C_out: Tensor,
    reset: Tensor | None, mask: Tensor | None, input_gate: str, forget_gate: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, K = q.shape
    V = v.shape[-1]
    q, k, v = (readable(x) for x in (q, k, v))
    i, f, n, m = (x.to(torch.float32).contiguous() for x in (i, f, n, m))
    h, n_out, m_out = q.new_empty(B, H, V), torch.empty_like(n), torch.empty_like(m)
    flags = (n if x is None else x.contiguous().view(torch.uint8) for x in (reset, mask))
    if B > 0:
        step[B * H, triton.cdiv(V, TILE_V)](
            q, k, v, i, f, C, n, m, *flags, h, C_out, n_out, m_out, B, H,
            *strides(q), *strides(k), *strides(v), eps, K**-0.5,
            K=K, V=V, TILE_K=min(TILE_K, triton.next_power_of_2(K)), TILE_V=TILE_V, INPUT_GATE=input_gate,
            EXP_FORGET=forget_gate == "exp", RESET=reset is not None, MASK=mask is not None, num_warps=4,
        )  # fmt: skip
    return h, n_out, m_out
