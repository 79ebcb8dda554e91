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
@click.option("--allow", multiple=True, metavar="KEY", help="Let KEY differ from what the run began with. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Two steps, a checkpoint, and a third step from it; then delete it all.")
@click.option("--print", "show", is_flag=True, help="Print the recipe in full, every default filled in, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the run is over; no progress.")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    allow: tuple[str, ...],
    dry_run: bool,
    show: bool,
    as_json: bool,
) -> None:
    """Train the run that RECIPE describes: a TOML file, or the name of a recipe that is shipped.

    Ctrl-C saves and stops; the same command continues, and the curve is the one an uninterrupted run would have had.
    A finished run is not trained again. The run folder holds the model, the curve, the checkpoints and a report.

    \b
      xlstm train stdlib-demo
      xlstm train stdlib-demo optim.lr=1e-3 train.steps=500 --out runs/slower
      xlstm train my.toml data.corpus=~/texts --print
      torchrun --nproc-per-node 8 -m openxlstm train my.toml train.parallel=fsdp2
    """
    from openxlstm.train import strict
    from openxlstm.train.config import find
    from openxlstm.train.folder import default_cache
    from openxlstm.train.log import Silent, display
    from openxlstm.train.loop import train as run
    from openxlstm.train.parallel import ElsewhereError, is_first
    from openxlstm.train.rehearse import rehearse
    from openxlstm.train.run import read_recipe, resolve_for_print

    if show:
        printed = resolve_for_print(recipe, overrides).to_dict()
        if as_json:
            show_json(printed)
        else:
            click.echo(strict.write_toml(printed))
        return
    resolved, tokenizer = read_recipe(recipe, overrides)
    folder = out or Path("runs") / find(recipe).stem
    begin = _prompt(resolved)
    screen = display(console()) if is_first() and not as_json else Silent()
    try:
        if dry_run:
            facts = rehearse(resolved, tokenizer, folder, default_cache(), screen)
            screen.close()
            _show_rehearsal(facts, as_json)
            return
        ending = run(
            resolved,
            tokenizer,
            folder,
            default_cache(),
            screen,
            lambda model, words: begin + _continued(model, words, begin, 500),
            write=_continued,
            allowed=allow,
        )
    except ElsewhereError:
        raise click.exceptions.Exit(2) from None  # the first process has said it
    except OSError as error:
        raise click.ClickException(
            f"{error}. What was saved before is untouched; the same command goes on from there"
        ) from None
    finally:
        screen.close()
    if ending in ("interrupted", "paused"):
        if is_first():
            why = "stopped" if ending == "interrupted" else f"{resolved.train.stop_after:g} minutes are over; stopped"
            click.echo(f"{why} and saved; the same command goes on from there: {_command()}", err=True)
        raise click.exceptions.Exit(130 if ending == "interrupted" else 0)
    if is_first():
        _show_ending(folder, ending, begin, as_json)


def _continued(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """How the model goes on after a prompt: the same text whenever the model is the same."""
    from openxlstm.infer.generate import generate

    return generate(model, tokenizer, prompt, max_tokens=tokens, temperature=0.7, seed=1)


def _prompt(recipe: Any) -> str:
    """How a text of the corpus may begin; of one that nothing is known about, with a new line."""
    from openxlstm.data.corpus import STDLIB

    return "def " if recipe.data.mixture[0].path == STDLIB else "\n"


def _show_rehearsal(facts: dict[str, Any], as_json: bool) -> None:
    from openxlstm.train.parallel import is_first

    if not is_first():
        return
    if as_json:
        show_json(facts)
        return
    memory = max(facts["memory"].values()) / 2**30
    click.echo(
        f"dry run: {facts['seconds_per_step']:.3g} s per step, {facts['tokens_per_second']:,.0f} tokens/s,"
        f" {memory:.2f} GiB of memory, {facts['checkpoint_bytes'] / 2**20:.1f} MiB per checkpoint"
    )


def _show_ending(folder: Path, ending: str, prompt: str, as_json: bool) -> None:
    if as_json:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        show_json({"folder": str(folder), "ending": ending, "summary": summary})
    elif ending == "already finished":
        click.echo(f"{folder} is finished; nothing was trained. The report is written again: {folder / 'report.md'}")
    else:
        begin = prompt if prompt.strip() else "The "
        click.echo(f"report: {folder / 'report.md'}")
        click.echo(f"write:  xlstm generate {shlex.quote(str(folder))} --prompt {begin!r}")


def _command() -> str:
    """What the user typed, so that it can be copied."""
    return shlex.join(["xlstm", *sys.argv[1:]])
