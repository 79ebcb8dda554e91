"""`xlstm train`: the run that a recipe describes, begun or continued."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from openxlstm.cli.common import console, show_json


@click.command(short_help="Train the run that a recipe describes; the same command continues it.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The run folder.  [default: runs/NAME-OF-RECIPE]")
@click.option("--print", "show", is_flag=True, help="Print the recipe in full, every default filled in, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the run is over; no progress.")
def train(recipe: str, overrides: tuple[str, ...], out: Path | None, show: bool, as_json: bool) -> None:
    """Train the run that RECIPE describes: a TOML file, or the name of a recipe that is shipped.

    Ctrl-C saves and stops; the same command continues, and the curve is the one an uninterrupted run would have had.
    A finished run is not trained again. The run folder holds the model, the curve, the checkpoints and a report.

    \b
      xlstm train stdlib-demo
      xlstm train stdlib-demo optim.lr=1e-3 train.steps=500 --out runs/slower
      xlstm train my.toml data.corpus=~/texts --print
    """
    from openxlstm.data.corpus import STDLIB
    from openxlstm.infer.generate import generate as continued
    from openxlstm.train import strict
    from openxlstm.train.config import find
    from openxlstm.train.log import Silent, display
    from openxlstm.train.loop import train as run
    from openxlstm.train.run import default_cache, read_recipe

    resolved, tokenizer = read_recipe(recipe, overrides)
    if show:
        if as_json:
            show_json(resolved.to_dict())
        else:
            click.echo(strict.write_toml(resolved.to_dict()))
        return
    folder = out or Path("runs") / find(recipe).stem
    prompt = "def " if resolved.data.corpus == STDLIB else "\n"  # how a text may go on that nothing is known about

    def sample(model: Any, tokenizer: Any) -> str:
        """The text that stands in the report."""
        return prompt + continued(model, tokenizer, prompt, max_tokens=500, temperature=0.7, seed=1)

    screen = Silent() if as_json else display(console())
    try:
        ending = run(resolved, tokenizer, folder, default_cache(), screen, sample)
    except OSError as error:
        raise click.ClickException(
            f"{error}. What was saved before is untouched; the same command goes on from there"
        ) from None
    finally:
        screen.close()
    if ending == "interrupted":
        click.echo(f"stopped and saved; the same command goes on from there: {_command()}", err=True)
        raise click.exceptions.Exit(130)
    if as_json:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        show_json({"folder": str(folder), "ending": ending, "summary": summary})
        return
    if ending == "already finished":
        click.echo(f"{folder} is finished; nothing was trained. The report is written again: {folder / 'report.md'}")
    else:
        begin = "def " if resolved.data.corpus == STDLIB else "The "
        click.echo(f"report: {folder / 'report.md'}")
        click.echo(f"write:  xlstm generate {shlex.quote(str(folder))} --prompt {begin!r}")


def _command() -> str:
    """What the user typed, so that it can be copied."""
    return shlex.join(["xlstm", *sys.argv[1:]])
