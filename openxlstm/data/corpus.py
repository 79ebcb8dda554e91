"""Documents: the source of the Python library on this machine (the embedded corpus), or the text files of a folder.

A document is a file. It belongs to train, valid or test by the sha256 of its name, so the split is the same on every
machine, and a document that is added or removed moves no other.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

SPLITS = ("train", "valid", "test")
STDLIB = "stdlib"

# Distributions ship the library with or without its tests; packages that were installed beside it are not it; the
# last two the build generated: they hold its paths and compiler flags, different on every machine.
_NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_GENERATED = ("config-", "_sysconfigdata")


@final
@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` is its path below the corpus folder, with forward slashes; it decides the split."""

    name: str
    text: str


@final
@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents sorted by name, and how many files were left out because they were `empty` or not UTF-8 text."""

    source: str
    documents: list[Document]
    empty: int
    not_text: int

    @property
    def fingerprint(self) -> str:
        """sha256 over all names and texts: equal exactly when the corpora are equal."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (_name_bytes(document.name), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def split(self, wanted: str) -> list[Document]:
        """The documents of "train", "valid" or "test"."""
        if wanted not in SPLITS:
            raise ValueError(f"split {wanted!r} must be one of {', '.join(SPLITS)}")
        return [document for document in self.documents if split_of(document.name) == wanted]


def split_of(name: str) -> str:
    """90 of 100 documents are train, 5 valid, 5 test, chosen by the sha256 of the name alone."""
    percent = int.from_bytes(hashlib.sha256(_name_bytes(name)).digest()[:8], "big") % 100
    return "train" if percent < 90 else "valid" if percent < 95 else "test"


def read_corpus(source: str | os.PathLike[str]) -> Corpus:
    """The embedded corpus for "stdlib"; otherwise the text files of the folder `source`."""
    if source == STDLIB:
        return _read(STDLIB, Path(sysconfig.get_path("stdlib")), ".py", _is_not_the_library)
    root = Path(source)
    if root.is_file():
        raise ValueError(f"{root} is a file; a corpus is a folder with one text file per document: split it first")
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give a folder of text files, or {STDLIB!r}")
    corpus = _read(str(root), root, "", _is_hidden)
    if not corpus.documents:
        raise ValueError(
            f"{root} holds no document: {corpus.empty} files are empty, {corpus.not_text} are not UTF-8 text, "
            "and hidden ones do not count"
        )
    return corpus


def stdlib_documents() -> list[Document]:
    """The Python library's own .py files, without tests and without what its build generated."""
    return read_corpus(STDLIB).documents


def folder_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Every visible UTF-8 text file below a folder."""
    return read_corpus(path).documents


def _read(source: str, root: Path, suffix: str, left_out: Callable[[str], bool]) -> Corpus:
    """Documents below `root` whose name ends in `suffix` and has no part, folder or file, that is `left_out`."""
    documents, empty, not_text = [], 0, 0
    for name, path in sorted(_files(root, suffix, left_out)):
        raw = path.read_bytes()
        if not raw:
            empty += 1
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            not_text += 1
            continue
        if "\0" in text:  # what file(1) and git call binary
            not_text += 1
            continue
        documents.append(Document(name, text))
    return Corpus(source, documents, empty, not_text)


def _files(root: Path, suffix: str, left_out: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """(name, path) of regular files; links to folders are not followed, for they may lead in circles."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not left_out(name)]
        for file in files:
            path = Path(folder, file)
            if file.endswith(suffix) and not left_out(file) and path.is_file():  # a pipe would block
                yield path.relative_to(root).as_posix(), path


def _is_not_the_library(part: str) -> bool:
    return part in _NOT_THE_LIBRARY or part.startswith(_GENERATED)


def _is_hidden(part: str) -> bool:
    return part.startswith(".")


def _name_bytes(name: str) -> bytes:
    """A name as bytes, also where a file system holds one that is not UTF-8."""
    return name.encode(errors="surrogateescape")
