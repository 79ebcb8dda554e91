"""Small functions that both architectures share; above all the fp32 islands inside a bf16 model."""

from __future__ import annotations

import torch
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


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: nobody has wrapped or hooked it.

    An instance's own forward, as accelerate sets it, is looked for where it would stand: under torch.compile a bound
    method has no `__func__`.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)
