"""The command line: one thin file per verb, imported only when its verb is called.

`xlstm --help` answers at once because nothing here imports torch. An error that a person can mend (`ValueError`) is
one sentence and exit code 2, Ctrl-C is exit code 130; a traceback means a bug of ours.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import sys
import traceback
from typing import Any

import click

VERBS = {  # verb: (module that has a click command of the same name, one line for --help)
    "train": ("openxlstm.cli.train", "Train the run that a recipe describes; the same command continues it."),
    "estimate": (
        "openxlstm.cli.estimate",
        "Say what a run will need: memory per GPU, time, epochs; nothing is trained.",
    ),
    "sweep": ("openxlstm.cli.sweep", "Train a recipe once for every combination of values and seeds."),
    "prepare": ("openxlstm.cli.prepare", "Turn texts, JSONL or parquet into token folders to train on."),
    "tokenizer": ("openxlstm.cli.tokenizer", "Train a tokenizer on your texts."),
    "inspect": (
        "openxlstm.cli.inspect",
        "Look into token folders: documents, windows, and whether the files are whole.",
    ),
    "generate": ("openxlstm.cli.generate", "Continue a text with a trained model."),
    "eval": (
        "openxlstm.cli.eval",
        "Evaluate a model (perplexity, choices, tasks), or rerun an experiment of the papers.",
    ),
    "export": ("openxlstm.cli.export", "Take the model out of a run's checkpoint, in any layout."),
    "ckpt": ("openxlstm.cli.ckpt", "Look into checkpoints: info, diff, consolidate."),
    "convert": ("openxlstm.cli.convert", "Convert a checkpoint: ours, Hugging Face, NX-AI, GGUF."),
    "bench": ("openxlstm.cli.bench", "Time kernels, a training step and decoding beside the installed peers."),
    "info": ("openxlstm.cli.info", "Show what a model, a preset, a recipe or this installation is made of."),
}


class Verbs(click.Group):
    """A group that knows its verbs by name and imports one only to run it or to explain it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of a first day with the library."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's file."""
        if cmd_name not in VERBS:
            return None
        return getattr(importlib.import_module(VERBS[cmd_name][0]), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A misspelt verb gets the nearest one. Said here because click says it only since 8.4."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
            raise click.UsageError(f"there is no verb {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The lines of VERBS, without importing what they describe."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb, and turn what a person can mend into one sentence."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `| head` has seen enough, and click leaves quietly
            if ctx.params["traceback"]:
                traceback.print_exc()
            raise _Refused(str(error)) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if ctx.params["traceback"]:
                traceback.print_exc()
            said = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
            raise _Refused(f"not enough memory ({said}); a smaller micro_batch, context or model needs less") from None
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            raise click.exceptions.Exit(130) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or PyTorch could not get memory; PyTorch's CPU allocator has no class of its own for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "out of memory" in said


class _Refused(click.ClickException):
    exit_code = 2


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from openxlstm import __version__

        click.echo(f"openxlstm {__version__}")
        ctx.exit()


@click.group(
    cls=Verbs,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.option("--traceback", is_flag=True, help="Show where in the code an error arose, too.")
def main(traceback: bool) -> None:
    """xLSTM that simply works: train one, write text with it, look inside.

    \b
      xlstm train stdlib-demo --out runs/demo
      xlstm generate runs/demo --prompt 'def '
      xlstm info xlstm-125m

    Every verb has its own --help, and --json where a machine may read the answer.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # an old console shows ? for é, and does not end the run
