"""`xlstm sweep`: one recipe, trained once for every combination of values and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from openxlstm.cli.common import console, show_json, show_table


@click.command(short_help="Train a recipe once for every combination of values and seeds.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
@click.option("--grid", multiple=True, metavar="KEY=A,B,...", help="Values to try; may be given for several keys.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs per combination.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder for runs and results.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all runs are over; no progress.")
def sweep(recipe: str, overrides: tuple[str, ...], grid: tuple[str, ...], seeds: int, out: Path, as_json: bool) -> None:
    """Train RECIPE once for every combination of the values in --grid, and for every seed 0, 1, ... of --seeds.

    Every run has a folder of its own below --out; every finished one is a line of results.jsonl there. The same
    command continues: what is finished is not trained again, what was interrupted goes on. At the end, a table, the
    best first, by bits per byte on the validation windows: the test split is for the one run that is chosen.

    \b
      xlstm sweep stdlib-tiny --grid optim.lr=1e-2,3e-3,1e-3 --seeds 3 --out sweeps/rate
      xlstm sweep stdlib-tiny train.steps=300 --grid optim.lr=1e-2,1e-3 --grid model.width=64,96 --out sweeps/two
    """
    from openxlstm.train import sweep as library
    from openxlstm.train.log import Silent, display

    screen = Silent() if as_json else display(console())
    try:
        rows = library.sweep(recipe, overrides, library.read_grid(grid), seeds, out, screen)
    finally:
        screen.close()
    if as_json:
        show_json({"folder": str(out), "runs": rows})
    else:
        _show(rows)
    if any(row["ending"] in library.UNFINISHED for row in rows):
        click.echo("stopped and saved; the same command goes on from there", err=True)
        raise click.exceptions.Exit(130)


def _show(rows: list[dict[str, Any]]) -> None:
    keys = sorted({key for row in rows for key in row["values"]})
    best = sorted(rows, key=lambda row: (row["valid_bits_per_byte"] is None, row["valid_bits_per_byte"] or 0.0))
    shown = [
        (
            *(row["values"].get(key, "") for key in keys), str(row["seed"]), number(row["valid_bits_per_byte"]),
            str(row["step"]), f"{row['seconds']:.0f}", row["ending"],
        )
        for row in best
    ]  # fmt: skip
    columns = (*keys, "seed", "valid bits/byte", "steps", "seconds", "ending")
    show_table("Runs, the best first", columns, shown, numbers=tuple(range(len(keys), len(keys) + 4)))


def number(value: float | None) -> str:
    """Four digits, or a dash for a run that was never measured."""
    return "-" if value is None else f"{value:.4f}"
