"""Length extrapolation (arXiv:2405.04517, Fig. 7): what happens beyond the length that a model was trained at?

The same tokens of the same documents are scored at T = 1, 2, 4, 8 times the trained length:

    windows    cut into windows of T, each read from an empty state: the paper's
    stateful   read in one pass, the state carried through the document

For every T the perplexity of all tokens; that of the last T_train places of each window, where all the context is; and
the loss by place, in buckets of powers of two. In `stateful` the place counts from the beginning of the document, and
the last places of a window of T are the same tokens as there: what differs is what the model remembers before them.

Documents shorter than the largest T are left out at every T, and what goes beyond a multiple of it is not scored, so
every number is about the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int64

from openxlstm.models.interface import LanguageModel
from openxlstm.tasks import intervals, scoring
from openxlstm.tasks.intervals import Interval
from openxlstm.tasks.kept import Kept

FACTORS = (1, 2, 4, 8)
STATEFUL = "stateful"
Row = Mapping[str, Any]
Sums = list[float]  # nats, tokens, nats of tokens that stand for bytes, bytes


def measure(
    model: LanguageModel,
    texts: Iterable[tuple[int, Sequence[int]]],
    prefix: int,
    kept: Kept,
    *,
    train_length: int,
    factors: Sequence[int] = FACTORS,
    bytes_of: Int64[np.ndarray, "W"],
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Score all long enough documents that are not in `kept` yet; a row of sums for each of them goes there.

    Args:
        model: in evaluation mode.
        texts: (number, token ids without the prefix) of every document.
        prefix: the id that the first token follows: the end id.
        train_length: T_train.
        bytes_of: how many bytes each id stands for, 0 for special ones: `Tokenizer.bytes_of`.
        batch_size: windows computed together.
        progress: called with (documents done, tokens read).

    Returns:
        How many documents were too short.

    Raises:
        ValueError: no document is long enough, or what `scoring` refuses.
    """
    lengths = lengths_of(train_length, factors)
    short = done = read = longest = 0
    for index, ids in texts:
        longest = max(longest, len(ids))
        if len(ids) < lengths[-1]:
            short += 1
            continue
        if index in kept:
            continue
        text = list(ids[: len(ids) // lengths[-1] * lengths[-1]])
        size = bytes_of[np.array(text)]
        row: dict[str, Any] = {"index": index, "tokens": len(text), "windows": {}}
        for T in lengths:
            nats = _in_windows(model, text, prefix, T, batch_size)
            row["windows"][str(T)] = _sums(nats, size, np.arange(len(text)) % T, T, train_length)
        (nats,) = scoring.token_nats(model, [[prefix, *text]])
        row[STATEFUL] = {
            str(T): _sums(nats, size, np.arange(len(text)), T, train_length) for T in lengths
        }  # fmt: skip
        kept.add([row])
        done, read = done + 1, read + len(text)
        if progress is not None:
            progress(done, read)
    if not kept.rows:
        raise ValueError(
            f"no document has the {lengths[-1]} tokens that {max(factors)} times the trained length asks for; the "
            f"longest has {longest}: give longer documents, or smaller factors"
        )
    return short


def lengths_of(train_length: int, factors: Sequence[int]) -> list[int]:
    """The lengths to test at, rising; all divide the largest, so that windows of all of them end together."""
    if train_length < 1 or not factors or min(factors) < 1:
        raise ValueError(f"train_length={train_length} and factors={list(factors)} must be at least 1")
    lengths = sorted({train_length * factor for factor in factors})
    if odd := [T for T in lengths if lengths[-1] % T]:
        raise ValueError(f"length {odd[0]} must divide the largest, {lengths[-1]}; powers of two as factors do")
    return lengths


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line per mode and T: perplexity and bits per byte of all tokens and of the last places; loss by place."""
    found = []
    for mode in ("windows", STATEFUL):
        for T in sorted(map(int, rows[0][mode])):
            parts = [row[mode][str(T)] for row in rows]
            everything, last = (_add(part[name] for part in parts) for name in ("all", "last"))
            places: dict[int, Sums] = {}
            for part in parts:
                for begin, sums in part["places"]:
                    places[begin] = _add([places.get(begin, [0.0] * 4), sums])
            found.append({
                "mode": mode, "length": T, "tokens": int(everything[1]),
                **_numbers(everything), **{f"last_{name}": value for name, value in _numbers(last).items()},
                "places": [
                    {"from": begin, "to": 2 * begin or 1, "tokens": int(sums[1]), **_numbers(sums)}
                    for begin, sums in sorted(places.items())
                ],
            })  # fmt: skip
    return found


def rise(rows: Sequence[Row], train_length: int) -> Interval:
    """Bits per byte beyond T_train less those in its last half, in windows of the largest T; paired over documents.

    About 0: nothing is lost beyond the trained length. Windows begin anywhere in a document, so the same kind of text
    is at every place; in `stateful` the first places are the beginnings of documents, and such a number would be about
    these.

    Raises:
        ValueError: T_train is no power of two, so places do not divide there.
    """
    if train_length < 2 or train_length & (train_length - 1):
        raise ValueError(f"train_length={train_length} must be a power of two, as the buckets of places are")
    T = str(max(map(int, rows[0]["windows"])))
    if int(T) == train_length:
        raise ValueError(f"nothing was read beyond the trained length of {train_length}; a factor above 1 does")
    before, beyond = [], []
    for row in rows:
        places = dict(row["windows"][T]["places"])
        before.append(places[train_length // 2])
        beyond.append(_add(sums for begin, sums in places.items() if begin >= train_length))
    return intervals.difference(_bits(before), _bits(beyond))


def carried(rows: Sequence[Row]) -> Interval:
    """Bits per byte of all tokens, `stateful` less windows of the smallest T: what the state brings along from before.

    The same tokens, paired over documents. Below 0: what is remembered beyond the trained length helps.
    """
    T = str(min(map(int, rows[0]["windows"])))
    return intervals.difference(*(_bits([row[mode][T]["all"] for row in rows]) for mode in ("windows", STATEFUL)))


def place_bucket(place: int) -> int:
    """The lower edge of a place's bucket: 0, 1, 2, 4, 8, ...: a bucket holds [edge, 2 edge)."""
    return 0 if place == 0 else 1 << (place.bit_length() - 1)


def _in_windows(model: LanguageModel, text: list[int], prefix: int, T: int, batch_size: int) -> np.ndarray:
    def pieces() -> Iterator[list[int]]:
        for begin in range(0, len(text), T):
            yield [text[begin - 1] if begin else prefix, *text[begin : begin + T]]

    found, waiting = [], pieces()
    while some := list(islice(waiting, batch_size)):
        found += scoring.token_nats(model, some, chunk=T)
    return np.concatenate(found)


def _sums(nats: np.ndarray, size: np.ndarray, place: np.ndarray, T: int, train_length: int) -> dict[str, Any]:
    """Sums over all tokens, over the last T_train places of every window of T, and by bucket of place."""
    in_window = place % T
    edges = np.array([place_bucket(int(one)) for one in place])
    return {
        "all": _sum(nats, size),
        "last": _sum(nats[in_window >= T - train_length], size[in_window >= T - train_length]),
        "places": [[edge, _sum(nats[edges == edge], size[edges == edge])] for edge in np.unique(edges).tolist()],
    }


def _sum(nats: np.ndarray, size: np.ndarray) -> Sums:
    return [float(nats.sum()), float(len(nats)), float(nats[size > 0].sum()), float(size.sum())]


def _add(sums: Iterable[Sums]) -> Sums:
    return [math.fsum(column) for column in zip(*sums, strict=True)]


def _numbers(sums: Sums) -> dict[str, float | None]:
    """Perplexity and bits per byte; None where there is no byte."""
    nats, tokens, of_bytes, size = sums
    return {
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": of_bytes / math.log(2) / size if size else None,
    }


def _bits(sums: Sequence[Sums]) -> tuple[list[float], list[float]]:
    return [one[2] / math.log(2) for one in sums], [one[3] for one in sums]
