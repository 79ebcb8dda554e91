"""Projections to the input and forget gate: islands of fp32 inside a bf16 model.

bf16 would round a forget gate of 6 to steps of 1/32 and a bias of -10 to steps of 1/16.

B batch, T time, H heads, U any inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openxlstm.nn.functional import is_plain, widened, without_autocast
from openxlstm.nn.linear import Linear

FEW_ROWS = 16  # up to here, which is generation, joining the weights costs more than a second matmul


class GateLinear(Linear):
    """A linear map that computes in fp32 (fp64), whatever dtype its input and its weights have."""

    def forward(self, x: Float[Tensor, "*any U"]) -> Float[Tensor, "*any H"]:
        with without_autocast(x):
            return F.linear(widened(x), widened(self.weight), widened(self.bias))


def project_gates(
    inputs: Sequence[Float[Tensor, "B T _"]], i: nn.Module, f: nn.Module
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
    """Pre-activations of the input and forget gate from the concatenated inputs, in fp32 (fp64).

    The concatenation is never built: the weights are split instead, and both gates share one matmul per input. That
    reads weights without calling their module, so a module that somebody has wrapped, replaced or hooked (an adapter,
    a quantiser, weights that wait on another device) is called like any other.
    """
    if not (_is_plain(i) and _is_plain(f)):
        x = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=-1)
        return widened(i(x)), widened(f(x))
    with without_autocast(inputs[0]):
        if len(inputs) == 1 and inputs[0].numel() <= FEW_ROWS * inputs[0].shape[-1]:
            x = widened(inputs[0])
            i_BTH, f_BTH = (F.linear(x, widened(gate.weight), widened(gate.bias)) for gate in (i, f))
            return i_BTH, f_BTH
        weights = widened(torch.cat((i.weight, f.weight))).split([x.shape[-1] for x in inputs], dim=1)
        raw = widened(torch.cat((i.bias, f.bias)))
        for x, weight in zip(inputs, weights, strict=True):
            raw = raw + F.linear(widened(x), weight)
    i_BTH, f_BTH = raw.chunk(2, dim=-1)
    return i_BTH, f_BTH


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module would do nothing but multiply by its weight and add its bias."""
    return type(module).forward in (GateLinear.forward, nn.Linear.forward) and is_plain(module)
