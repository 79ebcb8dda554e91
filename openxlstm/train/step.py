"""One step: from rows to a gradient that every process agrees on, and from there to new parameters, or to none.

Between the two stands a judgement (guard.py). Nothing has changed by then but the gradients, so a step that is not
taken leaves no trace in parameters, moments, averages or carried states.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openxlstm.data.gather import Batch
from openxlstm.models.interface import ModelState
from openxlstm.train import optim, parallel
from openxlstm.train.loss import Rows, Score, derived
from openxlstm.train.meters import Meters
from openxlstm.train.run import Run


@dataclass(frozen=True, slots=True)
class Found:
    """What the rows of a step said. All but `states` is the same in every process."""

    step: int  # counted from 0
    score: Score
    norm: float  # of the whole gradient
    slots: int  # positions computed, in all processes
    seconds: float  # of training over all sittings, by the clock of the first process
    wished: bool  # somebody wants the run to stop
    states: list[ModelState]  # what this process's portions remember


def gradient(run: Run, portions: Sequence[Batch], meters: Meters, seconds: float, wished: bool) -> Found:
    """The gradient of the step where `run` stands, summed over portions and processes.

    Args:
        portions: this process's rows (`Feed.portions`).
        seconds, wished: what this process's clock and signals say.
    """
    world, step, device = run.world, run.progress.step, run.bytes_of.device
    targets = world.sum(torch.tensor(sum(int(part.valid.sum()) for part in portions), device=device))
    scale = world.loss_factor / targets.clamp(min=1).double()  # a batch in which nothing counts has a gradient of 0
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    carried = run.carry.states if run.carry else [None] * len(portions)
    states = []
    for index, (part, before) in enumerate(zip(portions, carried, strict=True)):
        rows = Rows.of(part, device)
        # Its own dropout, from its place in the whole batch: the same masks for every split into portions of this size.
        torch.manual_seed(derived(derived(run.recipe.train.seed, step), index * world.ranks + world.rank))
        with world.accumulate(run.wrapped, last=index == len(portions) - 1):
            with meters.time("forward"), run.products():
                loss, found, state = run.wrapped(
                    rows.tokens, rows.targets, rows.reset, rows.valid, run.bytes_of, scale, before
                )
            with meters.time("backward"):
                loss.backward()
        sums += found
        states.append(state)
    clocks = torch.tensor([seconds if world.first else 0.0, float(wished)], dtype=torch.float64, device=device)
    *totals, seconds, wishes = world.sum(torch.cat((sums, clocks))).tolist()
    return Found(
        step=step,
        score=Score.of(torch.tensor(totals, dtype=torch.float64)),
        norm=parallel.global_norm(run.parameters),
        slots=run.feed.batch_size(step) * run.feed.context,
        seconds=seconds,
        wished=wishes > 0,
        states=states if run.carry else [],
    )


def update(run: Run, found: Found) -> float:
    """Take the step. Returns the learning rate it was taken with."""
    rate = run.recipe.optim.lr * run.schedule.factor(found.step)
    parallel.clip(run.parameters, run.recipe.optim.clip, found.norm)
    optim.set_rate(run.optimiser, rate)
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(found.step)
    if run.carry is not None:
        run.carry.take(found.states)
    return rate


def leave(run: Run) -> float:
    """Do not take the step: its gradients are forgotten, and lanes keep the state they came with. The rate is 0."""
    run.optimiser.zero_grad(set_to_none=True)
    return 0.0


def largest(run: Run, most: int = 3) -> dict[str, float | None]:
    """The parameters with the largest gradients, by name and norm: first those whose norm is no number (None)."""
    norms = {name: parallel.global_norm([weight]) for name, weight in run.model.named_parameters()}
    ranked = sorted(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf, reverse=True)
    return {name: norms[name] if math.isfinite(norms[name]) else None for name in ranked[:most]}
