"""Token files of others: read exactly, through windows too, or refused by name."""

import json

import numpy as np
import pytest
from tiny_texts import bpe_json

from openxlstm.data import foreign
from openxlstm.data.feed import Feed
from openxlstm.data.prepare import open_source
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, write_tokens


def ids(documents, tokenizer, *, before=False):
    """All documents in a row, each with its end token behind it, or before it as llm.c has it."""
    parts = [tokenizer.encode(each.text) for each in documents]
    return [one for part in parts for one in ([tokenizer.end_id, *part] if before else [*part, tokenizer.end_id])]


def bin_file(path, tokens, *, magic=None, size=2, count=None, version=None):
    header = b""
    if magic is not None:
        words = [
            magic,
            foreign.MAGIC[magic][0] if version is None else version,
            len(tokens) if count is None else count,
        ]
        header = np.array(words + [0] * 253, "<i4").tobytes()
    path.write_bytes(header + np.array(tokens, f"<u{size}").tobytes())
    return path


def datatrove_folder(folder, documents, tokenizer, *, name="00000_00000_doc_shuffled.ds", size=2, loss=None, end=True):
    """What datatrove's DocumentTokenizer leaves: ids, index, metadata that names some tokenizer, perhaps marks."""
    folder.mkdir(exist_ok=True)
    parts = [[*tokenizer.encode(each.text), *([tokenizer.end_id] if end else [])] for each in documents]
    ends = np.cumsum([len(part) for part in parts])
    (folder / name).write_bytes(np.array([one for part in parts for one in part], f"<u{size}").tobytes())
    (folder / f"{name}.index").write_bytes(ends.astype("<u8").tobytes())
    (folder / f"{name}.metadata").write_text(f"gpt2|{size}\n{ends[-1]}\n{ends[-1]} T")
    if loss is not None:
        (folder / f"{name}.loss").write_bytes(bytes(loss))
    return folder


@pytest.mark.parametrize(("magic", "size"), [(None, 2), (20240520, 2), (20240801, 4)])
def test_a_bin_file_is_the_documents_it_was_made_of(tmp_path, documents, bpe, magic, size):
    documents = [each for each in documents if each.text]
    path = bin_file(tmp_path / "x.bin", ids(documents, bpe, before=magic is not None), magic=magic, size=size)
    folder = foreign.open_bins([path], bpe)
    assert [each.decode() for each in folder.texts()] == [each.text for each in documents]
    assert folder.total_bytes == sum(len(each.text.encode()) for each in documents)
    assert folder.byte_level
    folder.verify()
    write_tokens(tmp_path / "ours", documents, bpe)
    ours = TokenFolder.open(tmp_path / "ours")
    for window in ("stream", "packed", "docs"):
        one, other = (
            Feed.open([(each, 1.0)], seed=3, window=window, context=7, batch=4) for each in (folder, ours)
        )  # fmt: skip
        if magic is None:  # the same tokens; llm.c lacks the last end token
            for step in range(3):
                got, want = one.rows(one.step(step)), other.rows(other.step(step))
                assert all((getattr(got, name) == getattr(want, name)).all() for name in got.__slots__)
        else:
            assert one.rows(one.step(0)).valid.any()


def test_without_end_tokens_a_bin_file_is_one_document(tmp_path, byte):
    """As nanoGPT's shakespeare_char is, which has characters for tokens."""
    folder = foreign.open_bins([bin_file(tmp_path / "x.bin", list(b"To be"))], byte)
    assert list(folder.texts()) == [b"To be"]
    assert folder.shards[0].ends.tolist() == [5]


@pytest.mark.parametrize(
    ("tokens", "options", "complaint"),
    [
        ([], {}, r"x.bin has 0 bytes, which is no number of ids of 2 bytes"),
        ([1, 2, 300], {}, r"x.bin holds the id 300, and Tokenizer.* has none of it"),
        ([1, 2, 3, 4], {"size": 4}, r"every second id of .*x.bin is 0, so its ids have 4 bytes"),
        ([1, 2], {"magic": 20240520, "count": 3}, r"x.bin has version 1 and 1028 bytes; with 3 ids .* 1030 bytes"),
        ([1, 2], {"magic": 20240801, "size": 2}, r"x.bin has version 7 and 1028 bytes; .* version 7 and 1032 bytes"),
        ([1, 2], {"magic": 20240520, "version": 9}, r"x.bin has version 9"),
    ],
)
def test_a_bin_file_that_is_damaged_or_anothers_is_refused_by_name(tmp_path, byte, tokens, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        foreign.open_bins([bin_file(tmp_path / "x.bin", tokens, **options)], byte)


def test_four_bytes_are_read_when_said_and_a_lost_byte_is_noticed(tmp_path, byte):
    path = bin_file(tmp_path / "x.bin", [1, 2, 3, 4], size=4)
    assert foreign.open_bins([path], byte, token_size=4).shards[0].tokens.tolist() == [1, 2, 3, 4]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="15 bytes, which is no number of ids of 2 bytes"):
        foreign.open_bins([path], byte)


def test_a_folder_of_nanogpt_is_a_source_with_its_splits(tmp_path, documents, byte):
    for name, part in (("train", documents[:5]), ("val", documents[5:])):
        bin_file(tmp_path / f"{name}.bin", ids(part, byte))
    (tmp_path / "input.txt").write_text("the text it was made of")
    opened = open_source(tmp_path, byte, tmp_path / "cache")
    assert {split: folder.total_documents for split, folder in opened.items()} == {"train": 5, "valid": 3}
    assert len({folder.fingerprint for folder in opened.values()}) == 2
    assert not (tmp_path / "cache").exists()
    (one,) = open_source(tmp_path / "train.bin", byte, tmp_path / "cache").values()
    assert one.fingerprint == opened["train"].fingerprint


def test_shards_of_llm_c_are_one_source(tmp_path, documents, bpe):
    for number, part in enumerate((documents[:3], documents[3:])):
        bin_file(tmp_path / f"fineweb_train_{number:06d}.bin", ids(part, bpe, before=True), magic=20240520)
    bin_file(tmp_path / "fineweb_val_000000.bin", ids(documents, bpe, before=True), magic=20240520)
    opened = open_source(tmp_path, bpe, tmp_path / "cache")
    assert [len(opened[split].shards) for split in ("train", "valid")] == [2, 1]
    assert opened["train"].total_documents == opened["valid"].total_documents == 8


def test_an_adopted_folder_is_as_if_we_had_written_it(tmp_path, documents, bpe):
    folder = datatrove_folder(tmp_path / "theirs", documents, bpe)
    (folder / "00001_unshuffled.ds").touch()  # a task without input
    (folder / "00001_unshuffled.ds.index").touch()
    assert foreign.adopt(folder, bpe) == 0
    theirs = TokenFolder.open(folder)
    theirs.verify()
    assert [each.decode() for each in theirs.texts()] == [each.text for each in documents]
    write_tokens(tmp_path / "ours", documents, bpe)
    ours = json.loads((tmp_path / "ours/meta.json").read_text())["shards"]
    assert [
        shard | {"file": "000_tokens.ds"} for shard in json.loads((folder / "meta.json").read_text())["shards"]
    ] == ours
    assert (folder / "00000_00000_doc_shuffled.ds.metadata").read_text().startswith("gpt2|2")  # their files stay
    with pytest.raises(ValueError, match="already is a token folder"):
        foreign.adopt(folder, bpe)


def test_documents_without_end_token_are_counted(tmp_path, documents, byte):
    documents = [each for each in documents if each.text]
    assert foreign.adopt(datatrove_folder(tmp_path / "x", documents, byte, end=False), byte) == len(documents)
    assert list(TokenFolder.open(tmp_path / "x").texts()) == [each.text.encode() for each in documents]


def test_what_is_no_target_is_read_and_not_learnt(tmp_path, documents, byte):
    loss = [(number % 3 != 0) for number in range(len(ids(documents, byte)))]
    folder = datatrove_folder(tmp_path / "x", documents, byte, loss=loss)
    foreign.adopt(folder, byte)
    opened = TokenFolder.open(folder)
    marks = opened.shards[0].loss
    assert marks is not None
    assert marks.tolist() == loss
    feed = Feed.open([(opened, 1.0)], seed=0, window="stream", context=len(loss), batch=1)
    batch = feed.rows(feed.step(0))
    assert batch.valid[0].tolist() == loss
    assert batch.targets[0].tolist() == ids(documents, byte)
    (folder / "00000_00000_doc_shuffled.ds.loss").write_bytes(bytes(not each for each in loss))
    with pytest.raises(ValueError, match=r"doc_shuffled.ds.loss is damaged"):
        TokenFolder.open(folder).verify()


def test_bytes_are_counted_without_a_byte_table_too(tmp_path, documents):
    data = json.loads(bpe_json()) | {"pre_tokenizer": None, "decoder": {"type": "Fuse"}}
    words = Tokenizer.from_json(json.dumps(data))
    ascii_only = [each for each in documents if each.text.isascii() and " " not in each.text and "\n" not in each.text]
    foreign.adopt(datatrove_folder(tmp_path / "x", ascii_only, words), words)
    opened = TokenFolder.open(tmp_path / "x")
    assert not opened.byte_level
    assert opened.total_bytes == sum(len(each.text) for each in ascii_only)


def test_a_normalizer_is_not_trusted_with_texts_that_nobody_has(tmp_path, documents):
    nfc = Tokenizer.from_json(bpe_json(normalizer="NFC"))
    foreign.adopt(datatrove_folder(tmp_path / "x", documents, nfc), nfc)
    assert not TokenFolder.open(tmp_path / "x").byte_level


def _cut(suffix, by):
    def damage(folder):
        file = next(folder.glob(f"*.ds{suffix}"))
        file.write_bytes(file.read_bytes()[:-by])

    return damage


def _write(suffix, raw):
    return lambda folder: next(folder.glob("*.ds")).with_name(f"00000_00000_doc_shuffled.ds{suffix}").write_bytes(raw)


def _leave_unshuffled(folder):
    for suffix in ("", ".index"):
        raw = (folder / f"00000_00000_doc_shuffled.ds{suffix}").read_bytes()
        (folder / f"00000_unshuffled.ds{suffix}").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_cut("", 2), r"doc_shuffled.ds has \d+ bytes, .*index says \d+ ids of 2 bytes: one is truncated"),
        (_cut("", 1), r"doc_shuffled.ds has \d+ bytes"),
        (_cut(".index", 8), r"doc_shuffled.ds has \d+ bytes"),
        (_cut(".index", 3), r"doc_shuffled.ds has \d+ bytes"),
        (lambda folder: next(folder.glob("*.index")).unlink(), r"ds.index is missing: nobody knows where"),
        (_write("", np.full(99, 999, "<u2").tobytes()), r"doc_shuffled.ds has 198 bytes"),
        (_write(".metadata", b"gpt2\n5\n"), r"ds.metadata must end its first line with \|2 or \|4"),
        (_write(".metadata", b"gpt2|4\n5\n"), r"ids of 4 bytes: one is truncated, or the id size is wrong"),
        (_write(".loss", b"\1\0\1"), r"ds.loss must have \d+ bytes, one per token, each 0 or 1"),
        (_leave_unshuffled, r"00000_unshuffled.ds was being shuffled to 00000_00000_doc_shuffled.ds"),
        (lambda folder: [file.unlink() for file in folder.glob("*")], r"has no .ds file with tokens in it"),
    ],
)  # fmt: skip
def test_what_datatrove_left_damaged_is_refused_by_name_and_nothing_is_written(
    tmp_path, documents, byte, damage, complaint
):
    folder = datatrove_folder(tmp_path / "x", documents, byte)
    damage(folder)
    with pytest.raises(ValueError, match=complaint):
        foreign.adopt(folder, byte)
    assert not (folder / "meta.json").exists()


def test_another_tokenizers_ids_and_a_falling_index_are_refused(tmp_path, documents, byte, bpe):
    folder = datatrove_folder(tmp_path / "x", documents, bpe)
    with pytest.raises(ValueError, match=r"doc_shuffled.ds holds the id \d+, and Tokenizer.*W=257.* has none of it"):
        foreign.adopt(folder, byte)
    index = folder / "00000_00000_doc_shuffled.ds.index"
    ends = np.frombuffer(index.read_bytes(), "<u8").copy()
    ends[1] = ends[0]
    index.write_bytes(ends.tobytes())
    with pytest.raises(ValueError, match="must rise strictly"):
        foreign.adopt(folder, bpe)


def test_two_id_sizes_in_one_folder_are_refused(tmp_path, documents, byte):
    datatrove_folder(tmp_path / "x", documents, byte)
    datatrove_folder(tmp_path / "x", documents, byte, name="00001_00000_doc_shuffled.ds", size=4)
    with pytest.raises(ValueError, match="mixes shards of 2 and of 4 bytes"):
        foreign.adopt(tmp_path / "x", byte)


def test_shuffled_chunks_cut_documents_and_every_cut_is_a_reset(tmp_path, documents, byte):
    """datatrove writes the cuts into the index, and drops the last partial chunk."""
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    byte.save(tmp_path / "tokenizer.json")
    step = DocumentTokenizer(
        str(tmp_path / "x"), str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", seed=1, shuffle_chunk_size=16
    )
    step.run([Document(text=each.text, id=each.name) for each in documents if "<|" not in each.text], 0, 1)
    assert foreign.adopt(tmp_path / "x", byte) > 0
    opened = TokenFolder.open(tmp_path / "x")
    assert opened.total_tokens % 16 == 0
    feed = Feed.open([(opened, 1.0)], seed=0, window="stream", context=opened.total_tokens, batch=1)
    starts = np.flatnonzero(feed.rows(feed.step(0)).reset[0]).tolist()
    assert starts == [0, *opened.shards[0].ends[:-1].tolist()]
    assert set(range(0, opened.total_tokens, 16)) <= set(starts)


def test_an_id_out_of_range_is_found_by_verify_even_if_all_hashes_agree(tmp_path, documents, bpe, byte):
    """As when somebody writes meta.json by hand."""
    folder = foreign.open_bins([bin_file(tmp_path / "x.bin", ids(documents, bpe))], bpe)
    wrong = TokenFolder(folder.path, byte, byte.end_id or 0, True, folder.fingerprint, folder.shards)
    with pytest.raises(ValueError, match=r"x.bin holds the id \d+; Tokenizer.* has none of it"):
        wrong.verify()
