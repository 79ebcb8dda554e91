"""Every run of a plan, one line each. What is in the file is not run again; what is interrupted is lost with its run.

Runs do not know of each other, so they may go side by side, each on one thread: small models gain nothing from more.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from openxlstm.data.workers import pool
from openxlstm.experiments import contestants, generation, language, results, solve
from openxlstm.experiments.choice import FLOOR
from openxlstm.experiments.generation import GenerationPlan
from openxlstm.experiments.language import TextPlan
from openxlstm.experiments.plans import AnyPlan, Experiment, Plan
from openxlstm.experiments.results import Line, Metric
from openxlstm.tasks import floors, intervals, matching
from openxlstm.train.guard import StoppedError
from openxlstm.train.machine import describe

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One cell of a grid."""

    experiment: str
    profile: str
    plan: AnyPlan
    model: str
    rate: float
    seed: int

    @property
    def key(self) -> results.Key:
        """By which its line is found."""
        return (self.experiment, self.profile, self.model, self.rate, self.seed, self.plan.fingerprint)

    def __str__(self) -> str:
        return f"{self.experiment} {self.profile}, {self.model}, rate {self.rate:g}, seed {self.seed}"


def runs(experiment: Experiment, profile: str, models: Sequence[str] = ()) -> list[Run]:
    """The whole grid, and what needs no learning; seed by seed, so one that is interrupted has compared all models."""
    plan = experiment.profiles[profile]
    name = experiment.runs_of or experiment.name
    floor = [Run(name, profile, plan, FLOOR, 0.0, 0)] if isinstance(plan, Plan) else []
    return floor + [
        Run(name, profile, plan, model, rate, seed)
        for seed in plan.seeds
        for model in (models or plan.models)
        for rate in plan.rates
    ]


def go(wanted: Sequence[Run], file: Path, *, jobs: int, show: Show) -> list[Line]:
    """Make what is missing, and return the lines of all.

    Args:
        file: of lines; it is appended to.
        jobs: runs side by side, each on one thread; 1: in this process, on the threads that PyTorch has. What is timed
            is timed alone.

    Raises:
        KeyboardInterrupt: it was asked for; what was finished is in the file, and the same call goes on.
    """
    there = {line.key for line in results.read([file])}
    missing = [run for run in wanted if run.key not in there]
    timed = [run for run in missing if isinstance(run.plan, GenerationPlan)]
    side_by_side = [run for run in missing if not isinstance(run.plan, GenerationPlan)]
    if len(missing) < len(wanted):
        show(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {file} already")
    began, work, several = time.monotonic(), file.parent / "work", len({run.experiment for run in wanted}) > 1
    finished = chain(_finished(side_by_side, jobs, work), _finished(timed, 1, work))
    for count, line in enumerate(finished, 1):
        results.append(file, line)
        left = (time.monotonic() - began) / count * (len(missing) - count)
        name = f"{line.experiment}: " if several else ""
        show(f"[{count}/{len(missing)}] {name}{told(line)}" + (f"; {left / 60:.0f} min left" if left > 90 else ""))
    wanted_keys = {run.key for run in wanted}
    return [line for line in results.read([file]) if line.key in wanted_keys]


def told(line: Line) -> str:
    """A finished run in a line."""
    tested = (f"{name} {metric.value:z.3f}" for name, metric in line.metrics.items() if ", to " not in name)
    said = line.skipped or ", ".join(tested)
    return f"{line.label}, rate {line.rate:g}, seed {line.seed}: {said} ({line.wall_s:.0f} s)"


def once(run: Run, work: Path) -> Line:
    """Train and test one contestant. What diverges is a result, too.

    Args:
        work: where a run of text keeps its folder, so that it goes on where it was killed.
    """
    began, worked = time.monotonic(), time.process_time()
    if isinstance(run.plan, TextPlan):
        found = _text(run, run.plan, work)
    elif isinstance(run.plan, GenerationPlan):
        found = generation.run(run.plan, run.model, run.seed)
    else:
        assert isinstance(run.plan, Plan), "there are these three kinds"
        found = _floor(run.plan) if run.model == FLOOR else _task(run, run.plan)
    return Line(
        experiment=run.experiment, profile=run.profile, model=run.model, rate=run.rate, seed=run.seed,
        plan=run.plan.fingerprint, wall_s=round(time.monotonic() - began, 1),
        cpu_s=round(time.process_time() - worked, 1), machine=describe(_device()), git=results.commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"), **found,
    )  # fmt: skip


def _floor(plan: Plan) -> dict[str, Any]:
    """Of the best rule that does not do the task: what a model has to exceed before it has learned anything."""
    found = {name: floors.floor(task, "test", 0, plan.test)[0] for name, task in plan.tests.items()}
    return {
        "label": next(iter(found.values())).rule, "parameters": 0, "choice": 0.0, "steps": 0, "tokens": 0,
        "metrics": {name: Metric(one.score, plan.test) for name, one in found.items()},
    }  # fmt: skip


def _task(run: Run, plan: Plan) -> dict[str, Any]:
    """Of a synthetic task."""
    model, label, size = contestants.enter(run.model, plan.sizes, plan.models[0], run.seed)
    model = model.to(_device())
    chosen_by = plan.tests[plan.chosen_by]
    samples = [chosen_by.sample("validation", 0, index) for index in range(plan.validation)]
    metrics: dict[str, Metric] = {}
    choice, skipped, trained = None, None, solve.Trained({})

    def validate() -> float:
        return solve.ask(model, samples).score

    try:
        trained = solve.train(model, plan.task, plan.budget, run.rate, validate=validate)
    except solve.DivergedError as error:
        skipped = str(error)
    else:
        choice = 1 - validate() if plan.task.vocab_size else validate()
        for name, task in plan.tests.items():
            tally = solve.examine(model, task, "test", plan.test)
            interval = intervals.wilson(tally.right, tally.asked) if task.vocab_size else None
            metrics[name] = Metric(tally.score, tally.asked, interval)
            for upper, (right, asked) in sorted(tally.by_length.items()) if len(tally.by_length) > 1 else ():
                metrics[f"{name}, to {upper}"] = Metric(right / asked, asked, intervals.wilson(right, asked))
    return {
        "label": label, "parameters": size, "metrics": metrics, "choice": choice, "curve": trained.curve,
        "steps": plan.budget.steps, "tokens": trained.tokens, "skipped": skipped,
    }  # fmt: skip


def _text(run: Run, plan: TextPlan, work: Path) -> dict[str, Any]:
    """Of a language model."""
    folder = work / f"{run.experiment}-{run.profile}-{plan.fingerprint}" / f"{run.model}-{run.rate:g}-{run.seed}"
    size = matching.non_embedding_parameters(contestants.config(run.model, plan.sizes, plan.models[0]))
    found = {"label": contestants.find(run.model).label, "parameters": size, "steps": plan.steps}
    try:
        return found | language.run(plan, run.model, run.rate, run.seed, folder)
    except StoppedError as error:
        return found | {"metrics": {}, "choice": None, "tokens": 0, "skipped": str(error)}


def _finished(missing: Sequence[Run], jobs: int, work: Path) -> Iterator[Line]:
    if jobs == 1:
        yield from (once(run, work) for run in missing)
        return
    with pool(jobs, "spawn", _alone) as executor:
        for future in as_completed([executor.submit(once, run, work) for run in missing]):
            yield future.result()


def _alone() -> None:
    """In a process of its own: one thread, and Ctrl-C is for the one that waits."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
