"""Text appears whole: cut anywhere into tokens, the joined pieces are the text, and no stop string leaks."""

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from openxlstm.data.tokenizer import Tokenizer
from openxlstm.infer.detokenize import Characters, StopStrings

BYTES = Tokenizer.bytes()
TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)


@given(TEXTS)
def test_characters_appear_whole_and_at_once(text: str) -> None:
    characters, shown = Characters(BYTES), ""
    data = text.encode()
    for count, byte in enumerate(data, start=1):
        piece = characters.push(byte)
        assert "\ufffd" not in piece or "\ufffd" in text
        shown += piece
        assert shown == data[:count].decode(errors="ignore")  # a character never waits for the next one
    assert shown + characters.finish() == text


@given(st.binary(max_size=40))
def test_any_bytes_give_what_decoding_all_of_them_gives(data: bytes) -> None:
    characters = Characters(BYTES)
    shown = "".join(characters.push(byte) for byte in data) + characters.finish()
    assert shown == data.decode(errors="replace") == BYTES.decode(list(data))


def test_a_broken_byte_does_not_freeze_the_stream() -> None:
    characters = Characters(BYTES)
    assert characters.push(0xF0) == ""
    assert characters.push(ord("a")) == "\ufffda"


def test_special_tokens_are_no_text() -> None:
    characters = Characters(BYTES)
    assert [characters.push(token) for token in (0xC3, BYTES.end_id, 0xA9)] == ["", "", "é"]


def test_tokens_that_are_no_bytes_are_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="only from a byte-level tokenizer"):
        Characters(Tokenizer.from_json(words.to_str()))


def whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: cut before the stop string that is complete first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return text[: end - max(map(len, here))], True
    return text, False


@given(
    text=st.text(alphabet="ab", max_size=24),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings_do_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    wanted, found = whole(text, stops)
    machine, shown = StopStrings(stops), ""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(borders):
        shown += machine.push(text[start:end])
        assert wanted.startswith(shown)  # nothing is shown that would have to be taken back
    assert (machine.found is not None) == found
    assert shown + machine.finish() == wanted


def test_only_what_may_become_a_stop_string_waits() -> None:
    machine = StopStrings(["\n\nEND"])
    assert [machine.push(piece) for piece in ("a\n", "\n", "E", "x", "\n\nEN", "D rest", "more")] == [
        "a", "", "", "\n\nEx", "", "", "",
    ]  # fmt: skip
    assert machine.found == "\n\nEND"
    assert machine.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop contains an empty string"):
        StopStrings(["x", ""])
