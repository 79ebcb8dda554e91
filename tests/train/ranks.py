"""What the tests of several processes share: runs, runs that die, what they read and what they leave."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from openxlstm.data.feed import Feed
from openxlstm.data.gather import Batch
from openxlstm.train import step
from openxlstm.train.log import Silent
from openxlstm.train.loop import train
from openxlstm.train.meters import Meters
from openxlstm.train.parallel import World
from openxlstm.train.recipe import Recipe
from openxlstm.train.run import Run, open_run, read_recipe

CRASH_AFTER, SAVED = 7, 5  # steps done when a run dies, and those of its last checkpoint
SPLITS = {  # name: what the recipe says about it
    "ddp": ("train.parallel=ddp",),
    "ddp in portions": ("train.parallel=ddp", "train.micro_batch=1"),
    "fsdp2": ("train.parallel=fsdp2",),
    "fsdp2 in portions": ("train.parallel=fsdp2", "train.micro_batch=2"),
    "fsdp2 recomputed": ("train.parallel=fsdp2", "train.micro_batch=1", "train.checkpoint_every=1"),
}
FILES = ("small.toml", "large.toml")  # a recipe per architecture


class DiedError(Exception):
    """As if the process had been killed here."""


def recipe_of(folder: Path, *overrides: str, file: str = FILES[0]) -> tuple[Recipe, Any]:
    """A recipe of FOLDER, and its tokenizer."""
    return read_recipe(str(folder / file), overrides)


def run_training(folder: Path, name: str, *overrides: str) -> str:
    """Train FOLDER/NAME as the command would, and say how it ended."""
    recipe, tokenizer = recipe_of(folder, *overrides)
    return train(recipe, tokenizer, folder / name, folder / "cache", Silent(), lambda model, tokenizer: "a text")


def dying(folder: Path, name: str, *overrides: str) -> None:
    """Train until the step after CRASH_AFTER, which no process survives."""
    honest = step.update

    def update(run: Run, found: step.Found) -> float:
        if found.step == CRASH_AFTER:
            run.settle()  # so that it is known which checkpoint is the last complete one
            raise DiedError
        return honest(run, found)

    with replaced(step, "update", update), contextlib.suppress(DiedError):
        run_training(folder, name, *overrides)
        raise AssertionError("the run should have died")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, list[list[int]]]]:
    """Inside, the sample ids that this process reads, by step and portion, are written into what is yielded."""
    seen: dict[int, list[list[int]]] = {}
    portions, rows = Feed.portions, Feed.rows

    def record(feed: Feed, number: int, *split: Any) -> list[Batch]:
        mine: list[list[int]] = []

        def read(feed: Feed, samples: Any) -> Batch:
            mine.append(samples.sample.tolist())
            return rows(feed, samples)

        with replaced(Feed, "rows", read):
            found = portions(feed, number, *split)
        seen[number] = mine
        return found

    with replaced(Feed, "portions", record):
        yield seen


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of train.jsonl without what the clock says."""
    keys = (
        "step",
        "loss",
        "bits_per_byte",
        "lr",
        "grad_norm",
        "tokens",
        "skipped",
        "valid_loss",
        "valid_bits_per_byte",
    )
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys if key in line} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model that a finished run leaves."""
    from openxlstm.checkpoint import store

    return dict(store.load(folder / "model").state_dict())


def same_run(one: Path, other: Path) -> None:
    """To the bit: every line and every weight."""
    assert curve(one) == curve(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def opened(folder: Path, world: World, *overrides: str, file: str = FILES[0]) -> Run:
    """A run at its first step, in memory only."""
    recipe, tokenizer = recipe_of(folder, *overrides, file=file)
    return open_run(recipe, tokenizer, folder / "none", folder / "cache", world)


def meters(run: Run) -> Meters:
    return Meters(1, run.world.device)


def digest(run: Run) -> str:
    """Parameters, moments and average of this process, to the bit."""
    tensors = [*run.parameters, *(run.ema.tensors.values() if run.ema else ())]
    for state in run.optimiser.state.values():
        tensors += [part for part in state.values() if isinstance(part, torch.Tensor)]
    hasher = hashlib.blake2b()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        hasher.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
