"""prepare, tokenizer, inspect: thin, plain when piped, and a sentence where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from openxlstm.cli import main
from openxlstm.data import preparation
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import META, TokenFolder


def xlstm(*arguments: object) -> Result:
    """Run a command as a terminal would, its output captured."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shown(*arguments: object) -> str:
    """What a command prints that succeeds."""
    done = xlstm(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    """What a command says that cannot run; it must be a sentence, not a traceback."""
    done = xlstm(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Eighty texts; one of them mentions the end token."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number:02d}.txt").write_text(f"the value of {number} é is the value\n" * (number % 5 + 1))
    (folder / "end.txt").write_text("not the [end]: <|endoftext|>\n")
    return folder


@pytest.fixture(scope="module")
def made(texts) -> Path:
    """A prepared folder with a tokenizer of its own."""
    base = texts.parent
    shown("tokenizer", texts, "--vocab", 300, "--out", base / "tokenizer.json")
    shown("prepare", texts, "--out", base / "made", "--tokenizer", base / "tokenizer.json", "--split", "80/10/10")
    return base / "made"


def test_prepare_prints_counts_and_how_to_go_on(texts, tmp_path) -> None:
    lines = shown("prepare", texts, "--out", tmp_path / "out", "--split", "80/10/10").splitlines()
    assert lines[0] == f"{tmp_path / 'out'} is complete"
    folder = TokenFolder.open(tmp_path / "out/train")
    (row,) = [line.split() for line in lines if line.startswith("train ")]
    assert [word.replace(",", "") for word in row[1:4]] == [
        str(count) for count in (folder.total_documents, folder.total_tokens, folder.total_bytes)
    ]
    assert row[4:] == [f"{folder.total_bytes / folder.total_tokens:.2f}", folder.fingerprint[:12]]
    assert f"look:  xlstm inspect {tmp_path / 'out'}" in lines
    assert f"train: xlstm train stdlib-demo data.corpus={tmp_path / 'out'} --out runs/out" in lines


def test_prepare_tells_a_machine_all_of_it(texts, tmp_path) -> None:
    answer = json.loads(shown("prepare", texts, "--out", tmp_path / "out", "--split", "100/0/0", "--json"))
    assert list(answer["splits"]) == ["train"]
    assert answer["splits"]["train"]["documents"] == 81
    assert answer["splits"]["train"]["fingerprint"] == TokenFolder.open(tmp_path / "out/train").fingerprint
    assert answer["left_out"] == {"empty": 0, "not_text": 0}


def test_prepare_says_which_split_got_nothing_and_what_was_left_out(tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for name, raw in (("a.txt", b"a"), ("b.txt", b""), ("c.txt", b"\xff")):
        (tmp_path / "texts" / name).write_bytes(raw)
    said = shown("prepare", tmp_path / "texts", "--out", tmp_path / "out", "--split", "100/0/0")
    assert "left out: 1 empty texts, 1 files that are not UTF-8 text" in said
    assert "no document fell into valid" in said


def test_prepare_cuts_a_file_where_it_is_told(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n\nmore\n---\nthree\n")
    for delimiter, count in ((r"\n---\n", 3), ("---", 3), ("blank", 2), ("none", 1)):
        out = tmp_path / delimiter.replace("\\n", "n")
        arguments = ("--split", "100/0/0", "--delimiter", delimiter, "--json")
        answer = json.loads(shown("prepare", tmp_path / "a.txt", "--out", out, *arguments))
        assert answer["splits"]["train"]["documents"] == count


def test_prepare_refuses_in_a_sentence(texts, tmp_path) -> None:
    out = ("--out", tmp_path / "out")
    assert "xlstm prepare SRC... --out OUT" in refused("prepare", texts)
    assert "xlstm prepare SRC... --out OUT" in refused("prepare", *out)
    assert "--split 98/1 must be three numbers" in refused("prepare", texts, *out, "--split", "98/1")
    assert "split 98/1/2 must be three shares of 100" in refused("prepare", texts, *out, "--split", "98/1/2")
    assert "there is no tokenizer at" in refused("prepare", texts, *out, "--tokenizer", tmp_path / "no.json")
    assert "there is no folder or file" in refused("prepare", tmp_path / "nowhere", *out)
    assert "--adopt works in place" in refused("prepare", texts, "--adopt", texts)
    assert "has no .ds file with tokens" in refused("prepare", "--adopt", texts)
    assert "--delimiter is empty" in refused("prepare", texts, *out, "--delimiter", "")
    (tmp_path / "slurm.toml").write_text("")
    slurm = ("--slurm", tmp_path / "slurm.toml")
    assert "--slurm and --ray exclude each other" in refused("prepare", texts, *out, *slurm, "--ray")
    assert "slurm.toml does not say time" in refused("prepare", texts, *out, *slurm)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_a_sentence_and_the_same_command_goes_on(texts, tmp_path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ("prepare", texts, "--out", tmp_path / "out")
    monkeypatch.setattr(preparation, "_manifest", stop)
    done = xlstm(*command)
    assert done.exit_code == 130
    assert done.stderr == "stopped; the same command goes on from there\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert "is complete" in shown(*command)


def test_adopt_makes_a_token_folder_of_what_datatrove_wrote(made, tmp_path) -> None:
    folder = TokenFolder.open(made / "train")
    raw = np.array([*b"a", 256, *b"b"], "<u2").tobytes()
    (tmp_path / "00000_unshuffled.ds").write_bytes(raw)
    (tmp_path / "00000_unshuffled.ds.index").write_bytes(np.array([2, 3], "<u8").tobytes())
    said = shown("prepare", "--adopt", tmp_path)
    assert "is a token folder now" in said
    assert "1 documents do not end in the end token" in said
    assert list(TokenFolder.open(tmp_path).texts()) == [b"a", b"b"]
    assert "already is a token folder" in refused("prepare", "--adopt", tmp_path)
    (tmp_path / META).unlink()
    answer = json.loads(shown("prepare", "--adopt", tmp_path, "--json"))
    assert (answer["documents"], answer["without_end_token"], answer["bytes"]) == (2, 1, 2)
    assert folder.byte_level


def test_a_tokenizer_is_written_once(texts, tmp_path) -> None:
    answer = json.loads(shown("tokenizer", texts, "--vocab", 290, "--out", tmp_path / "new/t.json", "--json"))
    trained = Tokenizer.from_file(tmp_path / "new/t.json")
    assert answer == {"out": str(tmp_path / "new/t.json"), "vocab": trained.vocab_size, "sha256": trained.sha256}
    assert "exists, and what is made with it would no longer be readable" in refused(
        "tokenizer", texts, "--out", tmp_path / "new/t.json"
    )
    assert "vocabulary=5 must be at least 257" in refused(
        "tokenizer", texts, "--vocab", 5, "--out", tmp_path / "x.json"
    )
    assert "these texts have no further pair" in shown(
        "tokenizer", texts, "--vocab", 9999, "--out", tmp_path / "y.json"
    )


def test_inspect_shows_counts_documents_and_windows_with_their_resets(made) -> None:
    said = shown("inspect", made, "--documents", 2, "--windows", 1, "--window", "packed", "--context", 256)
    assert f"{made}: every token agrees with its hash" in said
    assert said.count("document ") == 2
    folder = TokenFolder.open(made / "train")
    assert next(folder.texts()).decode()[:60] in said
    assert f"{folder.total_documents} " in said
    window = said.split("window 0 of packed")[1]
    assert window.count("[reset]") > 1
    assert window.count("[reset]") - 1 <= window.count("[end]") <= window.count("[reset]")
    assert "\x1b" not in said  # piped: no colours


@pytest.mark.parametrize("window", ["stream", "packed", "docs", "lanes"])
def test_inspect_shows_every_token_of_a_window_once(made, window) -> None:
    command = ("inspect", made / "train", "--window", window, "--context", 50, "--windows", 3, "--json")
    answer = json.loads(shown(*command))
    folder = TokenFolder.open(made / "train")
    assert answer["parts"]["train"]["tokens"] == folder.total_tokens
    assert answer["parts"]["train"]["fingerprint"] == folder.fingerprint
    for pieces in answer["windows"]:
        assert sum(piece.get("tokens", 0) + piece.get("padding", 0) for piece in pieces) == 50
        assert all(piece.get("padding") or piece["learnt"] for piece in pieces)
    if window in ("packed", "docs"):
        assert all(piece["reset"] for pieces in answer["windows"] for piece in pieces if "reset" in piece)


def test_inspect_finds_what_is_damaged(texts, tmp_path) -> None:
    shown("prepare", texts, "--out", tmp_path / "out")
    file = tmp_path / "out/train/000_train.ds"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(raw)
    assert "000_train.ds is damaged" in refused("inspect", tmp_path / "out")
    assert "tokens were not read" in shown("inspect", tmp_path / "out", "--no-verify")
    file.unlink()
    assert "000_train.ds is missing" in refused("inspect", tmp_path / "out")
    assert f"there is no {tmp_path / 'ou'}; did you mean" in refused("inspect", tmp_path / "ou")
    assert "is not a token folder" in refused("inspect", texts)
    assert "must not be negative" in refused("inspect", tmp_path / "out", "--windows", -1)


def test_inspect_marks_what_is_not_learnt(tmp_path) -> None:
    (tmp_path / "00000_unshuffled.ds").write_bytes(np.array([*b"question", *b"answer", 256], "<u2").tobytes())
    (tmp_path / "00000_unshuffled.ds.index").write_bytes(np.array([15], "<u8").tobytes())
    (tmp_path / "00000_unshuffled.ds.loss").write_bytes(bytes([0] * 8 + [1] * 7))
    shown("prepare", "--adopt", tmp_path)
    said = shown("inspect", tmp_path, "--windows", 1, "--context", 20)
    assert "all but 8 marked ones" in said
    assert "[reset][not learnt]questionanswer[end][5 padding]" in said
