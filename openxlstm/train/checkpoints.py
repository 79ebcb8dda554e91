"""Checkpoints that are there completely or not at all: `checkpoints/step-00000200/`.

Each holds, in PyTorch's distributed format, so that any number of processes writes and reads it:

    model.NAME  optimiser.*      parameters and moments by parameter name
    ema.NAME                     the running average of the parameters, if the run keeps one
    extra.NAME                   tensors of the trainer's own, such as a state carried across windows
    meta.json                    the trainer's few numbers (Progress) and the recipe

A save writes to `step-00000200.tmp`, forces it to the disk and renames it: complete means that the name has no suffix
and `meta.json` is there. What interrupts a save, a full disk and SIGKILL included, leaves the checkpoints before it
untouched, and the next save clears away what it left. POSIX file systems.

An asynchronous save copies every tensor to the CPU, returns, and writes from a thread: parameters that change right
afterwards do not reach the file. One save at a time; the next one waits for it.

The format holds pickles: resume from checkpoints of your own only. Models are passed on as safetensors.
"""

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from openxlstm.train.ema import EMA
from openxlstm.train.optim import Optimiser, parts
from openxlstm.train.recipe import CheckpointRecipe

FORMAT = "openxlstm-checkpoint/1"
NAME = re.compile(r"step-(\d{8,})")
_WRITING = threading.Lock()  # held from the copy of the tensors to the rename: one save at a time

Group = dist.ProcessGroup | None  # None: this process is alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. With the recipe, this, the model and the optimiser are all that a run is."""

    step: int = 0  # optimiser steps done
    consumed: int = 0  # rows read
    elapsed: float = 0.0  # seconds of training, over all sittings
    best: float | None = None  # lowest bits per byte on the validation windows so far
    best_step: int | None = None  # and when that was
    skipped: tuple[tuple[int, int], ...] = ()  # ranges [first, last) of samples that a rollback left out
    skips: int = 0  # steps that were not taken
    spikes: int = 0  # steps far above the ones before, whatever was done about them
    rollbacks: int = 0


@final
class Pending:
    """A save on its way to the disk. Whoever never asks `wait` never hears of a full disk."""

    def __init__(self, target: Path, write: Callable[[], None] | None, asynchronous: bool) -> None:
        self._target = target
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if write is not None and asynchronous:
            self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
            self._thread.start()
        elif write is not None:
            write()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # whatever it is, it belongs to the thread that waits
            self._error = error

    @property
    def done(self) -> bool:
        """Whether `wait` would answer at once."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """The complete checkpoint.

        Raises:
            OSError: the disk would not take it; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._target


def gloo_group() -> Group:
    """The processes of this run as a group for saving and loading; None if there is only this one.

    Called once, by all of them. Saving has a group of its own, on the CPU, because it goes on while training talks.
    """
    return dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None


def save(
    folder: Path,
    model: torch.nn.Module,
    optimiser: Optimiser,
    progress: Progress,
    recipe: dict[str, Any],
    *,
    ema: EMA | None = None,
    extra: Mapping[str, Tensor] | None = None,
    keep: CheckpointRecipe | None = None,
    asynchronous: bool = False,
    group: Group = None,
) -> Pending:
    """Write one complete checkpoint below `folder`, or leave everything as it was. Called by all processes of `group`.

    Args:
        model: without a wrapper of parallel training around it, so that its names are the model's.
        extra: tensors that belong to the trainer; the same on every process, or sharded (DTensor).
        keep: which of the others stay once this one is complete; None: all.
        asynchronous: return as soon as the tensors are copied.

    Raises:
        OSError: the disk would not take it (asynchronously, `Pending.wait` raises it); earlier ones are untouched.
    """
    target = folder / f"step-{progress.step:08d}"
    meta = {"format": FORMAT, "progress": asdict(progress), "recipe": recipe}
    _WRITING.acquire()
    try:
        if _first_says(target.exists(), group):  # a stop right after a scheduled save: a step is saved once
            _WRITING.release()
            return Pending(target, None, asynchronous)
        state = _state(model, optimiser, ema) | ({"extra": dict(extra)} if extra else {})
        if asynchronous:
            state = _copied(state)
    except BaseException:
        _WRITING.release()
        raise

    def write() -> None:
        try:
            _write(target, state, meta, group)
            if keep is not None and _is_first(group):
                tidy(folder, keep.keep_last, keep.keep_every, progress.best_step if keep.keep_best else None)
        finally:
            _WRITING.release()

    return Pending(target, write, asynchronous)


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if (path / "meta.json").exists()]


def load(
    path: Path, model: torch.nn.Module, optimiser: Optimiser, *, ema: EMA | None = None, group: Group = None
) -> Progress:
    """Put a checkpoint into `model`, `optimiser` and `ema`, and say where the run stands.

    Called by all processes of `group`, of which there may be more or fewer than wrote it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another format or another model.
    """
    progress = read_progress(path)
    state = _state(model, optimiser, ema)
    _read(path, state, group)
    set_state_dict(model, parts(optimiser), model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    return progress


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint ("model", "ema", "extra", "optimiser"), whole, by name, on the CPU.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    try:
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # damaged pickles raise nearly any
        raise ValueError(_unreadable(path, error)) from error
    prefix = f"{part}."
    found = {
        name.removeprefix(prefix): torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in known.items()
        if name.startswith(prefix) and isinstance(about, TensorStorageMetadata)
    }
    if found:
        _read(path, {part: found}, None)
    return found


def read_progress(path: Path) -> Progress:
    """The trainer's numbers of one checkpoint.

    Raises:
        ValueError: `meta.json` is missing, damaged or of another format.
    """
    meta = read_meta(path)
    try:
        said = dict(meta["progress"])
        said["skipped"] = tuple((first, last) for first, last in said.get("skipped", ()))
        return Progress(**said)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(_damaged(path)) from error


def read_meta(path: Path) -> dict[str, Any]:
    """`meta.json` of one checkpoint: its format, progress and recipe.

    Raises:
        ValueError: it is missing, damaged or of another format.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        given = meta["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_damaged(path)) from error
    if given != FORMAT:
        raise ValueError(f"{path}: its format is {given!r}; this version reads {FORMAT!r}")
    return meta


def tidy(folder: Path, keep_last: int, keep_every: int | None = None, best: int | None = None) -> None:
    """Remove what interrupted saves left, and old checkpoints.

    What stays: the newest `keep_last`, those of every `keep_every`-th step, and that of the step `best`.
    """
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)
    for path in complete(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if step != best and not (keep_every and step % keep_every == 0):
            doomed = path.with_name(f"{path.name}.tmp")
            path.rename(doomed)  # at once: killed in the middle, half a checkpoint must not look like a whole one
            shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Force a file, or a folder and the files in it, to the disk: a rename must not outlive what it names."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(model: torch.nn.Module, optimiser: Optimiser, ema: EMA | None) -> dict[str, Any]:
    fresh = not any(part.state for part in parts(optimiser))
    weights, moments = get_state_dict(model, parts(optimiser))
    for state in [state for part in parts(optimiser) for state in part.state.values()] if fresh else ():
        if "step" in state:  # asked for the state of an optimiser that has none yet, PyTorch takes a step of rate 0,
            state["step"].zero_()  # which must not count: bias correction looks at it
    return {"model": weights, "optimiser": moments} | ({"ema": ema.tensors} if ema is not None else {})


def _copied(value: Any) -> Any:
    """The same tree, with every tensor on the CPU and on its own."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _write(target: Path, state: dict[str, Any], meta: dict[str, Any], group: Group) -> None:
    """All of a save but the copy. Every process writes its own part; the first one does everything else."""
    scratch = target.with_name(f"{target.name}.tmp")

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def finish() -> None:
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        sync(scratch)
        scratch.rename(target)
        sync(target.parent)

    try:
        _first_alone(begin, group)
        _distributed(dcp.save, state, scratch, group)
        _first_alone(finish, group)
    except (OSError, CheckpointException) as error:
        if _is_first(group):
            shutil.rmtree(scratch, ignore_errors=True)  # a full disk needs the room
        raise OSError(f"{target.name} could not be saved: {_reason(error)}") from error


def _read(path: Path, state: dict[str, Any], group: Group) -> None:
    """Fill the tensors of `state` from the checkpoint."""
    try:
        _distributed(dcp.load, state, path, group)
    except (CheckpointException, Exception) as error:  # the first is no Exception; damaged pickles raise nearly any
        raise ValueError(_unreadable(path, error)) from error


def _distributed(function: Any, state: dict[str, Any], path: Path, group: Group) -> None:
    """dcp.save or dcp.load, by one process or by all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we mean
            function(state, checkpoint_id=str(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        if any(isinstance(wrapped[0], KeyboardInterrupt) for wrapped in error.failures.values()):
            raise KeyboardInterrupt from None  # the format wraps even that
        raise


def _is_first(group: Group) -> bool:
    return group is None or dist.get_rank(group) == 0


def _first_says(value: bool, group: Group) -> bool:
    """What the first process thinks: file systems do not show everybody the same at the same moment."""
    if group is None:
        return value
    said = [value]
    dist.broadcast_object_list(said, group=group, group_src=0)
    return said[0]


def _first_alone(action: Callable[[], None], group: Group) -> None:
    """The first process does it; all go on, or all fail."""
    if group is None:
        return action()
    failed: BaseException | None = None
    if _is_first(group):
        try:
            action()
        except BaseException as error:
            failed = error
    said = [None if failed is None else str(failed)]
    dist.broadcast_object_list(said, group=group, group_src=0)
    if failed is not None:
        raise failed
    if said[0] is not None:
        raise OSError(said[0])
    return None


def _damaged(path: Path) -> str:
    return f"{path}: its meta.json is damaged; move {path.name} away to go on from the one before"


def _unreadable(path: Path, error: BaseException) -> str:
    return f"{path}: cannot be read: {_reason(error)}; move it away to go on from the one before"


def _reason(error: BaseException) -> str:
    """The first cause: the distributed format wraps what went wrong on each rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
    return str(error)
