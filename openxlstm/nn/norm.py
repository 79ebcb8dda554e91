"""Norms without bias. Reductions run in fp32 (fp64 for fp64 inputs); the result has the dtype of the input.

B batch, T time, D width, H heads, V head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openxlstm.kernels import glue
from openxlstm.nn.functional import widened


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(biased variance + eps) * weight; the norm of xLSTM[a:b]."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*any D"], for_matmul: bool = False) -> Float[Tensor, "*any D"]:
        """The norm of x in its dtype. for_matmul: a matrix product alone reads it, so what autocast would round it to
        there may be given at once."""
        if glue.serves(x, self.weight):
            rounded = (
                for_matmul and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            )
            return glue.layer_norm(x, self.weight, self.eps, torch.bfloat16 if rounded else x.dtype)
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(widened(x), weight.shape, weight, None, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), cast back, then times weight; the norm of xLSTM-7B, in its order of rounding."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        return F.rms_norm(widened(x), self.weight.shape, None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over each head by itself, then heads side by side, then one weight for all of them."""

    def __init__(self, heads: int, head_width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * head_width))
        self.eps = eps

    def forward(self, h: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H*V"]:
        normed = F.layer_norm(widened(h), h.shape[-1:], None, None, self.eps)
        return normed.flatten(-2).to(h.dtype) * self.weight.to(h.dtype)
