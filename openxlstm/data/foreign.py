"""Token files that somebody else wrote, read token by token once and then as good as our own.

    datatrove   NAME.ds and NAME.ds.index                 adopt: checks all of them and adds meta.json; no copy
    nanoGPT     NAME.bin: uint16 ids and nothing else     open_bins: as a token folder in memory, nothing is written
    llm.c       NAME.bin: 256 int32 first, which are magic, version, number of ids, and zeros; then uint16 or uint32

Where documents end, datatrove's index says. In a .bin file only the end token can say it; without one the file is a
single document. llm.c writes that token before each document and not behind it, so the first of a file ends nothing
and is skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64, UInt

from openxlstm.data.order import mix64
from openxlstm.data.tokenizer import END_TOKENS, Tokenizer
from openxlstm.data.tokens import META, Shard, TokenFolder, blocks, fingerprint_of, seal, sha256_of

MAGIC = {20240520: (1, 2), 20240801: (7, 4)}  # llm.c: magic: (version, bytes per id); GPT-2 and Llama 3
_HEADER = 256 * 4
_NAMES = {"train": "train", "val": "valid", "test": "test"}  # part of the name of a .bin file: its split


@final
@dataclass(frozen=True, slots=True)
class Examined:
    """What reading every token of a shard shows.

    line      its line in meta.json
    unended   documents whose last token is not the end token
    lengths   a sum over `mix_lengths` of the documents: equal where the same lengths occur, in any order
    """

    line: dict[str, Any]
    unended: int
    lengths: int


def adopt(folder: Path, tokenizer: Tokenizer, *, token_size: int | None = None) -> int:
    """Make a token folder of datatrove's output, in place; how many documents do not end in the end token.

    Args:
        token_size: bytes per id, where no .metadata says it. By default what the vocabulary needs.

    Raises:
        ValueError: a file is truncated, misses its index, is left over from a task that was killed, or holds ids that
            the tokenizer does not have. Nothing is written then.
    """
    if (folder / META).exists():
        raise ValueError(f"{folder} already is a token folder; delete {folder / META} to adopt it again")
    end_id = end_id_of(tokenizer)
    examined, sizes = [], set()
    for file in complete_shards(folder):
        size = _size_said(file) or token_size or (2 if tokenizer.vocab_size <= 1 << 16 else 4)
        examined.append(examine(file, tokenizer, size))
        sizes.add(size)
    if len(sizes) > 1:
        raise ValueError(f"{folder} mixes shards of 2 and of 4 bytes per id; put them into folders of their own")
    lines = [each.line for each in examined]
    seal(folder, lines, tokenizer, end_id, sizes.pop(), byte_level=spells(tokenizer), made_by={"adopted": str(folder)})
    return sum(each.unended for each in examined)


def complete_shards(folder: Path) -> list[Path]:
    """The .ds files of a folder in the order of their names; empty ones, of tasks without input, are left out.

    Raises:
        ValueError: there is none; one lacks its index; or a file that a killed task had not shuffled yet stands beside
            its shuffled copy.
    """
    found = [file for file in sorted(folder.glob("*.ds")) if file.stat().st_size]
    names = [file.name for file in found]
    for file in found:
        if not Path(f"{file}.index").is_file():
            raise ValueError(f"{file}.index is missing: nobody knows where the documents of {file.name} end")
        stem = file.name.removesuffix("_unshuffled.ds")
        twin = next((name for name in names if re.match(rf"{re.escape(stem)}_\d+_\w+_shuffled\.ds", name)), None)
        if twin is not None:
            raise ValueError(f"{file} was being shuffled to {twin} when its task was killed; run that task again")
    if not found:
        raise ValueError(f"{folder} has no .ds file with tokens in it; datatrove's DocumentTokenizer writes them")
    return found


def examine(file: Path, tokenizer: Tokenizer, token_size: int, *, text_bytes: int | None = None) -> Examined:
    """Read every token of a .ds file and check all that can be checked.

    Args:
        text_bytes: the length of the texts, from who has them; otherwise it is computed from the tokens.

    Raises:
        ValueError: the file, its index or its marks are damaged, or it holds ids that the tokenizer does not have.
    """
    index, loss = Path(f"{file}.index"), Path(f"{file}.loss")
    size = file.stat().st_size
    ends = np.fromfile(index, "<i8")  # uint64 on disk, and far below 2^63
    if size % token_size or len(ends) * 8 != index.stat().st_size or not len(ends) or ends[-1] * token_size != size:
        said = f"{ends[-1]} ids of {token_size} bytes" if len(ends) else "no ids"
        raise ValueError(
            f"{file} has {size} bytes, {index.name} says {said}: one is truncated, or the id size is wrong"
        )
    if ends[0] <= 0 or (np.diff(ends) <= 0).any():
        raise ValueError(f"{index} must rise strictly from above 0: it is damaged, or a document is empty")
    tokens = np.memmap(file, f"<u{token_size}", "r")
    line, unended, lengths = _read(str(file), tokens, ends, tokenizer, text_bytes)
    line = {"file": file.name} | line | {"index_sha256": sha256_of(index)}
    if loss.exists():
        if loss.stat().st_size != len(tokens) or np.memmap(loss, np.uint8, "r").max() > 1:
            raise ValueError(f"{loss} must have {len(tokens)} bytes, one per token, each 0 or 1")
        line["loss_sha256"] = sha256_of(loss)
    return Examined(line, unended, lengths)


def mix_lengths(lengths: Int64[np.ndarray, "documents"]) -> int:
    """A number modulo 2^64 that two lists of lengths share if they agree but for their order, and hardly otherwise."""
    return int(mix64(lengths.astype(np.uint64) + np.uint64(1)).sum(dtype=np.uint64))


def bins_of(path: Path) -> dict[str, list[Path]]:
    """A .bin file, as training data; or those of a folder by split, by "train", "val" or "test" in their names.

    Empty where there is none, or none of training.
    """
    if path.suffix == ".bin" and path.is_file():
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.bin")):
        for part, split in _NAMES.items():
            if part in file.name:
                found.setdefault(split, []).append(file)
                break
    return found if "train" in found else {}


def open_bins(files: Sequence[Path], tokenizer: Tokenizer, *, token_size: int | None = None) -> TokenFolder:
    """Token files of nanoGPT or llm.c as one token folder, a shard each. They are read once, a gigabyte in seconds.

    Args:
        token_size: bytes per id of files without a header. By default 2, as nanoGPT writes them.

    Raises:
        ValueError: a file is truncated, or is not of this tokenizer.
    """
    end_id = end_id_of(tokenizer)
    shards, lines = [], []
    for file in files:
        tokens = _ids_of_bin(file, token_size)
        if len(tokens) > 1 and tokens[0] == end_id:
            tokens = tokens[1:]  # llm.c: see above
        ends = _ends_after(tokens, end_id)
        line, _, _ = _read(str(file), tokens, ends, tokenizer)
        index_sha256 = hashlib.sha256(ends.astype("<u8").tobytes()).hexdigest()
        lines.append({"file": file.name, **line, "index_sha256": index_sha256})
        shards.append(Shard(file.name, tokens, ends, line["bytes"], line["sha256"]))
    said = {"end_id": end_id, "tokenizer": tokenizer.sha256, "shards": lines}
    return TokenFolder(files[0].parent, tokenizer, end_id, spells(tokenizer), fingerprint_of(said), tuple(shards))


def end_id_of(tokenizer: Tokenizer) -> int:
    """The id that ends documents, or a refusal: the windows need one to start documents with."""
    if tokenizer.end_id is None:
        raise ValueError(f"{tokenizer} has no token to end a document with; one of {', '.join(END_TOKENS)} is needed")
    return tokenizer.end_id


def spells(tokenizer: Tokenizer) -> bool:
    """Whether tokens add up to the bytes of any text: byte-level, and nothing is changed or inserted before that."""
    data = json.loads(tokenizer.json)
    inserts = '"add_prefix_space": true' in json.dumps(data.get("pre_tokenizer"))
    return tokenizer.byte_level and not data.get("normalizer") and not inserts


def _read(
    where: str,
    tokens: UInt[np.ndarray, "tokens"],
    ends: Int64[np.ndarray, "documents"],
    tokenizer: Tokenizer,
    text_bytes: int | None = None,
) -> tuple[dict[str, Any], int, int]:
    """The part of a line in meta.json that comes from the tokens, documents without end token, and mixed lengths."""
    bytes_of = tokenizer.bytes_of if tokenizer.byte_level else None
    digest, start, sum_before = hashlib.sha256(), 0, 0
    at_ends = np.zeros(len(ends) + 1, np.int64)  # bytes before the first document and up to the end of each
    for block in blocks(tokens):
        if block.max() >= tokenizer.vocab_size:
            raise ValueError(f"{where} holds the id {block.max()}, and {tokenizer} has none of it: another tokenizer's")
        digest.update(block.data)
        if bytes_of is not None:
            sums = np.cumsum(bytes_of[block]) + sum_before
            first, last = np.searchsorted(ends, (start + 1, start + len(block) + 1))
            at_ends[first + 1 : last + 1] = sums[ends[first:last] - start - 1]
            sum_before = int(sums[-1])
        start += len(block)
    if bytes_of is None and text_bytes is None:
        at_ends[1:] = np.cumsum([len(text.encode()) for text in _decoded(tokens, ends, tokenizer)])
    length = int(at_ends[-1]) if text_bytes is None else text_bytes
    line = {"tokens": len(tokens), "documents": len(ends), "bytes": length, "sha256": digest.hexdigest()}
    unended = int(np.count_nonzero(tokens[ends - 1] != tokenizer.end_id))
    return line, unended, mix_lengths(np.diff(at_ends))


def _decoded(
    tokens: UInt[np.ndarray, "tokens"], ends: Int64[np.ndarray, "documents"], tokenizer: Tokenizer
) -> Iterator[str]:
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
        yield tokenizer.decode(tokens[start:end])


def _size_said(file: Path) -> int | None:
    """Bytes per id by datatrove's .metadata: the number behind the last | of its first line."""
    metadata = Path(f"{file}.metadata")
    if not metadata.is_file():
        return None
    first = metadata.read_text().split("\n")[0].rpartition("|")[2]
    if first not in ("2", "4"):
        raise ValueError(f"{metadata} must end its first line with |2 or |4, the bytes per id; it has {first!r}")
    return int(first)


def _ids_of_bin(file: Path, token_size: int | None) -> UInt[np.ndarray, "tokens"]:
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 3)
    if len(header) == 3 and (magic := int(header[0])) in MAGIC:
        (version, token_size), count = MAGIC[magic], int(header[2])
        if header[1] != version or size != _HEADER + count * token_size:
            raise ValueError(
                f"{file} has version {header[1]} and {size} bytes; with {count} ids in its header it must have version "
                f"{version} and {_HEADER + count * token_size} bytes"
            )
        return np.memmap(file, f"<u{token_size}", "r", offset=_HEADER)
    if not size or size % (token_size or 2):
        raise ValueError(f"{file} has {size} bytes, which is no number of ids of {token_size or 2} bytes")
    tokens = np.memmap(file, f"<u{token_size or 2}", "r")
    if token_size is None and len(tokens) > 3 and not tokens[1 : 1 << 20 : 2].any():
        raise ValueError(f"every second id of {file} is 0, so its ids have 4 bytes; say so: --token-size 4")
    return tokens


def _ends_after(tokens: UInt[np.ndarray, "tokens"], end_id: int) -> Int64[np.ndarray, "documents"]:
    """Where documents end: behind each end token, and at the end of the file."""
    found, start = [], 0
    for block in blocks(tokens):
        found.append(np.flatnonzero(block == end_id) + start + 1)
        start += len(block)
    ends = np.concatenate(found).astype(np.int64)
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, np.int64(len(tokens)))
