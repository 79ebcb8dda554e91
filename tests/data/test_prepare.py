"""Prepared once, found again, complete or absent."""

import json
import os

import pytest

from openxlstm.data import prepare, tokens
from openxlstm.data.corpus import SPLITS, read_corpus
from openxlstm.data.prepare import prepare_corpus
from openxlstm.data.tokens import TokenFolder


@pytest.fixture
def texts(tmp_path):
    """150 files: enough that no split is empty."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number}.txt").write_text(f"text {number}\n" * (number % 7 + 1))
    return folder


def test_every_document_is_in_its_split(tmp_path, texts, byte):
    made = prepare_corpus(texts, tmp_path / "cache", byte)
    corpus = read_corpus(texts)
    manifest = json.loads((made / "corpus.json").read_text())
    for split in SPLITS:
        folder = TokenFolder.open(made / split)
        assert list(folder.texts()) == [each.text.encode() for each in corpus.split(split)]
        assert manifest["splits"][split]["fingerprint"] == folder.fingerprint
    assert manifest["corpus"] == corpus.fingerprint
    assert sum(each["documents"] for each in manifest["splits"].values()) == 150


def test_a_second_call_writes_nothing_and_another_corpus_or_tokenizer_gets_another_folder(tmp_path, texts, byte, bpe):
    cache = tmp_path / "cache"
    made = prepare_corpus(texts, cache, byte)
    written = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert prepare_corpus(texts, cache, byte, progress=lambda *_: pytest.fail("prepared again")) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == written
    other = prepare_corpus(texts, cache, bpe)
    (texts / "0.txt").write_text("changed")
    assert len({made, other, prepare_corpus(texts, cache, byte)}) == 3
    assert sorted(os.listdir(cache)) == sorted(each.name for each in cache.iterdir() if each.name.startswith("texts-"))


def test_progress_names_the_split(tmp_path, texts, byte):
    seen = {}
    prepare_corpus(
        texts, tmp_path / "cache", byte, progress=lambda split, done, total: seen.update({split: done / total})
    )
    assert seen == dict.fromkeys(SPLITS, 1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(tmp_path, texts, byte, monkeypatch, error):
    def interrupt(path, text):
        if path.name == "corpus.json":  # the very last file
            raise error
        tokens.write_atomically(path, text)

    monkeypatch.setattr(prepare, "write_atomically", interrupt)
    with pytest.raises(error if isinstance(error, type) else OSError):
        prepare_corpus(texts, tmp_path / "cache", byte)
    assert list((tmp_path / "cache").iterdir()) == []


def test_whoever_comes_second_takes_what_the_first_has_made(tmp_path, texts, byte, monkeypatch):
    first = prepare_corpus(texts, tmp_path / "first", byte)

    def overtaken(source, target):
        os.replace(first, target)
        raise OSError("Directory not empty")

    monkeypatch.setattr(os, "rename", overtaken)
    second = prepare_corpus(texts, tmp_path / "cache", byte)
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [second.name]
    assert TokenFolder.open(second / "train").total_documents > 100


def test_a_damaged_result_is_named_and_not_repaired_in_silence(tmp_path, texts, byte):
    made = prepare_corpus(texts, tmp_path / "cache", byte)
    (made / "valid" / "000_valid.ds").unlink()
    with pytest.raises(ValueError, match=r"000_valid.ds is missing.*; delete .*texts-\w+ to prepare it again"):
        prepare_corpus(texts, tmp_path / "cache", byte)


def test_one_changed_token_is_noticed(tmp_path, texts, byte):
    """It would be no error anywhere else: it would be learned."""
    made = prepare_corpus(texts, tmp_path / "cache", byte)
    file = made / "train" / "000_train.ds"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"000_train.ds is damaged: its sha256.*delete .* to prepare it again"):
        prepare_corpus(texts, tmp_path / "cache", byte)


def test_what_cannot_be_prepared_is_refused_before_anything_is_written(tmp_path, texts, byte):
    made = prepare_corpus(texts, tmp_path / "cache", byte)
    for tokens_already in (made, made / "train"):
        with pytest.raises(ValueError, match="holds tokens, not texts"):
            prepare_corpus(tokens_already, tmp_path / "other", byte)
    with pytest.raises(ValueError, match="lies inside the corpus"):
        prepare_corpus(texts, texts / "cache", byte)
    for path in list(texts.iterdir())[3:]:
        path.unlink()
    with pytest.raises(ValueError, match="has 3 documents and none of them falls into"):
        prepare_corpus(texts, tmp_path / "other", byte)
    assert not (tmp_path / "other").exists()
