"""Models small enough to predict by hand; the real ones are in test_generate_models.py."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openxlstm.cells import State
from openxlstm.models.interface import ModelState


@dataclass(frozen=True, slots=True)
class Trace(State):
    """A decaying sum of everything seen, and how many tokens that was."""

    sum: Float[Tensor, "B D"]
    count: Float[Tensor, "B"]


class Recurrent(nn.Module):
    """h_t = 0.7 h_{t-1} + E[token_t]: every prediction depends on the whole text. Remembers how it was called."""

    def __init__(self, vocab_size: int = 257, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.embedding = nn.Embedding(vocab_size, width, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab_size, dtype=torch.float64)
        self.calls: list[torch.Size] = []
        self.first_inputs: list[int] = []

    checkpoint_every = 0

    def parameter_groups(self, weight_decay: float) -> list:
        raise NotImplementedError("nobody trains this")

    def readout(self) -> tuple:
        raise NotImplementedError("nobody trains this")

    def units(self) -> list:
        raise NotImplementedError("nobody shards this")

    def empty_state(self, batch: int) -> ModelState:
        zeros = torch.zeros(batch, self.embedding.embedding_dim, dtype=torch.float64)
        return ModelState(blocks=(Trace(zeros, zeros[:, 0].clone()),))

    def features(self, tokens, state=None, *, reset=None, mask=None):
        self.calls.append(tokens.shape)
        if state is None:
            state = self.empty_state(tokens.shape[0])
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            self.first_inputs = [row[here][0].item() for row, here in zip(tokens, real)]
        past, hidden = state.blocks[0], []
        for t in range(tokens.shape[1]):
            now = Trace(0.7 * past.sum + self.embedding(tokens[:, t]), past.count + 1)
            if mask is not None:
                here = mask[:, t]
                now = Trace(torch.where(here[:, None], now.sum, past.sum), torch.where(here, now.count, past.count))
            past = now
            hidden.append(self.hidden(now))
        return self.dropout(torch.stack(hidden, dim=1)), ModelState(blocks=(past,))

    def hidden(self, trace: Trace) -> Tensor:
        return trace.sum

    def logits(self, hidden):
        return self.head(hidden).float()

    def forward(self, tokens, state=None, *, reset=None, mask=None):
        hidden, state = self.features(tokens, state, reset=reset, mask=mask)
        return self.logits(hidden), state


class Scripted(Recurrent):
    """Says given tokens, whatever it reads: token number c after c real inputs, counted from the end of the prompt."""

    def __init__(self, script: list[int], prompt_tokens: int, vocab_size: int = 257) -> None:
        super().__init__(vocab_size)
        self.script, self.prompt_tokens = script, prompt_tokens

    def hidden(self, trace: Trace) -> Tensor:
        return trace.count[:, None]

    def logits(self, hidden):
        position = hidden[..., 0].long() - self.prompt_tokens
        said = torch.tensor([*self.script, 0])[position.clamp(0, len(self.script))]
        return 50 * nn.functional.one_hot(said, self.config.vocab_size).float()
