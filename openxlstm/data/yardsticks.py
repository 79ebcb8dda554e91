"""What anybody can reach on the same bytes without a neural network: byte n-grams and general compressors.

The n-gram of order k predicts a byte from the k before it, with interpolated Witten-Bell smoothing (Witten and Bell
1991, "The zero-frequency problem"; method C). With N(c) occurrences of the context c in the training texts, D(c)
different bytes after it, and c' the context without its earliest byte,

    p(w | c) = (N(c w) + D(c) p(w | c')) / (N(c) + D(c)),      p(w | c) = p(w | c') if N(c) = 0,

down to 1/256 below order 0. Documents are independent: a symbol of its own stands before each, so how documents
begin is learned too. Like the bits per byte of a model, only bytes count; the end of a document is not predicted.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, UInt64

_BITS = 9  # a symbol: 256 bytes and the start of a document
_START = 256
_HIGHEST = 64 // _BITS - 1  # a context and its byte are packed into one uint64


def ngram_bits_per_byte(
    train_texts: Sequence[str | bytes],
    held_out_texts: Sequence[str | bytes],
    orders: Sequence[int] = (0, 1, 2, 3, 4),
) -> dict[int, float]:
    """Bits per byte of the held-out texts under n-grams of each order, fitted on the training texts.

    Takes a second and 0.3 GB per order for 11 MB of training text; the counts are sorted keys, not dictionaries.
    """
    if not orders or not all(0 <= order <= _HIGHEST for order in orders):
        raise ValueError(f"orders={tuple(orders)} must be numbers in 0..{_HIGHEST}")
    highest = max(orders)
    train, train_real = _symbols(train_texts, highest)
    held_out, held_out_real = _symbols(held_out_texts, highest)
    if not train_real.any() or not held_out_real.any():
        raise ValueError("both the training and the held-out texts must hold at least one byte")

    bits = {}
    train_key, key = np.zeros_like(train), np.zeros_like(held_out)
    p = np.full(np.count_nonzero(held_out_real), 1 / 256)
    for order in range(highest + 1):
        train_key, key = _longer(train_key, train), _longer(key, held_out)
        p = _interpolate(p, train_key[train_real], key[held_out_real])
        if order in orders:
            bits[order] = float(-np.log2(p).mean())
    return bits


def compressor_bits_per_byte(held_out: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the held-out bytes, which have seen nothing before them."""
    if not held_out:
        raise ValueError("there is not one byte to compress")
    sizes = {
        "gzip -9": len(gzip.compress(held_out, 9, mtime=0)),
        "xz -9": len(lzma.compress(held_out, preset=9)),
    }
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def _symbols(texts: Sequence[str | bytes], starts: int) -> tuple[UInt64[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """All texts in a row, each behind `starts` start symbols (at least one), and where the bytes are."""
    parts: list[np.ndarray] = []
    for text in texts:
        raw = text.encode() if isinstance(text, str) else text
        parts += [np.full(max(starts, 1), _START, np.uint64), np.frombuffer(raw, np.uint8).astype(np.uint64)]
    symbols = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    return symbols, symbols != _START


def _longer(key: UInt64[np.ndarray, "S"], symbols: UInt64[np.ndarray, "S"]) -> UInt64[np.ndarray, "S"]:
    """Keys one symbol longer: the key that ended just before each symbol, and then the symbol."""
    before = np.zeros_like(key)
    before[1:] = key[:-1]
    return (before << np.uint64(_BITS)) | symbols


def _interpolate(
    p: Float64[np.ndarray, "bytes"], train: UInt64[np.ndarray, "any"], key: UInt64[np.ndarray, "bytes"]
) -> Float64[np.ndarray, "bytes"]:
    """One order more: from p(w | c') to p(w | c), for the context and byte packed in each key."""
    train.sort()
    grams, N_gram = _runs(train)
    contexts, D = _runs(grams >> np.uint64(_BITS))
    N = np.add.reduceat(N_gram, np.cumsum(D) - D)
    seen, at = _find(contexts, key >> np.uint64(_BITS))
    gram_seen, gram_at = _find(grams, key)
    N, D = np.where(seen, N[at], 0), D[at]  # with N = 0 any D leaves p as it is
    return (np.where(gram_seen, N_gram[gram_at], 0) + D * p) / (N + D)


def _runs(ordered: UInt64[np.ndarray, "any"]) -> tuple[np.ndarray, np.ndarray]:
    """Different values of a sorted array, and how often each occurs."""
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    return ordered[first], np.diff(first, append=len(ordered))


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each wanted value is in a sorted array, and where (any valid place if it is not)."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return ordered[at] == wanted, at
