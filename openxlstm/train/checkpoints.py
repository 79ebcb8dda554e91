"""Checkpoints that are there completely or not at all: `checkpoints/step-00000200/`.

Each holds the model and the optimiser by parameter name, in PyTorch's distributed format (so that any number of
processes can read it), and `meta.json` with the trainer's few numbers. A save writes to `step-00000200.tmp`, forces
it to the disk and renames it: complete means that the name has no suffix. Whatever interrupts a save, a full disk
included, the checkpoints before it are untouched. POSIX file systems.

The format holds pickles: resume from checkpoints of your own only. Models are passed on as safetensors.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

FORMAT = "openxlstm-checkpoint/1"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. With the recipe, this, the model and the optimiser are all that a run is."""

    step: int = 0  # optimiser steps done
    consumed: int = 0  # rows read
    elapsed: float = 0.0  # seconds of training, over all sittings
    best: float | None = None  # lowest bits per byte on the validation windows so far


def save(
    folder: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, recipe: dict[str, Any]
) -> Path:
    """Write one complete checkpoint below `folder`, or leave everything as it was.

    Raises:
        OSError: the disk would not take it; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress.step:08d}"
    scratch = target.with_name(f"{target.name}.tmp")
    if target.exists():  # a stop right after a scheduled save: a step is saved once
        return target
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        weights, moments = get_state_dict(model, optimiser)
        _alone(dcp.save, {"model": weights, "optimiser": moments}, scratch)
        _write_json(scratch / "meta.json", {"format": FORMAT, "progress": asdict(progress), "recipe": recipe})
        sync(scratch)
        scratch.rename(target)
        sync(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(scratch, ignore_errors=True)  # a full disk needs the room
        raise OSError(f"{target.name} could not be saved: {_reason(error)}") from error
    return target


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def load(path: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint into `model` and `optimiser`, and say where the run stands.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another format or another model.
    """
    progress = read_progress(path)
    weights, moments = get_state_dict(model, optimiser)
    state: dict[str, Any] = {"model": weights, "optimiser": moments}
    try:
        _alone(dcp.load, state, path)
    except (CheckpointException, Exception) as error:  # the first is no Exception; damaged pickles raise nearly any
        raise ValueError(
            f"{path}: cannot be read: {_reason(error)}; move it away to go on from the one before"
        ) from error
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    return progress


def read_progress(path: Path) -> Progress:
    """The trainer's numbers of one checkpoint.

    Raises:
        ValueError: `meta.json` is missing, damaged or of another format.
    """
    damaged = f"{path}: its meta.json is damaged; move {path.name} away to go on from the one before"
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        given = meta["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(damaged) from error
    if given != FORMAT:
        raise ValueError(f"{path}: its format is {given!r}; this version reads {FORMAT!r}")
    try:
        return Progress(**meta["progress"])
    except (KeyError, TypeError) as error:
        raise ValueError(damaged) from error


def tidy(folder: Path, keep_last: int) -> None:
    """Remove what interrupted saves left, and all but the newest `keep_last` complete checkpoints."""
    for path in [*folder.glob("step-*.tmp"), *complete(folder)[:-keep_last]]:
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Force a file, or a folder and the files in it, to the disk: a rename must not outlive what it names."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alone(function: Any, state: dict[str, Any], path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we mean
            function(state, checkpoint_id=str(path), no_dist=True)
    except CheckpointException as error:
        if any(isinstance(wrapped[0], KeyboardInterrupt) for wrapped in error.failures.values()):
            raise KeyboardInterrupt from None  # the format wraps even that
        raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _reason(error: BaseException) -> str:
    """The first cause: the distributed format wraps what went wrong on each rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
    return str(error)
