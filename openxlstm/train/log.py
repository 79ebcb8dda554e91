"""What a run says: a line of JSON for every step, and to people one live line, or plain lines when piped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET_SECONDS = 10.0  # between plain lines: a piped log of an hour is a few pages


class Journal:
    """Lines of JSON in a file that is only appended to, and cut back when a run resumes from an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            _mend(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # by line: a killed run loses no finished line

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(dict(line)) + "\n")

    def sync(self) -> None:
        """Force what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """One of the run folder's JSON files: an object that has the fields `needed`.

    Raises:
        ValueError: it is not. They are written atomically, so somebody else wrote it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path}: not JSON: {error}; restore it, or move it away") from None
    for name in needed:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{path}: it has no field {name!r}; restore it, or move it away")
    return value


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All lines. A last line that a kill tore is left out.

    Raises:
        ValueError: any other line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {error}; move the run folder away") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"{path}, line {number}: {line.strip()!r} is no line of a run; move the run folder away")
        found.append(entry)
    return found


def cut_journal(path: Path, step: int) -> None:
    """Keep the lines up to `step`: what came after the checkpoint will happen again."""
    kept = [line for line in read_journal(path) if line["step"] <= step]
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())  # a rename must not outlive what it names
    os.replace(scratch, path)


def _mend(path: Path) -> None:
    """Take away a last line that a kill tore, which the next line would otherwise be glued to."""
    with path.open("rb+") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


@runtime_checkable
class Display(Protocol):
    """What people see of a run."""

    def note(self, text: str) -> None:
        """One sentence that stays."""

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """One training step, as it is in the journal, of `end` steps."""

    def close(self) -> None:
        """The steps are over, for better or worse; only notes may follow. May be called twice."""


class Silent:
    """A display for programs: the run folder says everything."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines, at most one every few seconds, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = -QUIET_SECONDS

    def note(self, text: str) -> None:
        """Print a sentence."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """Print the step if the last line is old enough, or if it is the last step."""
        if line["elapsed"] - self._said < QUIET_SECONDS and line["step"] < end:
            return
        self._said = line["elapsed"]
        self.note(f"step {line['step']}/{end}  {_numbers(line)}  {clock(seconds_left)} left")

    def close(self) -> None:
        """Nothing is open."""


class Live:
    """One line that moves, for a terminal. It is redrawn between steps: no thread competes with the training."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("[bold]step {task.completed:,.0f}[/]/{task.total:,.0f}"),
            BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[dim]{task.fields[left]} left[/]"),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._progress.add_task("train", total=1, numbers="", left="", visible=False)
        self._drawn = 0.0
        self._progress.start()

    def note(self, text: str) -> None:
        """Print a sentence above the moving line."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """Redraw, at most five times a second."""
        if 0 <= line["elapsed"] - self._drawn < 0.2 and line["step"] < end:
            return
        self._drawn = line["elapsed"]
        self._progress.update(
            self._task,
            completed=line["step"],
            total=end,
            numbers=_numbers(line),
            left=clock(seconds_left),
            visible=True,
            refresh=True,
        )

    def close(self) -> None:
        """Take the line away and give the cursor back."""
        self._progress.stop()


def display(console: Console) -> Display:
    """A live line on a terminal, plain lines elsewhere."""
    return Live(console) if console.is_terminal else Lines(console)


def clock(seconds: float) -> str:
    """A duration for people: 47s, 2m41s, 3h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _numbers(line: Mapping[str, Any]) -> str:
    return f"loss {line['loss']:.3f}  {line['bits_per_byte']:.3f} bits/byte  {line['tokens_per_second']:,.0f} tokens/s"
