"""One step of the sLSTM inside a kernel: the pointwise part, shared by the sweeps. Everything here is fp32.

Numbers at the right margin are the equations of arXiv:2405.04517. m of an empty element is minus infinity: it then
keeps nothing and takes m from its input gate alone, without a case of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_of_exp(x):
    """log(1 + exp(x)) for x <= 0, as 2 atanh(e / (2 + e)): log(1 + e) would lose e where the forget gate is open."""
    e = tl.exp(x)
    s = e / (2.0 + e)
    y = s * s  # at most 1/9: the first term left out is below 1e-9
    p = 1.0 / 17.0
    p = p * y + 1.0 / 15.0
    p = p * y + 1.0 / 13.0
    p = p * y + 1.0 / 11.0
    p = p * y + 1.0 / 9.0
    p = p * y + 1.0 / 7.0
    p = p * y + 1.0 / 5.0
    p = p * y + 1.0 / 3.0
    return 2.0 * s * (p * y + 1.0)


@triton.jit
def logsigmoid(x):
    """log(sigmoid(x)), of full precision where the gate is open."""
    return tl.minimum(x, 0.0) - log1p_of_exp(-tl.abs(x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """From an exponential that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def load_flag(p_flags, o_b, t, T, in_b):
    """flags[b, t] as bool [ROWS, 1]; False outside the batch."""
    return (tl.load(p_flags + o_b * T + t, mask=in_b, other=0) != 0)[:, None]


@triton.jit
def next_state(i, f, z, o, c, n, m, EXP_FORGET: tl.constexpr):
    """Pre-activations and the state before -> the state after: h, c, n, m."""
    log_f = f if EXP_FORGET else logsigmoid(f)  # (13)
    l = log_f + m
    m_new = tl.maximum(l, i)  # (15)
    write = tl.exp(i - m_new)  # (16)
    keep = tl.exp(l - m_new)  # (17)
    c_new = keep * c + write * tanh(z)  # (8)
    n_new = keep * n + write  # (9)
    return sigmoid(o) * c_new / n_new, c_new, n_new, m_new  # (10)


@triton.jit
def gradients_of_step(
    total, GC, GN, p_raw, p_s, part, p_reset, o_b, t, T, in_b, ok, K: tl.constexpr,
    EXP_FORGET: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """di, df, dz, do, and GC, GN before the step. Rows that pause give numbers without meaning; the caller drops them.

    p_raw points at the four gates of the step, K apart; p_s at the state before, [4, H, B, K], the one after follows.
    """
    i = tl.load(p_raw, mask=ok, other=0.0)
    f = tl.load(p_raw + K, mask=ok, other=0.0)
    z = tanh(tl.load(p_raw + 2 * K, mask=ok, other=0.0))
    o = sigmoid(tl.load(p_raw + 3 * K, mask=ok, other=0.0))
    c_in = tl.load(p_s + part, mask=ok, other=0.0)
    n_in = tl.load(p_s + 2 * part, mask=ok, other=0.0)
    m_in = tl.load(p_s + 3 * part, mask=ok, other=0.0)
    h = tl.load(p_s + 4 * part, mask=ok, other=0.0)
    c = tl.load(p_s + 5 * part, mask=ok, other=0.0)
    n = tl.load(p_s + 6 * part, mask=ok, other=1.0)
    m = tl.load(p_s + 7 * part, mask=ok, other=0.0)
    if RESET:
        fresh = load_flag(p_reset, o_b, t, T, in_b)
        c_in, n_in = tl.where(fresh, 0.0, c_in), tl.where(fresh, 0.0, n_in)
        m_in = tl.where(fresh, float("-inf"), m_in)
    log_f = f if EXP_FORGET else logsigmoid(f)
    keep = tl.exp(log_f + m_in - m)
    write = tl.exp(i - m)
    GC = GC + total * o / n
    GN = GN - total * h / n
    di = write * (GC * z + GN)
    df = keep * (GC * c_in + GN * n_in)
    if not EXP_FORGET:
        df *= sigmoid(-f)
    dz = GC * write * (1.0 - z * z)
    do = total * (c / n) * o * (1.0 - o)
    return di, df, dz, do, keep * GC, keep * GN
