"""Token folders: datatrove's layout to the byte, and every fault found at opening and named."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_texts import bpe_json

from openxlstm.data import tokens
from openxlstm.data.corpus import Document
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_tokens


@pytest.fixture
def folder(tmp_path, documents, byte):
    write_tokens(tmp_path / "tokens", documents, byte, name="train")
    return tmp_path / "tokens"


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    file, to_disk = tmp_path / "made.jsonl", tokens._to_disk
    program = "from pathlib import Path; from openxlstm.data.tokens import write_atomically; "
    program += f"write_atomically(Path({str(file)!r}), 'theirs')"

    def meanwhile(stream):
        subprocess.run([sys.executable, "-c", program], check=True)
        assert file.read_text() == "theirs"
        to_disk(stream)

    monkeypatch.setattr(tokens, "_to_disk", meanwhile)
    tokens.write_atomically(file, "ours")
    assert file.read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["made.jsonl"]


def test_a_text_that_could_not_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    def full(stream):
        raise OSError(28, "No space left on device")

    tokens.write_atomically(tmp_path / "plan.json", "before")
    monkeypatch.setattr(tokens, "_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        tokens.write_atomically(tmp_path / "plan.json", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("plan.json", "before")]


def test_the_layout_is_ids_and_exclusive_ends(folder):
    ends = np.frombuffer((folder / "000_train.ds.index").read_bytes(), "<u8")
    assert ends.tolist()[:3] == [5, 14, 16]  # "one\n", "zwei é\n" with two bytes for é, "x"; each with its end token
    ids = np.frombuffer((folder / "000_train.ds").read_bytes(), "<u2")
    assert ids[:16].tolist() == [*b"one\n", 256, *"zwei é\n".encode(), 256, *b"x", 256]
    assert ends[-1] == len(ids)
    assert (folder / "000_train.ds.metadata").read_text().split("\n")[:2] == ["tokenizer.json|2", str(len(ids))]


def test_what_was_written_is_read(folder, documents, byte, bpe, tmp_path):
    write_tokens(tmp_path / "bpe", documents, bpe)
    for path, tokenizer in ((folder, byte), (tmp_path / "bpe", bpe)):
        read = TokenFolder.open(path)
        texts = [document.text.encode() for document in documents]
        assert list(read.texts()) == texts
        assert read.total_bytes == sum(map(len, texts))
        assert read.total_documents == len(documents)
        assert read.total_tokens == sum(len(tokenizer.encode(each.text)) + 1 for each in documents)
        assert read.tokenizer.sha256 == tokenizer.sha256
        assert read.byte_level
        read.verify()


def test_a_large_vocabulary_takes_four_bytes(tmp_path, documents):
    data = json.loads(bpe_json())
    data["model"]["vocab"]["returnreturn"] = 70_000
    write_tokens(tmp_path, documents, Tokenizer.from_json(json.dumps(data)))
    read = TokenFolder.open(tmp_path)
    assert read.shards[0].tokens.dtype == np.uint32
    assert list(read.texts()) == [document.text.encode() for document in documents]


def test_a_normalizer_that_changes_texts_costs_the_byte_table(tmp_path):
    """NFC makes 2 bytes of a decomposed é, which has 3: tokens no longer add up to the text, and the folder says so."""
    nfc = Tokenizer.from_json(bpe_json(normalizer="NFC"))
    for name, text, exact in (("kept", "caf\u00e9", True), ("changed", "cafe\u0301", False)):
        write_tokens(tmp_path / name, [Document("a", text)], nfc)
        read = TokenFolder.open(tmp_path / name)
        assert read.byte_level is exact
        assert read.total_bytes == len(text.encode())


def test_the_fingerprint_is_the_content(tmp_path, documents, byte, bpe):
    def fingerprint(name, docs, tokenizer, **options):
        write_tokens(tmp_path / name, docs, tokenizer, **options)
        return TokenFolder.open(tmp_path / name).fingerprint

    same = [fingerprint("a", documents, byte), fingerprint("b", documents, byte, made_by={"who": "else"})]
    same_lengths = [Document(each.name, each.text.replace("x", "y")) for each in documents]
    others = [
        fingerprint("c", same_lengths, byte),
        fingerprint("d", documents[::-1], byte),
        fingerprint("e", documents, bpe),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


def test_progress_counts_documents(tmp_path, documents, byte):
    seen = []
    write_tokens(tmp_path, documents, byte, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path):
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def _edit_meta(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "damage", "complaint"),
    [
        ("000_train.ds", lambda path: path.unlink(), r"000_train.ds is missing"),
        ("000_train.ds", _truncate, r"000_train.ds has \d+ bytes, but by .*meta.json it must have \d+"),
        ("000_train.ds.index", lambda path: path.unlink(), r"000_train.ds.index is missing"),
        ("000_train.ds.index", _truncate, r"000_train.ds.index has \d+ bytes"),
        ("000_train.ds.index", _flip, r"000_train.ds.index is damaged"),
        (
            "000_train.ds.loss",
            lambda path: path.write_bytes(b"\0"),
            r"000_train.ds.loss marks tokens .* knows nothing of it",
        ),
        ("tokenizer.json", lambda path: path.unlink(), r"no tokenizer at .*tokenizer.json"),
        ("tokenizer.json", lambda path: path.write_text(bpe_json()), r"tokenizer.json is not the tokenizer that"),
        ("meta.json", lambda path: path.unlink(), r"unfinished one: there is no meta.json"),
        ("meta.json", _truncate, r"meta.json is not JSON"),
        ("meta.json", _edit_meta(format="openxlstm-tokens/2"), r"has format 'openxlstm-tokens/2'; this version reads"),
        ("meta.json", _edit_meta(end_id=0), r"meta.json has been edited"),
        ("meta.json", _edit_meta(tokenizer={}), r"meta.json lacks a field .*'sha256'"),
    ],
)
def test_every_fault_is_found_at_opening_and_named(folder, file, damage, complaint):
    damage(folder / file)
    with pytest.raises(ValueError, match=complaint):
        TokenFolder.open(folder)


def test_a_damaged_token_of_the_right_size_is_found_by_verify(folder):
    _flip(folder / "000_train.ds")
    with pytest.raises(ValueError, match=r"000_train.ds is damaged"):
        TokenFolder.open(folder).verify()


def test_what_cannot_become_a_token_folder_is_refused_before_anything_is_written(folder, tmp_path, documents, byte):
    with pytest.raises(ValueError, match="already is a token folder"):
        write_tokens(folder, documents, byte)
    with pytest.raises(ValueError, match="not one document"):
        write_tokens(tmp_path / "new", [], byte)
    endless = Tokenizer.from_json(byte.json.replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(ValueError, match="no token to end a document with"):
        write_tokens(tmp_path / "new", documents, endless)
    assert not (tmp_path / "new").exists()


def test_the_bytes_are_those_of_datatrove(tmp_path, documents, bpe):
    """datatrove's own tokenization step on the same texts, without shuffling. Skipped where it is not installed."""
    pytest.importorskip("datatrove")
    bpe.save(tmp_path / "tokenizer.json")
    documents = [each for each in documents if "<|" not in each.text]  # datatrove reads the end token in a text as one
    (tmp_path / "texts.json").write_text(json.dumps([each.text for each in documents]))
    program = """if True:
        import json, sys
        from datatrove.data import Document
        from datatrove.pipeline.tokens import DocumentTokenizer
        out = sys.argv[1]
        step = DocumentTokenizer(f"{out}/theirs", f"{out}/tokenizer.json", eos_token="<|endoftext|>",
                                 shuffle_documents=False)
        texts = json.load(open(f"{out}/texts.json"))
        step.run([Document(text=text, id=str(number)) for number, text in enumerate(texts)], rank=0, world_size=1)
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    write_tokens(tmp_path / "ours", documents, bpe)
    for suffix in ("", ".index"):
        theirs = (tmp_path / f"theirs/00000_unshuffled.ds{suffix}").read_bytes()
        assert (tmp_path / f"ours/000_tokens.ds{suffix}").read_bytes() == theirs
