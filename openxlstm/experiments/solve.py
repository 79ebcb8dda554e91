"""Train a model on a synthetic task, and test it: the loop of every experiment that is not about text.

Samples come by number: step s reads samples s*batch ... of the training split, whatever the model, so all contestants
see the same ones in the same order. Only positions at which something is asked are scored, and only there are logits
computed. Padding stands on the right, where no answer can feel it, because the models are causal. On a CPU a batch is
learned from in portions of like length whose gradients add up, because padding costs and caches are small.

AdamW, linear warm-up over the first tenth, cosine to `end_lr` (arXiv:2405.04517, App. B.1.1); the gradient's norm is
clipped at 1, which is not stated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.tasks.base import Batch, Sample, Task, collate
from openxlstm.train.schedules import Schedule

LEARNED_AT_ONCE = (
    3_000  # positions of a portion on a CPU: steps of xLSTM take 0.63 to 0.85 of the time, of LSTMs 0.8 to 1.1
)
TESTED_AT_ONCE = 32_768  # positions of a batch when nothing is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long, and how. The rate is not part of it: it is what a grid varies."""

    steps: int
    batch: int
    end_lr: float = 1e-5
    warmup: float = 0.1  # share of the steps
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps={self.steps} and batch={self.batch} must be at least 1")


@dataclass(slots=True)
class Tally:
    """What was asked and what of it was right, altogether and by the length of the sample."""

    loss: float = 0.0  # summed over what was asked: nats, or squared errors
    asked: int = 0
    right: int = 0
    of_numbers: bool = False
    by_length: dict[int, tuple[int, int]] = field(default_factory=dict)  # upper power of two: (right, asked)

    @property
    def accuracy(self) -> float:
        """Of all that was asked."""
        return self.right / self.asked

    @property
    def score(self) -> float:
        """The share of right answers; of numbers the mean squared error."""
        return self.mean_loss if self.of_numbers else self.accuracy

    @property
    def mean_loss(self) -> float:
        """Per question."""
        return self.loss / self.asked


@dataclass(slots=True)
class Trained:
    """A training's curve, by the name of its axis, and the tokens that were read."""

    curve: dict[str, list[float]]
    tokens: int = 0


class DivergedError(RuntimeError):
    """The loss is no number any more."""


def train(
    model: nn.Module,
    task: Task,
    budget: Budget,
    rate: float,
    *,
    validate: Callable[[], float] | None = None,
    looks: int = 10,
    show: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train `model` in place; its curve has step, loss (mean since the last look) and validation, `looks` times.

    Args:
        rate: the peak of the learning rate.
        validate: measured at every look.
        show: told step and loss, after every step.

    Raises:
        DivergedError: at which step, and at which rate.
    """
    optimiser = torch.optim.AdamW(_groups(model, budget.weight_decay), lr=rate, betas=budget.betas, fused=True)
    warmup = min(round(budget.warmup * budget.steps), budget.steps - 1)
    course = Schedule(kind="cosine", end=budget.steps, warmup=warmup, floor=min(1.0, budget.end_lr / rate))
    names = ("step", "loss") if validate is None else ("step", "loss", "validation")
    done = Trained({name: [] for name in names})
    curve = done.curve
    device, since, every = next(model.parameters()).device, [0.0, 0], max(1, budget.steps // looks)
    for step, portions in enumerate(_batches(task, budget, LEARNED_AT_ONCE if device.type == "cpu" else None)):
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = rate * course.factor(step)
        optimiser.zero_grad(set_to_none=True)
        asked, value = sum(int(found.asked.sum()) for found in portions), 0.0
        for found in portions:
            mean = _loss(model, _to(found, device)) / asked
            mean.backward()
            value += float(mean.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), budget.clip)
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise DivergedError(f"diverged at step {step + 1} of {budget.steps}: loss {value}, gradient {float(norm)}")
        optimiser.step()
        done.tokens += sum(int(found.exists.sum()) for found in portions)
        since = [since[0] + value, since[1] + 1]
        if show is not None:
            show(step + 1, value)
        if (step + 1) % every == 0 or step + 1 == budget.steps:
            curve["step"].append(float(step + 1))
            curve["loss"].append(since[0] / since[1])
            if validate is not None:
                curve["validation"].append(validate())
            since = [0.0, 0]
    return done


def examine(model: nn.Module, task: Task, split: str, count: int, *, data_seed: int = 0) -> Tally:
    """Ask a model about the first `count` samples of a split."""
    return ask(model, [task.sample(split, data_seed, index) for index in range(count)])


@torch.no_grad()
def ask(model: nn.Module, samples: Sequence[Sample]) -> Tally:
    """Ask a model about samples. Those of like length share a batch: padding costs."""
    model.eval()
    device, tally = next(model.parameters()).device, Tally()
    ordered = sorted(samples, key=lambda one: len(one.inputs))
    while ordered:
        size = max(1, TESTED_AT_ONCE // len(ordered[-1].inputs))
        some, ordered = ordered[-size:], ordered[:-size]
        found = _to(collate(some), device)
        answers, targets = _answers(model, found)
        lengths = found.exists.sum(1)[:, None].expand_as(found.asked)[found.asked]
        if targets.is_floating_point():
            tally.loss += float((answers - targets).square().double().sum())
            tally.asked, tally.of_numbers = tally.asked + len(targets), True
            continue
        tally.loss += float(F.cross_entropy(answers, targets, reduction="sum").double())
        hits = answers.argmax(-1) == targets
        tally.asked, tally.right = tally.asked + len(targets), tally.right + int(hits.sum())
        for upper, hit in zip(
            (2 ** (lengths - 1).clamp(min=1).log2().floor().add(1)).tolist(), hits.tolist(), strict=True
        ):
            right, asked = tally.by_length.get(int(upper), (0, 0))
            tally.by_length[int(upper)] = (right + hit, asked + 1)
    return tally


def _batches(task: Task, budget: Budget, at_once: int | None) -> Iterator[list[Batch]]:
    """The training batches, each made while the one before it is learned from; `at_once` positions are a portion."""

    def make(step: int) -> list[Batch]:
        numbers = range(step * budget.batch, (step + 1) * budget.batch)
        samples = [task.sample("train", 0, number) for number in numbers]
        return [collate(samples)] if at_once is None else _portions(samples, at_once)

    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(make, 0)
        for step in range(budget.steps):
            found = ahead.result()
            if step + 1 < budget.steps:
                ahead = worker.submit(make, step + 1)
            yield found


def _portions(samples: Sequence[Sample], at_once: int) -> list[Batch]:
    """As few equal portions as would have `at_once` positions if all were as long as the longest, longest first."""
    ordered = sorted(samples, key=lambda one: -len(one.inputs))
    count = min(len(ordered), -(-len(ordered) * len(ordered[0].inputs) // at_once))
    size = -(-len(ordered) // count)
    return [collate(ordered[first : first + size]) for first in range(0, len(ordered), size)]


def _loss(model: nn.Module, found: Batch) -> Tensor:
    """Summed over what is asked."""
    answers, targets = _answers(model, found)
    if targets.is_floating_point():
        return (answers - targets).square().sum()
    return F.cross_entropy(answers, targets, reduction="sum")


def _answers(model: Any, found: Batch) -> tuple[Tensor, Tensor]:
    """What the model says where something is asked, and what it should: [N, W] and ids [N], or numbers [N] twice."""
    asked = found.asked
    targets = found.targets[asked]
    if found.inputs.is_floating_point():
        answers = model(found.inputs)[asked]
        return (answers[:, 0] if targets.is_floating_point() else answers), targets
    hidden, _ = model.features(found.inputs)
    return model.logits(hidden[asked]), targets


def _groups(model: Any, weight_decay: float) -> Sequence[dict[str, Any]]:
    return model.parameter_groups(weight_decay)


def _to(found: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return found
    return Batch(*(part.to(device, non_blocking=True) for part in (found.inputs, found.targets, found.exists)))
