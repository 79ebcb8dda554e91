"""`xlstm tokenizer`: a tokenizer trained on the texts it is for."""

from __future__ import annotations

from pathlib import Path

import click

from openxlstm.cli.common import show_facts, show_json


@click.command(short_help="Train a tokenizer on your texts.")
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("--vocab", default=4096, show_default=True, help="Ids at most, the end token and 256 bytes included.")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="tokenizer.json")
@click.option("--text-key", default="text", show_default=True, help="Key or column with the text of a record.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tokenizer(sources: tuple[str, ...], vocab: int, out: Path, text_key: str, as_json: bool) -> None:
    """Train a byte-level BPE tokenizer on SRC: whatever `xlstm prepare` reads. The same texts give the same file.

    The tenth of the documents that most splits keep for validation and test is not looked at. Texts are held in
    memory while they are counted; a gigabyte of them is plenty.

    \b
      xlstm tokenizer stdlib --vocab 1024 --out tokenizer.json
      xlstm prepare stdlib --tokenizer tokenizer.json --out data/stdlib
    """
    from openxlstm.data.corpus import files_of
    from openxlstm.data.records import LeftOut, documents
    from openxlstm.data.tokens import write_atomically
    from openxlstm.data.train_tokenizer import for_training, train_bpe

    if out.exists():
        raise ValueError(f"{out} exists, and what is made with it would no longer be readable; give another --out")
    left_out = LeftOut()
    found = (
        document
        for source in sources
        for file in files_of(source)
        for document in documents(file.path, file.name, text_key, file.delimiter, left_out)
    )
    trained = train_bpe(for_training(found), vocab)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, trained.json)
    if as_json:
        show_json({"out": str(out), "vocab": trained.vocab_size, "sha256": trained.sha256})
        return
    show_facts(f"Tokenizer: {out}", {"ids": f"{trained.vocab_size:,}", "sha256": trained.sha256})
    if trained.vocab_size < vocab:
        click.echo(f"{vocab:,} ids were asked for; these texts have no further pair that occurs twice")
