"""Rows of results survive a kill at any byte, and do not mix with those of another measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from openxlstm.tasks.kept import Kept, read_rows

ABOUT = {"model": "a", "window": 16}


def test_every_cut_of_the_file_is_continued(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    Kept(whole, ABOUT).add([{"index": n, "nats": n / 3} for n in range(4)])
    data = whole.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(len(data) + 1):
        file = tmp_path / "cut.jsonl"
        file.write_bytes(data[:cut])
        kept = Kept(file, ABOUT)
        assert len(kept.rows) == max(0, data[:cut].count(b"\n") - (cut >= first))
        kept.add([{"index": n, "nats": n / 3} for n in range(4) if n not in kept])
        assert file.read_bytes() == data
    assert read_rows(whole) == (ABOUT, [{"index": n, "nats": n / 3} for n in range(4)])


def test_without_a_file_rows_are_kept_in_memory() -> None:
    kept = Kept(None, ABOUT)
    kept.add([{"index": 3}, {"index": 1}])
    assert [row["index"] for row in kept.rows] == [1, 3]
    assert 3 in kept
    assert 2 not in kept


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"about": {"model": "a", "window": 32}}\n', "another measurement: window was 32 and is 16"),
        ('{"about": {"model": "a"}}\n', "window was None and is 16"),
        ('{"index": 0}\n', "holds no rows of results; choose another name"),
        ("my notes", "holds no rows of results; choose another name"),
        ("my notes\n", "not JSON"),
        ('{"about": {"model": "a", "window": 16}}\n{"nats": 1}\n', "2 is no row of results"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Kept(file, ABOUT)
    assert file.read_text() == content


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
