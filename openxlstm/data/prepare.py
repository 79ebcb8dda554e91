"""A corpus and a tokenizer become token folders, once; the name of the result says what it was made from.

    CACHE/stdlib-0123456789abcdef/
        train/  valid/  test/     token folders
        corpus.json               source, fingerprints, sizes, files left out

Everything is written into a temporary folder beside the result and renamed at the end: a folder of that name is
complete, whatever was interrupted, and several processes may prepare the same corpus at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from openxlstm.data import foreign
from openxlstm.data.corpus import SPLITS, STDLIB, Corpus, read_corpus
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import FORMAT, META, TokenFolder, write_atomically, write_tokens

Progress = Callable[[str, int, int], None]  # split, documents done, documents in it


def prepare_corpus(
    source: str | os.PathLike[str],
    cache: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
) -> Path:
    """The folder that holds `train`, `valid` and `test` of "stdlib" or of a folder of texts, prepared if need be.

    The texts are read each time, for only they say whether the prepared folder is still theirs. A damaged result is
    a ValueError that names the file; nothing is repaired in silence.
    """
    cache = Path(cache)
    if source != STDLIB:
        _refuse_what_is_no_corpus(Path(source), cache)
    corpus = read_corpus(source)
    identity = hashlib.sha256(f"{FORMAT} {corpus.fingerprint} {tokenizer.sha256}".encode()).hexdigest()
    root = Path(source).resolve()
    stem = STDLIB if source == STDLIB else root.stem if root.is_file() else root.name
    result = cache / f"{stem}-{identity[:16]}"
    if result.exists():
        _check(result)
        return result

    for split in SPLITS:
        if not corpus.split(split):
            raise ValueError(
                f"{corpus.source} has {len(corpus.documents)} documents and none of them falls into {split!r} "
                "(90, 5 and 5 of 100, by the hash of the name); add documents, or cut long ones into several files"
            )
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{result.name}-", suffix=".tmp", dir=cache))
    try:
        _write(temporary / "made", corpus, tokenizer, progress)  # below it: nobody else may enter what mkdtemp makes
        os.rename(temporary / "made", result)
    except OSError:
        if not result.exists():
            raise
        _check(result)  # another process was first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def open_source(
    path: str | os.PathLike[str], tokenizer: Tokenizer, cache: str | os.PathLike[str], progress: Progress | None = None
) -> dict[str, TokenFolder]:
    """What a recipe calls a source, as token folders by split; only the splits that it has.

    path is one of
        "stdlib", a folder of texts, one file of texts or records: prepared in `cache`, has all three splits
        what `xlstm prepare` wrote: has those of train, valid and test that have documents
        a token folder: {"train": it}
        a .bin file of nanoGPT or llm.c: {"train": it}; a folder of them: split by their names

    Raises:
        ValueError: there is nothing of that kind; the tokens are those of another tokenizer; a file is damaged.
    """
    root = Path(path)
    if path != STDLIB and (root / META).is_file():
        folders = {"train": TokenFolder.open(root)}
    elif bins := foreign.bins_of(root):
        folders = {split: foreign.open_bins(files, tokenizer) for split, files in bins.items()}
    else:
        prepared = path != STDLIB and any((root / split / META).is_file() for split in SPLITS)
        made = root if prepared else prepare_corpus(path, cache, tokenizer, progress=progress)
        folders = {split: TokenFolder.open(made / split) for split in SPLITS if (made / split).is_dir()}
    for folder in folders.values():
        if folder.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder.path} holds tokens of another tokenizer ({folder.tokenizer.vocab_size} ids, sha256 "
                f"{folder.tokenizer.sha256[:12]}; wanted: {tokenizer.vocab_size} ids, {tokenizer.sha256[:12]}); "
                f"train with {folder.path / 'tokenizer.json'}, or prepare the texts again"
            )
    return folders


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: Progress | None) -> None:
    said = {"source": corpus.source, "python": platform.python_version(), "corpus": corpus.fingerprint}
    sizes = {}
    for split in SPLITS:
        documents = corpus.split(split)
        report = None if progress is None else functools.partial(progress, split)
        write_tokens(folder / split, documents, tokenizer, name=split, made_by=said, progress=report)
        written = TokenFolder.open(folder / split)
        sizes[split] = {
            "documents": written.total_documents,
            "tokens": written.total_tokens,
            "bytes": written.total_bytes,
            "fingerprint": written.fingerprint,
        }
    left_out = {"empty": corpus.empty, "not_text": corpus.not_text}
    manifest = said | {"tokenizer": tokenizer.sha256, "left_out": left_out, "splits": sizes}
    write_atomically(folder / "corpus.json", json.dumps(manifest, indent=1) + "\n")


def _check(result: Path) -> None:
    for split in SPLITS:
        try:
            TokenFolder.open(result / split).verify()  # a changed token is no error anywhere else: it is learned
        except ValueError as error:
            raise ValueError(f"{error}; delete {result} to prepare it again") from None


def _refuse_what_is_no_corpus(root: Path, cache: Path) -> None:
    if (root / META).is_file() or (root / "train" / META).is_file():
        raise ValueError(f"{root} holds tokens, not texts: open it, or give the folder the texts are in")
    if cache.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the cache {cache} lies inside the corpus {root} and would become part of it; move it out")
