"""What a preparation is going to do, settled before it begins: which files, who reads which, and what must not change.

    OUT/                       complete, or not there
      train/ valid/ test/      token folders; one without documents is left out
      corpus.json              the plan's settings, sizes, fingerprints, what was left out
    .OUT.unfinished/           until then, beside it
      plan.json                this page's `Plan`
      made/                    becomes OUT
      logs/ facts/             of the tasks (pipeline.py)

Tasks are runs of consecutive files of some 64 MB, so the shards depend on the texts alone, not on the workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from openxlstm.data.corpus import SPLITS, File, files_of
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import FORMAT, META

TASK_BYTES = 64 << 20
MOST_TASKS = 128  # a shard keeps two files open, three splits may be open at once, and a process has 1,024


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How texts become token folders.

    shares      percent of the documents in train, valid and test, to two decimals
    text_key    the key or column that holds the text of a record
    delimiter   where text files are cut: see corpus.files_of
    """

    shares: tuple[float, float, float] = (98.0, 1.0, 1.0)
    text_key: str = "text"
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or round(sum(self.shares), 6) != 100 or not self.shares[0]:
            said = "/".join(f"{share:g}" for share in self.shares)
            raise ValueError(f"split {said} must be three shares of 100, the first above 0, as 98/1/1")
        if any(round(share, 2) != share for share in self.shares):
            raise ValueError(f"split {self.shares}: shares have two decimals at most, as 99.9/0.05/0.05")


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Files in reading order with their times of change, and tasks as [first, last + 1) of them."""

    files: tuple[File, ...]
    changed: tuple[int, ...]  # ns since 1970
    tasks: tuple[tuple[int, int], ...]
    settings: Settings
    tokenizer: str  # sha256

    @classmethod
    def of(
        cls, sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, settings: Settings, tasks: int | None
    ) -> Plan:
        """The plan for these sources, in this order; `tasks` overrides their number.

        Raises:
            ValueError: a source does not exist, holds tokens already, or all of them together hold no file.
        """
        files: list[File] = []
        for source in sources:
            if (Path(source) / META).is_file() or any((Path(source) / split / META).is_file() for split in SPLITS):
                raise ValueError(f"{source} holds tokens already, not texts")
            files += files_of(source, settings.delimiter)
        if not files:
            raise ValueError(f"{', '.join(map(str, sources))}: there is no file to read; hidden ones do not count")
        if tasks is not None and tasks < 1:
            raise ValueError(f"tasks={tasks} must be at least 1")
        changed = tuple(file.path.stat().st_mtime_ns for file in files)
        wanted = tasks or min(sum(file.size for file in files) // TASK_BYTES + 1, MOST_TASKS)
        return cls(tuple(files), changed, _cut([file.size for file in files], wanted), settings, tokenizer.sha256)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files as they lie on the disk."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """Of all that decides the result."""
        return hashlib.sha256(f"{FORMAT} {self.to_json()}".encode()).hexdigest()

    def to_json(self) -> str:
        """As the text of plan.json."""
        table: dict[str, Any] = {"tokenizer": self.tokenizer, "settings": asdict(self.settings), "tasks": self.tasks}
        files = [
            [str(file.path.absolute()), file.name, file.size, file.delimiter, changed]
            for file, changed in zip(self.files, self.changed, strict=True)
        ]
        return json.dumps(table | {"files": files})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote."""
        table = json.loads(text)
        settings = table["settings"] | {"shares": tuple(table["settings"]["shares"])}
        return cls(
            tuple(File(Path(path), name, size, delimiter) for path, name, size, delimiter, _ in table["files"]),
            tuple(line[-1] for line in table["files"]),
            tuple((first, end) for first, end in table["tasks"]),
            Settings(**settings),
            table["tokenizer"],
        )

    def differs(self, other: Plan) -> str | None:
        """In one clause, what another plan does differently; None if nothing."""
        if self.tokenizer != other.tokenizer:
            return "the tokenizer is another"
        if self.settings != other.settings:
            return f"the settings were {other.settings}"
        if self.files != other.files or self.changed != other.changed:
            mine, theirs = (set(zip(plan.files, plan.changed)) for plan in (self, other))
            names = sorted({file.name for file, _ in mine ^ theirs})
            return (
                f"the files have changed ({names[0]}{', ...' if len(names) > 1 else ''})"
                if names
                else "the order is another"
            )
        return None if self.tasks == other.tasks else f"there were {len(other.tasks)} tasks"


def _cut(sizes: Sequence[int], tasks: int) -> tuple[tuple[int, int], ...]:
    """At most `tasks` runs of consecutive files, none empty, whose bytes are about equal."""
    runs: list[tuple[int, int]] = []
    total, done, first = sum(sizes), 0, 0
    for index, size in enumerate(sizes):
        done += size
        if done * tasks >= total * (len(runs) + 1) and (done or index == len(sizes) - 1):
            runs.append((first, index + 1))
            first = index + 1
    if first < len(sizes):
        runs.append((first, len(sizes)))
    return tuple(runs)
