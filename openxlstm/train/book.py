"""What a run writes down as it goes: train.jsonl, events.jsonl, and the writers that the recipe asks for.

Only the first process writes. The others hold a book with no pages: they call the same, and nothing happens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from openxlstm.train import writers
from openxlstm.train.log import Journal, cut_journal, read_journal
from openxlstm.train.recipe import Recipe
from openxlstm.train.writers import Writer


@final
class Book:
    """The open files of a sitting. `Book.open` makes one."""

    def __init__(self, recipe: Recipe, folder: Path | None) -> None:
        """folder: None writes nothing."""
        self._recipe, self._folder = recipe, folder
        self._steps: Journal | None = None
        self._events: Journal | None = None
        self._writers: list[Writer] = []

    @classmethod
    @contextmanager
    def open(cls, recipe: Recipe, folder: Path | None, step: int) -> Iterator["Book"]:
        """The book of a run that stands at `step`: what was written about later steps is void."""
        book = cls(recipe, folder)
        try:
            book.cut(step)
            yield book
        finally:
            book.close()

    def cut(self, step: int) -> None:
        """Take back the steps after `step`: they will happen again. Events stay, since they did happen."""
        if self._folder is None:
            return
        self.close()
        cut_journal(self._folder / "train.jsonl", step)
        self._steps = Journal(self._folder / "train.jsonl")
        self._events = Journal(self._folder / "events.jsonl")
        self._writers = writers.open(self._recipe, self._folder, step)

    def step(self, line: Mapping[str, Any], *, shown: bool = True) -> None:
        """A line of train.jsonl; if it is `shown`, of the writers as well."""
        if self._steps is not None:
            self._steps.write(line)
        for writer in self._writers if shown else ():
            writer.write(line)

    def event(self, name: str, step: int, facts: Mapping[str, Any] | None = None) -> None:
        """A line of events.jsonl."""
        if self._events is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._events.write({"event": name, "step": step, "time": now, **(facts or {})})

    def lines(self) -> list[dict[str, Any]]:
        """What train.jsonl holds."""
        return [] if self._folder is None else read_journal(self._folder / "train.jsonl")

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._steps is not None:
            self._steps.sync()

    def close(self) -> None:
        """Nothing more will be written."""
        for part in (self._steps, self._events, *self._writers):
            if part is not None:
                part.close()
        self._steps = self._events = None
        self._writers = []
