"""docs/performance.md from the numbers of runs: nothing in it is typed.

The page has a part for every writer, between its own marks: `xlstm bench --write` replaces the CPU's and `make gpu` the
GPU's, and neither touches the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

TITLES = {
    "kernels": "Cells, forward and backward",
    "train": "A training step",
    "generate": "Decoding, a token at a time",
}
WRITERS = {"cpu": "xlstm bench --write", "gpu": "make gpu"}  # the parts of the page, in order


def replace(file: Path, part: str, text: str) -> None:
    """Put `text` in the place of one part of the page; the file and the part are made if they are not there.

    Raises:
        ValueError: the file is there and is no such page, so nothing of it is overwritten.
    """
    old = file.read_text(encoding="utf-8") if file.is_file() else "# Performance\n"
    if not old.startswith("# Performance\n"):
        raise ValueError(f"{file} does not begin with '# Performance', so it is not written to; name another file")
    parts = {name: _part(old, name, file) for name in WRITERS} | {part: text}
    marked = [_begin(name) + "\n\n" + body.strip() + "\n\n" + _end(name) for name, body in parts.items() if body]
    file.write_text("\n\n".join(["# Performance", *marked]) + "\n", encoding="utf-8")


def _begin(name: str) -> str:
    return f"<!-- {name}: written by `{WRITERS[name]}` -->"


def _end(name: str) -> str:
    return f"<!-- {name}: end -->"


def _part(text: str, name: str, file: Path) -> str:
    begins, ends = text.count(_begin(name)), text.count(_end(name))
    if begins != ends or begins > 1:
        raise ValueError(f"{file}: the marks of the part {name!r} are not one pair; mend them, or delete the file")
    return text.split(_begin(name))[1].split(_end(name))[0] if begins else ""


def page(found: dict[str, Any], command: str, date: str) -> str:
    """The CPU's part: machine, versions, command, and a table for every suite that ran."""
    return "\n".join(_lines(found, command, date)) + "\n"


def _lines(found: dict[str, Any], command: str, date: str) -> Iterator[str]:
    machine, versions = found["machine"], found["versions"]
    yield "## On a CPU"
    yield ""
    yield f"Written by `{command}` on {date}; every number is a measurement of that run. Sides take turns; medians of"
    yield f"{found['runs']} rounds, fastest and slowest in brackets. *times ours*: the side's median over ours. Results"
    yield "were compared before they were timed: *error* is the relative rms difference from float64 (cells), from the"
    yield "model in PyTorch calls (decoding), or between the sides (training). *of ceiling* is the share of what a"
    yield "large fp32 matrix product (cells) or a read beyond the caches (decoding) reached in the same rounds."
    yield ""
    yield f"- Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; native kernels: "
    yield f"  {machine['native']}; load in the minute before: {machine['load_before']}."
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    yield f"- Versions: {said}."
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield f"- Not installed, so not compared: {', '.join(missing)}."
    for name, rows in found["suites"].items():
        yield ""
        yield f"### {TITLES.get(name, name)}"
        for case, sides in groupby(rows, key=lambda row: row["case"]):
            yield from table(case, sides)


def table(case: str, sides: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines of one case."""
    yield from ("", f"**{case}**", "")
    yield "| side | ms | times ours | error | rate | of ceiling |"
    yield "|---|---|---|---|---|---|"
    for row in sides:
        yield "| " + " | ".join(cells(row)) + " |"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a table, for people."""
    spread = f"({number(row['fastest_ms'])} to {number(row['slowest_ms'])})"
    rate = "" if row["rate"] is None else f"{number(row['rate'])} {row['unit']}"
    share = "" if row["of_ceiling"] is None else f"{100 * row['of_ceiling']:.0f} %"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    return [row["side"], f"{number(row['median_ms'])} {spread}", f"{row['its_over_ours']:.2f}", error, rate, share]


def number(x: float) -> str:
    """Three digits that mean something."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
