"""What every architecture of transformers that we compare with needs to stand in for one of our language models.

The network is that of transformers. What is ours is the border: documents of a packed row do not see each
other, padding does not exist, and what has been read can be carried on from. It is trained, evaluated and sampled as
our models are; it is no model of this library, so its files are those of transformers.

B batch, T time, S tokens seen so far and now, D width, W vocabulary.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openxlstm.cells import State
from openxlstm.models import checks
from openxlstm.models.interface import ModelState, Unit, decay_groups


@dataclass(frozen=True, slots=True)
class History(State):
    """All that was read. `begins` and `exists` are `reset` and `mask`."""

    tokens: Tensor  # int64 [B, S]
    begins: Tensor  # bool [B, S]
    exists: Tensor  # bool [B, S]


Read = TypeVar("Read", bound=State)


def read_on(state: ModelState | None, now: Read) -> Read:
    """What was read before, and behind it what is read now."""
    if state is None:
        return now
    (before,) = state.blocks
    assert type(before) is type(now), "the state of another architecture"
    pairs = zip(before.tensors(), now.tensors(), strict=True)
    return type(now)(*(torch.cat(pair, dim=1) for pair in pairs))


class Compared(ABC, nn.Module):
    """A causal network of transformers as a `LanguageModel`.

    A call with a state reads the whole history again: right, and slow. It is here to be compared with, not to serve.
    A subclass says where the parts of its network are, and how the network reads a history.
    """

    def __init__(self, config: Any, network: Any) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self._checkpoint_every = 0

    @abstractmethod
    def read(self, history: History) -> Float[Tensor, "B S D"]:
        """Hidden states behind the last norm, of every token; finite where none exists."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The network's blocks."""

    def _embedding(self) -> nn.Embedding:
        return self.network.get_input_embeddings()

    def _head(self) -> nn.Linear:
        return self.network.get_output_embeddings()

    @property
    def checkpoint_every(self) -> int:
        """n > 0: recompute every n-th block's activations in the backward pass. About the run, not the model."""
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, every: int) -> None:
        self._checkpoint_every = every
        if every:
            self.network.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        else:
            self.network.activation_checkpointing_disable()

    def empty_state(self, batch: int) -> ModelState:
        """Nothing read yet, for `batch` sequences."""
        nothing = torch.zeros(batch, 0, dtype=torch.bool, device=self._head().weight.device)
        return ModelState((History(nothing.long(), nothing, nothing),))

    def features(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]:
        """What the head reads, of the new tokens only."""
        checks.check_tokens(tokens, self.config.vocab_size, reset, mask)
        begins = torch.zeros_like(tokens, dtype=torch.bool) if reset is None else reset
        exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        history = History(torch.where(exists, tokens, 0), begins, exists)
        history = read_on(state, history)
        S = history.tokens.shape[1]
        if not S:  # the networks do not read nothing
            return self._embedding()(history.tokens), ModelState((history,))
        return self.read(history)[:, S - tokens.shape[1] :], ModelState((history,))

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]:
        """What `logits` multiplies by; there is no soft cap."""
        return self._head().weight, None

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]:
        """Scores of the next token, in fp32 (fp64)."""
        scores = F.linear(hidden, self._head().weight)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T W"], ModelState]:
        """Scores of every next token, and what was read. The contract of `interface` holds."""
        hidden, state = self.features(tokens, state, reset=reset, mask=mask)
        return self.logits(hidden), state

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As ours: weight decay on every matrix but the embedding, and on no vector."""
        embedding = self._embedding().weight
        decayed = {
            id(p): p
            for name, p in self.named_parameters()
            if name.endswith("weight") and p.ndim > 1 and p is not embedding
        }
        return decay_groups(decayed.values(), [p for p in self.parameters() if id(p) not in decayed], weight_decay)

    def units(self) -> list[Unit]:
        """The blocks, first to last; norms and convolutions are islands of fp32."""
        return [
            Unit(layer, [part for part in layer.modules() if isinstance(part, nn.Linear)]) for layer in self.layers()
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of transformers: its Auto classes read them."""
        self.network.save_pretrained(folder)

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """The weights that `save` wrote."""
        self.network = type(self.network).from_pretrained(folder)
