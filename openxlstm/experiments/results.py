"""A run is a line: everything that a reader needs to judge a number and to repeat it. Appended, never edited.

A line is found again by its key: experiment, profile, model, rate, seed and the plan's fingerprint. So a plan that is
changed is run anew, and what was measured under the old one stays in the file without being shown as the new one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, float, int, str]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a run, measured on `n` questions; `interval`: 95 %, within the run, if it has one."""

    value: float
    n: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A run."""

    experiment: str
    profile: str
    model: str  # its name among the contestants
    label: str  # what it is called in tables
    parameters: int  # without embedding and head
    rate: float
    seed: int
    plan: str  # fingerprint
    metrics: Mapping[str, Metric]
    choice: float | None  # what the rate is chosen by, on validation samples: lower is better
    curve: Mapping[str, list[float]] = field(default_factory=dict)  # for pictures; its axes are named by the keys
    steps: int
    tokens: int
    skipped: str | None = None  # why there are no metrics
    wall_s: float  # since its last start
    cpu_s: float  # of all its threads, likewise: what a busy machine does not change much
    machine: Mapping[str, Any]
    git: str | None
    date: str

    @property
    def key(self) -> Key:
        """What makes this run different from every other."""
        return (self.experiment, self.profile, self.model, self.rate, self.seed, self.plan)


def fingerprint(facts: Any) -> str:
    """Twelve digits that change with anything in `facts`, which JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def append(file: Path, line: Line) -> None:
    """Write one line, whole or not at all: a single write at the end of the file, then to the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(line), sort_keys=True) + "\n"
    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            text = "\n" + text  # a line that a full disk or a power cut left unfinished stays alone
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(files: Iterable[Path]) -> list[Line]:
    """All complete lines, the newest of a key last and alone.

    Raises:
        ValueError: a line that no run wrote. One that was cut off in the middle is left out.
    """
    found: dict[Key, Line] = {}
    for file in files:
        for number, line in _lines(file):
            try:
                read = Line(**{**line, "metrics": {name: _metric(one) for name, one in line["metrics"].items()}})
            except (TypeError, KeyError) as error:
                raise ValueError(f"{file}:{number} is not a result of a run: {error}") from None
            found.pop(read.key, None)
            found[read.key] = read
    return list(found.values())


def commit() -> str | None:
    """The commit that the code is of, with a + if it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None


def _metric(one: Mapping[str, Any]) -> Metric:
    interval = one["interval"]
    return Metric(one["value"], one["n"], None if interval is None else (interval[0], interval[1]))


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.exists():
        return
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield number, json.loads(text)
        except json.JSONDecodeError:
            continue  # cut off: the run is simply made again
