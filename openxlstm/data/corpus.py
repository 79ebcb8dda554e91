"""Corpora: the source of the Python library on this machine (the embedded one), a folder of files, or one file.

A document belongs to train, valid or test by the sha256 of its name, so the split is the same on every machine, and a
document that is added or removed moves no other. How files become documents, and what their names are: records.py.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from openxlstm.data.records import WHOLE, Document, LeftOut, delimiter_of, documents, holds_records
from openxlstm.data.tokenizer import END_OF_TEXT

SPLITS = ("train", "valid", "test")
STDLIB = "stdlib"
SHARES = (90.0, 5.0, 5.0)  # percent of the documents in each split

# Distributions ship the library with or without its tests; packages that were installed beside it are not it; the
# last two the build generated: they hold its paths and compiler flags, different on every machine.
_NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_GENERATED = ("config-", "_sysconfigdata")


@final
@dataclass(frozen=True, slots=True)
class File:
    """A file of a corpus: where it is, what it is called there, its bytes, and where it is cut (records.py)."""

    path: Path
    name: str
    size: int
    delimiter: str


@final
@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, in the order of their files' names; and how many were left out as `empty` or as no UTF-8 text."""

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

    def split(self, wanted: str, shares: Sequence[float] = SHARES) -> list[Document]:
        """The documents of "train", "valid" or "test"."""
        if wanted not in SPLITS:
            raise ValueError(f"split {wanted!r} must be one of {', '.join(SPLITS)}")
        return [document for document in self.documents if split_of(document.name, shares) == wanted]


def split_of(name: str, shares: Sequence[float] = SHARES) -> str:
    """train, valid or test, in these shares (percent, to two decimals), chosen by the sha256 of the name alone."""
    number = int.from_bytes(hashlib.sha256(_name_bytes(name)).digest()[:8], "big")
    percent = number % 100 + number // 100 % 100 / 100
    return "train" if percent < shares[0] else "valid" if percent < round(shares[0] + shares[1], 2) else "test"


def files_of(source: str | os.PathLike[str], delimiter: str | None = None) -> list[File]:
    """The files of a corpus in the order of their names: "stdlib", a folder and all below it, or one file.

    A text file in a folder is one document. One that is named itself is cut: at `delimiter` (BLANK, WHOLE or a text),
    or, without one, at lines that are nothing but <|endoftext|>, or else at blank lines. A delimiter cuts the text
    files of a folder as well.

    Raises:
        ValueError: there is no such folder or file.
    """
    if source == STDLIB:
        found = _files(Path(sysconfig.get_path("stdlib")), ".py", _is_not_the_library)
    elif (root := Path(source)).is_dir():
        found = _files(root, "", _is_hidden)
    elif root.is_file():
        if delimiter is None:
            delimiter = WHOLE if holds_records(root.name) else delimiter_of(root, END_OF_TEXT)
        found = iter([(root.name, root)])
    else:
        raise ValueError(f"there is no folder or file {root}; give texts, or {STDLIB!r}")
    return [File(path, name, path.stat().st_size, delimiter or WHOLE) for name, path in sorted(found)]


def read_corpus(source: str | os.PathLike[str], *, text_key: str = "text", delimiter: str | None = None) -> Corpus:
    """The whole of a corpus in memory: see `files_of`; `text_key` is where records have their text.

    Raises:
        ValueError: there is no such folder or file, no document in it, or a damaged record.
    """
    left_out = LeftOut()
    found = [
        document
        for file in files_of(source, delimiter)
        for document in documents(file.path, file.name, text_key, file.delimiter, left_out)
    ]
    if not found:
        raise ValueError(
            f"{source} holds no document: {left_out.empty} files are empty, {left_out.not_text} are not UTF-8 text, "
            "and hidden ones do not count"
        )
    return Corpus(str(source), found, left_out.empty, left_out.not_text)


def stdlib_documents() -> list[Document]:
    """The Python library's own .py files, without tests and without what its build generated."""
    return read_corpus(STDLIB).documents


def folder_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Every visible UTF-8 text file below a folder."""
    return read_corpus(path).documents


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
