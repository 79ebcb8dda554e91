"""Files become documents: every one of them, in order, or an error with file and line."""

import gzip
import hashlib
import json

import pytest

from openxlstm.data import records
from openxlstm.data.corpus import files_of, read_corpus, split_of
from openxlstm.data.records import BLANK, WHOLE, Document, LeftOut, delimiter_of, documents

TEXTS = ["one\n", "zwei é\r\n", "<|endoftext|> is text here", "x" * 70_000, "\u2028 is no line break\n"]


def lines(texts, key="text"):
    return "".join(
        json.dumps({"id": number, key: text}, ensure_ascii=False) + "\n" for number, text in enumerate(texts)
    )


def read(path, text_key="text", delimiter=WHOLE):
    left_out = LeftOut()
    return [each.text for each in documents(path, path.name, text_key, delimiter, left_out)], left_out


def packed(path, raw):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames, as `cat a.zst b.zst` makes them
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])))
    else:
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.gz"])
def test_lines_of_json_are_documents_in_order(tmp_path, name):
    path = packed(tmp_path / name, lines([*TEXTS, "", None, "last"]).replace("last", "last\\u0000").encode() + b"\n \n")
    assert read(path) == ([*TEXTS, "last\0"], LeftOut(empty=2))


def test_rows_of_parquet_are_documents_in_order(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    many = [f"row {number}" for number in range(3000)]  # more than a batch, and several row groups
    table = arrow.table({"n": range(3002), "body": [*many, "", None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    assert read(tmp_path / "a.parquet", "body") == (many, LeftOut(empty=2))
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text'; its columns are n, body \(--text-key\)"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: row 1: 'n' is a int, not a text"):
        read(tmp_path / "a.parquet", "n")
    raw = (tmp_path / "a.parquet").read_bytes()
    for name, damaged in (("cut.parquet", raw[:-100]), ("none.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} is damaged, or no parquet file"):
            read(tmp_path / name, "body")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a', r"a.jsonl:3 is not JSON"),
        (b'{"text": "\xff"}', r"a.jsonl:3 is not JSON: .*utf-8"),
        (b'["text"]', r"a.jsonl:3 holds a list; every line must be an object"),
        (b'{"content": "a", "id": 1}', r"a.jsonl:3 has no key 'text'; its keys are content, id \(--text-key\)"),
        (b'{"text": 5}', r"a.jsonl:3: 'text' is a int, not a text"),
        (b'{"text": "\\ud800"}', r"a.jsonl:3: the text cannot be written as UTF-8"),
    ],
)
def test_a_damaged_line_is_an_error_with_file_and_line_and_nothing_is_dropped(tmp_path, line, complaint):
    path = packed(tmp_path / "a.jsonl", lines(["one", "two"]).encode() + line + b"\n" + lines(["four"]).encode())
    with pytest.raises(ValueError, match=complaint):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive_is_not_taken_for_a_short_one(tmp_path, name, damage):
    """zstandard's own stream reader takes a truncated file for a whole one."""
    raw = packed(tmp_path / name, lines(TEXTS * 20).encode()).read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(raw[:-9] if damage == "cut" else bytes(flipped))
    with pytest.raises(ValueError, match=r"a.jsonl.\w+ is damaged after line|is not JSON"):
        read(tmp_path / name)


def test_a_text_file_is_whole_or_cut(tmp_path):
    path = packed(tmp_path / "a.txt", b"one\ntwo\n\n \t\nthree\r\n\r\n\n\nfour")
    assert read(path)[0] == ["one\ntwo\n\n \t\nthree\r\n\r\n\n\nfour"]
    assert read(path, delimiter=BLANK)[0] == ["one\ntwo\n", "three\r\n", "four"]
    assert read(path, delimiter="two")[0] == ["one\n", " \t\nthree\r\n\r\n\n\nfour"]
    assert read(path, delimiter="five")[0] == ["one\ntwo\n\n \t\nthree\r\n\r\n\n\nfour"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_cutting_in_blocks_is_cutting_at_once(tmp_path, monkeypatch, block):
    """A delimiter may lie across blocks, and may look like its own beginning."""
    text = "a--b---c-d--" * 3 + "-" * 5 + "e-"
    monkeypatch.setattr(records, "_BLOCK", block)
    path = packed(tmp_path / "a.txt", text.encode())
    assert read(path, delimiter="--")[0] == [part for part in text.split("--") if part.strip()]


def test_where_a_file_that_stands_alone_is_cut(tmp_path):
    stories = packed(tmp_path / "stories.txt", b"Once\n\nupon\n<|endoftext|>\nTwo\n")
    book = packed(tmp_path / "book.txt", b"It says <|endoftext|> here\n\nand ends\n")
    assert [delimiter_of(path, "<|endoftext|>") for path in (stories, book)] == ["<|endoftext|>", BLANK]
    assert [each.text for each in read_corpus(stories).documents] == ["Once\n\nupon\n", "Two\n"]
    assert [each.text for each in read_corpus(book).documents] == ["It says <|endoftext|> here\n", "and ends\n"]
    assert [each.text for each in read_corpus(book, delimiter=WHOLE).documents] == [book.read_text()]
    assert [file.delimiter for file in files_of(tmp_path)] == [WHOLE, WHOLE]
    assert [file.delimiter for file in files_of(tmp_path, BLANK)] == [BLANK, BLANK]


def test_half_a_text_is_not_taken(tmp_path):
    for raw, complaint in ((b"one\n\n\xff\n", "is not UTF-8 text"), (b"one\n\n\0\n", "holds a NUL")):
        path = packed(tmp_path / "a.txt", raw)
        with pytest.raises(ValueError, match=complaint):
            read(path, delimiter=BLANK)
        assert read(path) == ([], LeftOut(not_text=1))


def test_a_record_is_named_by_its_text_so_equal_texts_share_a_split(tmp_path):
    path = packed(tmp_path / "a.jsonl", lines(["same", "other", "same"]).encode())
    names = [each.name for each in documents(path, "a.jsonl", "text", WHOLE, LeftOut())]
    assert names == [hashlib.sha256(text.encode()).hexdigest()[:32] for text in ("same", "other", "same")]
    moved = packed(tmp_path / "b.jsonl.gz", lines(["new first", "same"]).encode())
    assert names[0] == list(documents(moved, "b.jsonl.gz", "text", WHOLE, LeftOut()))[1].name


def test_a_folder_may_mix_texts_and_records(tmp_path):
    packed(tmp_path / "a.txt", b"text\n")
    packed(tmp_path / "b.jsonl.gz", lines(["one", "two"]).encode())
    packed(tmp_path / "c.json", b'{"text": "a document like any other"}')
    packed(tmp_path / "d.bin", b"\xff\xfe")
    corpus = read_corpus(tmp_path)
    assert [each.text for each in corpus.documents] == ["text\n", "one", "two", '{"text": "a document like any other"}']
    assert corpus.documents[0] == Document("a.txt", "text\n")
    assert (corpus.empty, corpus.not_text) == (0, 1)


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_without_its_reader_a_file_is_refused_with_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.lib", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: to read .*, pip install 'openxlstm\[data\]'"):
        read(tmp_path / name)


def test_shares_are_met_to_two_decimals_and_nest():
    names = [f"{number}.txt" for number in range(40_000)]
    fine = [split_of(name, (99.5, 0.25, 0.25)) for name in names]
    assert fine.count("valid") / 400 == pytest.approx(0.25, abs=0.08)  # standard deviation 0.025
    coarse = [split_of(name) for name in names]
    assert all(one == "train" for one, other in zip(fine, coarse) if other == "train")
    assert {split_of(name, (100.0, 0.0, 0.0)) for name in names} == {"train"}
