"""Time and memory of a token, over how much was generated before it (arXiv:2405.04517, Fig. 9).

Batch 1, greedy, one token first, no stopping, random weights: what a token costs does not depend on what was learned.
Ours decodes as `ox.generate` does (infer/decoder.py); the Llama as transformers does, with its default cache. The time
of a token at n is the median of the tokens before n; the memory is what is kept between tokens. A seed is a repetition.

What is about to generate the tokens before n is forked there, and the forks take turns: a ratio of times minutes apart
would be one of two moods of the machine.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openxlstm.experiments import contestants
from openxlstm.experiments.contestants import Sizes
from openxlstm.experiments.results import Metric, fingerprint
from openxlstm.infer.decoder import decoder
from openxlstm.models.interface import LanguageModel, ModelState

GROWTH = "last over first"


@runtime_checkable
class Entrant(Protocol):
    """What generates a token at a time, and can be doubled."""

    @property
    def nbytes(self) -> int: ...

    def step(self, tokens: Tensor) -> Tensor: ...

    def fork(self) -> Entrant: ...


class _Ours:
    """A decoder of this library."""

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        self._model, self._decoder = model, decoder(model, state)

    @property
    def nbytes(self) -> int:
        """Of the state."""
        return sum(part.nbytes for part in self._decoder.state.tensors())

    def step(self, tokens: Tensor) -> Tensor:
        """Scores of the token after these."""
        return self._decoder.step(tokens)

    def fork(self) -> _Ours:
        """Another that has read the same."""
        return _Ours(self._model, self._decoder.state.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Contestants of equal size, and the lengths at which a token is timed."""

    models: tuple[str, ...]
    width: int
    blocks: int
    heads: int
    vocab_size: int
    lengths: tuple[int, ...]  # rising
    timed: int  # tokens before each length
    turns: int  # in which they are timed, each after those of the other lengths
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = (0.0,)  # nothing is trained

    def __post_init__(self) -> None:
        if list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < self.timed:
            raise ValueError(f"lengths={self.lengths} must rise, and the first be at least timed={self.timed}")
        if self.turns < 1 or self.timed % self.turns:
            raise ValueError(f"timed={self.timed} must be a multiple of turns={self.turns}")

    @property
    def sizes(self) -> Sizes:
        """What all contestants share."""
        return Sizes(width=self.width, blocks=self.blocks, heads=self.heads, vocab_size=self.vocab_size, text=True)

    @property
    def fingerprint(self) -> str:
        """Changes with everything that a run depends on but the list of models and repetitions."""
        facts: dict[str, Any] = asdict(self)
        for grown in ("models", "seeds"):
            del facts[grown]
        return fingerprint({**facts, "reference": self.models[0]})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What stands in a table."""
        ends = (self.lengths[0], self.lengths[-1])
        return (*(f"ms at {n:,}" for n in self.lengths), GROWTH, *(f"MiB kept at {n:,}" for n in ends))

    @property
    def headline(self) -> str:
        """The metric that stands for all where there is room for one."""
        return GROWTH

    @property
    def unit(self) -> str:
        """Of the times."""
        return "ms"

    @property
    def chance(self) -> float:
        """There is none."""
        return 0.0

    @property
    def volume(self) -> str:
        """What a run is."""
        return f"{self.lengths[-1]:,} tokens"

    @property
    def lacking(self) -> str | None:
        """Nothing: it needs no data."""
        return None


def run(plan: GenerationPlan, name: str, seed: int) -> dict[str, Any]:
    """Generate with one contestant: label, parameters, metrics."""
    model, label, size = contestants.enter(name, plan.sizes, plan.models[0], seed)
    going = _entrant(name, model.eval())
    begun: dict[int, tuple[Entrant, Tensor]] = {}  # by length: what is about to generate the tokens before it
    token = torch.zeros(1, dtype=torch.long)
    for position in range(plan.lengths[-1] - plan.timed + 1):
        if position + plan.timed in plan.lengths:
            begun[position + plan.timed] = going.fork(), token
        token = going.step(token).argmax(-1)
    times: dict[int, list[float]] = {length: [] for length in begun}
    for _ in range(plan.turns):
        for length, (entrant, token) in begun.items():
            begun[length] = entrant, _timed(entrant, token, plan.timed // plan.turns, times[length])
    metrics = {f"ms at {length:,}": Metric(statistics.median(times[length]), plan.timed) for length in begun}
    metrics |= {f"MiB kept at {length:,}": Metric(one.nbytes / 2**20, 1) for length, (one, _) in begun.items()}
    first, last = (metrics[f"ms at {n:,}"].value for n in (plan.lengths[0], plan.lengths[-1]))
    metrics[GROWTH] = Metric(last / first, plan.timed)
    return {
        "label": label, "parameters": size, "metrics": metrics, "choice": 0.0, "steps": 0, "tokens": plan.lengths[-1],
    }  # fmt: skip


def _timed(entrant: Entrant, token: Tensor, count: int, times: list[float]) -> Tensor:
    """Generate `count` tokens, each timed, in milliseconds, to the end of `times`; the last of them."""
    for _ in range(count):
        began = time.perf_counter()
        token = entrant.step(token).argmax(-1)
        times.append(1e3 * (time.perf_counter() - began))
    return token


def _entrant(name: str, model: Any) -> Entrant:
    """What generates.

    Raises:
        ValueError: a contestant that is not decoded here.
    """
    if name == "llama":
        from openxlstm.hf.decoding import CachedLlama

        return CachedLlama(model)
    if set(name) - set("ms"):
        raise ValueError(f"{name} is not timed: patterns and llama are")
    return _Ours(model, model.empty_state(1))
