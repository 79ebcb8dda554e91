"""A folder, or a file, that appears complete or not at all.

The files are written into a hidden folder beside the target, which then takes its name in one step. A process that is
killed leaves only the hidden folder, and the next one that writes to the same target removes it. A file likewise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(target: Path, *, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """A hidden folder to write into; on leaving without an error it becomes `target`.

    Args:
        replaceable: names of files that may be replaced: a target that holds nothing else is exchanged for the new one.

    Raises:
        ValueError: the target holds other things, or another process is writing it.
    """
    check_free(target, replaceable)
    target = target.resolve()  # what a link points to, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.partial")
    hidden.mkdir(exist_ok=True)
    descriptor = _lock(hidden, target)
    try:
        _empty(hidden)  # what a killed process left
        yield hidden
        sync(hidden)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            check_free(target, replaceable)
            check_free(old, replaceable)
            shutil.rmtree(old, ignore_errors=True)  # left by a process killed at the very end
            target.replace(old)
        try:
            hidden.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def appearing_file(target: Path) -> Iterator[Path]:
    """A hidden file to write into; on leaving without an error it becomes `target`.

    Raises:
        ValueError: something is there, or another process is writing it.
    """
    check_free_file(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.partial")
    hidden.touch()
    descriptor = _lock(hidden, target)
    try:
        yield hidden
        with hidden.open("rb+") as file:
            os.fsync(file.fileno())
        check_free_file(target)
        hidden.replace(target)
        sync(target.parent)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_free_file(target: Path) -> None:
    """Nothing would be lost if a file took this name.

    Raises:
        ValueError: something has it, or it is below a file.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists; name a new file, or delete it first")
    if above := [folder for folder in target.parents if folder.exists() and not folder.is_dir()]:
        raise ValueError(f"{target} cannot be a file, since {above[0]} is one")


def check_free(target: Path, replaceable: Collection[str] = ()) -> None:
    """Nothing would be lost if the target were replaced.

    Raises:
        ValueError: it is a file or below one, a folder that holds something, or where this process stands.
    """
    if target.is_dir():
        if target.resolve() == Path.cwd():
            raise ValueError(f"{target} is the current folder, which cannot be exchanged; name a new folder in it")
        if held := sorted(path.name for path in target.iterdir() if path.name not in replaceable):
            raise ValueError(f"{target} exists and holds {held[0]}; name a new folder, or empty this one")
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists and is {'a file' if target.exists() else 'a link to nothing'}; name a new "
                         f"folder")  # fmt: skip
    elif above := [folder for folder in target.parents if folder.exists() and not folder.is_dir()]:
        raise ValueError(f"{target} cannot be a folder, since {above[0]} is a file")


def sync(folder: Path) -> None:
    """The names in the folder survive a power cut. Windows cannot open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(hidden: Path, target: Path) -> int | None:
    """Hold the hidden folder or file as long as this process writes; the system lets go of it when the process dies."""
    if os.name != "posix":
        return None  # no locks on folders there; two conversions to one target are then up to the user
    import fcntl

    descriptor = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"another process is writing {target} (it holds {hidden})") from error
    return descriptor


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
