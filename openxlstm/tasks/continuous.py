"""Sequences of numbers in, numbers or classes out: a backbone between two linear maps.

For tasks without a vocabulary (nearest-neighbour search, images as sequences of pixels) every architecture is a
backbone, [B, T, D] to [B, T, D]: `xLSTMStack`, `lstm_layers` and `lstm_blocks` of `tasks.baselines`, `LlamaStack` of
`hf.continuous`. The two maps around it are the same for all of them.

B batch, T time, F numbers in an input vector, D model width, O outputs.
"""

from __future__ import annotations

from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from openxlstm.models import checks
from openxlstm.models.interface import ModelState, decay_groups
from openxlstm.nn.init import small_std
from openxlstm.nn.linear import Linear


@runtime_checkable
class Backbone(Protocol):
    """What stands between the two maps. The contract of `interface` holds, for vectors instead of tokens."""

    def __call__(
        self,
        x: Float[Tensor, "B T D"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]: ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]: ...


@final
class Regressor(nn.Module):
    """y = W_out backbone(W_in x + b_in) + b_out at every place: what it makes of all inputs up to there.

    Args:
        backbone: a module of width `width`.
        features: F.
        outputs: O: 1 for a number, as many as there are classes for a choice among them.
    """

    def __init__(self, backbone: nn.Module, *, width: int, features: int, outputs: int) -> None:
        super().__init__()
        checks.check_positive("Regressor", width=width, features=features, outputs=outputs)
        if not isinstance(backbone, Backbone):
            raise ValueError(
                f"{type(backbone).__name__} is no backbone: it maps [B, T, D] and a state to the same, and names its "
                f"parameter_groups, as xLSTMStack does"
            )
        self.features, self.outputs = features, outputs
        self.read = Linear(features, width)
        self.backbone = backbone
        self.write = Linear(width, outputs)
        nn.init.normal_(self.read.weight, std=features**-0.5)  # inputs of unit size give a stream of unit size
        nn.init.normal_(self.write.weight, std=small_std(width))
        nn.init.zeros_(self.read.bias)
        nn.init.zeros_(self.write.bias)

    def forward(
        self, inputs: Float[Tensor, "B T F"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T O"]:
        """Outputs of every place; where the mask is False, inputs may be anything and outputs mean nothing."""
        if inputs.ndim != 3 or inputs.shape[-1] != self.features:
            raise ValueError(f"inputs must be [batch, time, {self.features}]; got {list(inputs.shape)}")
        if mask is not None:
            checks.check_flag("mask", mask, inputs.shape[0], inputs.shape[1])
            inputs = torch.where(mask[..., None], inputs, 0.0)  # 0 * NaN is NaN, in the gradient of W_in too
        hidden, _ = self.backbone(self.read(inputs), mask=mask)
        return self.write(hidden)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the backbone, both matrices with weight decay, their biases without."""
        decayed, kept = (group["params"] for group in self.backbone.parameter_groups(weight_decay))  # type: ignore[operator]
        return decay_groups(
            [*decayed, self.read.weight, self.write.weight], [*kept, self.read.bias, self.write.bias], weight_decay
        )
