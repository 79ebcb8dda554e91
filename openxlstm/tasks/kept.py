"""Results that survive a kill: a line of JSON per finished item, in a file that is only appended to.

The first line says what was measured, how, and on what; a file that says something else is not continued. Lines go
out in whole writes. What a kill leaves behind at the end of the file, half a line, is cut off when it is opened again,
and its item is measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final


@final
class Kept:
    """Rows by their `index`. Without a path they are kept in memory only."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """`about` must be plain JSON: what it names has to be equal for rows to belong together.

        Raises:
            ValueError: the file is of another measurement; the message names the difference.
        """
        self.path, self._rows = path, {}  # type: Path | None, dict[int, dict[str, Any]]
        about = json.loads(json.dumps(dict(about)))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(path)
        if not whole:
            self._write([{"about": about}])
            return
        said, *rows = whole
        _compare(path, said.get("about"), about)
        self._rows = {row["index"]: row for row in rows}

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All that is finished, in the order of the index."""
        return [self._rows[index] for index in sorted(self._rows)]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Items that are finished; on the disk when this returns."""
        found = [json.loads(json.dumps(dict(row))) for row in rows]
        if self.path is not None and found:
            self._write(found)
        self._rows |= {row["index"]: row for row in found}

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self.path is not None
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what it is about, rows in the order of their index) of a file that `Kept` wrote.

    Raises:
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    lines = _lines(path, path.read_bytes())
    if not lines or not isinstance(lines[0].get("about"), dict):
        raise ValueError(f"{path} holds no rows of results: its first line does not say what they are about")
    return lines[0]["about"], sorted(lines[1:], key=lambda row: row["index"])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, which is cut behind the last whole one."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    lines = _lines(path, data[:end])
    if lines and "about" not in lines[0]:
        raise ValueError(f"{path} exists and holds no rows of results; choose another name for them")
    if end < len(data):
        if not lines and data[:1] != b"{":  # somebody's text without a line break is not ours to cut
            raise ValueError(f"{path} exists and holds no rows of results; choose another name for them")
        os.truncate(path, end)
    return lines


def _lines(path: Path, data: bytes) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}; choose another name, or mend the file") from None
        if not isinstance(value, dict) or (number > 1 and not isinstance(value.get("index"), int)):
            raise ValueError(f"{path}:{number} is no row of results; choose another name, or mend the file")
        found.append(value)
    return found


def _compare(path: Path, said: Any, about: Mapping[str, Any]) -> None:
    if said == about:
        return
    said = said if isinstance(said, dict) else {}
    odd = next(name for name in [*about, *said] if said.get(name) != about.get(name))
    raise ValueError(
        f"{path} is of another measurement: {odd} was {said.get(odd)!r} and is {about.get(odd)!r}; choose another "
        f"name, or remove the file"
    )
