"""AdamW, or Muon for the matrices inside the model; and the rate.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal matrix, found by five Newton-Schulz iterations in bf16. It serves weights of dense linear layers. Everything
else stays with AdamW: embedding and readout, convolutions, block-diagonal and recurrent weights, biases, norms. Its
update is scaled so that its root mean square is that of AdamW (Liu et al. 2025, arXiv:2502.16982, Sec. 2.2), so one
learning rate and one weight decay serve both. Experimental: no published xLSTM was trained with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from openxlstm.train.recipe import OptimRecipe


@final
class Together:
    """Optimisers that share the parameters of a model among them and step at the same time."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Change every parameter once."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)


Optimiser = torch.optim.Optimizer | Together


def build(model: Any, recipe: OptimRecipe) -> Optimiser:
    """The optimiser a recipe names, over the model's own groups: what decays belongs to the architecture."""
    return BUILDERS[recipe.name](model, recipe)


def parts(optimiser: Optimiser) -> list[torch.optim.Optimizer]:
    """PyTorch's own optimisers within."""
    return list(optimiser.parts) if isinstance(optimiser, Together) else [optimiser]


def set_rate(optimiser: Optimiser, lr: float) -> None:
    """Use the rate `lr` from the next step on."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def _adamw(model: Any, recipe: OptimRecipe) -> torch.optim.AdamW:
    return _adamw_over(model.parameter_groups(recipe.weight_decay), recipe)


def _adamw_over(groups: list[dict[str, Any]], recipe: OptimRecipe) -> torch.optim.AdamW:
    """Fused is one pass over the memory of each parameter; on the CPU it is as deterministic as the plain loop."""
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def _muon(model: Any, recipe: OptimRecipe) -> Together:
    chosen = {id(weight) for weight in matrices(model)}
    theirs, rest = [], []
    for group in model.parameter_groups(recipe.weight_decay):
        weights = list(group["params"])
        theirs.append({**group, "params": [weight for weight in weights if id(weight) in chosen]})
        rest.append({**group, "params": [weight for weight in weights if id(weight) not in chosen]})
    theirs, rest = ([group for group in groups if group["params"]] for groups in (theirs, rest))
    muon = torch.optim.Muon(theirs, lr=recipe.lr, adjust_lr_fn="match_rms_adamw")
    return Together(muon, _adamw_over(rest, recipe))


def matrices(model: Any) -> list[Tensor]:
    """Weights of dense linear layers, but for the readout."""
    readout, _ = model.readout()
    dense = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return [weight for weight in dense if weight is not readout]


BUILDERS: dict[str, Callable[[Any, OptimRecipe], Optimiser]] = {"adamw": _adamw, "muon": _muon}
