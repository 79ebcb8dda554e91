"""What is minimised: a language model and its loss as one module, so that no tensor of all logits leaves it.

The loss stands inside the module because sharded training gathers weights around `forward`, and around nothing else.

B batch, T time, W vocabulary.
"""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from openxlstm.models.interface import ModelState
from openxlstm.train.cross_entropy import Entropy, linear_cross_entropy
from openxlstm.train.recipe import LossRecipe


@final
class Objective(nn.Module):
    """The summed loss of a portion of a batch, times `scale`, beside the sums that a `Score` is made of.

    The caller's `scale` is 1 / (valid targets of the whole batch), times the number of ranks where gradients are
    averaged. So portions of any size, and portions without a single target, add up to the gradient of the batch.

    Under autocast products run in its dtype. Gates, norms, states, soft caps and everything behind the logits are
    computed in fp32 all the same.
    """

    def __init__(self, model: Any, recipe: LossRecipe | None = None) -> None:
        super().__init__()
        self.model = model  # a LanguageModel that is an nn.Module
        self.recipe = LossRecipe() if recipe is None else recipe

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        reset: Bool[Tensor, "B T"],
        valid: Bool[Tensor, "B T"],
        bytes_of: Int[Tensor, " W"],
        scale: Float[Tensor, ""],
        state: ModelState | None = None,
    ) -> tuple[Float[Tensor, ""], Float64[Tensor, "5"], ModelState]:
        """(what to call backward on; nats, targets, nats of bytes, bytes, z-loss; what the model remembers)."""
        entropy, state = self._entropy(tokens, targets, reset, valid, state)
        return entropy.total * scale, sums_of(entropy, targets, valid, bytes_of), state

    @torch.no_grad()
    def token_nats(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        reset: Bool[Tensor, "B T"],
        valid: Bool[Tensor, "B T"],
        state: ModelState | None = None,
    ) -> tuple[Float[Tensor, "B T"], ModelState]:
        """Cross-entropy of every target in nats, 0 where it does not count: for whoever measures by position."""
        entropy, state = self._entropy(tokens, targets, reset, valid, state)
        return entropy.nats.view_as(targets), state

    def _entropy(
        self, tokens: Tensor, targets: Tensor, reset: Tensor, valid: Tensor, state: ModelState | None
    ) -> tuple[Entropy, ModelState]:
        hidden, state = self.model.features(tokens, state, reset=reset)
        weight, soft_cap = self.model.readout()
        entropy = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            targets.flatten(),
            valid.flatten(),
            soft_cap=soft_cap,
            z_loss=self.recipe.z_loss,
            chunk=self.recipe.chunk,
            recompute=self.recipe.recompute,
        )
        return entropy, state


def sums_of(
    entropy: Entropy, targets: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"], bytes_of: Int[Tensor, " W"]
) -> Float64[Tensor, "5"]:
    """Nats, targets, nats of targets that stand for bytes, bytes, z-loss.

    In float64, since a sum over a million fp32 terms should not depend on how it was cut.
    """
    nats = entropy.nats.double()
    bytes_N = (bytes_of[torch.where(valid, targets, 0)] * valid).flatten()
    of_bytes = torch.where(bytes_N > 0, nats, 0.0)
    return torch.stack((nats.sum(), valid.sum().double(), of_bytes.sum(), bytes_N.sum().double(), entropy.z.double()))
