"""RWKV-4's sums over time in about 2 sqrt(T) steps in place of T.

transformers has a loop over tokens, which is most of a training step, and a CUDA kernel that is compiled at first use
and ends at a fixed length. This computes the same from PyTorch's own operations, gradients included, on any device and
at any length: all stretches of L = sqrt(T) tokens side by side, a token at a time; then from stretch to stretch.

B batch, T time, D channels, each of which is a recurrence by itself, C stretches of L tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention


class Stretch(NamedTuple):
    """What some tokens in a row sum to, at the last of them.

    m is whatever keeps the sums finite. It divides numerator and denominator alike, so that nothing depends on it, and
    it has no gradient.
    """

    sums: Float[Tensor, "2 ..."]  # of weights times values, and of weights; both over e^m
    m: Float[Tensor, "..."]


def join(before: Stretch, now: Stretch, elapsed: Float[Tensor, "..."]) -> Stretch:
    """Both stretches as one; `elapsed`: how much the first has decayed since it ended, as a logarithm."""
    m = torch.maximum(before.m - elapsed.detach(), now.m)
    return Stretch(before.sums * (before.m - elapsed - m).exp() + now.sums * (now.m - m).exp(), m)


def wkv(
    decay_D: Float[Tensor, "D"],
    first_D: Float[Tensor, "D"],
    k_BTD: Float[Tensor, "B T D"],
    v_BTD: Float[Tensor, "B T D"],
) -> Float[Tensor, "B T D"]:
    """Averages of all values so far, weighted by their keys and by how long ago they were (arXiv:2305.13048, Eq. 16).

    out_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same with all v = 1),  w = e^decay, u = first

    In fp32, or fp64 if the keys are; returned as the values came.
    """
    if k_BTD.shape[1] < 2:
        return v_BTD
    dtype = torch.promote_types(k_BTD.dtype, torch.float32)
    w, u, k, v = (x.to(dtype) for x in (decay_D.exp(), first_D, k_BTD, v_BTD))
    before = _until(w, k, v)
    own = u + k[:, 1:]
    m = torch.maximum(before.m, own.detach())
    numerator, denominator = before.sums * (before.m - m).exp()
    weight = (own - m).exp()
    later = (numerator + weight * v[:, 1:]) / (denominator + weight)
    return torch.cat((v[:, :1], later), dim=1).to(v_BTD.dtype)


def _until(w: Float[Tensor, "D"], k: Float[Tensor, "B T D"], v: Float[Tensor, "B T D"]) -> Stretch:
    """All that was before each token but the first: sums [2, B, T-1, D], m [B, T-1, D]."""
    B, T, D = k.shape
    L = math.isqrt(T - 1) + 1
    C = -(-T // L)
    m = k.detach()
    ones = (k - m).exp()  # through which k gets its gradient
    sums, missing = torch.stack((ones * v, ones)), (0, 0, 0, C * L - T)
    sums_2BCLD = F.pad(sums, missing).view(2, B, C, L, D)
    m_BCLD = F.pad(m, missing, value=-torch.inf).view(B, C, L, D)

    tokens = [Stretch(*pair) for pair in zip(sums_2BCLD.unbind(3), m_BCLD.unbind(2), strict=True)]
    within = tokens[:1]
    for token in tokens[1:]:
        within.append(join(within[-1], token, w))
    ends = [Stretch(*pair) for pair in zip(within[-1].sums.unbind(2), within[-1].m.unbind(1), strict=True)]
    starts = [Stretch(torch.zeros_like(ends[0].sums), torch.full_like(ends[0].m, -torch.inf))]
    for end in ends[:-1]:
        starts.append(join(starts[-1], end, L * w))

    start = Stretch(*(torch.stack(parts, dim=-2)[..., None, :] for parts in zip(*starts, strict=True)))
    here = Stretch(*(torch.stack(parts, dim=-2) for parts in zip(*within, strict=True)))
    elapsed_LD = torch.arange(1, L + 1, dtype=w.dtype, device=w.device)[:, None] * w
    whole = join(start, here, elapsed_LD)
    return Stretch(whole.sums.view(2, B, C * L, D)[:, :, : T - 1], whole.m.view(B, C * L, D)[:, : T - 1])


@final
class ScannedAttention(RwkvSelfAttention):
    """transformers' time mixing with `wkv` for its loop. Made of one that is there: `attention.__class__ = ...`."""

    def forward(self, hidden: Float[Tensor, "B T D"], state: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        """What the original returns. With a state to carry it is the original."""
        if state is not None or use_cache:
            return super().forward(hidden, state=state, use_cache=use_cache)
        receptance, k, v, _ = self.extract_key_value(hidden)
        return self.output(receptance * wkv(self.time_decay, self.time_first, k, v)), None
