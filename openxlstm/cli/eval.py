"""`xlstm eval`: a trained model (eval_model.py), or an experiment of the papers (experiments.py): a word decides."""

from __future__ import annotations

from pathlib import Path

import click

from openxlstm.cli.eval_model import model
from openxlstm.cli.experiments import experiment, is_experiment, list_, refuse, report

OURS = ("list", "report", "experiment", "model")


class ByWord(click.Group):
    """`xlstm eval parity ...` is `xlstm eval experiment parity ...`, and what is no word of ours is a model's path."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the word in front that is left out."""
        if args and args[0] not in (*OURS, "-h", "--help"):
            first = args[0]
            if is_experiment(first):
                args = ["experiment", *args]
            elif first.startswith("-") or Path(first).exists():
                args = ["model", *args]
            else:
                raise click.UsageError(refuse(first), ctx)
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As it is typed."""
        for said in ("PATH [OPTIONS]", "EXPERIMENT --profile PROFILE [OPTIONS]", "list", "report [FILES] [OPTIONS]"):
            formatter.write_usage(ctx.command_path, said)


@click.group("eval", cls=ByWord, short_help="Evaluate a model, or rerun an experiment of the papers.")
def eval() -> None:
    """Evaluate a model, or rerun an experiment of the papers.

    \b
      xlstm eval runs/demo --perplexity texts.jsonl      a model: PATH; xlstm eval model --help has the options
      xlstm eval list                                    what experiments there are
      xlstm eval parity --profile smoke                  one of them, from a minute (smoke) to as published (paper)
      xlstm eval all --profile smoke                     all of them, with a total
      xlstm eval report runs/eval/results.jsonl          a page of tables, pictures and verdicts

    Runs that are in the file of results are not made again, so the same command goes on where it was interrupted.
    """


eval.add_command(model)
eval.add_command(experiment)
eval.add_command(list_)
eval.add_command(report)
