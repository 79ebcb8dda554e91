"""`xlstm inspect`: what is in a token folder, as a model will see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from openxlstm.cli.common import console, nearest, show_facts, show_json, show_table

if TYPE_CHECKING:
    from openxlstm.data.gather import Batch
    from openxlstm.data.tokens import TokenFolder

HEAD = 300  # characters of a document that are shown
RESET, END, NO_TARGET = "[reset]", "[end]", "[not learnt]"


@click.command(short_help="Look into token folders: documents, windows, and whether the files are whole.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--documents", default=3, show_default=True, help="Documents to show, evenly spread.")
@click.option("--windows", default=2, show_default=True, help="Rows of training to show, the first of a run.")
@click.option("--context", default=256, show_default=True, help="Tokens per window.")
@click.option("--window", default="stream", show_default=True, help="stream, packed, docs or lanes.")
@click.option("--verify/--no-verify", default=True, help="Read every token and compare hashes.  [default: do]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    folder: Path, documents: int, windows: int, context: int, window: str, verify: bool, as_json: bool
) -> None:  # fmt: skip
    """Show what is in FOLDER: one that `xlstm prepare` made, or any token folder.

    Counts, lengths and hashes are checked; then come some documents, and some windows as a model reads them, with a
    mark where its memory is emptied.

    \b
      xlstm inspect data/mine
      xlstm inspect data/mine/valid --windows 4 --window packed --context 512
    """
    from openxlstm.data.corpus import SPLITS
    from openxlstm.data.tokens import META, TokenFolder

    if min(documents, windows) < 0:
        raise ValueError(f"--documents {documents} and --windows {windows} must not be negative")
    if not folder.exists():
        raise ValueError(f"there is no {folder}{nearest(folder)}")
    parts = {split: folder / split for split in SPLITS if (folder / split / META).is_file()}
    opened = {name: TokenFolder.open(path) for name, path in (parts or {folder.name: folder}).items()}
    if verify:
        for part in opened.values():
            part.verify()
    first = next(iter(opened.values()))
    batch = _windows(first, window, context, windows) if windows else None
    answer = {
        "folder": str(folder),
        "verified": verify,
        "parts": {name: _facts(part) for name, part in opened.items()},
        "documents": [text for _, text in _documents(first, documents)],
        "windows": [] if batch is None else [_pieces(first, batch, row) for row in range(len(batch.tokens))],
    }
    if as_json:
        show_json(answer)
        return
    _show(answer, first, documents, batch, window, context)


def _facts(part: TokenFolder) -> dict[str, Any]:
    """One token folder in numbers."""
    import numpy as np

    lengths = np.concatenate([np.diff(shard.ends, prepend=0) for shard in part.shards])
    return {
        "documents": part.total_documents, "tokens": part.total_tokens, "bytes": part.total_bytes,
        "shards": len(part.shards), "tokens_per_document": {
            name: int(np.quantile(lengths, share)) for name, share in (("least", 0), ("median", 0.5), ("most", 1))
        }, "masked": sum(int((~shard.loss).sum()) for shard in part.shards if shard.loss is not None),
        "tokenizer": part.tokenizer.sha256, "vocabulary": part.tokenizer.vocab_size, "byte_level": part.byte_level,
        "fingerprint": part.fingerprint, "made_by": json.loads((part.path / "meta.json").read_text())["made_by"],
    }  # fmt: skip


def _documents(part: TokenFolder, count: int) -> Iterator[tuple[str, str]]:
    """Evenly spread documents: where they lie, and how they begin."""
    count = min(count, part.total_documents)
    for number in (index * part.total_documents // count for index in range(count)):
        at = number
        for shard in part.shards:
            if at < len(shard.ends):
                start, end = int(shard.ends[at - 1]) if at else 0, int(shard.ends[at])
                head = part.tokenizer.decode(shard.tokens[start : min(end, start + HEAD)])
                yield f"document {number:,}: {end - start:,} tokens in {shard.file}", head[:HEAD]
                break
            at -= len(shard.ends)


def _windows(part: TokenFolder, window: str, context: int, count: int) -> Batch:
    """The first rows that a run with seed 0 reads."""
    from openxlstm.data.feed import Feed

    feed = Feed.open([(part, 1.0)], seed=0, window=window, context=context, batch=count)
    return feed.rows(feed.samples(0, count))


def _pieces(part: TokenFolder, batch: Batch, row: int) -> list[dict[str, Any]]:
    """A row as stretches of targets between resets, and before and behind tokens that are no targets."""
    import numpy as np

    targets, reset, valid = batch.targets[row], batch.reset[row], batch.valid[row]
    used = int(np.flatnonzero(valid | reset).max(initial=-1)) + 1
    cuts = np.flatnonzero(reset[1:used] | (valid[1:used] != valid[: used - 1])) + 1 if used else np.array([], np.int64)
    edges = [0, *cuts.tolist(), used] if used else []
    stretches = [
        {
            "reset": bool(reset[start]), "learnt": bool(valid[start]), "tokens": end - start,
            "text": part.tokenizer.decode(targets[start:end]), "ends": bool(targets[end - 1] == part.end_id),
        }
        for start, end in pairwise(edges)
    ]  # fmt: skip
    return stretches + ([{"padding": len(targets) - used}] if used < len(targets) else [])


def _show(
    answer: dict[str, Any], part: TokenFolder, documents: int, batch: Batch | None, window: str, context: int
) -> None:
    rows = [
        (
            name, facts["documents"], facts["tokens"], facts["bytes"], facts["shards"],
            " / ".join(f"{each:,}" for each in facts["tokens_per_document"].values()), facts["fingerprint"][:12],
        )
        for name, facts in answer["parts"].items()
    ]  # fmt: skip
    columns = ("part", "documents", "tokens", "bytes", "shards", "least / median / most tokens", "fingerprint")
    whole = "every token agrees with its hash" if answer["verified"] else "counts agree, tokens were not read"
    click.echo(f"{answer['folder']}: {whole}")
    show_table("Token folders", columns, rows, numbers=(1, 2, 3, 4))
    facts = next(iter(answer["parts"].values()))
    show_facts("Tokens", {
        "tokenizer": f"{facts['vocabulary']:,} ids, {'byte-level' if facts['byte_level'] else 'not byte-level'}, "
                     f"sha256 {facts['tokenizer'][:12]}",
        "learnt": f"all but {facts['masked']:,} marked ones" if facts["masked"] else "every one",
    })  # fmt: skip
    out = console()
    for title, head in _documents(part, documents):
        out.print(Text(title, style="bold"))
        out.print(Text(head), soft_wrap=True)
        out.print()
    if batch is None:
        return
    for number, pieces in enumerate(answer["windows"]):
        used = int(batch.valid[number].sum())
        out.print(Text(f"window {number} of {window}: {used} of {context} targets", style="bold"))
        line = Text()
        for piece in pieces:
            if "padding" in piece:
                line.append(f"[{piece['padding']} padding]", style="dim")
                continue
            line.append(RESET if piece["reset"] else "", style="bold red")
            line.append("" if piece["learnt"] else NO_TARGET, style="yellow")
            line.append(piece["text"], style="" if piece["learnt"] else "dim")
            line.append(END if piece["ends"] else "", style="bold cyan")
        out.print(line, soft_wrap=True)
        out.print()
