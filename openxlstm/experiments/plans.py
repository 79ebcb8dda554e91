"""What an experiment is, as data: who competes in what, on which budget, and what was published.

A plan is everything that a result depends on; its fingerprint names it in every result. Profiles of one experiment:
`smoke` (about a minute, in CI), `cpu` (two cores, minutes to an hour), `gpu` (one device, up to a day), `paper` (the
published setting; shipped, not promised).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from openxlstm.experiments.contestants import Sizes
from openxlstm.experiments.results import fingerprint
from openxlstm.experiments.solve import Budget
from openxlstm.tasks.base import Task

PROFILES = ("smoke", "cpu", "gpu", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A grid of runs on a synthetic task: every model at every rate with every seed."""

    task: Task
    tests: Mapping[str, Task]  # name of the metric: what is asked
    models: tuple[str, ...]  # the first has the published proportions, the others its number of parameters
    width: int
    blocks: int
    heads: int
    budget: Budget
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    chosen_by: str  # the test whose validation samples choose the rate
    validation: int = 256  # samples
    test: int = 1000  # samples

    def __post_init__(self) -> None:
        if self.chosen_by not in self.tests:
            raise ValueError(f"chosen_by={self.chosen_by!r} must be one of the tests {', '.join(self.tests)}")
        for name in self.models:
            if name and not set(name) - set("ms") and len(name) != self.blocks:
                raise ValueError(f"the pattern {name!r} has {len(name)} blocks, but blocks={self.blocks}")

    @property
    def sizes(self) -> Sizes:
        """What all contestants share."""
        return Sizes(
            width=self.width, blocks=self.blocks, heads=self.heads, vocab_size=max(1, self.task.vocab_size),
            features=self.task.features,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Changes with everything that a run depends on; the lists of models, rates and seeds may grow."""
        facts: dict[str, Any] = asdict(self)
        for grown in ("models", "rates", "seeds"):
            del facts[grown]
        return fingerprint({**facts, "reference": self.models[0], "kinds": [type(one).__name__ for one in self.tasks]})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is trained on, and what is tested."""
        return (self.task, *self.tests.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What stands in a table."""
        return tuple(self.tests)

    @property
    def unit(self) -> str:
        """Of all metrics."""
        return "accuracy" if self.task.vocab_size else "squared error"

    @property
    def chance(self) -> float:
        """Of guessing."""
        return self.task.chance

    @property
    def volume(self) -> str:
        """What a run has seen."""
        return f"{self.budget.steps:,} steps of {self.budget.batch} samples"


@runtime_checkable
class AnyPlan(Protocol):
    """What a grid, a verdict and a page need to know of a plan, whatever is trained in it."""

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def rates(self) -> tuple[float, ...]: ...

    @property
    def seeds(self) -> tuple[int, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def unit(self) -> str: ...

    @property
    def chance(self) -> float: ...

    @property
    def volume(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a paper says: a number, or words, and where it stands."""

    text: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What has to hold for a claim to count as reproduced, for one model at the rate that validation chose.

    `seeds` of its runs reach the bound; 0: all of them. `scaled`: between chance (0) and perfection (1).
    `below`: another model, and the bound is that the paired difference over seeds has a 95 % interval below zero.
    """

    model: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    seeds: int = 0
    scaled: bool = False
    below: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A question, what is published about it, and how it is asked here, in several sizes."""

    name: str
    title: str
    question: str
    claims: tuple[Claim, ...]
    profiles: Mapping[str, AnyPlan]
    rules: Mapping[str, tuple[Rule, ...]]  # by profile
    picture: str = "length"  # what is drawn: scores over "length", validation over "steps", loss over "positions"
    runs_of: str = ""  # another experiment whose runs this one looks at, with other rules
    order: tuple[str, ...] = ()  # of contestants, each compared with the one before it; without: with the first
