"""Small functions that both architectures share; above all the fp32 islands inside a bf16 model.

B batch, T time, H heads, U any inner width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def widened(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """x in fp32, or in fp64 if it is fp64: where sums, exponents and states live."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves x's device alone; without it the next matmul undoes `widened`."""
    device = "cpu" if x.device.type == "meta" else x.device.type  # autocast does not know the meta device
    return torch.autocast(device, enabled=False)


def soft_cap(x: Float[Tensor, "*any"], cap: float) -> Float[Tensor, "*any"]:
    """cap * tanh(x / cap), in the dtype of x; arXiv:2503.13427 (13)."""
    return cap * torch.tanh(x / cap)


def project_gates(
    inputs: Sequence[Float[Tensor, "B T _"]], i: nn.Linear, f: nn.Linear
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
    """Pre-activations of the input and forget gate from the concatenated inputs, in fp32 (fp64).

    bf16 would round a forget gate of 6 to steps of 1/32 and a bias of -10 to steps of 1/16. The concatenation is
    never built: the weights are split instead, and both gates share one matmul per input.
    """
    with without_autocast(inputs[0]):
        weights = widened(torch.cat((i.weight, f.weight))).split([x.shape[-1] for x in inputs], dim=1)
        raw = widened(torch.cat((i.bias, f.bias)))
        for x, weight in zip(inputs, weights, strict=True):
            raw = raw + F.linear(widened(x), weight)
    i_BTH, f_BTH = raw.chunk(2, dim=-1)
    return i_BTH, f_BTH
