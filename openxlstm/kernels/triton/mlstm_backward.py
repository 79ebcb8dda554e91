"""mLSTM, chunkwise, backward, on a GPU. Letters as in mlstm_forward.py; formulas as in kernels/torch/mlstm.py.

    row_dot   e_j = dh_j . h_j over all of V, h with what its rounding lost: behind a norm e is a difference near zero
    sweep     (mlstm_forward.py, in reverse) the gradient GC, Gn of the memory at every border, and rho = <GC, C'>
    dq, dk    apart, because together they spill; each also sums q . dq or k . dk from its fp32 accumulator: from the
              stored bf16 numbers the forget gate's gradient would be off by up to 15 %
    dv
    dgates    di_l = k_l . dk_l; the log forget gate's gradient restarts in every chunk and is anchored there by rho

Products are never transposed after the fact (`tl.trans` of a result miscompiles on Hopper): v dh^T is computed beside
dh v^T. Partial sums of K tiles go to a buffer each, never through atomics: equal calls give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openxlstm.kernels.triton.layout import RUNTIME, numbers


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def row_dot(
    p_x, p_y, p_rest, p_mask, p_e, T, N, H, s_xB, s_xT, s_xH, s_yB, s_yT, s_yH,
    V: tl.constexpr, L: tl.constexpr, TILE_V: tl.constexpr, MASK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """x_t . (y_t + rest_t) -> [Z, N L]; 0 where there is no step. The rest lies as y does."""
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_xB, s_xT, s_xH = numbers(s_xB, V), numbers(s_xT, V), numbers(s_xH, V)
    s_yB, s_yT, s_yH = numbers(s_yB, V), numbers(s_yT, V), numbers(s_yH, V)
    t = n * L + tl.arange(0, L)
    awake = t < T
    if MASK:
        awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
    t = t.to(tl.int64)
    e = tl.zeros((L,), dtype=tl.float32)
    for v0 in range(0, V, TILE_V):
        o_v = v0 + tl.arange(0, TILE_V)
        inside = awake[:, None] & (o_v < V)[None, :]
        x = tl.load(p_x + i_b * s_xB + i_h * s_xH + t[:, None] * s_xT + o_v[None, :], mask=inside, other=0.0)
        y = tl.load(p_y + i_b * s_yB + i_h * s_yH + t[:, None] * s_yT + o_v[None, :], mask=inside, other=0.0)
        y = y.to(tl.float32)
        if REST:
            o_y = i_b * s_yB + i_h * s_yH + t[:, None] * s_yT + o_v[None, :]
            y += tl.load(p_rest + o_y, mask=inside, other=0.0).to(tl.float32)
        e += tl.sum(x.to(tl.float32) * y, axis=1)
    tl.store(p_e + z * N * L + n * L + tl.arange(0, L), e)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def dq(
    p_q, p_k, p_v, p_dh, p_key, p_row, p_enter, p_segment, p_inverse, p_da, p_mask, p_states, p_columns, p_dq, p_sum,
    T, N, H, s_qB, s_qT, s_qH, s_kB, s_kT, s_kH, s_vB, s_vT, s_vH, s_dB, s_dT, s_dH, s_oB, s_oT, s_oH, scale,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    NORMALISED: tl.constexpr, MASK: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dq_j = s (dS k + g_j C u_j), and q_j . dq_j of each K tile, [tiles, Z, N L]."""
    i_k, n, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_qB, s_qT, s_qH = numbers(s_qB, K), numbers(s_qT, K), numbers(s_qH, K)
    s_kB, s_kT, s_kH = numbers(s_kB, K), numbers(s_kT, K), numbers(s_kH, K)
    s_vB, s_vT, s_vH = numbers(s_vB, V), numbers(s_vT, V), numbers(s_vH, V)
    s_dB, s_dT, s_dH = numbers(s_dB, V), numbers(s_dT, V), numbers(s_dH, V)
    s_oB, s_oT, s_oH = numbers(s_oB, K), numbers(s_oT, K), numbers(s_oH, K)
    o_k, o_l = i_k * TILE_K + tl.arange(0, TILE_K), tl.arange(0, L)
    in_k = o_k < K
    t = n * L + o_l
    real = t < T
    awake = real
    if MASK:
        awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
    t = t.to(tl.int64)
    p_v += i_b * s_vB + i_h * s_vH
    p_dh += i_b * s_dB + i_h * s_dH
    border = z * (N + 1) + n
    dS = tl.zeros((L, L), dtype=tl.float32)
    acc = tl.zeros((L, TILE_K), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    for v0 in range(0, V, TILE_V):
        o_v = v0 + tl.arange(0, TILE_V)
        in_v = o_v < V
        dh = tl.load(p_dh + t[:, None] * s_dT + o_v[None, :], mask=awake[:, None] & in_v[None, :], other=0.0)
        v = tl.load(p_v + t[None, :] * s_vT + o_v[:, None], mask=in_v[:, None] & awake[None, :], other=0.0)
        C = tl.load(
            p_states + border * K * V + o_k[None, :] * V + o_v[:, None], mask=in_v[:, None] & in_k[None, :], other=0.0
        )
        dS = tl.dot(dh, v, dS, input_precision=precision)
        acc = tl.dot(dh, C.to(dh.dtype), acc, input_precision=precision)
    o = z * N * L + n * L + o_l
    inverse, enter, segment = tl.load(p_inverse + o), tl.load(p_enter + o), tl.load(p_segment + o)
    dS = dS * inverse[:, None]
    acc = acc * inverse[:, None]
    if NORMALISED:
        da = tl.load(p_da + o)
        column = tl.load(p_columns + border * K + o_k, mask=in_k, other=0.0)
        dS += da[:, None]
        acc += da[:, None] * column[None, :]
    same = (o_l[:, None] >= o_l[None, :]) & (segment[:, None] == segment[None, :])
    exponent = tl.load(p_key + o)[None, :] - tl.load(p_row + o)[:, None]
    dS = dS * tl.where(same, tl.exp(tl.where(same, exponent, 0.0)), 0.0)
    inside = awake[:, None] & in_k[None, :]
    k = tl.load(p_k + i_b * s_kB + i_h * s_kH + t[:, None] * s_kT + o_k[None, :], mask=inside, other=0.0)
    here = tl.dot(dS.to(k.dtype), k, input_precision=precision)
    result = (acc * enter[:, None] + here) * scale
    q = tl.load(p_q + i_b * s_qB + i_h * s_qH + t[:, None] * s_qT + o_k[None, :], mask=inside, other=0.0)
    tl.store(p_sum + (i_k * tl.num_programs(2) + z) * N * L + n * L + o_l, tl.sum(q.to(tl.float32) * result, axis=1))
    tl.store(
        p_dq + i_b * s_oB + i_h * s_oH + t[:, None] * s_oT + o_k[None, :],
        tl.where(awake[:, None], result, 0.0).to(p_dq.dtype.element_ty), mask=real[:, None] & in_k[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def dk(
    p_q, p_k, p_v, p_dh, p_key, p_row, p_write, p_segment, p_inverse, p_da, p_mask, p_states, p_columns, p_dk, p_sum,
    T, N, H, s_qB, s_qT, s_qH, s_kB, s_kT, s_kH, s_vB, s_vT, s_vH, s_dB, s_dT, s_dH, s_oB, s_oT, s_oH, scale,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    NORMALISED: tl.constexpr, MASK: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dk_l = s dS^T q + write_l (GC v_l + Gn), and k_l . dk_l of each K tile. States and columns are GC and Gn."""
    i_k, n, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_qB, s_qT, s_qH = numbers(s_qB, K), numbers(s_qT, K), numbers(s_qH, K)
    s_kB, s_kT, s_kH = numbers(s_kB, K), numbers(s_kT, K), numbers(s_kH, K)
    s_vB, s_vT, s_vH = numbers(s_vB, V), numbers(s_vT, V), numbers(s_vH, V)
    s_dB, s_dT, s_dH = numbers(s_dB, V), numbers(s_dT, V), numbers(s_dH, V)
    s_oB, s_oT, s_oH = numbers(s_oB, K), numbers(s_oT, K), numbers(s_oH, K)
    o_k, o_l = i_k * TILE_K + tl.arange(0, TILE_K), tl.arange(0, L)
    in_k = o_k < K
    t = n * L + o_l
    real = t < T
    awake = real
    if MASK:
        awake = awake & (tl.load(p_mask + i_b * T + t, mask=awake, other=0) != 0)
    t = t.to(tl.int64)
    p_v += i_b * s_vB + i_h * s_vH
    p_dh += i_b * s_dB + i_h * s_dH
    border = z * (N + 1) + n + 1
    dS = tl.zeros((L, L), dtype=tl.float32)  # [l, j]
    acc = tl.zeros((L, TILE_K), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    for v0 in range(0, V, TILE_V):
        o_v = v0 + tl.arange(0, TILE_V)
        in_v = o_v < V
        v = tl.load(p_v + t[:, None] * s_vT + o_v[None, :], mask=awake[:, None] & in_v[None, :], other=0.0)
        dh = tl.load(p_dh + t[None, :] * s_dT + o_v[:, None], mask=in_v[:, None] & awake[None, :], other=0.0)
        C = tl.load(
            p_states + border * K * V + o_k[None, :] * V + o_v[:, None], mask=in_v[:, None] & in_k[None, :], other=0.0
        )
        dS = tl.dot(v, dh, dS, input_precision=precision)
        acc = tl.dot(v, C.to(v.dtype), acc, input_precision=precision)
    o = z * N * L + n * L + o_l
    segment = tl.load(p_segment + o)
    dS = dS * tl.load(p_inverse + o)[None, :]
    if NORMALISED:
        column = tl.load(p_columns + border * K + o_k, mask=in_k, other=0.0)
        dS += tl.load(p_da + o)[None, :]
        acc += column[None, :]
    same = (o_l[:, None] <= o_l[None, :]) & (segment[:, None] == segment[None, :])
    exponent = tl.load(p_key + o)[:, None] - tl.load(p_row + o)[None, :]
    dS = dS * tl.where(same, tl.exp(tl.where(same, exponent, 0.0)), 0.0)
    inside = awake[:, None] & in_k[None, :]
    q = tl.load(p_q + i_b * s_qB + i_h * s_qH + t[:, None] * s_qT + o_k[None, :], mask=inside, other=0.0)
    here = tl.dot(dS.to(q.dtype), q, input_precision=precision)
    result = acc * tl.load(p_write + o)[:, None] + here * scale
    k = tl.load(p_k + i_b * s_kB + i_h * s_kH + t[:, None] * s_kT + o_k[None, :], mask=inside, other=0.0)
    tl.store(p_sum + (i_k * tl.num_programs(2) + z) * N * L + n * L + o_l, tl.sum(k.to(tl.float32) * result, axis=1))
    tl.store(
        p_dk + i_b * s_oB + i_h * s_oH + t[:, None] * s_oT + o_k[None, :],
        tl.where(awake[:, None], result, 0.0).to(p_dk.dtype.element_ty), mask=real[:, None] & in_k[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_mask"])
def dv(
    p_q, p_k, p_dh, p_key, p_row, p_write, p_segment, p_inverse, p_mask, p_states, p_dv,
    T, N, H, s_qB, s_qT, s_qH, s_kB, s_kT, s_kH, s_dB, s_dT, s_dH, s_oB, s_oT, s_oH, scale,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    MASK: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dv_l = S^T u + write_l GC^T k_l; the states are GC."""
    i_v, n, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = z // H, z % H
    s_qB, s_qT, s_qH = numbers(s_qB, K), numbers(s_qT, K), numbers(s_qH, K)
    s_kB, s_kT, s_kH = numbers(s_kB, K), numbers(s_kT, K), numbers(s_kH, K)
    s_dB, s_dT, s_dH = numbers(s_dB, V), numbers(s_dT, V), numbers(s_dH, V)
    s_oB, s_oT, s_oH = numbers(s_oB, V), numbers(s_oT, V), numbers(s_oH, V)
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
    border = z * (N + 1) + n + 1
    S = tl.zeros((L, L), dtype=tl.float32)  # [l, j]
    acc = tl.zeros((L, TILE_V), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    for k0 in range(0, K, TILE_K):
        o_k = k0 + tl.arange(0, TILE_K)
        in_k = o_k < K
        k = tl.load(p_k + t[:, None] * s_kT + o_k[None, :], mask=awake[:, None] & in_k[None, :], other=0.0)
        q = tl.load(p_q + t[None, :] * s_qT + o_k[:, None], mask=in_k[:, None] & awake[None, :], other=0.0)
        C = tl.load(
            p_states + border * K * V + o_k[:, None] * V + o_v[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0
        )
        S = tl.dot(k, q, S, input_precision=precision)
        acc = tl.dot(k, C.to(k.dtype), acc, input_precision=precision)
    o = z * N * L + n * L + o_l
    segment = tl.load(p_segment + o)
    same = (o_l[:, None] <= o_l[None, :]) & (segment[:, None] == segment[None, :])
    exponent = tl.load(p_key + o)[:, None] - tl.load(p_row + o)[None, :]
    S = S * tl.where(same, tl.exp(tl.where(same, exponent, 0.0)), 0.0) * (tl.load(p_inverse + o) * scale)[None, :]
    dh = tl.load(
        p_dh + i_b * s_dB + i_h * s_dH + t[:, None] * s_dT + o_v[None, :],
        mask=awake[:, None] & in_v[None, :], other=0.0,
    )  # fmt: skip
    here = tl.dot(S.to(dh.dtype), dh, input_precision=precision)
    result = acc * tl.load(p_write + o)[:, None] + here
    tl.store(
        p_dv + i_b * s_oB + i_h * s_oH + t[:, None] * s_oT + o_v[None, :],
        tl.where(awake[:, None], result, 0.0).to(p_dv.dtype.element_ty), mask=real[:, None] & in_v[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_i", "p_f", "p_reset", "p_mask"])
def dgates(
    p_i, p_f, p_reset, p_mask, p_segment, p_q_dq, p_k_dk, p_rho, p_di, p_df,
    T, N, H, tiles_k, tiles, s_iB, s_iT, s_iH, s_fB, s_fT, s_fH,
    L: tl.constexpr, EXP: tl.constexpr, RESET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """di and df, contiguous [B, T, H], from the partial sums of the tiles."""
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Z = tl.num_programs(1)
    i_b, i_h = z // H, z % H
    o_l = tl.arange(0, L)
    t = n * L + o_l
    real = t < T
    o = z * N * L + t
    p = tl.zeros((L,), dtype=tl.float32)
    x = tl.zeros((L,), dtype=tl.float32)
    for tile in range(0, tiles_k):
        p += tl.load(p_k_dk + tile * Z * N * L + o)
        x += tl.load(p_q_dq + tile * Z * N * L + o)
    rho = 0.0
    for tile in range(0, tiles):
        rho += tl.load(p_rho + (tile * Z + z) * N + n)
    segment = tl.load(p_segment + o)
    segment_end = tl.sum(tl.where(o_l == L - 1, segment, 0), axis=0)
    later = (o_l[None, :] >= o_l[:, None]) & (segment[None, :] == segment[:, None])
    r = tl.sum(tl.where(later, (x - p)[None, :], 0.0), axis=1) + tl.where(segment == segment_end, rho, 0.0)
    awake = real
    if MASK:
        awake = awake & (tl.load(p_mask + i_b * T + t, mask=real, other=0) != 0)
    long = t.to(tl.int64)
    f = tl.load(p_f + i_b * s_fB + long * s_fT + i_h * s_fH, mask=awake, other=0.0).to(tl.float32)
    df = r * tl.sigmoid(-f)
    di = p
    if not EXP:
        i = tl.load(p_i + i_b * s_iB + long * s_iT + i_h * s_iH, mask=awake, other=0.0).to(tl.float32)
        di = p * tl.sigmoid(-i)
    if RESET:  # what it would have kept was emptied
        df = tl.where(tl.load(p_reset + i_b * T + t, mask=real, other=0) != 0, 0.0, df)
    out = (i_b * T + long) * H + i_h
    tl.store(p_di + out, tl.where(awake, di, 0.0).to(p_di.dtype.element_ty), mask=real)
    tl.store(p_df + out, tl.where(awake, df, 0.0).to(p_df.dtype.element_ty), mask=real)
