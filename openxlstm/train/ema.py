"""A running average of the parameters: what is measured and passed on may be smoother than what is trained.

After the step s (from 0), for every parameter θ:

    average += (1 - d) (θ - average)        d = min(decay, (1 + s) / (10 + s))

The second term lets the average follow while the run is young: 0.1 at the first step, 0.99 after 890. So the start is
forgotten whatever the decay, and the average is a function of the steps alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn


@final
class EMA:
    """The average, in fp32 (fp64 for fp64), on the parameters' devices, sharded as they are.

    Attributes:
        tensors: the average of each parameter, by its name in the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1; 0.999 looks back on about 1,000 steps")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after the step `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside, and its own parameters again afterwards, to the bit."""
        with torch.no_grad():
            own = {name: weight.detach().clone() for name, weight in self._parameters.items()}
            for name, weight in self._parameters.items():
                weight.copy_(self.tensors[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._parameters.items():
                    weight.copy_(own[name])
