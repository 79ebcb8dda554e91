"""sLSTM over a whole sequence on a GPU: one program sweeps the time of one head and ROWS rows of the batch.

The equations are those of `cells/slstm.py` (arXiv:2405.04517, Sec. 2.2), backward as in `kernels/torch/slstm.py`.
Heads never talk and rows never talk, so no program waits for another: correct by construction, without a barrier
between programs. Up to K = 64 (fp32: 32) the recurrent weights stay in the program for the whole sweep; wider heads
are cut into tiles of that width on both sides, h goes from step to step through memory that this program alone
touches, and R is read again at every step, from the second-level cache.

The backward recomputes all pre-activations of a span as one matrix product, sweeps back, and leaves dR as one more.

B batch, T time, H heads, K head width; i_h head, o_b rows of the batch, o_k units. Buffers are [T, .., H, B, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openxlstm.kernels.torch.slstm import final_state
from openxlstm.kernels.triton.layout import RUNTIME, numbers, readable, strides
from openxlstm.kernels.triton.slstm_cell import gradients_of_step, load_flag, next_state

ROWS = 16  # the smallest matrix product; a smaller batch is padded in registers, not in memory
TILE = {2: 64, 4: 32}  # by bytes of a number: in fp32, whose products use no matrix unit, R of 64 x 64 spills
SPAN = 1024  # steps whose pre-activations are recomputed at once in the backward: bounds its memory for any T
# One stage: the pipeliner would fetch the next step's h before this step has written it.
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_reset", "p_mask"])
def forward_resident(
    p_gates, p_R, p_b, p_reset, p_mask, p_states, p_out, T, B, H, s_gB, s_gT, s_gG, s_gH,
    K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    EXP_FORGET: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Everything in registers: K <= TILE. p_R [H,K,4,K] in the dtype of the gates; p_states fp32 [T+1,4,H,B,K]."""
    i_h = tl.program_id(0).to(tl.int64)
    o_b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = tl.arange(0, TILE)
    in_b, in_k = o_b < B, o_k < K
    ok = in_b[:, None] & in_k[None, :]
    square = in_k[:, None] & in_k[None, :]
    part = H.to(tl.int64) * B * K
    s_gB, s_gT, s_gG, s_gH = numbers(s_gB, K), numbers(s_gT, K), numbers(s_gG, K), numbers(s_gH, K)
    p_r = p_R + i_h * 4 * K * K + o_k[:, None] * (4 * K) + o_k[None, :]
    R_i = tl.load(p_r, mask=square, other=0.0)
    R_f = tl.load(p_r + K, mask=square, other=0.0)
    R_z = tl.load(p_r + 2 * K, mask=square, other=0.0)
    R_o = tl.load(p_r + 3 * K, mask=square, other=0.0)
    p_bias = p_b + i_h * K + o_k
    b_i = tl.load(p_bias, mask=in_k, other=0.0)[None, :]
    b_f = tl.load(p_bias + H * K, mask=in_k, other=0.0)[None, :]
    b_z = tl.load(p_bias + 2 * H * K, mask=in_k, other=0.0)[None, :]
    b_o = tl.load(p_bias + 3 * H * K, mask=in_k, other=0.0)[None, :]
    p_s = p_states + (i_h * B + o_b[:, None]) * K + o_k[None, :]
    h = tl.load(p_s, mask=ok, other=0.0)
    c = tl.load(p_s + part, mask=ok, other=0.0)
    n = tl.load(p_s + 2 * part, mask=ok, other=0.0)
    m = tl.load(p_s + 3 * part, mask=ok, other=0.0)
    p_g = p_gates + o_b[:, None] * s_gB + i_h * s_gH + o_k[None, :]
    p_y = p_out + (o_b[:, None] * T * H + i_h) * K + o_k[None, :]
    for t in range(T):
        there = ok
        if RESET:
            fresh = load_flag(p_reset, o_b, t, T, in_b)
            h, c, n = tl.where(fresh, 0.0, h), tl.where(fresh, 0.0, c), tl.where(fresh, 0.0, n)
            m = tl.where(fresh, float("-inf"), m)
        if MASK:
            awake = load_flag(p_mask, o_b, t, T, in_b)
            there = ok & awake
        raw_i = tl.load(p_g, mask=there, other=0.0).to(tl.float32) + b_i
        raw_f = tl.load(p_g + s_gG, mask=there, other=0.0).to(tl.float32) + b_f
        raw_z = tl.load(p_g + 2 * s_gG, mask=there, other=0.0).to(tl.float32) + b_z
        raw_o = tl.load(p_g + 3 * s_gG, mask=there, other=0.0).to(tl.float32) + b_o
        h_in = h.to(R_i.dtype)
        raw_i += tl.dot(h_in, R_i, input_precision="ieee")
        raw_f += tl.dot(h_in, R_f, input_precision="ieee")
        raw_z += tl.dot(h_in, R_z, input_precision="ieee")
        raw_o += tl.dot(h_in, R_o, input_precision="ieee")
        h_new, c_new, n_new, m_new = next_state(raw_i, raw_f, raw_z, raw_o, c, n, m, EXP_FORGET)
        y = h_new
        if MASK:
            y = tl.where(awake, y, 0.0)
            h_new, c_new = tl.where(awake, h_new, h), tl.where(awake, c_new, c)
            n_new, m_new = tl.where(awake, n_new, n), tl.where(awake, m_new, m)
        h, c, n, m = h_new, c_new, n_new, m_new
        p_s += 4 * part
        tl.store(p_s, h, mask=ok)
        tl.store(p_s + part, c, mask=ok)
        tl.store(p_s + 2 * part, n, mask=ok)
        tl.store(p_s + 3 * part, m, mask=ok)
        tl.store(p_y, y.to(p_out.dtype.element_ty), mask=ok)
        p_g += s_gT
        p_y += H * K


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_reset", "p_mask"])
def forward_tiled(
    p_gates, p_R, p_b, p_reset, p_mask, p_states, p_out, T, B, H, s_gB, s_gT, s_gG, s_gH,
    K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    EXP_FORGET: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The same for K > TILE: the state goes from step to step through p_states."""
    i_h = tl.program_id(0).to(tl.int64)
    o_b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_b = o_b < B
    o_t = tl.arange(0, TILE)
    part = H.to(tl.int64) * B * K
    s_gB, s_gT, s_gG, s_gH = numbers(s_gB, K), numbers(s_gT, K), numbers(s_gG, K), numbers(s_gH, K)
    p_s = p_states + (i_h * B + o_b[:, None]) * K
    p_g = p_gates + o_b[:, None] * s_gB + i_h * s_gH
    p_y = p_out + (o_b[:, None] * T * H + i_h) * K
    p_r = p_R + i_h * 4 * K * K
    for t in range(T):
        for e in range(0, K, TILE):
            o_e = e + o_t
            in_e = o_e < K
            ok = in_b[:, None] & in_e[None, :]
            there = ok
            if MASK:
                awake = load_flag(p_mask, o_b, t, T, in_b)
                there = ok & awake
            p_bias = p_b + i_h * K + o_e
            raw_i = tl.load(p_bias, mask=in_e, other=0.0)[None, :]
            raw_f = tl.load(p_bias + H * K, mask=in_e, other=0.0)[None, :]
            raw_z = tl.load(p_bias + 2 * H * K, mask=in_e, other=0.0)[None, :]
            raw_o = tl.load(p_bias + 3 * H * K, mask=in_e, other=0.0)[None, :]
            p_ge = p_g + o_e[None, :]
            raw_i += tl.load(p_ge, mask=there, other=0.0).to(tl.float32)
            raw_f += tl.load(p_ge + s_gG, mask=there, other=0.0).to(tl.float32)
            raw_z += tl.load(p_ge + 2 * s_gG, mask=there, other=0.0).to(tl.float32)
            raw_o += tl.load(p_ge + 3 * s_gG, mask=there, other=0.0).to(tl.float32)
            for d in range(0, K, TILE):
                o_d = d + o_t
                in_d = o_d < K
                h_in = tl.load(p_s + o_d[None, :], mask=in_b[:, None] & in_d[None, :], other=0.0)
                if RESET:
                    h_in = tl.where(load_flag(p_reset, o_b, t, T, in_b), 0.0, h_in)
                h_in = h_in.to(p_R.dtype.element_ty)
                square = in_d[:, None] & in_e[None, :]
                p_rde = p_r + o_d[:, None] * (4 * K) + o_e[None, :]
                raw_i += tl.dot(h_in, tl.load(p_rde, mask=square, other=0.0), input_precision="ieee")
                raw_f += tl.dot(h_in, tl.load(p_rde + K, mask=square, other=0.0), input_precision="ieee")
                raw_z += tl.dot(h_in, tl.load(p_rde + 2 * K, mask=square, other=0.0), input_precision="ieee")
                raw_o += tl.dot(h_in, tl.load(p_rde + 3 * K, mask=square, other=0.0), input_precision="ieee")
            p_se = p_s + o_e[None, :]
            h = tl.load(p_se, mask=ok, other=0.0)
            c = tl.load(p_se + part, mask=ok, other=0.0)
            n = tl.load(p_se + 2 * part, mask=ok, other=0.0)
            m = tl.load(p_se + 3 * part, mask=ok, other=0.0)
            if RESET:
                fresh = load_flag(p_reset, o_b, t, T, in_b)
                h, c, n = tl.where(fresh, 0.0, h), tl.where(fresh, 0.0, c), tl.where(fresh, 0.0, n)
                m = tl.where(fresh, float("-inf"), m)
            h_new, c_new, n_new, m_new = next_state(raw_i, raw_f, raw_z, raw_o, c, n, m, EXP_FORGET)
            y = h_new
            if MASK:
                y = tl.where(awake, y, 0.0)
                h_new, c_new = tl.where(awake, h_new, h), tl.where(awake, c_new, c)
                n_new, m_new = tl.where(awake, n_new, n), tl.where(awake, m_new, m)
            p_se += 4 * part
            tl.store(p_se, h_new, mask=ok)
            tl.store(p_se + part, c_new, mask=ok)
            tl.store(p_se + 2 * part, n_new, mask=ok)
            tl.store(p_se + 3 * part, m_new, mask=ok)
            tl.store(p_y + o_e[None, :], y.to(p_out.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # the next step reads what other threads of this program wrote
        p_s += 4 * part
        p_g += s_gT
        p_y += H * K


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_reset", "p_mask"])
def backward_resident(
    p_raw, p_states, p_dout, p_R, p_reset, p_mask, p_G, p_draw, first, last, T, B, H, s_dB, s_dT, s_dH,
    K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    EXP_FORGET: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr, DOUT: tl.constexpr,
):  # fmt: skip
    """Steps last-1 .. first. p_raw, p_draw fp32 [S,H,B,4,K]; p_R [H,4,K,K], output unit first; p_G [3,H,B,K]."""
    i_h = tl.program_id(0).to(tl.int64)
    o_b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = tl.arange(0, TILE)
    in_b, in_k = o_b < B, o_k < K
    ok = in_b[:, None] & in_k[None, :]
    square = in_k[:, None] & in_k[None, :]
    part = H.to(tl.int64) * B * K
    s_dB, s_dT, s_dH = numbers(s_dB, K), numbers(s_dT, K), numbers(s_dH, K)
    p_r = p_R + i_h * 4 * K * K + o_k[:, None] * K + o_k[None, :]
    R_i = tl.load(p_r, mask=square, other=0.0)
    R_f = tl.load(p_r + K * K, mask=square, other=0.0)
    R_z = tl.load(p_r + 2 * K * K, mask=square, other=0.0)
    R_o = tl.load(p_r + 3 * K * K, mask=square, other=0.0)
    row = i_h * B + o_b[:, None]
    p_g = p_G + row * K + o_k[None, :]
    GH = tl.load(p_g, mask=ok, other=0.0)
    GC = tl.load(p_g + part, mask=ok, other=0.0)
    GN = tl.load(p_g + 2 * part, mask=ok, other=0.0)
    for back in range(last - first):
        t = last - 1 - back
        s = (t - first).to(tl.int64)
        p_s = p_states + t.to(tl.int64) * 4 * part + row * K + o_k[None, :]
        p_4 = s * 4 * part + row * (4 * K) + o_k[None, :]
        total = GH
        if DOUT:
            p_d = p_dout + o_b[:, None] * s_dB + t.to(tl.int64) * s_dT + i_h * s_dH + o_k[None, :]
            total += tl.load(p_d, mask=ok, other=0.0).to(tl.float32)
        di, df, dz, do, new_GC, new_GN = gradients_of_step(
            total, GC, GN, p_raw + p_4, p_s, part, p_reset, o_b, t, T, in_b, ok, K, EXP_FORGET, RESET
        )
        if MASK:
            awake = load_flag(p_mask, o_b, t, T, in_b)
            di, df = tl.where(awake, di, 0.0), tl.where(awake, df, 0.0)
            dz, do = tl.where(awake, dz, 0.0), tl.where(awake, do, 0.0)
            new_GC, new_GN = tl.where(awake, new_GC, GC), tl.where(awake, new_GN, GN)
        tl.store(p_draw + p_4, di, mask=ok)
        tl.store(p_draw + p_4 + K, df, mask=ok)
        tl.store(p_draw + p_4 + 2 * K, dz, mask=ok)
        tl.store(p_draw + p_4 + 3 * K, do, mask=ok)
        GH_i = tl.dot(di.to(R_i.dtype), R_i, input_precision="ieee")
        GH_f = tl.dot(df.to(R_i.dtype), R_f, input_precision="ieee")
        GH_z = tl.dot(dz.to(R_i.dtype), R_z, input_precision="ieee")
        GH_o = tl.dot(do.to(R_i.dtype), R_o, input_precision="ieee")
        new_GH = (GH_i + GH_f) + (GH_z + GH_o)
        if MASK:
            new_GH = tl.where(awake, new_GH, GH)
        if RESET:  # what came before was emptied
            fresh = load_flag(p_reset, o_b, t, T, in_b)
            new_GH = tl.where(fresh, 0.0, new_GH)
            new_GC, new_GN = tl.where(fresh, 0.0, new_GC), tl.where(fresh, 0.0, new_GN)
        GH, GC, GN = new_GH, new_GC, new_GN
    tl.store(p_g, GH, mask=ok)
    tl.store(p_g + part, GC, mask=ok)
    tl.store(p_g + 2 * part, GN, mask=ok)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_reset", "p_mask"])
def backward_tiled(
    p_raw, p_states, p_dout, p_R, p_reset, p_mask, p_G, p_draw, first, last, T, B, H, s_dB, s_dT, s_dH,
    K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    EXP_FORGET: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr, DOUT: tl.constexpr,
):  # fmt: skip
    """The same for K > TILE: the carried gradients live in p_G, which this program alone reads and writes."""
    i_h = tl.program_id(0).to(tl.int64)
    o_b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_t = tl.arange(0, TILE)
    in_b = o_b < B
    part = H.to(tl.int64) * B * K
    s_dB, s_dT, s_dH = numbers(s_dB, K), numbers(s_dT, K), numbers(s_dH, K)
    row = i_h * B + o_b[:, None]
    p_r = p_R + i_h * 4 * K * K
    for back in range(last - first):
        t = last - 1 - back
        s = (t - first).to(tl.int64)
        p_s = p_states + t.to(tl.int64) * 4 * part + row * K
        p_4 = s * 4 * part + row * (4 * K)
        for e in range(0, K, TILE):
            o_e = e + o_t
            ok = in_b[:, None] & (o_e < K)[None, :]
            p_g = p_G + row * K + o_e[None, :]
            total = tl.load(p_g, mask=ok, other=0.0)
            GC = tl.load(p_g + part, mask=ok, other=0.0)
            GN = tl.load(p_g + 2 * part, mask=ok, other=0.0)
            if DOUT:
                p_d = p_dout + o_b[:, None] * s_dB + t.to(tl.int64) * s_dT + i_h * s_dH + o_e[None, :]
                total += tl.load(p_d, mask=ok, other=0.0).to(tl.float32)
            di, df, dz, do, new_GC, new_GN = gradients_of_step(
                total, GC, GN, p_raw + p_4 + o_e[None, :], p_s + o_e[None, :], part,
                p_reset, o_b, t, T, in_b, ok, K, EXP_FORGET, RESET,
            )  # fmt: skip
            if MASK:
                awake = load_flag(p_mask, o_b, t, T, in_b)
                di, df = tl.where(awake, di, 0.0), tl.where(awake, df, 0.0)
                dz, do = tl.where(awake, dz, 0.0), tl.where(awake, do, 0.0)
                new_GC, new_GN = tl.where(awake, new_GC, GC), tl.where(awake, new_GN, GN)
            if RESET:
                fresh = load_flag(p_reset, o_b, t, T, in_b)
                new_GC, new_GN = tl.where(fresh, 0.0, new_GC), tl.where(fresh, 0.0, new_GN)
            p_de = p_draw + p_4 + o_e[None, :]
            tl.store(p_de, di, mask=ok)
            tl.store(p_de + K, df, mask=ok)
            tl.store(p_de + 2 * K, dz, mask=ok)
            tl.store(p_de + 3 * K, do, mask=ok)
            tl.store(p_g + part, new_GC, mask=ok)
            tl.store(p_g + 2 * part, new_GN, mask=ok)
        tl.debug_barrier()  # every unit's draw is read below, by other threads
        for d in range(0, K, TILE):
            o_d = d + o_t
            in_d = o_d < K
            new_GH = tl.zeros((ROWS, TILE), dtype=tl.float32)
            for ge in range(0, 4 * ((K + TILE - 1) // TILE)):
                g = ge % 4
                o_e = (ge // 4) * TILE + o_t
                in_e = o_e < K
                draw = tl.load(p_draw + p_4 + g * K + o_e[None, :], mask=in_b[:, None] & in_e[None, :], other=0.0)
                p_rge = p_r + g * K * K + o_e[:, None] * K + o_d[None, :]
                b_R = tl.load(p_rge, mask=in_e[:, None] & in_d[None, :], other=0.0)
                new_GH += tl.dot(draw.to(b_R.dtype), b_R, input_precision="ieee")
            ok = in_b[:, None] & in_d[None, :]
            p_g = p_G + row * K + o_d[None, :]
            if MASK:
                new_GH = tl.where(load_flag(p_mask, o_b, t, T, in_b), new_GH, tl.load(p_g, mask=ok, other=0.0))
            if RESET:
                new_GH = tl.where(load_flag(p_reset, o_b, t, T, in_b), 0.0, new_GH)
            tl.store(p_g, new_GH, mask=ok)
        tl.debug_barrier()


def forward(
    gates: Tensor, R: Tensor, b: Tensor, h0: Tensor, c0: Tensor, n0: Tensor, m0: Tensor,
    reset: Tensor | None, mask: Tensor | None, forget_gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h [B,T,H,K] in the gates' dtype, the final h, c, n, m, and every state as fp32 [T+1, 4, H, B, K]. T >= 1."""
    B, T, _, H, K = gates.shape
    gates = readable(gates)
    states = h0.new_empty(T + 1, 4, H, B, K)
    for part, x in zip(states[0], (h0, c0, n0, m0)):
        part.copy_(x.transpose(0, 1))
    states[0, 3].masked_fill_(states[0, 2] == 0, -torch.inf)  # m of an empty element is ignored: m_t = max(-inf, i_t)
    out = gates.new_empty(B, T, H, K)
    if B > 0:
        resident, tile = plan(K, gates.dtype)
        kernel = forward_resident if resident else forward_tiled
        kernel[H, triton.cdiv(B, ROWS)](
            gates, R.to(gates.dtype).contiguous(), b.to(h0.dtype).contiguous(), _bytes(reset, states),
            _bytes(mask, states), states, out, T, B, H, *strides(gates), K=K, TILE=tile, ROWS=ROWS,
            EXP_FORGET=forget_gate == "exp", RESET=reset is not None, MASK=mask is not None, **LAUNCH,
        )  # fmt: skip
    return out, *final_state(states, m0, reset), states


def backward(
    dout: Tensor | None, dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, gates: Tensor, R: Tensor, b: Tensor,
    states: Tensor, reset: Tensor | None, mask: Tensor | None, forget_gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of gates, R, b and of the initial h, c, n, for cotangents of h and of the final h, c, n."""
    B, T, _, H, K = gates.shape
    dout = None if dout is None else readable(dout)
    rows = (0, 0, 0) if dout is None else strides(dout)
    R_in = R.to(gates.dtype)
    R_flat, R_back = R_in.reshape(H, K, 4 * K), R_in.permute(0, 2, 3, 1).contiguous()
    dgates, dR, db = torch.empty_like(gates), states.new_zeros(H, K, 4 * K), states.new_zeros(4, H, K)
    G = states.new_zeros(3, H, B, K)
    for part, x in zip(G, (dh, dc, dn)):
        if x is not None:
            part.copy_(x.transpose(0, 1))
    resident, tile = plan(K, gates.dtype)
    kernel = backward_resident if resident else backward_tiled
    for first in reversed(range(0, T, SPAN)):
        last = min(first + SPAN, T)
        h_in = states[first:last, 0]
        if reset is not None:
            h_in = torch.where(reset[:, first:last].t()[:, None, :, None], 0.0, h_in)
        h_in = h_in.transpose(0, 1).flatten(1, 2)  # [H, S B, K], as it entered the product with R
        raw = states.new_empty(last - first, H, B, 4, K)
        raw.copy_(gates[:, first:last].permute(1, 3, 0, 2, 4))
        if mask is not None:  # a masked gate may hold NaN
            raw.masked_fill_(~mask[:, first:last].t()[:, None, :, None, None], 0.0)
        raw.add_(b.to(states.dtype).transpose(0, 1)[:, None])
        mixed = torch.bmm(h_in.to(gates.dtype).to(states.dtype), R_flat.to(states.dtype))
        raw.flatten(3).add_(mixed.view(H, last - first, B, 4 * K).transpose(0, 1))
        draw = torch.empty_like(raw)
        if B > 0:
            kernel[H, triton.cdiv(B, ROWS)](
                raw, states, states if dout is None else dout, R_back, _bytes(reset, states), _bytes(mask, states),
                G, draw, first, last, T, B, H, *rows, K=K, TILE=tile, ROWS=ROWS, EXP_FORGET=forget_gate == "exp",
                RESET=reset is not None, MASK=mask is not None, DOUT=dout is not None, **LAUNCH,
            )  # fmt: skip
        dgates[:, first:last] = draw.permute(2, 0, 3, 1, 4).to(gates.dtype)
        db += draw.sum((0, 2)).transpose(0, 1)
        dR.baddbmm_(h_in.mT, draw.transpose(0, 1).flatten(3).flatten(1, 2))
    dh0, dc0, dn0 = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in G)
    return dgates, dR.view(R.shape).to(R.dtype), db.to(b.dtype), dh0, dc0, dn0


def plan(K: int, dtype: torch.dtype) -> tuple[bool, int]:
    """Whether R stays in the program, and the tile: from shape and dtype alone, so that equal calls run alike."""
    widest = TILE[dtype.itemsize]
    return (True, max(16, triton.next_power_of_2(K))) if widest >= K else (False, widest)


def _bytes(flags: Tensor | None, anything: Tensor) -> Tensor:
    """A bool tensor as bytes, or an argument that is never read."""
    return anything if flags is None else flags.contiguous().view(torch.uint8)
