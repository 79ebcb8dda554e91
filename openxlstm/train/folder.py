"""The run folder: whose it is, who may write to it, and what it must agree with.

runs/NAME/  resolved.json        the recipe in full, machine and versions
            train.jsonl          one line per step and per validation
            events.jsonl         starts, resumptions, stops, changes, steps that went wrong
            plan.json            only if a limit in minutes settled where the cool-down begins
            checkpoints/         complete ones only: checkpoints.py
            model/               weights, config and tokenizer, for everything else in the library
            summary.json  report.md  *.png
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openxlstm.train import config
from openxlstm.train.log import read_json
from openxlstm.train.recipe import Recipe

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two commands on one folder are not refused
    fcntl = None  # type: ignore[assignment]

RESOLVED = "resolved.json"


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


def belongs(folder: Path, recipe: Recipe, *, begun: bool, allowed: Collection[str] = ()) -> dict[str, Any] | None:
    """What the run in `folder` was resolved to, None for a new folder; refuse any other folder.

    A run that has `begun` has a checkpoint to go on from. Before that everything may be corrected still. Frozen keys
    may change if they, or a table that holds them, are `allowed` by name.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    if (folder / RESOLVED).is_file():
        before = read_json(folder / RESOLVED, "recipe", "machine", "data")
        if not all(isinstance(before[name], dict) for name in ("recipe", "machine", "data")):
            raise ValueError(f"{folder / RESOLVED}: recipe, machine and data must be objects; restore it")
        before["recipe"] = config.completed(before["recipe"], str(folder / RESOLVED))
        if begun and (differing := config.changed_frozen(before["recipe"], recipe.to_dict(), allowed)):
            said = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in differing.items())
            words = " ".join(f"--allow {key}" for key in differing)
            raise ValueError(
                f"{folder} holds another run: {said}. Model, data and optimiser stay as they are for the whole run;"
                f" restore the value, or start a new run with another --out, or insist with {words}"
            )
        return before
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is no run folder; choose a new one with --out")
    return None


def refuse_run_in_corpus(folder: Path, recipe: Recipe) -> None:
    """What a run writes must not become part of what it reads."""
    for source in recipe.data.mixture:
        if source.path != config.FILES["data.corpus"] and folder.resolve().is_relative_to(Path(source.path).resolve()):
            raise ValueError(
                f"the run folder {folder} lies inside the corpus {source.path}, and what the run writes would become"
                " part of it; choose another --out"
            )


def default_cache() -> Path:
    """Where prepared corpora live: $XLSTM_CACHE, or openxlstm in the user's cache folder."""
    if said := os.environ.get("XLSTM_CACHE"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openxlstm"


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another command is training this run; wait for it, or use another --out") from None
