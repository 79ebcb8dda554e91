"""Token folders: the layout of Hugging Face `datatrove` (0.10.1), plus one small file of ours, `meta.json`.

    NAME.ds           token ids, little-endian, no header: uint16 if the vocabulary is at most 65,536, else uint32;
                      documents back to back, each with its end token
    NAME.ds.loss      optional: one byte per token, 0 where the token is no target of training
    NAME.ds.index     one uint64 per document: its exclusive end in tokens from the start of NAME.ds; no leading 0
    NAME.ds.metadata  three lines for datatrove's own merger, which otherwise takes every token for 2 bytes
    tokenizer.json    the tokenizer the ids belong to
    meta.json         sizes, hashes and the fingerprint; written last and atomically: a folder without it is not one

Whoever wrote the first three (foreign.py reads and adopts what others wrote), `seal` adds the last two. Borders of
documents come from the index, never from searching for the end token.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import numpy as np
from jaxtyping import Bool, Int64, UInt

from openxlstm.data.corpus import Document
from openxlstm.data.tokenizer import END_TOKENS, Tokenizer

FORMAT = "openxlstm-tokens/1"
META = "meta.json"
_BATCH_CHARACTERS = 1 << 20  # texts encoded at once: enough for every core, little memory
_HASH_BYTES = 1 << 24
_ADOPT = "adopt the folder again (xlstm prepare --adopt)"


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """One .ds file, memory-mapped. `ends` are the exclusive ends of its documents; `bytes` is their UTF-8 length.

    `loss` is None where every token is a target, else false at those that are none.
    """

    file: str
    tokens: UInt[np.ndarray, "tokens"]
    ends: Int64[np.ndarray, "documents"]
    bytes: int
    sha256: str
    loss: Bool[np.ndarray, "tokens"] | None = None
    loss_sha256: str | None = None


@final
@dataclass(frozen=True, slots=True)
class TokenFolder:
    """Tokens of one split of one corpus, open for reading.

    `fingerprint` covers the tokenizer and every token: equal fingerprints mean equal data. `byte_level` says that the
    lengths in `tokenizer.bytes_of` add up to the length of every document, so bits per byte hold for any subset.
    """

    path: Path
    tokenizer: Tokenizer
    end_id: int
    byte_level: bool
    fingerprint: str
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenFolder:
        """Map the files and check what can be checked without reading every token: presence, sizes, index, hashes.

        A fault is a ValueError that names the file. `verify` reads the tokens as well.
        """
        path = Path(folder)
        meta = _read_meta(path)
        try:
            tokenizer = Tokenizer.from_file(path / "tokenizer.json")
            if tokenizer.sha256 != meta["tokenizer"]["sha256"]:
                raise ValueError(f"{path / 'tokenizer.json'} is not the tokenizer that {path / META} names")
            if meta["fingerprint"] != fingerprint_of(meta):
                raise ValueError(f"{path / META} has been edited: its fingerprint does not belong to its content")
            if tokenizer.vocab_size != meta["tokenizer"]["vocab"] or not 0 <= meta["end_id"] < tokenizer.vocab_size:
                raise ValueError(
                    f"{path / META} says {meta['tokenizer']['vocab']} token ids, {meta['end_id']} the one that ends "
                    f"documents; {path / 'tokenizer.json'} has {tokenizer.vocab_size}"
                )
            shards = tuple(_open_shard(path, shard, meta["token_size"]) for shard in meta["shards"])
            if not shards:
                raise ValueError(f"{path / META} lists not one shard")
            byte_level = meta["tokenizer"]["byte_level"]
            return cls(path, tokenizer, meta["end_id"], byte_level, meta["fingerprint"], shards)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / META} lacks a field or has one of the wrong type: {error}") from None
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            need = 4 * len(meta["shards"]) + 100  # tokens, index and marks, and what a program has open anyway
            raise ValueError(
                f"{path} has {len(meta['shards'])} shards, more than this process may keep open; "
                f"allow more: ulimit -n {1 << need.bit_length()}"
            ) from None

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every token: is it in the vocabulary, and does the stored hash agree? A second per gigabyte or so.

        `progress(done, total)` counts tokens.

        Raises:
            ValueError: a file is damaged; it is named.
        """
        done = 0
        for shard in self.shards:
            file, digest = self.path / shard.file, hashlib.sha256()
            for block in blocks(shard.tokens):
                digest.update(block.data)
                if block.max() >= self.tokenizer.vocab_size:
                    raise ValueError(f"{file} holds the id {block.max()}; {self.tokenizer} has none of it")
                done += len(block)
                if progress is not None:
                    progress(done, self.total_tokens)
            if digest.hexdigest() != shard.sha256:
                raise ValueError(f"{file} is damaged: its sha256 is not the one in {META}")
            if shard.loss is not None and hashlib.sha256(shard.loss.data).hexdigest() != shard.loss_sha256:
                raise ValueError(f"{file}.loss is damaged: its sha256 is not the one in {META}")

    @property
    def total_tokens(self) -> int:
        """Tokens in all shards, end tokens included."""
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def total_documents(self) -> int:
        """Documents in all shards."""
        return sum(len(shard.ends) for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of all texts; end tokens have none."""
        return sum(shard.bytes for shard in self.shards)

    def texts(self) -> Iterator[bytes]:
        """The documents, as the bytes that went in. Needs a byte-level tokenizer."""
        for shard in self.shards:
            start = 0
            for end in shard.ends.tolist():
                yield self.tokenizer.decode_bytes(shard.tokens[start:end])
                start = end


def write_tokens(
    folder: str | os.PathLike[str],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    name: str = "tokens",
    made_by: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a token folder with one shard, 000_NAME.ds; byte for byte what datatrove writes without shuffling.

    `made_by` is stored for people. `progress(done, total)` counts documents.
    """
    path = Path(folder)
    if (path / META).exists():
        raise ValueError(f"{path} already is a token folder; write to another, or delete it first")
    if not documents:
        raise ValueError(f"there is not one document to write to {path}")
    if tokenizer.end_id is None:
        raise ValueError(f"{tokenizer} has no token to end a document with; one of {', '.join(END_TOKENS)} is needed")
    path.mkdir(parents=True, exist_ok=True)
    file = f"000_{name}.ds"
    (path / f"{file}.metadata").unlink(missing_ok=True)  # of an attempt that was interrupted
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    bytes_of = tokenizer.bytes_of if tokenizer.byte_level else None

    ends: list[int] = []
    end = text_bytes = 0
    digest, byte_level = hashlib.sha256(), tokenizer.byte_level
    with open(path / file, "wb") as stream:
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([each.text for each in batch]), strict=True):
                tokens = np.array([*ids, tokenizer.end_id], dtype)
                length = len(document.text.encode())
                if bytes_of is not None and bytes_of[tokens].sum() != length:
                    byte_level = False  # a normalizer or an inserted space: tokens no longer spell the text
                raw = tokens.tobytes()
                stream.write(raw)
                digest.update(raw)
                end, text_bytes = end + len(tokens), text_bytes + length
                ends.append(end)
            if progress is not None:
                progress(len(ends), len(documents))
        _to_disk(stream)

    index = np.array(ends, "<u8").tobytes()
    (path / f"{file}.index").write_bytes(index)
    shard: dict[str, Any] = {
        "file": file,
        "tokens": end,
        "documents": len(ends),
        "bytes": text_bytes,
        "sha256": digest.hexdigest(),  # two corpora may agree in every length, so the index is not enough
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }
    seal(path, [shard], tokenizer, tokenizer.end_id, dtype.itemsize, byte_level=byte_level, made_by=made_by)


def write_folder(
    path: Path, folder: TokenFolder, *, name: str = "tokens", made_by: dict[str, Any] | None = None
) -> None:
    """Write the tokens of a folder to another one, 000_NAME.ds, 001_NAME.ds, ...: for those that have no index."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, shard in enumerate(folder.shards):
        file, index = f"{number:03d}_{name}.ds", shard.ends.astype("<u8").tobytes()
        with open(path / file, "wb") as stream:
            for block in blocks(shard.tokens):
                stream.write(block.data)
            _to_disk(stream)
        (path / f"{file}.index").write_bytes(index)
        lines.append({
            "file": file, "tokens": len(shard.tokens), "documents": len(shard.ends), "bytes": shard.bytes,
            "sha256": shard.sha256, "index_sha256": hashlib.sha256(index).hexdigest(),
        })  # fmt: skip
    size = folder.shards[0].tokens.itemsize
    seal(path, lines, folder.tokenizer, folder.end_id, size, byte_level=folder.byte_level, made_by=made_by)


def seal(
    path: Path,
    shards: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    end_id: int,
    token_size: int,
    *,
    byte_level: bool,
    made_by: dict[str, Any] | None = None,
) -> None:
    """Make a token folder of the shards in a folder: metadata for datatrove, the tokenizer, and meta.json at the end.

    `shards` are the lines of meta.json: file, tokens, documents, bytes, sha256, index_sha256, and loss_sha256 where
    some tokens are no targets.
    """
    for shard in shards:
        metadata, count = path / f"{shard['file']}.metadata", shard["tokens"]
        if not metadata.exists():  # who wrote it knows the tokenizer's name
            metadata.write_text(f"tokenizer.json|{token_size}\n{count}\n{count / 1e6:.1f} MT")
    tokenizer.save(path / "tokenizer.json")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "token_size": token_size,
        "end_id": end_id,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab": tokenizer.vocab_size, "byte_level": byte_level},
        "shards": list(shards),
    }
    meta |= {"fingerprint": fingerprint_of(meta), "made_by": made_by or {}}
    write_atomically(path / META, json.dumps(meta, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The whole text under its name, or nothing: through a temporary file of this process beside it, and rename.

    Processes that write the same file at once do not meet; the last one's stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            _to_disk(stream)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too: its name has a number that nobody looks for again
        temporary.unlink(missing_ok=True)
        raise


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / META).is_file():
        raise ValueError(f"{path} is not a token folder, or an unfinished one: there is no {META} in it")
    try:
        meta = json.loads((path / META).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path / META} is not JSON: {error}") from None
    given = meta.get("format") if isinstance(meta, dict) else None
    if given != FORMAT:
        raise ValueError(f"{path / META} has format {given!r}; this version reads {FORMAT!r}")
    return meta


def _open_shard(path: Path, meta: dict[str, Any], token_size: int) -> Shard:
    file, index = path / meta["file"], path / f"{meta['file']}.index"
    loss = Path(f"{file}.loss")
    sizes = {file: meta["tokens"] * token_size, index: meta["documents"] * 8}
    if "loss_sha256" in meta:
        sizes[loss] = meta["tokens"]
    elif loss.exists():
        raise ValueError(f"{loss} marks tokens that are no targets, and {path / META} knows nothing of it: {_ADOPT}")
    for part, size in sizes.items():
        if not part.is_file():
            raise ValueError(f"{part} is missing; {path / META} lists it")
        if part.stat().st_size != size or size == 0:
            raise ValueError(
                f"{part} has {part.stat().st_size} bytes, but by {path / META} it must have {size}, and not 0"
            )
    if sha256_of(index) != meta["index_sha256"]:
        raise ValueError(f"{index} is damaged: its sha256 is not the one in {path / META}")

    tokens = np.memmap(file, dtype=f"<u{token_size}", mode="r")
    ends = np.memmap(index, dtype="<i8", mode="r")  # uint64 on disk; signed, because numpy mixes uint64 to float64
    if ends[-1] != len(tokens) or ends[0] <= 0 or (np.diff(ends) <= 0).any():
        raise ValueError(f"{index} must rise strictly from above 0 to {len(tokens)}, the number of tokens in {file}")
    marks = np.memmap(loss, dtype=np.bool_, mode="r") if loss in sizes else None
    return Shard(meta["file"], tokens, ends, meta["bytes"], meta["sha256"], marks, meta.get("loss_sha256"))


def fingerprint_of(meta: dict[str, Any]) -> str:
    """sha256 over all that a meta.json says, but for itself and who made it."""
    said = {key: value for key, value in meta.items() if key not in ("fingerprint", "made_by")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, some _BATCH_CHARACTERS together."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """An array in consecutive pieces of some 16 MB, for what is larger than memory."""
    step = max(_HASH_BYTES // tokens.itemsize, 1)
    for start in range(0, len(tokens), step):
        yield tokens[start : start + step]


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
