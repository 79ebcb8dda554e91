"""mLSTM, chunkwise, forward, on a GPU: gates, memory at every chunk border, outputs.

The equations are those of `kernels/torch/mlstm.py` and `kernels/torch/gates.py` (arXiv:2405.04517, Sec. 2.3); their
letters are used here. Three kernels, each free of atomics:

    gates    one program per head of a row: key, row, m, enter, write and the segment of every step, all fp32
    sweep    one program per tile of C: C' = decay C + sum_l weight_l k_l v_l^T, stored before every chunk. The same
             kernel, backward in time over q and dh, is the gradient of the memory (mlstm_backward.py)
    output   one program per chunk and tile of V: scores, the reading of the memory, the denominator

n and a are fp32 and summed from unrounded numbers: as a bf16 column of the products, a's passage near zero would
cost up to 42 % of a gradient. C accumulates in fp32 and is rounded as an operand only.

B batch, T time, H heads, K query/key width, V value width, L chunk length, N chunks, Z = B x H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openxlstm.kernels.triton.layout import RUNTIME, numbers


@triton.jit
def logsigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)): accurate at both ends."""
    z = tl.exp(-tl.abs(x))
    # log1p: z itself where 1 + z rounds to 1, and otherwise corrected for the rounding of 1 + z
    w = 1.0 + z
    return tl.minimum(x, 0.0) - tl.where(w == 1.0, z, tl.log(w) * (z / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def segmented_max(start_a, value_a, start_b, value_b):
    """Running maximum that begins anew at a start: associative."""
    return start_a | start_b, tl.where(start_b != 0, value_b, tl.maximum(value_a, value_b))


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_i", "p_f", "p_reset", "p_mask"])
def gates(
    p_i, p_f, p_m, p_reset, p_mask, p_key, p_row, p_stab, p_enter, p_write, p_segment, p_decay, p_m_out,
    T, N, H, s_iB, s_iT, s_iH, s_fB, s_fT, s_fH,
    L: tl.constexpr, EXP: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """p_key .. p_segment: [Z, N L]; p_decay [Z, N]: weight of the incoming memory in the chunk's final one."""
    z = tl.program_id(0).to(tl.int64)
    i_b, i_h = z // H, z % H
    o_l = tl.arange(0, L)
    p_i += i_b * s_iB + i_h * s_iH
    p_f += i_b * s_fB + i_h * s_fH
    m_in = tl.load(p_m + z)
    for n in range(0, N):
        t = n * L + o_l
        awake = t < T
        start = tl.zeros((L,), dtype=tl.int32)
        if RESET:
            start = (tl.load(p_reset + i_b * T + t, mask=awake, other=0) != 0).to(tl.int32)
        if MASK:
            awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
        b_f = tl.load(p_f + t.to(tl.int64) * s_fT, mask=awake, other=0.0).to(tl.float32)
        b_i = tl.load(p_i + t.to(tl.int64) * s_iT, mask=awake, other=0.0).to(tl.float32)
        log_f = tl.where(awake, logsigmoid(b_f), 0.0)
        log_i = tl.where(awake, b_i if EXP else logsigmoid(b_i), float("-inf"))
        b = tl.cumsum(tl.where(start != 0, 0.0, log_f), axis=0)  # restarts in every chunk, and ignores a reset's gate
        segment = tl.cumsum(start, axis=0)
        key = log_i - b
        if EXP:
            first = tl.where(start != 0, tl.maximum(log_f - b, key), key)  # m = max(lf + 0, i) after a reset
            _, local = tl.associative_scan((start, first), 0, segmented_max)
            row = tl.where(segment == 0, tl.maximum(m_in, local), local)
        else:
            row = -b  # nothing is stabilised: m = 0
        m = b + row
        last = o_l == L - 1
        row_end = tl.sum(tl.where(last, row, 0.0), axis=0)
        segment_end = tl.sum(tl.where(last, segment, 0), axis=0)
        enter = tl.where(segment == 0, tl.exp(m_in - row), 0.0)
        o = z * N * L + t
        tl.store(p_key + o, key)
        tl.store(p_row + o, row)
        tl.store(p_stab + o, m)
        tl.store(p_enter + o, enter)
        tl.store(p_write + o, tl.where(segment == segment_end, tl.exp(key - row_end), 0.0))
        tl.store(p_segment + o, segment)
        tl.store(p_decay + z * N + n, tl.sum(tl.where(last, enter, 0.0), axis=0))
        m_in = tl.sum(tl.where(last, m, 0.0), axis=0) if EXP else m_in * 0.0
    tl.store(p_m_out + z, m_in)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def sweep(
    p_x, p_y, p_weight, p_column, p_decay, p_mask, p_C, p_n, p_states, p_columns, p_C_out, p_n_out,
    p_other, p_other_n, p_rest, p_rho,
    T, N, H, s_xB, s_xT, s_xH, s_yB, s_yT, s_yH,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    REVERSE: tl.constexpr, REST: tl.constexpr, NORMALISED: tl.constexpr, MASK: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """C <- decay C + sum_l weight_l x_l y_l^T and n <- decay n + sum_l column_l x_l, over all chunks.

    p_states [Z, N + 1, K, V] and p_columns [Z, N + 1, K] take C and n at the borders, border 0 before the first chunk.
    REVERSE runs from the last chunk to the first, and writes rho = <C, other> + <n, other_n> of each chunk's end,
    [tiles, Z, N]. The two parts nearly cancel, since h does not change if memory and normaliser grow alike: with REST,
    what p_states loses by rounding is kept in p_rest, of the same shape, and `other` is both together.
    """
    i_k, i_v, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_xB, s_xT, s_xH = numbers(s_xB, K), numbers(s_xT, K), numbers(s_xH, K)
    s_yB, s_yT, s_yH = numbers(s_yB, V), numbers(s_yT, V), numbers(s_yH, V)
    o_k, o_v, o_l = i_k * TILE_K + tl.arange(0, TILE_K), i_v * TILE_V + tl.arange(0, TILE_V), tl.arange(0, L)
    in_k, in_v = o_k < K, o_v < V
    inside = in_k[:, None] & in_v[None, :]
    o_C = o_k[:, None] * V + o_v[None, :]
    p_x += i_b * s_xB + i_h * s_xH
    p_y += i_b * s_yB + i_h * s_yH
    C = tl.load(p_C + z * K * V + o_C, mask=inside, other=0.0)
    column = tl.load(p_n + z * K + o_k, mask=in_k, other=0.0)
    for step in range(0, N):
        n = N - 1 - step if REVERSE else step
        border = z * (N + 1) + (n + 1 if REVERSE else n)
        rounded = C.to(p_states.dtype.element_ty)
        tl.store(p_states + border * K * V + o_C, rounded, mask=inside)
        if REST and not REVERSE:
            rest = (C - rounded.to(tl.float32)).to(p_rest.dtype.element_ty)
            tl.store(p_rest + border * K * V + o_C, rest, mask=inside)
        if i_v == 0:
            tl.store(p_columns + border * K + o_k, column, mask=in_k)
        if REVERSE:
            other = tl.load(p_other + border * K * V + o_C, mask=inside, other=0.0).to(tl.float32)
            if REST:
                other += tl.load(p_rest + border * K * V + o_C, mask=inside, other=0.0).to(tl.float32)
            rho = tl.sum(tl.sum(C * other, axis=1), axis=0)
            if NORMALISED:
                other_n = tl.load(p_other_n + border * K + o_k, mask=in_k, other=0.0)
                rho += tl.where(i_v == 0, tl.sum(column * other_n, axis=0), 0.0)
            tile = i_k * tl.num_programs(1) + i_v
            tl.store(p_rho + (tile * tl.num_programs(2) + z) * N + n, rho)
        t = n * L + o_l
        awake = t < T
        if MASK:
            awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
        x = tl.load(p_x + t.to(tl.int64)[None, :] * s_xT + o_k[:, None], mask=in_k[:, None] & awake[None, :], other=0.0)
        y = tl.load(p_y + t.to(tl.int64)[:, None] * s_yT + o_v[None, :], mask=awake[:, None] & in_v[None, :], other=0.0)
        o = z * N * L + t
        weighted = y.to(tl.float32) * tl.load(p_weight + o)[:, None]
        decay = tl.load(p_decay + z * N + n)
        C = C * decay + tl.dot(x, weighted.to(x.dtype), input_precision="ieee" if IEEE else "tf32")
        if NORMALISED:
            column = column * decay + tl.sum(x.to(tl.float32) * tl.load(p_column + o)[None, :], axis=1)
    border = z * (N + 1) + (0 if REVERSE else N)
    rounded = C.to(p_states.dtype.element_ty)
    tl.store(p_states + border * K * V + o_C, rounded, mask=inside)
    if REST and not REVERSE:
        rest = (C - rounded.to(tl.float32)).to(p_rest.dtype.element_ty)
        tl.store(p_rest + border * K * V + o_C, rest, mask=inside)
    tl.store(p_C_out + z * K * V + o_C, C, mask=inside)
    if i_v == 0:
        if not NORMALISED:
            column = column * 0.0
        tl.store(p_columns + border * K + o_k, column, mask=in_k)
        tl.store(p_n_out + z * K + o_k, column, mask=in_k)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def output(
    p_q, p_k, p_v, p_key, p_row, p_stab, p_enter, p_segment, p_mask, p_states, p_columns, p_h, p_rest, p_a,
    T, N, H, s_qB, s_qT, s_qH, s_kB, s_kT, s_kH, s_vB, s_vT, s_vH, s_hB, s_hT, s_hH, eps, scale,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    NORMALISED: tl.constexpr, MASK: tl.constexpr, IEEE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """h_j = (S v + s g_j C^T q_j) / d_j, and for the backward pass a_j [Z, N L] and what h loses by rounding."""
    i_v, n, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_qB, s_qT, s_qH = numbers(s_qB, K), numbers(s_qT, K), numbers(s_qH, K)
    s_kB, s_kT, s_kH = numbers(s_kB, K), numbers(s_kT, K), numbers(s_kH, K)
    s_vB, s_vT, s_vH = numbers(s_vB, V), numbers(s_vT, V), numbers(s_vH, V)
    s_hB, s_hT, s_hH = numbers(s_hB, V), numbers(s_hT, V), numbers(s_hH, V)
    o_v, o_l = i_v * TILE_V + tl.arange(0, TILE_V), tl.arange(0, L)
    in_v = o_v < V
    t = n * L + o_l
    real = t < T
    awake = real
    if MASK:
        awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
    t = t.to(tl.int64)
    p_q += i_b * s_qB + i_h * s_qH
    p_k += i_b * s_kB + i_h * s_kH
    border = z * (N + 1) + n
    scores = tl.zeros((L, L), dtype=tl.float32)
    y = tl.zeros((L, TILE_V), dtype=tl.float32)
    qn = tl.zeros((L,), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    for k0 in range(0, K, TILE_K):
        o_k = k0 + tl.arange(0, TILE_K)
        in_k = o_k < K
        q = tl.load(p_q + t[:, None] * s_qT + o_k[None, :], mask=awake[:, None] & in_k[None, :], other=0.0)
        k = tl.load(p_k + t[None, :] * s_kT + o_k[:, None], mask=in_k[:, None] & awake[None, :], other=0.0)
        C = tl.load(
            p_states + border * K * V + o_k[:, None] * V + o_v[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0
        )
        scores = tl.dot(q, k, scores, input_precision=precision)
        y = tl.dot(q, C.to(q.dtype), y, input_precision=precision)
        if NORMALISED:
            column = tl.load(p_columns + border * K + o_k, mask=in_k, other=0.0)
            qn += tl.sum(q.to(tl.float32) * column[None, :], axis=1)
    o = z * N * L + n * L + o_l
    segment = tl.load(p_segment + o)
    same = (o_l[:, None] >= o_l[None, :]) & (segment[:, None] == segment[None, :])
    exponent = tl.load(p_key + o)[None, :] - tl.load(p_row + o)[:, None]
    scores = scores * tl.where(same, tl.exp(tl.where(same, exponent, 0.0)), 0.0) * scale
    enter = tl.load(p_enter + o) * scale
    v = tl.load(
        p_v + i_b * s_vB + i_h * s_vH + t[:, None] * s_vT + o_v[None, :], mask=awake[:, None] & in_v[None, :], other=0.0
    )
    here = tl.dot(scores.to(v.dtype), v, input_precision=precision)  # its own accumulator: two dots into one miscompile
    y = y * enter[:, None] + here
    if NORMALISED:
        a = tl.sum(scores, axis=1) + enter * qn
        floor = tl.exp(-tl.minimum(tl.maximum(tl.load(p_stab + o), -80.0), 80.0))
        y = y / (tl.maximum(tl.abs(a), floor) + eps)[:, None]
        if i_v == 0:
            tl.store(p_a + o, a)
    y = tl.where(awake[:, None], y, 0.0)
    o_h = i_b * s_hB + i_h * s_hH + t[:, None] * s_hT + o_v[None, :]
    there = real[:, None] & in_v[None, :]
    rounded = y.to(p_h.dtype.element_ty)
    tl.store(p_h + o_h, rounded, mask=there)
    if REST:
        tl.store(p_rest + o_h, (y - rounded.to(tl.float32)).to(p_rest.dtype.element_ty), mask=there)
