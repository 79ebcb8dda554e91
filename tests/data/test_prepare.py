"""Prepared once, found again, complete or absent."""

import json
import os
import shutil

import pytest

from openxlstm.data import prepare, tokens
from openxlstm.data.corpus import SPLITS, read_corpus
from openxlstm.data.prepare import open_source, prepare_corpus
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


def test_a_source_is_whatever_a_recipe_may_name(tmp_path, texts, byte):
    cache = tmp_path / "cache"
    from_texts = open_source(texts, byte, cache)
    assert list(from_texts) == list(SPLITS)
    (made,) = cache.iterdir()
    for path in (made, str(made)):
        assert {split: part.path for split, part in open_source(path, byte, cache).items()} == {
            split: made / split for split in SPLITS
        }
    assert [part.path for part in open_source(made / "valid", byte, cache).values()] == [made / "valid"]
    assert list(open_source(made / "valid", byte, cache)) == ["train"]
    shutil.rmtree(made / "test")
    assert list(open_source(made, byte, cache)) == ["train", "valid"]
    assert [each.name for each in cache.iterdir()] == [made.name]


def test_one_text_file_is_a_source(tmp_path, byte):
    (tmp_path / "book.v1.txt").write_text("".join(f"paragraph {number}\nof it\n\n" for number in range(200)))
    opened = open_source(tmp_path / "book.v1.txt", byte, tmp_path / "cache")
    assert sum(part.total_documents for part in opened.values()) == 200
    assert opened["train"].path.parent.name.startswith("book.v1-")
    (tmp_path / "note.txt").write_text("a single paragraph")
    with pytest.raises(ValueError, match="note.txt has 1 documents and none of them falls into"):
        open_source(tmp_path / "note.txt", byte, tmp_path / "cache")


def test_tokens_of_another_tokenizer_are_no_source(tmp_path, texts, byte, bpe):
    cache = tmp_path / "cache"
    made = open_source(texts, byte, cache)["train"].path.parent
    for path in (made, made / "train"):
        with pytest.raises(ValueError, match=r"train holds tokens of another tokenizer \(257 ids, .*wanted: 287 ids"):
            open_source(path, bpe, cache)
    with pytest.raises(ValueError, match="there is no folder or file .*nowhere"):
        open_source(tmp_path / "nowhere", byte, cache)
