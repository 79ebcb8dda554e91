"""One step of the mLSTM without gradients: the definition's numbers, bit for bit, with less memory written.

Decoding is bound by the memory that a step touches. The definition makes four arrays of the size of C; this makes two,
the new C and one association, and works in place on them. Nothing that came in is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openxlstm.cells import mLSTMState
from openxlstm.cells.mlstm import denominator


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: mLSTMState, eps: float
) -> tuple[Tensor, mLSTMState]:
    """`openxlstm.cells.mlstm.step` with an exponential input gate and a sigmoid forget gate; no reset, no mask."""
    dtype = q.dtype
    q, k, v, i, f = (x.to(state.m.dtype) for x in (q, k, v, i, f))
    decayed = F.logsigmoid(f) + state.m  # (26)
    m = torch.maximum(decayed, i)  # (15)
    write_BH1 = torch.exp(i - m)[..., None]  # (16)
    keep_BH1 = torch.exp(decayed - m)[..., None]  # (17)
    kv_BHKV = (k[..., :, None] * v[..., None, :]).mul_(write_BH1[..., None])
    C = (state.C * keep_BH1[..., None]).add_(kv_BHKV)  # (19)
    n = (state.n * keep_BH1).add_(write_BH1 * k)  # (20)
    q = q * q.shape[-1] ** -0.5  # (23)
    h = torch.einsum("bhk,bhkv->bhv", q, C)
    h = h / denominator((q * n).sum(-1), m, eps)[..., None]  # (21)
    return h.to(dtype), mLSTMState(C, n, m)
