"""A tokenizer of one's own: exact, the same each time, and blind to what is held out."""

import pytest

from openxlstm.data.corpus import Document, split_of, stdlib_documents
from openxlstm.data.tokenizer import END_OF_TEXT
from openxlstm.data.train_tokenizer import for_training, train_bpe


def test_it_spells_any_text_and_compresses_what_it_knows():
    texts = [each.text for each in stdlib_documents()[:60]]
    trained = train_bpe(texts, 512)
    assert trained.vocab_size == 512
    assert trained.byte_level
    assert trained.end_id == trained._inner.token_to_id(END_OF_TEXT)
    for text in (*texts[:5], "grüße, 世界 🙂\r\n", "<|endoftext|>", "\x00\x7f", "".join(map(chr, range(0x250)))):
        ids = trained.encode(text)
        assert trained.decode_bytes(ids) == text.encode()
        assert sum(trained.bytes_of[ids]) == len(text.encode())
    assert len(trained.encode(texts[0])) < 0.6 * len(texts[0].encode())


def test_the_same_texts_give_the_same_file():
    texts = [each.text for each in stdlib_documents()[:40]]
    assert train_bpe(texts, 400).sha256 == train_bpe(iter(texts), 400).sha256 != train_bpe(texts[1:], 400).sha256


def test_small_texts_give_a_small_vocabulary():
    assert train_bpe(["abc"], 1000).vocab_size == 257
    assert train_bpe(["ababab ababab"], 1000).vocab_size < 270


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="vocabulary=256 must be at least 257"):
        train_bpe(["a"], 256)
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        train_bpe([], 300)


def test_held_out_documents_are_not_looked_at():
    documents = [Document(f"{number}.txt", f"{number}") for number in range(500)]
    seen = set(for_training(documents))
    assert seen == {each.text for each in documents if split_of(each.name) == "train"}
    assert seen <= {each.text for each in documents if split_of(each.name, (98.0, 1.0, 1.0)) == "train"}
