"""The learning rate as a closed form of the step. There is no scheduler object, so there is nothing to save.

s step (from 0), w warm-up, c cool-down, E end: the number of steps of the run. The factor of the peak rate is

    warm-up        (s + 1) / w                                    for s < w; the first step already learns
    cosine         φ + (1 - φ)(1 + cos(π min(x, 1))) / 2          x = (s - w) / (span - w)
    linear         φ + (1 - φ)(1 - min(x, 1))
    exponential    φ^x                                            goes on falling behind the span
    constant       1
    cool-down      linear: 1 - x    root: 1 - sqrt(x)             x = (s - E + c) / c, times the value at E - c

So step E would have 0. A constant course with a cool-down is what others call WSD, warm-up, stable, decay; "root" is
the shape that Hägele et al. 2024, arXiv:2405.18392, found better than the straight line.

`span` is the step at which the decay reaches its floor φ; without one that is E - c. Two published runs need it:
arXiv:2405.04517 trains 28,170 steps of a cosine over 30,000, and arXiv:2503.13427 goes on for 50,000 steps after its
exponential has come down to a tenth.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["cosine", "exponential", "linear", "constant"]
Shape = Literal["linear", "root"]  # of the cool-down


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The whole course of the rate. `factor` is the only question it answers."""

    kind: Kind
    end: int
    warmup: int = 0
    cooldown: int = 0
    shape: Shape = "linear"
    floor: float = 0.1
    span: int | None = None

    def __post_init__(self) -> None:
        if self.warmup + self.cooldown > self.end:
            rule = f"warmup={self.warmup} and cooldown={self.cooldown} must fit into the {self.end} steps of the run"
            raise ValueError(f"{rule}; together at most {self.end}")
        if self.span is not None and self.span <= self.warmup:
            raise ValueError(f"span={self.span} must be above warmup={self.warmup}: the decay lies between them")

    def factor(self, step: int) -> float:
        """What to multiply the peak rate with at `step`, counted from 0."""
        begin = self.end - self.cooldown
        if step < begin or not self.cooldown:
            return self._course(step)
        if self.shape == "root":
            return self._course(begin) * (1 - math.sqrt((step - begin) / self.cooldown))
        return self._course(begin) * (self.end - step) / self.cooldown

    def cool_down_from(self, step: int) -> "Schedule":
        """The same course, cut short: the cool-down begins at `step`, with the same share of the shorter run."""
        assert self.cooldown, "a course without a cool-down has no early end that keeps its shape"
        share = self.cooldown / self.end
        cooldown = max(1, math.ceil(step * share / (1 - share))) if share < 1 else 1
        span = self.end - self.cooldown if self.span is None else self.span
        return replace(self, end=step + cooldown, cooldown=cooldown, span=span)

    def _course(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        span = self.end - self.cooldown if self.span is None else self.span
        x = (step - self.warmup) / max(1, span - self.warmup)
        match self.kind:
            case "cosine":
                return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(x, 1.0))) / 2
            case "exponential":
                return self.floor**x
            case "linear":
                return self.floor + (1 - self.floor) * (1 - min(x, 1.0))
            case "constant":
                return 1.0
