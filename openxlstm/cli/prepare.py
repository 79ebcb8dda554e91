"""`xlstm prepare`: texts become token folders; or somebody else's token folder becomes one of ours."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from openxlstm.cli.common import console, show_facts, show_json, show_table

if TYPE_CHECKING:
    from openxlstm.data.tokenizer import Tokenizer


@click.command(short_help="Turn texts, JSONL or parquet into token folders to train on.")
@click.argument("sources", nargs=-1, metavar="SRC...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to make; train/, valid/, test/ in it.")
@click.option("--tokenizer", default="bytes", show_default=True, help="A tokenizer.json, or bytes.")
@click.option("--split", default="98/1/1", show_default=True, help="Percent of train, valid and test documents.")
@click.option("--text-key", default="text", show_default=True, help="Key or column with the text of a record.")
@click.option(
    "--delimiter",
    help=r"What separates documents in text files: a text (\n and \t work), blank for blank lines, none to keep each "
    "file whole.  [default: none for the files of a folder; for a file, lines of <|endoftext|>, else blank]",
)
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
@click.option("--slurm", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file: use Slurm.")
@click.option("--ray", is_flag=True, help="Run the tasks on the Ray cluster of RAY_ADDRESS, or on one made here.")
@click.option("--adopt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder of datatrove.")
@click.option("--token-size", type=click.Choice(["2", "4"]), help="Bytes per id of token files that do not say it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prepare(
    sources: tuple[str, ...], out: Path | None, tokenizer: str, split: str, text_key: str, delimiter: str | None,
    workers: int | None, slurm: Path | None, ray: bool, adopt: Path | None, token_size: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Turn SRC into token folders: text files, JSONL (also .gz and .zst), parquet, folders of these, or stdlib.

    Ctrl-C stops; the same command goes on. When it is done, OUT is complete; before, it is not there. What a document
    is, and how to run this on a cluster: docs/data.md. SRC may also be a .bin file of nanoGPT or llm.c, or a folder
    of them. --adopt needs no SRC and no OUT: it checks the files that datatrove has written and makes them ours.

    \b
      xlstm prepare stdlib --out data/stdlib
      xlstm prepare dump.jsonl.zst more/ --out data/mine --tokenizer tokenizer.json
      xlstm prepare --adopt data/fineweb --tokenizer tokenizer.json
    """
    from openxlstm.data.cluster import Slurm
    from openxlstm.data.plan import Settings
    from openxlstm.data.preparation import prepare as make
    from openxlstm.data.tokenizer import Tokenizer

    words = Tokenizer.bytes() if tokenizer == "bytes" else Tokenizer.from_file(tokenizer)
    size = None if token_size is None else int(token_size)
    if adopt is not None:
        if sources or out is not None:
            raise click.UsageError("--adopt works in place: it takes no SRC and no --out")
        _adopt(adopt, words, size, as_json)
        return
    if not sources or out is None:
        raise click.UsageError("say what to read and where to write: xlstm prepare SRC... --out OUT")
    if slurm is not None and ray:
        raise click.UsageError("--slurm and --ray exclude each other")
    settings = Settings(shares=_shares(split), text_key=text_key, delimiter=_unescaped(delimiter))
    cluster: Slurm | Literal["ray"] | None = Slurm.read(slurm) if slurm is not None else "ray" if ray else None
    try:
        with _shown(as_json) as status:
            made = make(
                sources, out, words, settings, workers=workers, cluster=cluster, token_size=size, status=status
            )  # fmt: skip
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from there", err=True)
        raise click.exceptions.Exit(130) from None
    if made is None:
        click.echo("the tasks are with Slurm; when its jobs are done, the same command makes " + str(out), err=True)
        return
    if as_json:
        show_json({"out": str(out), **made})
        return
    _show(out, tokenizer, words, made)


def _adopt(folder: Path, words: Tokenizer, size: int | None, as_json: bool) -> None:
    from openxlstm.data.foreign import adopt
    from openxlstm.data.tokens import TokenFolder

    unended = adopt(folder, words, token_size=size)
    made = TokenFolder.open(folder)
    facts: dict[str, Any] = {
        "documents": made.total_documents, "tokens": made.total_tokens, "bytes": made.total_bytes,
        "shards": len(made.shards), "fingerprint": made.fingerprint, "without_end_token": unended,
    }  # fmt: skip
    if as_json:
        show_json({"out": str(folder), **facts})
        return
    click.echo(f"{folder} is a token folder now")
    show_facts("Counts", {name: f"{fact:,}" if isinstance(fact, int) else fact for name, fact in facts.items()})
    if unended:
        click.echo(f"{unended:,} documents do not end in the end token, so a model will not learn to end those")


def _show(out: Path, tokenizer: str, words: Tokenizer, made: dict[str, Any]) -> None:
    rows = [
        (
            split, part["documents"], part["tokens"], part["bytes"],
            f"{part['bytes'] / part['tokens']:.2f}", part["fingerprint"][:12],
        )
        for split, part in made["splits"].items()
    ]  # fmt: skip
    columns = ("split", "documents", "tokens", "bytes", "bytes per token", "fingerprint")
    click.echo(f"{out} is complete")
    show_table("Token folders", columns, rows, numbers=(1, 2, 3, 4))
    left_out = made["left_out"]
    if any(left_out.values()):
        click.echo(
            f"left out: {left_out['empty']:,} empty texts, {left_out['not_text']:,} files that are not UTF-8 text"
        )
    for split in ("valid", "test"):
        if split not in made["splits"]:
            click.echo(f"no document fell into {split}; a larger share of --split puts some there")
    shown = shlex.quote(str(out))
    extra = "" if tokenizer == "bytes" else f" data.tokenizer={shlex.quote(str(out / 'train' / 'tokenizer.json'))}"
    click.echo(f"look:  xlstm inspect {shown}")
    click.echo(f"train: xlstm train stdlib-demo data.corpus={shown}{extra} --out runs/{shlex.quote(out.name)}")


def _shares(split: str) -> tuple[float, float, float]:
    """98/1/1 as numbers."""
    parts = split.split("/")
    try:
        first, second, third = map(float, parts)
    except ValueError:
        raise click.UsageError(f"--split {split} must be three numbers, as 98/1/1") from None
    return first, second, third


def _unescaped(delimiter: str | None) -> str | None:
    if delimiter == "":
        raise click.UsageError("--delimiter is empty; none keeps each file whole")
    return None if delimiter is None else delimiter.replace("\\n", "\n").replace("\\t", "\t")


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that tells how far it is, on a terminal only."""
    out = console()
    if quiet or not out.is_terminal:
        yield lambda text: None
        return
    with out.status("reading") as line:
        yield line.update
