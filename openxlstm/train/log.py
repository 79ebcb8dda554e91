"""What a run says: a line of JSON for every step, and to people a few live lines, or plain lines when piped."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 10.0  # between plain lines: a piped log of an hour is a few pages
CURVE = 40  # letters of the loss's course on a terminal
LETTERS = "▁▂▃▄▅▆▇█"


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
    """Three lines that move, for a terminal: how far, how good, how fast. Redrawn between steps: no thread competes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = RichLive(console=console, auto_refresh=False, transient=True)
        self._losses: list[float] = []  # of this sitting
        self._drawn = 0.0
        self._live.start()

    def note(self, text: str) -> None:
        """Print a sentence above the moving lines."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, line: Mapping[str, Any], end: int, seconds_left: float) -> None:
        """Redraw, at most five times a second."""
        self._losses.append(line["loss"])
        if 0 <= line["elapsed"] - self._drawn < 0.2 and line["step"] < end:
            return
        self._drawn = line["elapsed"]
        self._live.update(picture(line, end, seconds_left, self._losses), refresh=True)

    def close(self) -> None:
        """Take the lines away and give the cursor back."""
        self._live.stop()


def picture(line: Mapping[str, Any], end: int, seconds_left: float, losses: Sequence[float]) -> RenderableType:
    """What a terminal shows of a step: progress, loss and its course, and what the meters say."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text.assemble((f"step {line['step']:,}", "bold"), f"/{end:,}"),
        ProgressBar(total=end, completed=line["step"], width=32, complete_style="cyan", finished_style="green"),
        Text(f"{100 * line['step'] / end:.0f} %  {clock(seconds_left)} left"),
    )
    numbers = Text.assemble(_loss(line), "  ", (curve(losses), "cyan"))
    return Group(bar, numbers, Text(f"{_speed(line)}  {_details(line)}".strip(), style="dim"))


def curve(values: Sequence[float]) -> str:
    """The course of a number in `CURVE` letters: means of equal parts, the lowest and the highest as marks."""
    finite = [value for value in values if math.isfinite(value)]
    parts = min(CURVE, len(finite))
    if parts < 2:
        return ""
    borders = [len(finite) * index // parts for index in range(parts + 1)]
    means = [sum(finite[begin:end]) / (end - begin) for begin, end in pairwise(borders)]
    low, high = min(means), max(means)
    scale = (len(LETTERS) - 1) / (high - low) if high > low else 0.0
    return "".join(LETTERS[round((mean - low) * scale)] for mean in means)


def display(console: Console) -> Display:
    """Live lines on a terminal, plain lines elsewhere."""
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
    return f"{_loss(line)}  {_speed(line)}"


def _loss(line: Mapping[str, Any]) -> str:
    return f"loss {line['loss']:.3f}  {line['bits_per_byte']:.3f} bits/byte"


def _speed(line: Mapping[str, Any]) -> str:
    return f"{line['tokens_per_second']:,.0f} tokens/s"


def _details(line: Mapping[str, Any]) -> str:
    """What else the meters say; only what the line holds."""
    found = []
    if "mfu" in line:
        found.append(f"{100 * line['mfu']:.1f} % of the peak")
    if "lr" in line:
        found.append(f"rate {line['lr']:.1e}")
    if "grad_norm" in line:
        found.append(f"norm {line['grad_norm']:.2f}")
    if line.get("data_wait", 0.0) >= 0.01:
        found.append(f"waits for data {100 * line['data_wait']:.0f} %")
    if "memory" in line:
        found.append(f"{max(line['memory'].values()) / 2**30:.1f} GiB")
    return "  ".join(found)
