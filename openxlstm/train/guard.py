"""What to do about a step that went wrong: take it, skip it, go back, or stop. A decision, and nothing else.

It looks at two numbers that are the same on every process, the loss and the gradient norm of the whole batch, and at
those of the steps before, which stand in train.jsonl. So all processes decide alike without asking each other, and a
run that is resumed decides as if it had never stopped.

    not finite    the loss or the norm is NaN or infinite
    spike         one of them is above  median + deviations * 1.4826 MAD  of the last `memory` steps that were taken

1.4826 MAD (median absolute deviation) is the standard deviation of a normal distribution, and a few spikes in memory
do not move it. It counts as at least a thousandth of the median: numbers that hardly vary at all make no spikes.

A skipped step leaves parameters and optimiser as they are; its data are consumed, its line says why. A rollback goes
to the last checkpoint and never reads the samples of the step again.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, final

from openxlstm.train.recipe import GuardRecipe

Action = Literal["ok", "log", "skip", "rollback", "stop"]  # log: the step is taken, and an event is written
FEWEST = 20  # steps in memory before a spike can be told from a start
NORMAL = 1.4826  # standard deviations per MAD, of a normal distribution
LEAST = 1e-3  # of the median: the smallest deviation


@final
class StoppedError(ValueError):
    """The guard ended the run: what it saw, and what usually helps."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step, and why; the reason of "ok" is empty."""

    action: Action
    reason: str = ""


@final
class Guard:
    """Judges the steps of a run, one after another.

    Args:
        lines: the step lines of train.jsonl so far, oldest first; a step that was not taken has "skipped".
        rollbacks: how often this run went back already.
    """

    def __init__(self, recipe: GuardRecipe, lines: Iterable[Mapping[str, Any]] = (), *, rollbacks: int = 0) -> None:
        self._recipe, self._rollbacks = recipe, rollbacks
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=recipe.memory) for name in ("loss", "gradient norm")}
        self._skips = self._in_a_row = 0
        for line in lines:
            if "loss" in line:  # validations have lines, too
                self._remember(line["loss"], line["grad_norm"], skipped="skipped" in line)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """What to do with `step`, whose batch has this loss and this gradient norm (before clipping)."""
        trouble, policy = self._trouble(loss, norm)
        if trouble is None:
            self._remember(loss, norm, skipped=False)
            return Verdict("ok")
        verdict = self._limited(policy, f"step {step}: {trouble}")
        self._remember(loss, norm, skipped=verdict.action != "log")
        return verdict

    def _trouble(self, loss: float, norm: float) -> tuple[str | None, Action]:
        """What is wrong with these numbers, and what the recipe says about that."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}", self._recipe.nonfinite
        for name, value in (("loss", loss), ("gradient norm", norm)):
            seen = self._seen[name]
            if len(seen) < min(FEWEST, self._recipe.memory):
                continue
            middle = median(seen)
            deviation = max(NORMAL * median(abs(other - middle) for other in seen), LEAST * abs(middle))
            if value > middle + self._recipe.deviations * deviation:
                above = f"above the median {middle:.4g} of the last {len(seen)} steps"
                times = (value - middle) / deviation if deviation else math.inf
                return f"the {name} {value:.4g} is {times:.1f} robust deviations {above}", self._recipe.spike
        return None, "log"

    def _limited(self, policy: Action, reason: str) -> Verdict:
        """The policy, unless it was followed too often already."""
        said = self._recipe
        limits = {
            "skip": (
                (self._in_a_row, said.most_in_a_row, "most_in_a_row", "steps in a row were skipped"),
                (self._skips, said.most, "most", "steps were skipped"),
            ),
            "rollback": ((self._rollbacks, said.most_rollbacks, "most_rollbacks", "rollbacks were made"),),
        }
        for count, most, key, what in limits.get(policy, ()):
            if count >= most:
                return Verdict("stop", f"{reason}; {count} {what} already, and guard.{key} = {most}")
        return Verdict(policy, reason)

    def _remember(self, loss: float | None, norm: float | None, *, skipped: bool) -> None:
        if skipped:
            self._skips += 1
            self._in_a_row += 1
            return
        self._in_a_row = 0
        for seen, value in zip(self._seen.values(), (loss, norm), strict=True):
            assert value is not None, "a step without a finite loss was taken"
            seen.append(value)
