"""Files become documents: a text is one, or is cut at a delimiter; JSONL and parquet hold one per record.

    NAME.jsonl  NAME.ndjson            an object per line, its text under a key; also with .gz or .zst behind it
    NAME.parquet                       a table, the texts in one column                        (needs pyarrow)
    every other name                   text, if it is UTF-8 without a NUL; anything else is left out and counted

A damaged record is an error with file and line. Leaving it out would be kinder to the eye and would change the corpus
without a word (datatrove's own JSONL reader warns, and drops the rest of a file after a byte that is not UTF-8).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

WHOLE = "none"  # delimiter: a text is one document
BLANK = "blank"  # delimiter: documents are separated by lines without a visible character
_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
_BLOCK = 1 << 20
_BLOCK_PACKED = 1 << 16  # a thousand times as much may come out of it


@final
@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` decides its split: the path of a file below the corpus folder, with forward slashes; or, for a
    piece of a larger file, the sha256 of the text, so that equal texts are never on both sides of a split."""

    name: str
    text: str


@final
@dataclass(slots=True)
class LeftOut:
    """How many texts were left out because they were `empty`, and how many files because they are not UTF-8 text."""

    empty: int = 0
    not_text: int = 0


def holds_records(name: str) -> bool:
    """Whether a file of this name holds a document per record, by its ending."""
    return name.endswith(".parquet") or _unpacked(name).endswith(_LINES)


def documents(path: Path, name: str, text_key: str, delimiter: str, left_out: LeftOut) -> Iterator[Document]:
    """The documents of one file, in its order; what is left out is counted in `left_out`.

    Args:
        path: where the file is.
        name: what it is called: the name of its document, if it is one.
        text_key: the key, or the column, that holds the text of a record.
        delimiter: WHOLE, BLANK, or a text that stands between documents; for text files only.

    Raises:
        ValueError: a record is damaged or has no such key; the file ends too early; its reader is not installed.
    """
    if path.name.endswith(".parquet"):
        texts = _of_parquet(path, text_key)
    elif holds_records(path.name):
        texts = _of_lines(path, text_key)
    elif delimiter == WHOLE:
        yield from _of_text(path, name, left_out)
        return
    else:
        texts = _of_pieces(path, delimiter)
    for where, text in texts:
        if not text:
            left_out.empty += 1
            continue
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the text cannot be written as UTF-8: {error}") from None
        yield Document(hashlib.sha256(raw).hexdigest()[:32], text)


def delimiter_of(path: Path, mark: str) -> str:
    """Where a text file that stands alone is cut: at `mark`, if it is a line of its own somewhere, else BLANK."""
    line = mark.encode()
    with open(path, "rb") as stream:
        return mark if any(each.strip() == line for each in stream) else BLANK


def _of_text(path: Path, name: str, left_out: LeftOut) -> Iterator[Document]:
    raw = path.read_bytes()
    if not raw:
        left_out.empty += 1
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        left_out.not_text += 1
        return
    if "\0" in text:  # what file(1) and git call binary
        left_out.not_text += 1
        return
    yield Document(name, text)


def _of_pieces(path: Path, delimiter: str) -> Iterator[tuple[str, str]]:
    """What stands between delimiters and is more than white space, without the line break that ends a delimiter."""
    with open(path, encoding="utf-8", newline="") as text:
        empty = True
        try:
            for piece in _between_blank_lines(text) if delimiter == BLANK else _between(text, delimiter):
                if "\0" in piece:
                    raise ValueError(f"{path} holds a NUL, so it is not text")
                if piece.strip():
                    empty = False
                    yield str(path), piece.lstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        if empty:
            yield str(path), ""


def _between_blank_lines(text: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in text:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def _between(text: IO[str], delimiter: str) -> Iterator[str]:
    """Like str.split, but a block at a time. `seam` is searched again with the next block: it may begin a delimiter."""
    held: list[str] = []
    seam = ""
    while block := text.read(_BLOCK):
        *pieces, rest = (seam + block).split(delimiter)
        for piece in pieces:
            yield "".join([*held, piece])
            held = []
        cut = max(len(rest) - len(delimiter) + 1, 0)
        held.append(rest[:cut])
        seam = rest[cut:]
    yield "".join([*held, seam])


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line of a JSONL file, also of a .gz or .zst one; empty lines are none.

    Raises:
        ValueError: a line is no JSON object, or the file ends too early.
    """
    with _open(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _record(where, line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged after line {number}: {error}") from None


def _of_lines(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    for where, record in json_lines(path):
        if text_key not in record:
            raise ValueError(
                f"{where} has no key {text_key!r}; its keys are {', '.join(record) or 'none'} (--text-key)"
            )
        yield where, _checked(where, record[text_key], text_key)


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__}; every line must be an object with a text in it")
    return record


def _of_parquet(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: to read parquet, pip install 'openxlstm[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise ValueError(
                    f"{path} has no column {text_key!r}; its columns are {', '.join(columns)} (--text-key)"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}: row {row}"
                    yield where, _checked(where, text, text_key)
    except (pyarrow.lib.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {error}") from None


def _checked(where: str, text: Any, text_key: str) -> str:
    """The text of a record; null is the empty text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} is a {type(text).__name__}, not a text")
    return text


def _unpacked(name: str) -> str:
    return name[: name.rindex(".")] if name.endswith(_PACKED) else name


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says."""
    with open(path, "rb") as stream:
        if path.name.endswith(".gz"):
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif path.name.endswith(".zst"):
            with io.BufferedReader(_Zstandard(stream, path), _BLOCK) as unpacked:
                yield unpacked
        else:
            yield stream


@final
class _Zstandard(io.RawIOBase):
    """The content of a .zst file, of one frame or more. The reader of zstandard takes a truncated file for a whole."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: to read .zst, pip install 'openxlstm[data]'") from None
        self._stream, self._damaged = stream, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # the frame that has begun and not ended
        self._packed = self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one step goes; 0 at the end of the file."""
        while not self._ready:
            self._packed = self._packed or self._stream.read(_BLOCK_PACKED)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._damaged as error:
                raise EOFError(str(error)) from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
