"""A tokenizer decodes exactly what it encoded, knows its bytes, and refuses what would change data in silence."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_texts import TEXTS, bpe_json

from openxlstm.data.tokenizer import Tokenizer

BYTE, BPE = Tokenizer.bytes(), Tokenizer.from_json(bpe_json())  # hypothesis and fixtures do not mix well


def test_the_byte_tokenizer_is_one_file_on_every_machine(byte):
    assert byte.sha256 == "d6e150873f4af2cccb4b8da73d9fba9686d8c2368bc2dec265bd4955cac5fc76"
    assert (byte.vocab_size, byte.end_id, byte.byte_level) == (257, 256, True)
    assert byte.bytes_of.tolist() == [1] * 256 + [0]
    assert byte.encode("aé") == [97, 0xC3, 0xA9]


@pytest.mark.parametrize("text", TEXTS)
def test_the_short_cut_for_bytes_is_what_the_library_does(byte, text):
    library = Tokenizer.from_json(byte.json + "\n")  # another file, so without the short cut
    assert library.sha256 != byte.sha256
    assert library.encode(text) == byte.encode(text) == list(text.encode())
    assert library.decode(byte.encode(text)) == text


def test_every_byte_has_its_token(byte):
    assert byte.decode_bytes(np.arange(256)) == bytes(range(256))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(json.loads(byte.json)["model"]["vocab"]) == set(alphabet)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)  # a busy machine is not a fault
def test_whatever_is_encoded_decodes_to_the_same_text(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.bytes_of[ids].sum() == len(text.encode())


def test_a_batch_is_its_texts(bpe):
    assert bpe.encode_batch(TEXTS) == [bpe.encode(text) for text in TEXTS]
    assert any(len(ids) < len(text.encode()) for ids, text in zip(bpe.encode_batch(TEXTS), TEXTS)), "no merge was used"


def test_a_special_token_in_a_text_is_text(bpe, byte):
    for tokenizer in (bpe, byte):
        assert tokenizer.end_id not in tokenizer.encode("before <|endoftext|> after")


def test_special_tokens_decode_to_nothing_and_added_ones_to_themselves(bpe):
    ids = bpe.encode("a<tab>b")
    assert len(ids) == 3
    assert bpe.bytes_of[ids].tolist() == [1, 5, 1]
    assert bpe.decode_bytes([bpe.end_id, *ids, bpe.end_id]) == b"a<tab>b"


def test_half_a_character_is_replaced_in_text_and_kept_in_bytes(byte):
    half = byte.encode("é")[:1]
    assert byte.decode(half) == "\N{REPLACEMENT CHARACTER}"
    assert byte.decode_bytes(half) == b"\xc3"


def test_truncation_padding_and_postprocessing_in_the_file_do_not_touch_a_text(bpe):
    text = "def function(value): return the returned value"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    start = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": start, "pair": start, "special_tokens": special}
    meddling = Tokenizer.from_json(bpe_json(truncation=truncation, padding=padding, post_processor=template))
    assert meddling.encode(text) == bpe.encode(text)


def test_identity_is_the_file_and_saving_keeps_it(tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path)
    assert again.sha256 == bpe.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    (tmp_path / "windows.json").write_bytes(bpe.json.replace("\n", "").encode() + b"\r\n")
    assert Tokenizer.from_file(tmp_path / "windows.json").json.endswith("\r\n")


WORDS = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"},
}


def test_without_bytes_a_tokenizer_still_works_and_says_what_it_cannot():
    words = Tokenizer.from_json(json.dumps(WORDS))
    assert (words.byte_level, words.end_id, words.vocab_size) == (False, None, 3)
    assert words.decode(words.encode("a b a")) == "a b a"
    with pytest.raises(ValueError, match="decode_bytes needs a byte-level tokenizer.*use decode"):
        words.decode_bytes([0])
    with pytest.raises(ValueError, match="bytes_of needs a byte-level tokenizer"):
        _ = words.bytes_of


@pytest.mark.parametrize("wrong", [-1, 257])
def test_an_unknown_id_is_refused_by_name(byte, wrong):
    with pytest.raises(ValueError, match=rf"token id {wrong} is not in the vocabulary of .*, 0\.\.256"):
        byte.decode([65, wrong])


def test_a_text_that_is_not_unicode_is_refused(byte, bpe):
    for tokenizer in (byte, bpe):
        with pytest.raises(ValueError, match="text 1 cannot be written as UTF-8"):
            tokenizer.encode_batch(["fine", "half a pair \ud800"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "has no table 'model'"),
        ('{"model": {"type": "nonsense"}}', "that tokenizers can read"),
        (bpe_json().replace('"dropout": null', '"dropout": 0.1'), "dropout=0.1"),
        (json.dumps(WORDS | {"model": WORDS["model"] | {"vocab": {}}}), "empty vocabulary"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"broken.json.*{complaint}"):
        Tokenizer.from_file(path)


def test_a_file_that_is_no_text_or_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model.bin is not UTF-8"):
        Tokenizer.from_file(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer.json"):
        Tokenizer.from_file(tmp_path)
