"""What several verbs share: finding a model, and showing tables that are plain text when piped."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from openxlstm.data.tokenizer import Tokenizer

UNCUT = 1_000  # columns of piped output: a program that reads it wants whole lines


def console() -> Console:
    """Colours and the terminal's width on a terminal; plain, uncut lines when piped."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else UNCUT, highlight=False, soft_wrap=False)


def show_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output, which no other line joins; letters as they are where the output can."""
    readable = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not readable))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    """A table with a title; columns in `numbers` stand flush right. Boxes and colours only on a terminal."""
    out = console()
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD if out.is_terminal else None,
        border_style="dim", header_style="bold cyan", pad_edge=False,
        show_edge=False,
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row))
    _show(out, table)


def show_facts(title: str, facts: dict[str, str]) -> None:
    """A title, and a line per fact."""
    out = console()
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    _show(out, table)


def _show(out: Console, table: Table) -> None:
    """Print a table and an empty line; piped lines end where their text ends, not where the column does."""
    if out.is_terminal:
        out.print(table)
        out.print()
        return
    with out.capture() as printed:
        out.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())
    click.echo()


def size(count: int | float) -> str:
    """A count of bytes for people: 54.6 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def short(count: int | float) -> str:
    """A count for people, in three digits: 163.8 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def model_folder(path: Path) -> Path:
    """The folder that holds config.json: PATH itself, or the model of the run in PATH. Or PATH, if it is a GGUF file.

    Raises:
        ValueError: there is no such folder, or no finished model in it.
    """
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if not path.exists():
        raise ValueError(f"there is no {path}{nearest(path)}")
    if (path / "resolved.json").is_file():
        raise ValueError(
            f"the run in {path} has not finished, so it has no model yet; the command that began it goes on"
        )
    if path.is_file():
        raise ValueError(f"{path} is a file; a model is a folder with a config.json, or a file that ends in .gguf")
    raise ValueError(
        f"{path} is neither a run folder nor a model folder: it has no config.json and no model/config.json"
    )


def tokenizer_of(model: Path) -> Tokenizer:
    """The tokenizer that lies in a model folder, or inside a GGUF file.

    Raises:
        ValueError: there is none.
    """
    from openxlstm.checkpoint.gguf import is_gguf, tokenizer_json
    from openxlstm.data.tokenizer import Tokenizer

    return Tokenizer.from_json(tokenizer_json(model)) if is_gguf(model) else Tokenizer.from_file(model)


def nearest(path: Path, names: Iterable[str] = ()) -> str:
    """The end of a sentence: which of `names`, or what beside `path`, a person may have meant."""
    beside = {other.name: str(path.parent / other.name) for other in path.parent.glob("*")}
    known = beside | {name: name for name in names}
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""
