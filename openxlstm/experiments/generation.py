"""Time and memory of a token, over how much was generated before it (arXiv:2405.04517, Fig. 9).

Batch 1, greedy, one token first, no stopping, random weights: what a token costs does not depend on what was learned.
Ours decodes as `ox.generate` does (infer/decoder.py); the Llama as transformers does, with its default cache. The time
of a token at n is the median of the tokens before n; the memory is what is kept between tokens. A seed is a repetition.
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
from openxlstm.models.accounting import state_bytes

GROWTH = "last over first"


@runtime_checkable
class Steps(Protocol):
    """What decodes a token at a time."""

    def step(self, tokens: Tensor) -> Tensor: ...


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
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = (0.0,)  # nothing is trained

    def __post_init__(self) -> None:
        if list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < self.timed:
            raise ValueError(f"lengths={self.lengths} must rise, and the first be at least timed={self.timed}")

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
    steps, kept = _decoder(name, model.eval())
    token, times = torch.zeros(1, dtype=torch.long), []
    metrics: dict[str, Metric] = {}
    for position in range(1, plan.lengths[-1] + 1):
        began = time.perf_counter()
        token = steps.step(token).argmax(-1)
        times.append(1e3 * (time.perf_counter() - began))
        if position in plan.lengths:
            metrics[f"ms at {position:,}"] = Metric(statistics.median(times[-plan.timed :]), plan.timed)
            metrics[f"MiB kept at {position:,}"] = Metric(kept() / 2**20, 1)
    first, last = (metrics[f"ms at {n:,}"].value for n in (plan.lengths[0], plan.lengths[-1]))
    metrics[GROWTH] = Metric(last / first, plan.timed)
    return {
        "label": label, "parameters": size, "metrics": metrics, "choice": 0.0, "steps": 0, "tokens": plan.lengths[-1],
    }  # fmt: skip


def _decoder(name: str, model: Any) -> tuple[Steps, Any]:
    """What decodes, and a function that says how many bytes it keeps.

    Raises:
        ValueError: a contestant that is not decoded here.
    """
    if name == "llama":
        from openxlstm.hf.decoding import CachedLlama

        cached = CachedLlama(model)
        return cached, lambda: cached.nbytes
    if set(name) - set("ms"):
        raise ValueError(f"{name} is not timed: patterns and llama are")
    size = state_bytes(model.config)
    return decoder(model, model.empty_state(1)), lambda: size
