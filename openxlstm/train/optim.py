"""AdamW, the rate, and the clip."""

from typing import Any

import torch

from openxlstm.train.recipe import OptimRecipe


def build(model: Any, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over the model's own groups: which parameters decay is part of the architecture, not of the run.

    Fused is one pass over the memory of each parameter; on the CPU it is as deterministic as the plain loop.
    """
    groups = model.parameter_groups(recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Use the rate `lr` from the next step on."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def clip(optimiser: torch.optim.Optimizer, limit: float) -> float:
    """Scale all gradients so that their global norm is at most `limit`. Returns the norm before."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, limit).item()
