"""The training loop. Read `steps` first: it is the whole of training, and every line of it is one named idea.

Everything that is scheduled is a function of the step, so a run is its recipe, its weights, its moments and a few
numbers (`checkpoints.Progress`). A run that was killed at any step and is started again writes the same curve, bit
for bit, in the same precision, with the same number of threads, and split in the same way; split in another way, the
same curve but for rounding.

All processes of a run go through here together. They decide alike because whatever decides, the loss, the norm, the
wishes to stop and the first process's clock, was summed over all of them in `step.gradient`. Only the first one writes
and shows.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openxlstm.data.feed import Prefetch
from openxlstm.data.gather import Batch
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.accounting import flops_per_token
from openxlstm.train import budget, gates, parallel, step
from openxlstm.train.book import Book
from openxlstm.train.evaluate import Write, by_length, continued, evaluate
from openxlstm.train.finish import Ending, Sample, finish, is_finished
from openxlstm.train.folder import only_one
from openxlstm.train.guard import Guard, StoppedError, Verdict
from openxlstm.train.log import Display, Silent, clock, counted
from openxlstm.train.loss import Rows
from openxlstm.train.meters import Meters
from openxlstm.train.recipe import Recipe
from openxlstm.train.report import SUMMARY, write_report
from openxlstm.train.run import Run, open_run
from openxlstm.train.schedules import Schedule
from openxlstm.train.sitting import Clock, Stop, wishes
from openxlstm.train.step import Found

REMEMBERED = ("loss", "grad_norm", "skipped")  # of a step's line, by its guard


@dataclass(slots=True)
class Sitting:
    """A run and what is open around it from the moment it is started until it ends or is interrupted."""

    run: Run
    book: Book
    display: Display
    stop: Stop
    write: Write | None  # continues prompts, for samples during training
    watch: Clock
    meters: Meters
    guard: Guard
    ahead: Prefetch
    seconds: float  # of training so far, over all sittings, as all processes agree


def train(
    recipe: Recipe,
    tokenizer: Tokenizer,
    folder: Path,
    cache: Path,
    display: Display,
    sample: Sample,
    *,
    write: Write | None = None,
    allowed: Collection[str] = (),
) -> Ending:
    """Train the run that `recipe` describes, or go on with it where `folder` says it stands.

    Args:
        recipe: resolved (`run.read_recipe`).
        cache: where prepared corpora are kept.
        sample: writes a text with the finished model, for the report.
        write: continues a prompt; needed if the recipe asks for samples.
        allowed: keys that may differ from what the run began with, though they change what it is.

    Raises:
        ValueError: the run cannot begin (`open_run`), or its guard stopped it.
        OSError: the disk would not take something; the last complete checkpoint is untouched.
    """
    with parallel.join(recipe.train.parallel, recipe.train.shard) as world:
        display = display if world.first else Silent()
        with world.led(lambda: only_one(folder)):
            run = open_run(recipe, tokenizer, folder, cache, world, display.note, allowed)
            if world.share(is_finished(run)):
                if world.first:
                    write_report(folder)
                return "already finished"
            ending = sit(run, display, write)
            display.close()
            finish(run, ending, display, sample)
            return ending


def sit(run: Run, display: Display, write: Write | None = None) -> Ending:
    """Train from where the run stands until it ends; files, threads and signals are as before afterwards."""
    mine = run.folder if run.world.first else None
    if mine:
        run.write_facts()
        (run.folder / SUMMARY).unlink(missing_ok=True)  # of a shorter run, which this one now exceeds
    with Book.open(run.recipe, mine, run.progress.step) as book, wishes() as stop, run.ahead() as ahead:
        now = Sitting(
            run=run,
            book=book,
            display=display,
            stop=stop,
            write=write,
            watch=Clock.start(run.progress.elapsed, run.progress.step),
            meters=Meters(flops_per_token(run.model.config), run.world.device, ranks=run.world.ranks),
            guard=_guard(run, book),
            ahead=ahead,
            seconds=run.progress.elapsed,
        )
        _introduce(now)
        try:
            ending = steps(now)
        finally:
            now.ahead.close()
        book.event(ending, run.progress.step)
    return ending


def steps(now: Sitting) -> Ending:
    """From where the run stands to its end, or until it has to stop. It is saved when this returns."""
    run = now.run
    ending = _ending(now)
    while ending is None:
        run.schedule = _in_time(now)
        with now.meters.time("data"):
            portions = now.ahead.portions(run.progress.step)
        found = step.gradient(run, portions, now.meters, now.watch.elapsed(), now.stop.asked)
        verdict = now.guard.judge(found.step + 1, found.score.loss, found.norm)
        _tell(now, found, verdict)
        if verdict.action == "rollback":
            _roll_back(now, found)
            continue
        _move_on(now, found, verdict)
        _measure_gates(now, portions[0])
        if _due(run, run.recipe.evaluate.every):
            _validate(now)
        ending = _ending(now, found)
        if ending is not None or _due(run, run.recipe.checkpoint.every):
            _save(now, asynchronous=ending is None and run.recipe.checkpoint.asynchronous)
    return ending


def _move_on(now: Sitting, found: Found, verdict: Verdict) -> None:
    """Take the step, or pass over it; either way it is done, and its line says which."""
    run, score = now.run, found.score
    skipped = verdict.action == "skip"
    with now.meters.time("optimiser"):
        rate = step.leave(run) if skipped else step.update(run, found)
    done = found.step + 1
    run.progress = replace(run.progress, step=done, consumed=run.feed.consumed(done))
    now.meters.step(score.tokens, found.slots)
    now.seconds = found.seconds if run.world.ranks > 1 else now.watch.elapsed()
    line: dict[str, Any] = {
        "step": done,
        "loss": _finite(score.loss),
        "bits_per_byte": _finite(score.bits_per_byte),
        "lr": rate,
        "grad_norm": _finite(found.norm),
        "tokens": score.tokens,
        "elapsed": round(now.seconds, 3),
    }
    if run.recipe.loss.z_loss:
        line["z_loss"] = _finite(score.z / max(1, score.tokens))
    if skipped:
        line["skipped"] = verdict.reason
    shown = _due(run, run.recipe.log.every)
    if shown:
        line |= now.meters.line(done, run.schedule.end)
    now.book.step(line, shown=shown)
    if shown and not skipped:
        left = min(line["seconds_left"], _limit(run) - now.seconds)
        now.display.step(line, run.schedule.end, left)
    run.settle(wait=False)  # a save that failed is heard of here, not at the next one


def _tell(now: Sitting, found: Found, verdict: Verdict) -> None:
    """Write down what went wrong with a step, if something did, and obey if the verdict is to stop.

    Raises:
        ValueError: it is. Nothing is saved.
    """
    if verdict.action == "ok":
        return
    run, ids = now.run, now.run.feed.step(found.step).sample
    spike = math.isfinite(found.score.loss) and math.isfinite(found.norm)
    now.book.event(
        "spike" if verdict.action == "log" else verdict.action,
        found.step + 1,
        {
            "reason": verdict.reason,
            "samples": [int(ids[0]), int(ids[-1]) + 1],
            "loss": _finite(found.score.loss),
            "grad_norm": _finite(found.norm),
            "largest": step.largest(run),
        },
    )
    now.display.note(f"{verdict.action}: {verdict.reason}")
    run.progress = replace(
        run.progress,
        spikes=run.progress.spikes + spike,
        skips=run.progress.skips + (verdict.action == "skip"),
    )
    if verdict.action == "stop":
        step.leave(run)
        run.settle()  # and nothing is saved: the parameters may be what is wrong, and the last checkpoint is older
        raise StoppedError(
            f"{verdict.reason}; so the run stopped, and the step was not taken; checkpoints in {run.checkpoints} are"
            " of the steps before. A lower optim.lr, a longer warm-up or a smaller optim.clip in a new run usually"
            " helps; [guard] in the recipe says what else can be done"
        )


def _roll_back(now: Sitting, found: Found) -> None:
    """Go on from the last checkpoint, without the samples of this step."""
    run, ids = now.run, now.run.feed.step(found.step).sample
    step.leave(run)
    run.progress = replace(run.progress, elapsed=now.watch.elapsed())
    run.roll_back((int(ids[0]), int(ids[-1]) + 1))
    now.ahead.close()
    now.ahead = run.ahead()
    now.book.cut(run.progress.step)
    now.guard = _guard(run, now.book)
    now.meters.start()
    now.display.note(f"goes on after step {run.progress.step}, without the samples [{ids[0]}, {ids[-1] + 1})")


def _save(now: Sitting, *, asynchronous: bool) -> None:
    """Where the run stands, on the disk; the curve first, which the checkpoint continues."""
    now.run.progress = replace(now.run.progress, elapsed=now.seconds)
    with now.meters.time("save"):
        now.book.sync()
        now.run.save(asynchronous=asynchronous)


def _validate(now: Sitting) -> None:
    """Measure on everything held out; the best so far is part of where the run stands."""
    run, said = now.run, now.run.recipe.evaluate
    with now.meters.time("evaluate"), run.averaged():
        main, *others = (
            evaluate(
                run.objective, stream, run.bytes_of, batch=said.batch, windows=said.windows,
                autocast=run.autocast, rank=run.world.rank, ranks=run.world.ranks, total=run.world.sum,
            )
            for stream in (run.valid, *run.sets.values())
        )  # fmt: skip
        line: dict[str, Any] = {
            "step": run.progress.step,
            "valid_loss": _finite(main.loss),
            "valid_bits_per_byte": _finite(main.bits_per_byte),
        }
        if others:
            sets = zip(run.sets, others, strict=True)
            line["sets"] = {
                name: {"loss": _finite(score.loss), "bits_per_byte": _finite(score.bits_per_byte)}
                for name, score in sets
            }
        if said.lengths:
            line |= _by_length(run)
        if said.samples:
            assert now.write is not None, "the recipe asks for samples, and nobody said how to write them"
            with run.world.unsharded(run.objective):
                line["samples"] = continued(now.write, run.model, run.tokenizer, said.samples, said.sample_tokens)
    known = math.inf if run.progress.best is None else run.progress.best
    if main.bits_per_byte < known:
        run.progress = replace(run.progress, best=main.bits_per_byte, best_step=run.progress.step)
    now.book.step(line | {"elapsed": round(now.watch.elapsed(), 3)})
    best = "" if run.progress.best is None else f"  (best {run.progress.best:.4f})"
    now.display.note(f"step {run.progress.step}  validation {main.bits_per_byte:.4f} bits/byte{best}")


def _by_length(run: Run) -> dict[str, Any]:
    """What the model makes of more context, and of less, than it is trained on."""
    said, context = run.recipe.evaluate, run.feed.context
    return by_length(
        run.objective, run.valid.folder, run.bytes_of, [*said.lengths, context],
        tokens=said.windows * context, batch_tokens=said.batch * context,
        autocast=run.autocast, rank=run.world.rank, ranks=run.world.ranks, total=run.world.sum,
    )  # fmt: skip


def _measure_gates(now: Sitting, portion: Batch) -> None:
    """What the cells do with rows of this step, if the recipe wants to know."""
    run, every = now.run, now.run.recipe.log.gates_every
    if not every or not _due(run, every):
        return
    rows = Rows.of(portion, run.world.device)
    scale = run.bytes_of.new_ones((), dtype=run.parameters[0].dtype)

    def forward() -> None:
        with run.products():
            run.objective(rows.tokens, rows.targets, rows.reset, rows.valid, run.bytes_of, scale)

    with now.meters.time("gates"):
        now.book.step({"step": run.progress.step, **gates.measure(run.model, forward)})


def _ending(now: Sitting, found: Found | None = None) -> Ending | None:
    """Why the run should end here, or None. `found`: of the step behind us."""
    run, train = now.run, now.run.recipe.train
    if run.progress.step >= run.schedule.end:
        return "done"
    if found is None:
        return None if now.seconds < _limit(run) or not run.progress.step else "out of time"
    alone = run.world.ranks == 1  # then nobody has to agree, and a wish is granted at once
    if alone:
        now.seconds = now.watch.elapsed()
    if now.seconds >= _limit(run):
        return "out of time"
    if train.stop_after is not None and now.seconds - now.watch.before >= 60 * train.stop_after:
        return "paused"
    return "interrupted" if found.wished or (alone and now.stop.asked) else None


def _in_time(now: Sitting) -> Schedule:
    """The course of the rate, cut short here if the recipe's minutes would not suffice for all of it."""
    run, done = now.run, now.run.progress.step
    minutes, steps = run.recipe.train.max_minutes, run.recipe.train.steps
    taken = done - now.watch.first
    if minutes is None or steps is None or taken < budget.SETTLE:
        return run.schedule
    pace = (now.seconds - now.watch.before) / taken
    shorter = budget.shortened(run.schedule, done, _limit(run) - now.seconds, pace)
    if shorter is None:
        return run.schedule
    if run.world.first:
        budget.write_plan(run.folder, shorter, steps, minutes)
    now.book.event("cools down early", done, {"end": shorter.end})
    now.display.note(
        f"step {done}  the cool-down begins now and ends at step {shorter.end} of {steps}, within {minutes:g} min"
    )
    return shorter


def _guard(run: Run, book: Book) -> Guard:
    """The judge of steps, who remembers the last ones, and which were skipped."""
    memory = run.recipe.guard.memory
    lines = [line for line in book.lines() if "loss" in line]
    taken = [index for index, line in enumerate(lines) if "skipped" not in line][-memory:]
    matters = [line for index, line in enumerate(lines) if "skipped" in line or index >= min(taken, default=0)]
    short: list[Mapping[str, Any]] = [{key: line[key] for key in REMEMBERED if key in line} for line in matters]
    return Guard(run.recipe.guard, run.world.share(short), rollbacks=run.progress.rollbacks)


def _due(run: Run, every: int) -> bool:
    return run.progress.step % every == 0 or run.progress.step == run.schedule.end


def _limit(run: Run) -> float:
    """Seconds of training that the recipe allows, over all sittings."""
    minutes = run.recipe.train.max_minutes
    return math.inf if minutes is None else 60 * minutes


def _finite(value: float) -> float | None:
    """For JSON, which knows no other numbers."""
    return value if math.isfinite(value) else None


def _introduce(now: Sitting) -> None:
    """What is about to happen, to people and to events.jsonl; and the checkpoint that a rollback may need."""
    run, facts, recipe = now.run, now.run.facts, now.run.recipe
    begins = run.progress.step == 0
    what = {"machine": facts["machine"], "changes": run.changes}
    now.book.event("start" if begins else "resume", run.progress.step, what)
    for key, (old, new) in run.allowed.items():
        now.book.event("allowed", run.progress.step, {"key": key, "old": old, "new": new})
    limit = "" if recipe.train.max_minutes is None else f", at most {recipe.train.max_minutes:g} min"
    tokens = sum(source.folder.total_tokens for source in run.feed.windows)
    now.display.note(
        f"{facts['model']['label']}  {facts['model']['parameters']:,} parameters  {tokens:,} training tokens  "
        f"{recipe.train.steps:,} steps of {_sizes(recipe)} x {recipe.data.context}{limit}  {run.precision}, "
        f"{_hands(run)}"
    )
    for key, (old, new) in run.changes.items():
        now.display.note(f"changed since the last sitting: {key} was {old!r}, is {new!r}")
    if not begins:
        now.display.note(f"goes on after step {run.progress.step}, {clock(run.progress.elapsed)} into the training")
    elif "rollback" in (recipe.guard.nonfinite, recipe.guard.spike):
        _save(now, asynchronous=False)


def _sizes(recipe: Recipe) -> str:
    return " to ".join(str(batch) for _, batch in (recipe.train.ramp[:1] + recipe.train.ramp[1:][-1:]))


def _hands(run: Run) -> str:
    """Who does the work."""
    threads = counted(run.facts["machine"]["threads"], "thread")
    if run.world.kind == "single":
        return threads
    return f"{run.world.kind} of {run.world.ranks} processes, {threads} each"
