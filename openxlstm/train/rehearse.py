"""A run in miniature before the long one: `xlstm train RECIPE --dry-run`.

Two steps, an evaluation, a checkpoint; a third step; then the run is opened again from its checkpoint, and its third
step must be the same to the bit: rows, loss, norm, parameters. Everything happens in a folder beside the run's, which
is gone afterwards. What cannot work, the memory of a step above all, shows within a minute instead of in a week.
"""

import hashlib
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.accounting import flops_per_token
from openxlstm.train import parallel, step
from openxlstm.train.evaluate import evaluate
from openxlstm.train.folder import only_one
from openxlstm.train.log import Display, Silent
from openxlstm.train.meters import Meters
from openxlstm.train.recipe import Recipe
from openxlstm.train.run import Run, open_run
from openxlstm.train.step import Found

STEPS = 2  # before the checkpoint: the first one allocates


def rehearse(recipe: Recipe, tokenizer: Tokenizer, folder: Path, cache: Path, display: Display) -> dict[str, Any]:
    """Do all that the run will do, briefly, and say what it costs.

    Args:
        folder: of the run to come. Nothing in it is read or written.

    Returns:
        loss, valid_bits_per_byte; seconds_per_step, tokens_per_second; memory, as in `Meters.line`;
        checkpoint_bytes.

    Raises:
        ValueError: the run cannot begin (`open_run`), a loss is no number, or the continued run is another one.
        OSError: the disk would not take the checkpoint.
    """
    scratch = folder.with_name(f"{folder.name}.dry-run")
    with parallel.join(recipe.train.parallel, recipe.train.shard) as world, ExitStack() as stack:
        display = display if world.first else Silent()
        if world.first:
            shutil.rmtree(scratch, ignore_errors=True)  # of a rehearsal that was killed
        stack.enter_context(world.led(lambda: only_one(scratch)))
        if world.first:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        run = open_run(recipe, tokenizer, scratch, cache, world, display.note)
        if world.first:
            run.write_facts()
        display.note(f"dry run: {STEPS} steps, an evaluation, a checkpoint, and a third step from memory and from it")
        facts = _begin(run)
        third = _digest(run, _take(run, _meters(run)))
        del run  # two models at once may be more than the memory holds
        again = open_run(recipe, tokenizer, scratch, cache, world)
        if _digest(again, _take(again, _meters(again))) != third:
            raise ValueError(
                f"the step after a checkpoint is another one from memory than from the disk ({scratch}): this"
                " installation does not continue runs as it should; please report it, with the recipe"
            )
        display.note("the continued run is the same to the bit; everything is deleted again")
    return facts


def _begin(run: Run) -> dict[str, Any]:
    """The first steps, an evaluation, a checkpoint; what they cost. The first step does not count in the times."""
    meters, said = _meters(run), run.recipe.evaluate
    for _ in range(STEPS):
        meters.start()
        began = time.perf_counter()
        found = _take(run, meters)
        seconds = time.perf_counter() - began
    meters.step(found.score.tokens, found.slots)
    line = meters.line(run.progress.step, run.schedule.end)
    valid = evaluate(
        run.objective, run.valid, run.bytes_of, batch=said.batch, windows=said.windows,
        autocast=run.autocast, rank=run.world.rank, ranks=run.world.ranks, total=run.world.sum,
    )  # fmt: skip
    run.save()
    return {
        "loss": found.score.loss,
        "valid_bits_per_byte": valid.bits_per_byte,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": line["tokens_per_second"],
        "memory": line["memory"],
        "checkpoint_bytes": sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file()),
    }


def _take(run: Run, meters: Meters) -> Found:
    portions = run.feed.portions(run.progress.step, run.recipe.train.micro_batch, run.world.rank, run.world.ranks)
    found = step.gradient(run, portions, meters, 0.0, wished=False)
    if not torch.isfinite(torch.tensor([found.score.loss, found.norm])).all():
        raise ValueError(f"step {found.step + 1}: the loss is {found.score.loss} and the gradient norm {found.norm}")
    step.update(run, found)
    done = found.step + 1
    run.progress = replace(run.progress, step=done, consumed=run.feed.consumed(done))
    return found


def _digest(run: Run, found: Found) -> tuple[float, float, str]:
    """Loss, norm, and this process's part of all parameters, to the bit."""
    digest = hashlib.blake2b()
    for weight in run.parameters:
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.score.loss, found.norm, digest.hexdigest()


def _meters(run: Run) -> Meters:
    return Meters(flops_per_token(run.model.config), run.world.device, ranks=run.world.ranks)
