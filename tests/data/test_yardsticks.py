"""The n-grams against the formula written with dictionaries, and the compressors against the programs' formats."""

import gzip
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.data.yardsticks import compressor_bits_per_byte, ngram_bits_per_byte

START = 256


def plain(train: list[bytes], held_out: list[bytes], order: int) -> float:
    """Interpolated Witten-Bell, as it stands in the literature."""
    counts = [defaultdict(Counter) for _ in range(order + 1)]
    for text in train:
        symbols = [START] * order + list(text)
        for at in range(order, len(symbols)):
            for k in range(order + 1):
                counts[k][tuple(symbols[at - k : at])][symbols[at]] += 1

    def p(w: int, context: tuple[int, ...]) -> float:
        shorter = p(w, context[1:]) if context else 1 / 256
        seen = counts[len(context)].get(context)
        if not seen:
            return shorter
        return (seen[w] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = 0.0
    for text in held_out:
        symbols = [START] * order + list(text)
        bits -= sum(math.log2(p(symbols[at], tuple(symbols[at - order : at]))) for at in range(order, len(symbols)))
    return bits / sum(map(len, held_out))


texts = st.lists(st.binary(max_size=30) | st.text("ab\n", max_size=60).map(str.encode), min_size=1, max_size=5)


@given(train=texts.filter(any), held_out=texts.filter(any))
@settings(max_examples=60, deadline=None)  # a busy machine is not a fault
def test_the_numbers_are_those_of_the_formula(train, held_out):
    got = ngram_bits_per_byte(train, held_out)
    assert got == pytest.approx({order: plain(train, held_out, order) for order in range(5)}, rel=1e-12)


def test_an_untrained_guess_of_a_known_answer():
    """Train "aab", score "ab" at order 0: N = 3, D = 2, so p(a) = (2 + 2/256)/5 and p(b) = (1 + 2/256)/5."""
    expected = -(math.log2((2 + 2 / 256) / 5) + math.log2((1 + 2 / 256) / 5)) / 2
    assert ngram_bits_per_byte(["aab"], ["ab"], orders=(0,)) == {0: pytest.approx(expected, rel=1e-14)}


def test_probabilities_sum_to_one():
    """Over all 256 bytes after a context, known or not: 2^-bits of one-byte documents after a shared start."""
    train = [b"abracadabra", b"ab", b"\xffb"]
    for prefix in (b"", b"a", b"zq"):
        before = len(prefix) * ngram_bits_per_byte(train, [prefix], (3,))[3] if prefix else 0.0
        after = [(len(prefix) + 1) * ngram_bits_per_byte(train, [prefix + bytes([w])], (3,))[3] for w in range(256)]
        assert sum(2 ** (before - bits) for bits in after) == pytest.approx(1, rel=1e-10)


def test_documents_are_independent():
    train, held_out = [b"one two", b"three four"], [b"two", b"", b"three"]
    apart = [ngram_bits_per_byte(train, [text])[4] * len(text) for text in held_out if text]
    assert ngram_bits_per_byte(train[::-1], held_out)[4] == pytest.approx(sum(apart) / 8, rel=1e-12)
    assert ngram_bits_per_byte(train, [b"twothree"])[4] != pytest.approx(sum(apart) / 8)


def test_text_and_its_bytes_are_the_same():
    assert ngram_bits_per_byte(["grün"], ["grüße"]) == ngram_bits_per_byte(["grün".encode()], ["grüße".encode()])


def test_orders_can_be_chosen():
    every = ngram_bits_per_byte(["banana"], ["bandana"], orders=range(7))
    assert ngram_bits_per_byte(["banana"], ["bandana"], orders=(6, 2)) == {2: every[2], 6: every[6]}


def test_compressors_are_those_of_the_command_line():
    data = np.random.default_rng(0).integers(97, 105, 20_000).astype(np.uint8).tobytes()  # 3 bits per byte
    got = compressor_bits_per_byte(data)
    assert list(got) == ["gzip -9", "xz -9"]
    assert all(3.0 < bits < 4.0 for bits in got.values())
    assert got["gzip -9"] == 8 * len(gzip.compress(data, 9)) / len(data)
    assert got["xz -9"] == 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9)) / len(data)


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"orders=\(7,\) must be numbers in 0\.\.6"):
        ngram_bits_per_byte(["a"], ["a"], orders=(7,))
    for train, held_out in ([], ["a"]), (["a"], [""]):
        with pytest.raises(ValueError, match="must hold at least one byte"):
            ngram_bits_per_byte(train, held_out)
    with pytest.raises(ValueError, match="not one byte"):
        compressor_bits_per_byte(b"")
