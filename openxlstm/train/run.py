"""A run folder and everything a run is made of, opened together or refused before anything is written.

runs/NAME/  resolved.json        the recipe in full, machine and versions
            train.jsonl          one line per step and per validation
            events.jsonl         starts, resumptions, stops, changes
            plan.json            only if a limit in minutes settled where the cool-down begins
            checkpoints/         complete ones only: checkpoints.py
            model/               weights, config and tokenizer, for everything else in the library
            summary.json  report.md  *.png
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from openxlstm.data.order import Order
from openxlstm.data.prepare import prepare_corpus
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_atomically
from openxlstm.data.windows import Stream
from openxlstm.train import budget, checkpoints, config, machine, optim
from openxlstm.train.checkpoints import Progress
from openxlstm.train.log import read_json
from openxlstm.train.loss import Rows, derived
from openxlstm.train.recipe import ARCHITECTURES, Recipe
from openxlstm.train.report import SUMMARY
from openxlstm.train.schedules import Schedule

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two commands on one folder are not refused
    fcntl = None  # type: ignore[assignment]

RESOLVED = "resolved.json"


@dataclass(slots=True)
class Run:
    """All that training needs. Only `progress` and `schedule` change, and the tensors of model and optimiser."""

    recipe: Recipe
    folder: Path
    prepared: Path  # token folders train, valid, test
    tokenizer: Tokenizer
    model: Any  # a LanguageModel that is an nn.Module
    optimiser: optim.Optimiser
    rows: Stream
    valid: Stream
    test: Stream
    order: Order
    bytes_of: Int[Tensor, " W"]
    precision: str
    schedule: Schedule
    progress: Progress
    facts: dict[str, Any]  # what resolved.json says
    changes: dict[str, list[Any]]  # dotted keys that differ from the last sitting, with old and new value

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products, or None for plain fp32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def batch(self) -> Rows:
        """The rows of the next step: a pure function of the data, the seed and the number of rows read so far."""
        rows = dict(self.recipe.train.ramp)[0]
        windows = self.order.windows(self.progress.consumed, rows)
        return Rows.of(self.rows.batch(windows), self.bytes_of.device)

    def write_facts(self) -> None:
        """Store what was resolved, machine and versions included."""
        write_atomically(self.folder / RESOLVED, json.dumps(self.facts, indent=1) + "\n")

    def save(self) -> Path:
        """One complete checkpoint; older ones beyond `keep_last` go."""
        folder = self.folder / "checkpoints"
        path = checkpoints.save(folder, self.model, self.optimiser, self.progress, self.recipe.to_dict()).wait()
        checkpoints.tidy(folder, self.recipe.checkpoint.keep_last)
        return path


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
    corpus = recipe.data.mixture[0].path
    if corpus != config.FILES["data.corpus"] and not Path(corpus).is_dir():
        where = table.where("data.corpus")
        raise ValueError(f'{where}: data.corpus = "{corpus}" is no folder; name one, or "stdlib"')
    return config.resolve(recipe, table, tokenizer.vocab_size), tokenizer


def open_run(
    recipe: Recipe, tokenizer: Tokenizer, folder: Path, cache: Path, note: Callable[[str], None] = lambda text: None
) -> Run:
    """Prepare the data, build the model, and go to where the run stands: its start, or its latest checkpoint.

    Args:
        recipe: resolved.
        folder: new, empty, or the folder of the same run.
        cache: where prepared token folders are kept between runs.
        note: is told, in a sentence, what takes a while.

    Raises:
        ValueError: the folder belongs to something else; a frozen key has changed; the data is too small; a
            checkpoint is damaged, or gone. Nothing in `folder` is touched here.
    """
    stands = checkpoints.latest(folder / "checkpoints")
    before = _belongs(folder, recipe, begun=stands is not None)
    if stands is None and (folder / SUMMARY).exists():
        raise ValueError(
            f"{folder}: this run is over and its checkpoints are gone, so it can neither go on nor be trained again"
            " without losing what it says; choose another --out"
        )
    _refuse_run_in_corpus(folder, recipe)
    device = machine.device()
    precision = machine.precision(recipe.train.precision, device)
    if recipe.train.compile:
        machine.check_compiler(device)

    def tell(split: str, done: int, total: int) -> None:
        if done == total:
            note(f"{split}: {total:,} documents are tokens now, in {cache}")

    prepared = prepare_corpus(recipe.data.mixture[0].path, cache, tokenizer, progress=tell)
    splits = {
        name: Stream(TokenFolder.open(prepared / name), recipe.data.context) for name in ("train", "valid", "test")
    }
    if not all(part.folder.byte_level for part in splits.values()):
        raise ValueError(
            f"data.tokenizer = {recipe.data.tokenizer!r}: its tokens do not spell the texts of the corpus"
            " byte for byte (a normalizer, or an added space), so bits per byte would be wrong; take that out of it"
        )

    torch.manual_seed(derived(recipe.train.seed))
    _, build = ARCHITECTURES[recipe.model["architecture"]]
    model = build(recipe.model_config()).to(device)
    model.checkpoint_every = recipe.train.checkpoint_every
    optimiser = optim.build(model, recipe.optim)

    progress = Progress() if stands is None else checkpoints.load(stands, model, optimiser)
    steps, minutes = recipe.train.steps, recipe.train.max_minutes
    assert steps is not None, "open_run takes a resolved recipe"
    schedule = budget.read_plan(folder, recipe.schedule(), steps, minutes)
    if recipe.train.compile:
        model.compile()

    facts = {
        "recipe": recipe.to_dict(),
        "machine": machine.describe(device) | {"precision": precision},
        "model": {"label": model.config.label, "parameters": sum(weight.numel() for weight in model.parameters())},
        "data": {name: part.folder.fingerprint for name, part in splits.items()},
    }
    if before is not None and stands is not None and before["data"] != facts["data"]:
        raise ValueError(
            f"{folder}: the corpus is not the one this run began with (fingerprint {before['data']['train'][:12]}, now"
            f" {facts['data']['train'][:12]}); start a new run with another --out"
        )
    changes = (
        {}
        if before is None
        else config.changed(
            {key: before[key] for key in ("recipe", "machine")}, {key: facts[key] for key in ("recipe", "machine")}
        )
    )
    return Run(
        recipe=recipe,
        folder=folder,
        prepared=prepared,
        tokenizer=tokenizer,
        model=model,
        optimiser=optimiser,
        rows=splits["train"],
        valid=splits["valid"],
        test=splits["test"],
        order=Order(recipe.train.seed, len(splits["train"])),
        bytes_of=torch.from_numpy(tokenizer.bytes_of.copy()).to(device),
        precision=precision,
        schedule=schedule,
        progress=progress,
        facts=facts,
        changes=changes,
    )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Make the run folder and hold it: a second command on the same run is refused. A killed holder lets go by itself.

    What was made and is still empty at the end, because the run was refused, is taken away again.

    Raises:
        ValueError: another command holds the folder, or it is a file.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} is, or lies below, a file; choose a folder with --out") from None
    except PermissionError:
        raise ValueError(f"{folder} may not be made here: permission denied; choose a folder with --out") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)
        for path in made:
            with suppress(OSError):  # not empty, then: there is a run in it
                path.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another command is training this run; wait for it, or use another --out") from None


def default_cache() -> Path:
    """Where prepared corpora live: $XLSTM_CACHE, or openxlstm in the user's cache folder."""
    if said := os.environ.get("XLSTM_CACHE"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openxlstm"


def _belongs(folder: Path, recipe: Recipe, begun: bool) -> dict[str, Any] | None:
    """What the run in `folder` was resolved to, None for a new folder; refuse any other folder.

    A run that has `begun` has a checkpoint to go on from. Before that everything may be corrected still.
    """
    if (folder / RESOLVED).is_file():
        before = read_json(folder / RESOLVED, "recipe", "machine", "data")
        if not all(isinstance(before[name], dict) for name in ("recipe", "machine", "data")):
            raise ValueError(f"{folder / RESOLVED}: recipe, machine and data must be objects; restore it")
        if begun and (differing := config.changed_frozen(before["recipe"], recipe.to_dict())):
            raise ValueError(
                f"{folder} holds another run: {'; '.join(differing)}. Model, data and optimiser stay as they are for"
                " the whole run; restore the value, or start a new run with another --out"
            )
        return before
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is no run folder; choose a new one with --out")
    return None


def _refuse_run_in_corpus(folder: Path, recipe: Recipe) -> None:
    corpus = recipe.data.mixture[0].path
    if corpus != config.FILES["data.corpus"] and folder.resolve().is_relative_to(Path(corpus).resolve()):
        raise ValueError(
            f"the run folder {folder} lies inside the corpus {corpus}, and what the run writes would become part of"
            " it; choose another --out"
        )
