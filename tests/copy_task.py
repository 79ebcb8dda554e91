"""A task that any model with a memory learns in a moment, an experiment about it, and lines of its runs."""

from __future__ import annotations

from dataclasses import dataclass

from openxlstm.experiments import solve
from openxlstm.experiments.plans import Experiment, Plan, Rule
from openxlstm.experiments.results import Line, Metric
from openxlstm.tasks.base import Sample, answered, generator


@dataclass(frozen=True, slots=True)
class Copy:
    """The first token, asked after the last one: what any model with a memory learns."""

    lengths: tuple[int, int] = (2, 6)
    name: str = "copy"
    vocab_size: int = 4
    features: int = 0
    chance: float = 1 / 3

    def sample(self, split: str, seed: int, index: int) -> Sample:
        random = generator("copy", split, seed, index)
        prompt = random.integers(1, 4, size=int(random.integers(self.lengths[0], self.lengths[1] + 1))).tolist()
        return answered(prompt, [prompt[0]])


PLAN = Plan(
    task=Copy(), tests={"short": Copy(), "longer": Copy((7, 12))}, chosen_by="short", models=("ss", "mm"), width=16,
    blocks=2, heads=2, budget=solve.Budget(steps=60, batch=32), rates=(1e-2,), seeds=(1, 2), validation=64, test=200,
)  # fmt: skip
EXPERIMENT = Experiment(
    name="copy", title="The first token", question="Can it remember?", claims=(), profiles={"smoke": PLAN},
    rules={"smoke": (Rule(model="ss", metric="short", at_least=0.9, seeds=2),)},
)  # fmt: skip


def line(**changes) -> Line:
    """A run of PLAN, as it would be written."""
    facts = dict(
        experiment="copy", profile="smoke", model="ss", label="xLSTM[0:1]", parameters=10, rate=1e-2, seed=1,
        plan=PLAN.fingerprint, metrics={"short": Metric(0.9, 100, (0.8, 0.95))}, choice=0.1, steps=60, tokens=9,
        wall_s=1.0, cpu_s=2.0, machine={"device": "CPU", "threads": 1, "torch": "2"}, git="abc", date="2026-01-01",
    )  # fmt: skip
    return Line(**{**facts, **changes})
