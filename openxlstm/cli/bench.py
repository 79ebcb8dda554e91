"""`xlstm bench`: speed beside what is installed, on this machine."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from openxlstm.cli.common import show_facts, show_json, show_table

SUITES = ("kernels", "train", "generate")
BUSY = 0.5  # load in the minute before, above which a person should know


@click.command(short_help="Time kernels, a training step and decoding beside the installed peers.")
@click.argument("suites", nargs=-1, type=click.Choice(SUITES), metavar="[kernels|train|generate]...")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds; medians count.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every side.  [default: PyTorch's]")
@click.option(
    "--write",
    "file",
    type=click.Path(path_type=Path),
    help="Also write the CPU's part of this page, as docs/performance.md is.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and no table.")
def bench(suites: tuple[str, ...], runs: int, threads: int | None, file: Path | None, as_json: bool) -> None:
    """Time what is named, or everything: ours beside the peers that are installed, in turn, in one process.

    Every result is compared first, and no time is printed for a wrong one. What is not installed is not compared;
    `pip install --no-deps xlstm==2.0.6 mlstm_kernels==2.0.6` brings the peers. It takes some minutes and some GB.

    \b
      xlstm bench
      xlstm bench generate --threads 2
      xlstm bench --runs 9 --write performance.md
    """
    import torch

    from openxlstm.bench import harness, page

    if threads is not None:
        torch.set_num_threads(threads)
    say = _quiet if as_json else _say
    before = harness.machine()
    if before["load_before"] > BUSY and not as_json:
        click.echo(f"The load is {before['load_before']}: something else is running, and ratios will waver.", err=True)
    rows = {}
    for name in suites or SUITES:
        rows[name] = importlib.import_module(f"openxlstm.bench.{name}").run(runs, say)
    found = harness.as_json(rows, runs) | {"machine": before}
    if file is not None:
        command = " ".join(["xlstm bench", *suites, *(["--runs", str(runs)]), *_threads(threads)])
        page.replace(file, "cpu", page.page(found, command, f"{datetime.now(UTC):%Y-%m-%d}"))
    show_json(found) if as_json else _show(found)


def _show(found: dict[str, Any]) -> None:
    from openxlstm.bench import page

    machine = found["machine"]
    facts = {
        "processor": f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        "native kernels": machine["native"],
        "versions": ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()),
    }
    show_facts("Measured here", facts)
    for name, rows in found["suites"].items():
        cells, case = [], None
        for row in rows:
            cells.append([row["case"] if row["case"] != case else "", *page.cells(row)])
            case = row["case"]
        columns = ("case", "side", f"ms, median of {found['runs']}", "times ours", "error", "rate", "of ceiling")
        show_table(page.TITLES[name], columns, cells, numbers=(2, 3, 4, 5, 6))


def _threads(threads: int | None) -> list[str]:
    return [] if threads is None else ["--threads", str(threads)]


def _say(what: str) -> None:
    click.echo(what, err=True)


def _quiet(_what: str) -> None:
    """A machine reads the answer alone."""
