"""Perplexity of documents from many sources, in the manner of PALOMA (Magnusson et al. 2023, arXiv:2312.10523).

    windows    a document is cut into disjoint windows of 2,048 targets, each read from an empty state; the first token
               follows the end token; the last window is filled up with earlier tokens, which are not scored again
               (arXiv:2405.04517, App. B.3): the number to compare with models that have a context length
    stateful   a document is read in one pass, the state carried along, in constant memory

Per source exp(nats / tokens) over all its documents, whatever their domains: weighted by tokens, no mean of means. The
mean over sources is the plain one, as the papers print it. Bits per byte do not depend on the tokenizer.

A row per document keeps sums, never tokens, so everything here (tables, intervals, comparisons) is computed from rows,
of this run or of a stored one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from openxlstm.data.records import json_lines
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, blocks
from openxlstm.models.interface import LanguageModel
from openxlstm.tasks import intervals, scoring
from openxlstm.tasks.intervals import Interval
from openxlstm.tasks.kept import Kept

MODES = ("windows", "stateful")
WINDOW = 2048
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A document: its number in the file, its text, and where it comes from."""

    index: int
    text: str
    source: str
    domain: str


def read_texts(path: Path) -> Iterator[Text]:
    """Documents of a JSONL file (also .gz, .zst): `text`, and if it is there `source` and `domain`.

    Without a source the file's name is the source; without a domain the domain is the source.

    Raises:
        ValueError: no such file, a damaged line, a field that is no text, or not one document with a text.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    found = False
    for index, (where, record) in enumerate(json_lines(path)):
        if "text" not in record:
            raise ValueError(f"{where} has no 'text'; its keys are {', '.join(record) or 'none'}")
        for name in ("text", "source", "domain"):
            if not isinstance(value := record.get(name) or "", str):
                raise ValueError(f"{where}: {name!r} is a {type(value).__name__}, not a text")
        source = record.get("source") or path.name.split(".")[0]
        one = Text(index, record["text"] or "", source, record.get("domain") or source)
        if one.text:
            found = True
            yield one
    if not found:
        raise ValueError(f"{path} holds no document with a text")


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterator[Text],
    kept: Kept,
    *,
    modes: Sequence[str] = MODES,
    window: int = WINDOW,
    batch_size: int = 1,
    counts: Int64[np.ndarray, "W"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score all documents that are not in `kept` yet, and put a row for each of them there.

    {"index", "source", "domain", "tokens", "bytes", "windows", "stateful"}: the last two are nats. With `counts`, how
    often each token id was seen in training, also "buckets", the tokens and nats of targets by frequency: see `bucket`.

    Args:
        model: in evaluation mode.
        batch_size: documents whose windows are computed together; a kill loses no more than these.
        progress: called with (documents done, tokens read) as it goes.

    Raises:
        ValueError: an unknown mode, or what `scoring` refuses.
    """
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"modes={list(modes)} must be of {', '.join(MODES)}")
    prefix, done, read = beginning(tokenizer), 0, 0
    waiting = (one for one in texts if one.index not in kept)
    while some := list(islice(waiting, batch_size)):
        ids = tokenizer.encode_batch([one.text for one in some])
        nats = {mode: _nats(model, ids, prefix, mode, window, batch_size) for mode in modes}
        rows = []
        for n, one in enumerate(some):
            row: dict[str, Any] = {
                "index": one.index, "source": one.source, "domain": one.domain,
                "tokens": len(ids[n]), "bytes": len(one.text.encode()),
            }  # fmt: skip
            row |= {mode: float(nats[mode][n].sum()) for mode in modes}
            if counts is not None:
                row["buckets"] = _by_frequency(np.array(ids[n], dtype=np.int64), nats[modes[0]][n], counts)
            rows.append(row)
        kept.add(rows)
        done, read = done + len(some), read + sum(map(len, ids))
        if progress is not None:
            progress(done, read)


def beginning(tokenizer: Tokenizer) -> int:
    """The id that the first token of a document follows: the end token, as in training.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.end_id is None:
        raise ValueError(f"{tokenizer!r} has no end token, and the first token of a document must follow something")
    return tokenizer.end_id


def table(rows: Sequence[Row], by: str = "source") -> list[dict[str, Any]]:
    """Sums per source (or "domain", within its source), in the order of their names.

    Each with documents, tokens, bytes, and for every mode that was measured `perplexity` and `bits_per_byte`:
    {"windows": {"perplexity", "bits_per_byte", "low", "high"}}, the last two the interval of the perplexity.
    """
    if by not in ("source", "domain"):
        raise ValueError(f"by={by!r} must be source or domain")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["domain"]) if by == "domain" else (row["source"],), []).append(row)
    return [{**dict(zip(("source", "domain"), name, strict=False)), **summary(groups[name])} for name in sorted(groups)]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All these documents as one text."""
    found: dict[str, Any] = {"documents": len(rows)}
    found |= {name: sum(row[name] for row in rows) for name in ("tokens", "bytes")}
    for mode in modes_of(rows):
        interval = perplexity(rows, mode)
        nats = math.fsum(row[mode] for row in rows)
        found[mode] = {
            "perplexity": interval.value, "low": interval.low, "high": interval.high,
            "bits_per_byte": nats / math.log(2) / found["bytes"],
        }  # fmt: skip
    return found


def mean_over_sources(rows: Sequence[Row], mode: str) -> float:
    """The plain mean of the sources' perplexities, which the papers call the average."""
    found = [one[mode]["perplexity"] for one in table(rows)]
    return math.fsum(found) / len(found)


def perplexity(rows: Sequence[Row], mode: str) -> Interval:
    """exp(nats / tokens), and its interval over documents."""
    return intervals.ratio(*_columns(rows, mode, "tokens"), log=True)


def difference(first: Sequence[Row], second: Sequence[Row], mode: str, unit: str = "bits_per_byte") -> Interval:
    """The second model's perplexity, or bits per byte, less the first's, on the same documents: paired.

    Raises:
        ValueError: the documents are not the same; or perplexities over different tokens.
    """
    if unit not in ("bits_per_byte", "perplexity"):
        raise ValueError(f"unit={unit!r} must be bits_per_byte or perplexity")
    facts = ("index", "source", "domain", "bytes")
    if [[row[name] for name in facts] for row in first] != [[row[name] for name in facts] for row in second]:
        raise ValueError("the rows are not of the same documents, so they cannot be paired")
    if unit == "bits_per_byte":
        return intervals.difference(_bits(first, mode), _bits(second, mode))
    if [row["tokens"] for row in first] != [row["tokens"] for row in second]:
        raise ValueError("the models cut the texts into different tokens: only their bits per byte can be compared")
    return intervals.difference(_columns(first, mode, "tokens"), _columns(second, mode, "tokens"), log=True)


def modes_of(rows: Sequence[Row]) -> list[str]:
    """What was measured."""
    return [mode for mode in MODES if rows and mode in rows[0]]


def token_counts(folder: TokenFolder, vocab_size: int) -> Int64[np.ndarray, "W"]:
    """How often each token id stands in a token folder: the training split, for `buckets`."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    if folder.tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{folder.path} is of {folder.tokenizer}, and this model knows {vocab_size} token ids")
    for shard in folder.shards:
        for block in blocks(shard.tokens):
            counts += np.bincount(block.astype(np.int64), minlength=vocab_size)
    return counts


def bucket(count: int) -> int:
    """The lower edge of a frequency's bucket: 0, 1, 10, 100, ...: never seen, seen up to 9 times, up to 99, ..."""
    return 0 if count == 0 else 10 ** (len(str(count)) - 1)


def frequency_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Perplexity of targets by how often they were seen in training, rare ones first (arXiv:2405.04517, Fig. 2).

    In the first mode that was measured.
    """
    sums: dict[int, list[float]] = {}
    for row in rows:
        for edge, (tokens, nats) in row.get("buckets", {}).items():
            held = sums.setdefault(int(edge), [0, 0.0])
            held[0] += tokens
            held[1] += nats
    return [
        {"seen_from": edge, "seen_below": 10 * edge or 1, "tokens": tokens, "perplexity": _exp(nats / tokens)}
        for edge, (tokens, nats) in sorted(sums.items())
    ]


def _nats(
    model: LanguageModel, texts: Sequence[list[int]], prefix: int, mode: str, window: int, batch_size: int
) -> list[np.ndarray]:
    """-log p of every token of every text."""
    pairs, owner = [], []
    for n, ids in enumerate(texts):
        for context, scored in scoring.windows(ids, prefix, window if mode == "windows" else max(len(ids), 1)):
            pairs.append(([*context, *scored], len(scored)))
            owner.append(n)
    chunk = window if mode == "windows" else scoring.CHUNK
    found: list[list[np.ndarray]] = [[] for _ in texts]
    parts: list[np.ndarray | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]))  # neighbours of equal length
    for begin in range(0, len(order), batch_size):
        some = order[begin : begin + batch_size]
        for index, nats in zip(some, scoring.token_nats(model, [pairs[i][0] for i in some], chunk=chunk), strict=True):
            parts[index] = nats[len(nats) - pairs[index][1] :]
    for n, part in zip(owner, parts, strict=True):
        assert part is not None, "every window was scored"
        found[n].append(part)
    return [np.concatenate(one) if one else np.empty(0) for one in found]


def _by_frequency(
    ids: Int64[np.ndarray, "n"], nats: np.ndarray, counts: Int64[np.ndarray, "W"]
) -> dict[str, tuple[int, float]]:
    edges = np.array([bucket(int(count)) for count in counts[ids]])
    return {
        str(edge): (int((edges == edge).sum()), float(nats[edges == edge].sum())) for edge in np.unique(edges).tolist()
    }


def _columns(rows: Sequence[Row], mode: str, below: str) -> tuple[list[float], list[float]]:
    if mode not in modes_of(rows):
        raise ValueError(f"mode {mode!r} was not measured; these rows have {', '.join(modes_of(rows)) or 'none'}")
    return [float(row[mode]) for row in rows], [float(row[below]) for row in rows]


def _bits(rows: Sequence[Row], mode: str) -> tuple[list[float], list[float]]:
    nats, size = _columns(rows, mode, "bytes")
    return [one / math.log(2) for one in nats], size


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond it a double is infinite anyway
