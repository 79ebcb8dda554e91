"""Tasks that read files which nothing here downloads: what is missing, and what was read.

Such a task has a `folder`. Without one it still says what it is, so that an experiment can be listed and planned by
whoever does not have the files; it only has no samples. What it reads is named by a fingerprint of names and contents:
results on other files are other results, wherever the files lie.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from openxlstm.tasks.base import Task


@runtime_checkable
class OfFiles(Task, Protocol):
    """A task that reads files of its user."""

    @property
    def folder(self) -> str | None:
        """Where they are."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def origin(self) -> str:
        """What they are called, for who looks for them."""
        ...


def check(task: OfFiles) -> None:
    """Refuse a folder that does not hold the files.

    Raises:
        ValueError: which of them are missing.
    """
    if task.folder is None:
        return
    missing = [name for name in task.files if not (Path(task.folder) / name).is_file()]
    if missing:
        raise ValueError(f"folder={task.folder!r} has no {', '.join(missing)}; it must hold {task.origin}")


def folder(task: OfFiles) -> str:
    """Where the files are.

    Raises:
        ValueError: nobody has said it.
    """
    if task.folder is None:
        raise ValueError(
            f"{task.name} reads {task.origin}, which nothing here downloads: name a folder that holds "
            f"{', '.join(task.files)}"
        )
    return task.folder


def fingerprint(task: OfFiles) -> str:
    """Eight digits that change with the name or the content of any of the files.

    Raises:
        ValueError: nobody has said where they are.
    """
    paths = [Path(folder(task)) / name for name in task.files]
    return _fingerprint(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of path, size and time of change, so that a file which is written again is read again."""
    whole = hashlib.sha256()
    for path, size, _ in files:
        whole.update(f"{Path(path).name}/{size}/".encode())
        with Path(path).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:8]
