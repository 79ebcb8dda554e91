"""Everything a run is made of, opened together or refused before anything is written."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from openxlstm.data.feed import Feed, Prefetch
from openxlstm.data.order import rows_of_rank
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import write_atomically
from openxlstm.data.windows import Stream
from openxlstm.train import budget, checkpoints, config, folder, machine, optim
from openxlstm.train.carry import Carry
from openxlstm.train.checkpoints import Pending, Progress
from openxlstm.train.ema import EMA
from openxlstm.train.folder import RESOLVED
from openxlstm.train.loss import derived
from openxlstm.train.objective import Objective
from openxlstm.train.parallel import World
from openxlstm.train.recipe import Recipe, architecture
from openxlstm.train.report import SUMMARY
from openxlstm.train.schedules import Schedule
from openxlstm.train.sources import Note, Sources, check_exist, open_sources


@dataclass(slots=True)
class Run:
    """All that training needs. What changes: `progress`, `schedule`, `feed`, and the tensors of all the rest."""

    recipe: Recipe
    folder: Path
    world: World
    tokenizer: Tokenizer
    prepared: Path | None  # holds the token folders train and test of the one source of the run
    feed: Feed
    valid: Stream
    test: Stream | None
    sets: dict[str, Stream]  # further validation sets
    bytes_of: Int[Tensor, " W"]
    model: Any  # a LanguageModel that is an nn.Module
    objective: Objective  # with `model` in it
    wrapped: nn.Module  # `objective` as this world calls it
    optimiser: optim.Optimiser
    ema: EMA | None
    carry: Carry | None  # of lanes
    precision: str
    schedule: Schedule
    progress: Progress
    facts: dict[str, Any]  # what resolved.json says
    changes: dict[str, list[Any]]  # dotted keys that differ from the last sitting, with old and new value
    allowed: dict[str, list[Any]]  # those of them that only --allow lets through
    saving: Any = None  # a group of processes for checkpoints alone
    pending: Pending | None = None  # the save that is on its way to the disk

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products, or None for that of the parameters."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained."""
        return [weight for group in self.optimiser.param_groups for weight in group["params"]]

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def products(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.bytes_of.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def ahead(self) -> Prefetch:
        """A thread that reads this process's rows of the next steps, as the feed stands now."""
        return Prefetch(self.feed, self.recipe.train.micro_batch, self.world.rank, self.world.ranks)

    def write_facts(self) -> None:
        """Store what was resolved, machine and versions included."""
        write_atomically(self.folder / RESOLVED, json.dumps(self.facts, indent=1) + "\n")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds its running average, if the run keeps one: what is measured and passed on."""
        if self.ema is None:
            yield
            return
        with self.world.rewritten(self.objective), self.ema.swapped():
            yield

    def whole_model(self) -> Any:
        """The model as anybody can use it, averaged if the run keeps an average. None in all processes but the first.

        Called by all of them: a sharded model is gathered. The model of the run itself where nothing is to be done.
        """
        if self.world.kind != "fsdp2" and self.ema is None:
            return self.model if self.world.first else None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with self.averaged():  # and loaded inside: these may be the parameters themselves, not copies
            weights = get_model_state_dict(self.model, options=options)
            if not self.world.first:
                return None
            model = _build(self.recipe, self.bytes_of.device, self.precision)
            model.load_state_dict(weights)
        return model

    def save(self, *, asynchronous: bool = False) -> None:
        """One checkpoint, complete when this returns, or asynchronous: when `settle` does.

        Raises:
            OSError: the disk would not take it, or the one before.
        """
        self.settle()
        self.pending = checkpoints.save(
            self.checkpoints,
            self.model,
            self.optimiser,
            self.progress,
            self.recipe.to_dict(),
            ema=self.ema,
            extra=self.carry.tensors() if self.carry else None,
            keep=self.recipe.checkpoint,
            asynchronous=asynchronous,
            group=self.saving,
        )
        if not asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Have the save that is on its way done, or hear of its failure; without `wait`, only if it is over."""
        if self.pending is not None and (wait or self.pending.done):
            pending, self.pending = self.pending, None
            pending.wait()

    def restore(self, path: Path) -> Progress:
        """Parameters, moments, average and carried states as a checkpoint has them. Returns where it stands."""
        progress = checkpoints.load(path, self.model, self.optimiser, ema=self.ema, group=self.saving)
        if self.carry is not None:
            self.carry.restore(self.model, checkpoints.read_tensors(path, "extra"))
        return progress

    def roll_back(self, samples: tuple[int, int]) -> None:
        """Go back to the newest checkpoint, and never read the samples [first, last) again.

        What was counted stays counted: skips, rollbacks, and the time that passed.
        """
        self.settle()
        path = checkpoints.latest(self.checkpoints)
        assert path is not None, "a run that may roll back saves its first step"
        now, then = self.progress, self.restore(path)
        self.feed = self.feed.without([samples])
        self.progress = replace(
            then,
            elapsed=now.elapsed,
            skipped=(*now.skipped, samples),
            skips=now.skips,
            spikes=now.spikes,
            rollbacks=now.rollbacks + 1,
        )


def read_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[Recipe, Tokenizer]:
    """A resolved recipe, from a file or the name of a shipped one, and its tokenizer. Writes nothing.

    Raises:
        ValueError: whatever is wrong with it, with file and path.
    """
    recipe, table = config.load(config.find(name), overrides)
    said = recipe.data.tokenizer
    try:
        tokenizer = Tokenizer.bytes() if said == config.FILES["data.tokenizer"] else Tokenizer.from_file(said)
    except (ValueError, OSError) as error:
        raise ValueError(f"{table.where('data.tokenizer')}: data.tokenizer: {error}") from None
    if not tokenizer.byte_level or tokenizer.end_id is None:
        lacks = "does not spell bytes (ByteLevel)" if not tokenizer.byte_level else "has no token that ends a document"
        raise ValueError(f'{table.where("data.tokenizer")}: data.tokenizer = {said!r} {lacks}; "bytes" always works')
    check_exist(recipe, table.where)
    return config.resolve(recipe, table, tokenizer.vocab_size), tokenizer


def resolve_for_print(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """As `read_recipe`, for looking at a recipe only: its data, and the tokenizer, need not be there yet.

    Raises:
        ValueError: whatever is wrong with the recipe itself.
    """
    recipe, table = config.load(config.find(name), overrides)
    if recipe.data.tokenizer != config.FILES["data.tokenizer"] and not Path(recipe.data.tokenizer).exists():
        return config.resolve(recipe, table, vocab_size=1)  # the recipe's own vocabulary holds any tokenizer's
    return read_recipe(name, overrides)[0]


def open_run(
    recipe: Recipe,
    tokenizer: Tokenizer,
    where: Path,
    cache: Path,
    world: World,
    note: Note = lambda text: None,
    allowed: Collection[str] = (),
) -> Run:
    """Prepare the data, build the model, and go to where the run stands: its start, or its latest checkpoint.

    Called by all processes of `world`.

    Args:
        recipe: resolved.
        where: the run folder: new, empty, or the folder of the same run.
        cache: where prepared token folders are kept between runs.
        note: is told, in a sentence, what takes a while.
        allowed: frozen keys that may have changed all the same.

    Raises:
        ValueError: the folder belongs to something else; a frozen key has changed; the data is too small; the batch
            does not divide among the processes; a checkpoint is damaged, or gone. Nothing in `where` is touched here.
    """
    stands, before = world.lead(lambda: _look(where, recipe, allowed))
    device = world.device
    precision = machine.precision(recipe.train.precision, device)
    _check_split(recipe, world)
    if recipe.train.compile:
        machine.check_compiler(device)
    progress = Progress() if stands is None else checkpoints.read_progress(stands)
    sources = world.lead(lambda: open_sources(recipe, tokenizer, cache, progress.skipped, note))
    allowances = {} if before is None else config.changed_frozen(before["recipe"], recipe.to_dict())
    _check_continues(where, before if stands else None, sources, progress, allowances)

    torch.manual_seed(derived(recipe.train.seed))
    model = _build(recipe, device, precision)
    model.checkpoint_every = recipe.train.checkpoint_every
    described = {"label": model.config.label, "parameters": sum(weight.numel() for weight in model.parameters())}
    if recipe.train.compile:
        for unit in model.units():
            unit.block.compile()
    objective = Objective(model, recipe.loss)
    wrapped = world.wrap(objective, torch.bfloat16 if precision == "bf16" else None)
    facts = {
        "recipe": recipe.to_dict(),
        "machine": machine.describe(device) | {"precision": precision} | world.describe(),
        "model": described,
        "data": sources.fingerprints,
        "sets": {name: stream.folder.fingerprint for name, stream in sources.sets.items()},
    }
    steps, minutes = recipe.train.steps, recipe.train.max_minutes
    assert steps is not None, "open_run takes a resolved recipe"
    run = Run(
        recipe=recipe,
        folder=where,
        world=world,
        tokenizer=tokenizer,
        prepared=sources.prepared,
        feed=sources.feed,
        valid=sources.valid,
        test=sources.test,
        sets=sources.sets,
        bytes_of=torch.from_numpy(tokenizer.bytes_of.copy()).to(device),
        model=model,
        objective=objective,
        wrapped=wrapped,
        optimiser=optim.build(model, recipe.optim),
        ema=None if recipe.optim.ema is None else EMA(model, recipe.optim.ema),
        carry=Carry(sources.feed.batch_size(0), recipe.train.micro_batch, world) if sources.feed.lanes else None,
        precision=precision,
        schedule=budget.read_plan(where, recipe.schedule(), steps, minutes),
        progress=progress,
        facts=facts,
        changes={} if before is None else _changes(before, facts),
        allowed=allowances if stands is not None else {},
        saving=checkpoints.gloo_group(),
    )
    if stands is not None:
        run.progress = run.restore(stands)
    return run


def _look(where: Path, recipe: Recipe, allowed: Collection[str]) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint in the run folder, and what the run there was resolved to."""
    stands = checkpoints.latest(where / "checkpoints")
    before = folder.belongs(where, recipe, begun=stands is not None, allowed=allowed)
    if stands is None and (where / SUMMARY).exists():
        raise ValueError(
            f"{where}: this run is over and its checkpoints are gone, so it can neither go on nor be trained again"
            " without losing what it says; choose another --out"
        )
    folder.refuse_run_in_corpus(where, recipe)
    return stands, before


def _check_split(recipe: Recipe, world: World) -> None:
    """Every batch of the run divides among the processes, now and not in a week."""
    for _, batch in recipe.train.ramp:
        micro_batch = recipe.train.micro_batch or max(1, batch // world.ranks)
        rows_of_rank(batch, micro_batch, world.rank, world.ranks)


def _check_continues(
    where: Path,
    before: dict[str, Any] | None,
    sources: Sources,
    progress: Progress,
    allowances: dict[str, list[Any]],
) -> None:
    """The data goes on where it stopped. `before`: what a run that has begun was resolved to."""
    other_data = any(key.startswith(("data.corpus", "data.sources", "data.tokenizer")) for key in allowances)
    if before is not None and before["data"] != sources.fingerprints and not other_data:
        raise ValueError(
            f"{where}: the corpus is not the one this run began with (fingerprint {before['data'].get('train')!s:.12},"
            f" now {sources.feed.fingerprint:.12}); start a new run with another --out"
        )
    if sources.feed.consumed(progress.step) != progress.consumed:
        raise ValueError(
            f"{where} has read {progress.consumed:,} rows in {progress.step:,} steps, and with this train.batch it"
            f" would be {sources.feed.consumed(progress.step):,}; say where the size changes, as in"
            f" train.batch=[[0, OLD], [{progress.step}, NEW]]"
        )


def _build(recipe: Recipe, device: torch.device, precision: str) -> Any:
    """The model that the recipe describes, freshly initialised from PyTorch's generator."""
    _, build = architecture(recipe.model["architecture"])
    model = build(recipe.model_config())  # on the CPU first: the same numbers on every device
    return model.to(device=device, dtype=torch.float64 if precision == "fp64" else torch.float32)


def _changes(before: dict[str, Any], facts: dict[str, Any]) -> dict[str, list[Any]]:
    compared = ("recipe", "machine")
    return config.changed({key: before[key] for key in compared}, {key: facts[key] for key in compared})
