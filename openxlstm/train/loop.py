"""The training loop. Read `steps` first: it is the whole of training, and every line of it is one named idea.

Everything that is scheduled is a function of the step, so a run is its recipe, its weights, its moments and four
numbers (`checkpoints.Progress`). A run that was killed at any step and is started again writes the same curve, bit
for bit, in the same precision and with the same number of threads.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.train import budget, optim
from openxlstm.train.evaluate import evaluate
from openxlstm.train.finish import Ending, Sample, finish, is_finished
from openxlstm.train.log import Display, Journal, clock, counted, cut_journal
from openxlstm.train.loss import Score, backward, derived
from openxlstm.train.recipe import Recipe
from openxlstm.train.report import SUMMARY, write_report
from openxlstm.train.run import Run, only_one, open_run
from openxlstm.train.schedules import Schedule


@dataclass(slots=True)
class Clock:
    """Seconds of training in this sitting and in all of them, and the pace."""

    before: float  # seconds of earlier sittings
    first: int  # the step this sitting began at
    began: float

    @classmethod
    def start(cls, run: Run) -> "Clock":
        """Begin to count."""
        return cls(run.progress.elapsed, run.progress.step, time.perf_counter())

    def elapsed(self) -> float:
        """Seconds over all sittings."""
        return self.before + time.perf_counter() - self.began

    def pace(self, step: int) -> float:
        """Seconds per step in this sitting, measurements and saves included; 0 before its first step is done."""
        return (self.elapsed() - self.before) / max(1, step - self.first)


class Stop:
    """Set by Ctrl-C and SIGTERM: the run saves after the step it is in. A second Ctrl-C ends it at once."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(recipe: Recipe, tokenizer: Tokenizer, folder: Path, cache: Path, display: Display, sample: Sample) -> Ending:
    """Train the run that `recipe` describes, or go on with it where `folder` says it stands.

    Args:
        recipe: resolved (`run.read_recipe`).
        cache: where prepared corpora are kept.
        sample: writes a text with the finished model, for the report.

    Raises:
        ValueError: the run cannot begin (`open_run`), or its gradients are no longer numbers.
        OSError: the disk would not take something; the last complete checkpoint is untouched.
    """
    with only_one(folder):
        run = open_run(recipe, tokenizer, folder, cache, display.note)
        if is_finished(run):
            write_report(folder)
            return "already finished"
        with _journals(run) as (journal, events), _signals() as stop:
            _introduce(run, display, events)
            ending = steps(run, journal, events, display, stop)
            _event(events, run, ending)
        display.close()
        finish(run, ending, display, sample)
        return ending


def steps(run: Run, journal: Journal, events: Journal, display: Display, stop: Stop) -> Ending:
    """From where the run stands to its end, or until it has to stop. It is saved when this returns."""
    watch = Clock.start(run)
    ending = _ending(run, watch, stop)
    while ending is None:
        run.schedule = _in_time(run, watch, display, events)
        line = _step(run, watch)
        journal.write(line)
        display.step(line, run.schedule.end, _seconds_left(run, watch))
        if _due(run, run.recipe.evaluate.every):
            _validate(run, watch, journal, display)
        ending = _ending(run, watch, stop)
        if ending is not None or _due(run, run.recipe.checkpoint.every):
            run.progress = replace(run.progress, elapsed=watch.elapsed())
            journal.sync()  # the curve is on the disk before the checkpoint that continues it
            run.save()
    return ending


def _ending(run: Run, watch: Clock, stop: Stop) -> Ending | None:
    """Why the run should end here, or None."""
    if run.progress.step >= run.schedule.end:
        return "done"
    if watch.elapsed() >= _limit(run) and run.progress.step:  # a run of no step at all has nothing to report
        return "out of time"
    return "interrupted" if stop.asked else None


def _step(run: Run, watch: Clock) -> dict[str, Any]:
    """One step of the optimiser; returns its line for the journal."""
    began = time.perf_counter()
    recipe, step, rows = run.recipe, run.progress.step, run.recipe.train.ramp[0][1]
    rate = recipe.optim.lr * run.schedule.factor(step)
    score = backward(
        run.model,
        run.batch(),
        run.bytes_of,
        micro_batch=recipe.train.micro_batch or rows,
        seed=derived(recipe.train.seed, step),
        autocast=run.autocast,
    )
    norm = optim.clip(run.optimiser, recipe.optim.clip)
    _refuse_nan(run, score, norm)
    optim.set_rate(run.optimiser, rate)
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    run.progress = replace(run.progress, step=step + 1, consumed=run.progress.consumed + rows)
    return {
        "step": step + 1,
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "lr": rate,
        "grad_norm": norm,
        "tokens": score.tokens,
        "utilisation": round(score.tokens / (rows * recipe.data.context), 4),
        "tokens_per_second": round(score.tokens / (time.perf_counter() - began), 1),
        "elapsed": round(watch.elapsed(), 3),
    }


def _validate(run: Run, watch: Clock, journal: Journal, display: Display) -> None:
    """Measure on the validation windows; the best so far is part of where the run stands."""
    said = run.recipe.evaluate
    score = evaluate(run.model, run.valid, run.bytes_of, batch=said.batch, windows=said.windows, autocast=run.autocast)
    best = min(score.bits_per_byte, math.inf if run.progress.best is None else run.progress.best)
    run.progress = replace(run.progress, best=best)
    line = {
        "step": run.progress.step,
        "valid_loss": score.loss,
        "valid_bits_per_byte": score.bits_per_byte,
        "elapsed": round(watch.elapsed(), 3),
    }
    journal.write(line)
    display.note(f"step {run.progress.step}  validation {score.bits_per_byte:.4f} bits/byte  (best {best:.4f})")


def _refuse_nan(run: Run, score: Score, norm: float) -> None:
    """Before anything is spoilt: parameters, moments and every checkpoint are as after the step before.

    Raises:
        ValueError: the loss or the global gradient norm is not finite.
    """
    if math.isfinite(norm) and math.isfinite(score.loss):
        return
    raise ValueError(
        f"step {run.progress.step + 1}: the loss is {score.loss} and the gradient norm {norm}, so the step was not"
        f" taken; checkpoints in {run.folder / 'checkpoints'} are sound. A lower optim.lr, a longer warm-up or a"
        " smaller optim.clip in a new run usually helps"
    )


def _in_time(run: Run, watch: Clock, display: Display, events: Journal) -> Schedule:
    """The course of the rate, cut short here if the recipe's minutes would not suffice for all of it."""
    minutes, step, steps = run.recipe.train.max_minutes, run.progress.step, run.recipe.train.steps
    if minutes is None or steps is None or step - watch.first < budget.SETTLE:
        return run.schedule
    shorter = budget.shortened(run.schedule, step, _limit(run) - watch.elapsed(), watch.pace(step))
    if shorter is None:
        return run.schedule
    budget.write_plan(run.folder, shorter, steps, minutes)
    _event(events, run, "cools down early", end=shorter.end)
    display.note(
        f"step {step}  the cool-down begins now and ends at step {shorter.end} of {steps}, within {minutes:g} min"
    )
    return shorter


def _due(run: Run, every: int) -> bool:
    return run.progress.step % every == 0 or run.progress.step == run.schedule.end


def _limit(run: Run) -> float:
    """Seconds of training that the recipe allows, over all sittings."""
    minutes = run.recipe.train.max_minutes
    return math.inf if minutes is None else 60 * minutes


def _seconds_left(run: Run, watch: Clock) -> float:
    to_go = (run.schedule.end - run.progress.step) * watch.pace(run.progress.step)
    return min(to_go, _limit(run) - watch.elapsed())


def _introduce(run: Run, display: Display, events: Journal) -> None:
    """What is about to happen, to people and to events.jsonl."""
    facts, recipe = run.facts, run.recipe
    begins = run.progress.step == 0
    _event(events, run, "start" if begins else "resume", machine=facts["machine"], changes=run.changes)
    display.note(
        f"{facts['model']['label']}  {facts['model']['parameters']:,} parameters  "
        f"{run.rows.folder.total_tokens:,} training tokens  {recipe.train.steps:,} steps of "
        f"{recipe.train.batch} x {recipe.data.context}{_at_most(recipe)}  "
        f"{run.precision}, {counted(facts['machine']['threads'], 'thread')}"
    )
    for key, (old, new) in run.changes.items():
        display.note(f"changed since the last sitting: {key} was {old!r}, is {new!r}")
    if not begins:
        display.note(f"goes on after step {run.progress.step}, {clock(run.progress.elapsed)} into the training")


def _at_most(recipe: Recipe) -> str:
    return "" if recipe.train.max_minutes is None else f", at most {recipe.train.max_minutes:g} min"


def _event(events: Journal, run: Run, name: str, **facts: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    events.write({"event": name, "step": run.progress.step, "time": now, **facts})


@contextmanager
def _journals(run: Run) -> Iterator[tuple[Journal, Journal]]:
    """The open journals of the run, the steps cut back to where it stands."""
    run.write_facts()
    (run.folder / SUMMARY).unlink(missing_ok=True)  # of a shorter run, which this one now exceeds
    cut_journal(run.folder / "train.jsonl", run.progress.step)
    journal, events = Journal(run.folder / "train.jsonl"), Journal(run.folder / "events.jsonl")
    try:
        yield journal, events
    finally:
        journal.close()
        events.close()


@contextmanager
def _signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a wish that the loop grants after its step. Outside the main thread: no wishes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
