"""From lines to what a table says: the best rate by validation, seeds side by side, rules that hold or do not."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from openxlstm.experiments import numbers
from openxlstm.experiments.plans import Experiment, Rule
from openxlstm.experiments.results import Line
from openxlstm.tasks.base import scaled

FLOOR = "floor"  # the contestant of a synthetic task that is a rule and learns nothing
VERDICTS = ("reproduced", "partly", "not", "not attempted")


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant at its chosen rate: its runs, one per seed, and everything that was tried."""

    model: str
    label: str
    rate: float
    lines: tuple[Line, ...]
    tried: tuple[Line, ...]

    @property
    def is_floor(self) -> bool:
        """Whether it is no model, but a rule."""
        return self.model == FLOOR

    def values(self, metric: str) -> list[float]:
        """One per run that finished."""
        return [line.metrics[metric].value for line in self.lines if metric in line.metrics]

    def mean(self, metric: str) -> float | None:
        """Over seeds."""
        found = self.values(metric)
        return statistics.fmean(found) if found else None

    def extremes(self, metric: str) -> tuple[float, float]:
        """The lowest and the highest over seeds, of at least one."""
        found = self.values(metric)
        return min(found), max(found)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Of the mean over seeds; of a single run its own."""
        found = [line.metrics[metric] for line in self.lines if metric in line.metrics]
        return found[0].interval if len(found) == 1 else numbers.over_seeds([one.value for one in found])


def in_order(lines: Iterable[Line], models: Sequence[str]) -> list[Line]:
    """The floor, then `models`, then others: runs that are made side by side do not end in the order of the plan."""
    places = {model: place for place, model in enumerate((FLOOR, *models))}
    return sorted(lines, key=lambda line: places.get(line.model, len(places)))


def entries(lines: Iterable[Line]) -> list[Entry]:
    """A contestant each, in the order in which they first appear. The rate: the lowest mean of `choice` over seeds.

    A rate at which a run diverged loses to every rate at which none did; of equal rates the smallest wins.
    """
    by_model: dict[str, list[Line]] = {}
    for line in lines:
        by_model.setdefault(line.model, []).append(line)
    return [_entry(model, tried) for model, tried in by_model.items()]


def _entry(model: str, tried: Sequence[Line]) -> Entry:
    rates = sorted({line.rate for line in tried})

    def badness(rate: float) -> tuple[int, float]:
        mine = [line for line in tried if line.rate == rate]
        good = [line.choice for line in mine if line.choice is not None]
        return len(mine) - len(good), statistics.fmean(good) if good else float("inf")

    best = min(rates, key=badness)
    chosen = sorted((line for line in tried if line.rate == best), key=lambda line: line.seed)
    return Entry(model, chosen[0].label, best, tuple(chosen), tuple(tried))


def paired(ours: Entry, theirs: Entry | None, metric: str) -> tuple[float, tuple[float, float] | None] | None:
    """Ours minus theirs, seed by seed: the mean and its interval; None where no seed has both."""
    if theirs is None:
        return None
    other = {line.seed: line.metrics[metric].value for line in theirs.lines if metric in line.metrics}
    both = [
        line.metrics[metric].value - other[line.seed]
        for line in ours.lines
        if line.seed in other and metric in line.metrics
    ]
    return (statistics.fmean(both), numbers.over_seeds(both)) if both else None


def holds(rule: Rule, found: Mapping[str, Entry], chance: float, seeds: int) -> bool | None:
    """Whether a rule is met; None if there are too few runs to say.

    Args:
        seeds: of the plan; what is asked of all seeds is not answered by the first ones.
    """
    entry = found.get(rule.model)
    if entry is None:
        return None
    if rule.below is not None:
        other = found.get(rule.below)
        difference = paired(entry, other, rule.metric)
        if other is None or difference is None or min(len(entry.lines), len(other.lines)) < seeds:
            return None
        return None if difference[1] is None else difference[1][1] < 0
    values = [scaled(value, chance) if rule.scaled else value for value in entry.values(rule.metric)]
    if rule.above_floor is not None:
        floor = found[FLOOR].mean(rule.metric) if FLOOR in found else None
        if floor is None:
            return None
        rule = replace(rule, at_least=floor + rule.above_floor, above_floor=None)
    met = sum(_within(value, rule) for value in values)
    if rule.seeds:
        return met >= rule.seeds or (None if len(entry.lines) < rule.seeds else False)
    if met < len(entry.lines):
        return False
    return True if met >= seeds else None


def judged(experiment: Experiment, profile: str, lines: Sequence[Line]) -> list[tuple[Rule, bool | None]]:
    """Every rule of a profile, and whether it is met; None: too few runs to say."""
    found = {entry.model: entry for entry in entries(lines)}
    plan = experiment.profiles[profile]
    return [(rule, holds(rule, found, plan.chance, len(plan.seeds))) for rule in experiment.rules.get(profile, ())]


def verdict(experiment: Experiment, profile: str, lines: Sequence[Line]) -> str:
    """One of VERDICTS, by the experiment's rules and nothing else.

    Rules of what is not learned count beside a rule of what is: kept alone, they would be so by training too little.
    """
    found = judged(experiment, profile, lines)
    answers = [answer for _, answer in found]
    if not answers or all(answer is None for answer in answers):
        return "not attempted"
    if all(answer is True for answer in answers):
        return "reproduced"
    return "partly" if any(answer is True for rule, answer in found if not rule.denies) else "not"


def said(experiment: Experiment, profile: str, lines: Sequence[Line]) -> str:
    """The verdict; where the profile has no rules there is nothing to be reproduced, and the numbers are reported."""
    return verdict(experiment, profile, lines) if experiment.rules.get(profile) else "reported"


def _within(value: float, rule: Rule) -> bool:
    low = rule.at_least is None or value >= rule.at_least
    return low and (rule.at_most is None or value <= rule.at_most)
