"""The corpus is the same wherever the files are the same, and says what it left out."""

import os

import pytest

from openxlstm.data.corpus import Corpus, Document, folder_documents, read_corpus, split_of, stdlib_documents


@pytest.fixture
def folder(tmp_path):
    files = {
        "b.txt": b"b\r\n",
        "a/z.py": "# é\n".encode(),
        "empty.txt": b"",
        "latin1.txt": b"\xe9",
        "binary.txt": b"text\x00text",
        ".hidden/secret.txt": b"secret",
        "a/.rc": b"secret",
    }
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    return tmp_path


def test_a_folder_is_its_visible_text_files_sorted_by_name(folder):
    corpus = read_corpus(folder)
    assert corpus.documents == [Document("a/z.py", "# é\n"), Document("b.txt", "b\r\n")]
    assert (corpus.empty, corpus.not_text) == (1, 2)
    assert folder_documents(folder) == corpus.documents


def test_the_fingerprint_is_the_content_and_not_the_place(folder, tmp_path_factory):
    before = read_corpus(folder).fingerprint
    moved = tmp_path_factory.mktemp("elsewhere") / "corpus"
    os.rename(folder, moved)
    assert read_corpus(moved).fingerprint == before
    (moved / "b.txt").write_text("c\r\n", newline="")
    changed = read_corpus(moved).fingerprint
    (moved / "b.txt").rename(moved / "c.txt")
    assert len({before, changed, read_corpus(moved).fingerprint}) == 3


def test_the_fingerprint_knows_where_a_name_and_a_text_end():
    pairs = ([("ab", "c")], [("a", "bc")], [("a", "b"), ("c", "")], [])
    corpora = [Corpus("here", [Document(*pair) for pair in each], 0, 0) for each in pairs]
    assert len({corpus.fingerprint for corpus in corpora}) == len(pairs)


def test_links_to_folders_and_pipes_are_not_followed(folder):
    os.symlink(folder, folder / "circle")
    os.mkfifo(folder / "pipe.txt")
    assert len(folder_documents(folder)) == 2


def test_the_library_has_no_tests_and_nothing_installed():
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "idle_test"))
    assert not any("site-packages" in name or name.startswith(("_sysconfigdata", "config-")) for name in names)
    assert sum(len(document.text) for document in documents) > 5e6
    assert all(document.text for document in documents)


def test_the_split_of_a_name_never_moves():
    """Stored, so that a result of today can be compared with one of next year."""
    stored = {"os.py": "valid", "ast.py": "test", "json/decoder.py": "valid", "typing.py": "train"}
    assert {name: split_of(name) for name in stored} == stored


def test_the_split_is_90_5_5_and_total():
    names = [f"{number}.txt" for number in range(20_000)]
    share = {split: sum(split_of(name) == split for name in names) / len(names) for split in ("train", "valid", "test")}
    assert sum(share.values()) == 1
    assert share["train"] == pytest.approx(0.9, abs=0.01)  # standard deviation 0.002
    assert share["valid"] == pytest.approx(0.05, abs=0.008)


def test_a_corpus_splits_into_disjoint_parts():
    corpus = read_corpus("stdlib")
    parts = [corpus.split(split) for split in ("train", "valid", "test")]
    assert sorted(each.name for part in parts for each in part) == [each.name for each in corpus.documents]
    assert all(parts)
    with pytest.raises(ValueError, match="split 'dev' must be one of train, valid, test"):
        corpus.split("dev")


def test_what_is_no_corpus_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="there is no folder or file .*nowhere"):
        read_corpus(folder / "nowhere")
    for name in ("b.txt", "a/z.py"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="holds no document: 1 files are empty, 2 are not UTF-8 text"):
        read_corpus(folder)
