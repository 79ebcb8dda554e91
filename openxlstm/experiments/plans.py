"""What an experiment is, as data: who competes in what, on which budget, and what was published.

A plan is everything that a result depends on; its fingerprint names it in every result. Profiles of one experiment:
`smoke` (about a minute, in CI), `cpu` (two cores, minutes to an hour), `gpu` (one device, up to a day), `paper` (the
published setting; shipped, not promised).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

from openxlstm.experiments.contestants import Sizes
from openxlstm.experiments.results import fingerprint
from openxlstm.experiments.solve import Budget
from openxlstm.tasks import files
from openxlstm.tasks.base import Task
from openxlstm.tasks.files import OfFiles

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
        """Changes with everything that a run depends on; the lists of models, rates and seeds may grow.

        Of tasks that read files it has two parts: the plan's, and that of the files, wherever they lie.
        """
        facts: dict[str, Any] = asdict(self if self.folder is None else self.reading(None))
        for grown in ("models", "rates", "seeds"):
            del facts[grown]
        kinds = [type(one).__name__ for one in self.tasks]
        ours = fingerprint({**facts, "reference": self.models[0], "kinds": kinds})
        task = self.task
        return f"{ours}-{files.fingerprint(task)}" if isinstance(task, OfFiles) and task.folder is not None else ours

    @property
    def reads_files(self) -> bool:
        """Whether its tasks read files that have to be named."""
        return isinstance(self.task, OfFiles)

    @property
    def folder(self) -> str | None:
        """Where these files are; None: nobody has said it, or there are none."""
        return self.task.folder if isinstance(self.task, OfFiles) else None

    def reading(self, folder: str | None) -> Plan:
        """The same plan on the files in `folder`.

        Raises:
            ValueError: the folder does not hold them.
        """

        def moved(task: Task) -> Task:
            return replace(task, folder=folder) if isinstance(task, OfFiles) else task  # type: ignore[type-var]

        return replace(self, task=moved(self.task), tests={name: moved(task) for name, task in self.tests.items()})

    @property
    def lacking(self) -> str | None:
        """Why it cannot be run on this machine, if it cannot: the first sample needs all that samples need."""
        try:
            self.task.sample("train", 0, 0)
        except (ImportError, ValueError) as error:
            return str(error)
        return None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is trained on, and what is tested."""
        return (self.task, *self.tests.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What stands in a table."""
        return tuple(self.tests)

    @property
    def headline(self) -> str:
        """The metric that stands for all where there is room for one."""
        return self.chosen_by

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

    @property
    def headline(self) -> str: ...

    @property
    def lacking(self) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a paper says: a number, or words, and where it stands."""

    text: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What has to hold for a claim to count as reproduced, for one model at the rate that validation chose.

    `seeds` of its runs reach the bound; 0: all of them. `scaled`: between chance (0) and perfection (1).
    `above_floor`: what every run has beyond the best rule that does not do the task, on the same samples.
    `below`: another model, and the bound is that the paired difference over seeds has a 95 % interval below zero.
    """

    model: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    seeds: int = 0
    scaled: bool = False
    above_floor: float | None = None
    below: str | None = None

    def __post_init__(self) -> None:
        if self.above_floor is not None and (self.at_least is not None or self.scaled):
            raise ValueError(f"{self}: above_floor is a bound of its own, and is not scaled")

    @property
    def denies(self) -> bool:
        """Whether it says what a model does not learn: a bound from above on a score."""
        return self.scaled and self.at_most is not None


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
    asks: str = ""  # the metric that its question is about; without: the one by which the plan chooses rates

    def headline(self, profile: str) -> str:
        """The metric that stands for all where there is room for one."""
        return self.asks or self.profiles[profile].headline

    def metrics(self, profile: str) -> tuple[str, ...]:
        """What stands in a table: what is asked first, if it is named."""
        others = (name for name in self.profiles[profile].metrics if name != self.asks)
        return (self.asks, *others) if self.asks else tuple(others)

    def reading(self, profile: str, folder: str) -> Experiment:
        """The same experiment, of which a profile reads the files in `folder`.

        Raises:
            ValueError: the folder does not hold them, or the profile reads none.
        """
        plan = self.profiles[profile]
        if not (isinstance(plan, Plan) and plan.reads_files):
            raise ValueError(f"{self.name} reads no files; leave the folder {folder!r} out")
        return replace(self, profiles={**self.profiles, profile: plan.reading(folder)})
