"""The distributions of the papers' initialisation tables. D model width, K head width.

Standard deviations: arXiv:2405.04517 trains with Nguyen and Salazar's small init (arXiv:1910.05895) and scales the
layers that write to the residual stream by depth, as GPT-NeoX does (arXiv:2204.06745, "wang init").
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.linear import HeadwiseLinear
from openxlstm.nn.norm import HeadNorm, LayerNorm, RMSNorm


def small_std(width: int) -> float:
    """sqrt(2 / (5 D)): every matrix that reads the residual stream, the embedding and the head."""
    return math.sqrt(2 / (5 * width))


def residual_std(width: int, blocks: int) -> float:
    """2 / (blocks sqrt(D)): every matrix that writes to the residual stream; D even where the input is wider."""
    return 2 / (blocks * math.sqrt(width))


def forget_bias_per_head(heads: int) -> Float[Tensor, "H"]:
    """linspace(3, 6) over the heads of an mLSTM: sigmoid gives 0.953 .. 0.998, memory starts open."""
    return torch.linspace(3.0, 6.0, heads)


def forget_bias_within_head(K: int, depth: float) -> Float[Tensor, "K"]:
    """5 - 12 (j / (K-1))^(0.3 + 1.3 depth), j = 0 .. K-1, for an sLSTM; depth 0 is the first block and 1 the last.

    From 5, which forgets slowly, down to -7, which forgets at once. A head of width 1 has no range to span: 5.
    """
    if K == 1:
        return torch.tensor([5.0])
    return 5 - 12 * (torch.arange(K) / (K - 1)) ** (0.3 + 1.3 * depth)


@torch.no_grad()
def init_leaf(module: nn.Module, width: int) -> None:
    """What both tables say of a leaf of this kind: matrices small, their biases 0, norms 1, convolutions as torch does.

    Rows about a weight's role (writing to the residual stream, opening a gate) come after; a module of another kind is
    left alone.
    """
    if isinstance(module, (nn.Linear, nn.Embedding, HeadwiseLinear)):
        nn.init.normal_(module.weight, std=small_std(width))
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (LayerNorm, RMSNorm, HeadNorm)):
        nn.init.ones_(module.weight)
    elif isinstance(module, ConvSiLU):
        module.reset_parameters()
