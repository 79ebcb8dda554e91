"""Windows: every token is a target once, documents start where the index says, and only padding is not valid."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openxlstm.data.corpus import Document
from openxlstm.data.packing import plan
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder, fingerprint_of, write_tokens
from openxlstm.data.windows import Pieces, Stream


@pytest.fixture
def folder(tmp_path, documents, byte) -> TokenFolder:
    """Two shards of different lengths: what our writer never makes, and other writers do."""
    for part, docs in (("one", documents[:5]), ("two", documents[5:])):
        write_tokens(tmp_path / part, docs, byte, name=part)
    one, two = (tmp_path / part / "meta.json" for part in ("one", "two"))
    two_shards = json.loads(two.read_text())["shards"]
    edit_meta(one.parent, lambda meta: meta["shards"].extend(two_shards))
    for suffix in ("", ".index"):
        (two.parent / f"000_two.ds{suffix}").rename(one.parent / f"000_two.ds{suffix}")
    return TokenFolder.open(one.parent)


def edit_meta(folder: Path, edit: Callable[[dict], None]) -> None:
    """Change meta.json as another writer might have written it, fingerprint included."""
    meta = json.loads((folder / "meta.json").read_text())
    edit(meta)
    (folder / "meta.json").write_text(json.dumps(meta | {"fingerprint": fingerprint_of(meta)}))


def by_hand(documents: list[Document], byte: Tokenizer) -> list[tuple[int, int, bool]]:
    """(input, target, reset) of every token, straight from the definition."""
    triples = []
    for document in documents:
        ids = [*byte.encode(document.text), byte.end_id]
        triples += [(before, token, n == 0) for n, (before, token) in enumerate(zip([byte.end_id, *ids], ids))]
    return triples


@pytest.mark.parametrize("context", [1, 2, 7, 16, 63, 1000])
def test_every_token_is_a_target_once_with_its_own_past(folder, documents, byte, context):
    stream = Stream(folder, context)
    batch = stream.batch(np.arange(len(stream)))
    assert len(stream) == sum(-(-len(shard.tokens) // context) for shard in folder.shards)
    got = list(zip(batch.tokens[batch.valid], batch.targets[batch.valid], batch.reset[batch.valid]))
    assert got == by_hand(documents, byte)


@pytest.mark.parametrize("method", ["best_fit", "one_per_row"])
def test_whole_documents_in_rows_are_the_documents(folder, documents, byte, method):
    """From disk, where no document is longer than a row: the same triples, and as few rows as the plan says."""
    rows = Pieces(folder, 50, plan(folder, 50, method))
    batch = rows.batch(np.arange(len(rows)))
    got = sorted(zip(batch.tokens[batch.valid], batch.targets[batch.valid], batch.reset[batch.valid]))
    assert got == sorted(by_hand(documents, byte))
    assert len(rows) == (3 if method == "best_fit" else len(documents))  # 41 + 9 | 36 + 6 + 5 + 2 | 23 + 19
    assert rows.batch(np.array([], np.int64)).tokens.shape == (0, 50)
    with pytest.raises(ValueError, match=rf"{len(rows)}.* must lie in 0\.\.{len(rows) - 1}"):
        rows.batch(np.array([len(rows)]))


def test_only_the_end_of_a_shard_is_padded_and_padding_is_harmless(folder):
    stream = Stream(folder, 16)
    batch = stream.batch(np.arange(len(stream)))
    lengths = batch.valid.sum(axis=1)
    ends = np.cumsum([-(-len(shard.tokens) // 16) for shard in folder.shards]) - 1
    assert (np.delete(lengths, ends) == 16).all()
    assert lengths[ends].tolist() == [len(shard.tokens) % 16 for shard in folder.shards]
    assert (np.diff(batch.valid.astype(int), axis=1) <= 0).all(), "valid targets come first in a row"
    assert (batch.tokens[~batch.valid] == 256).all()
    assert (batch.targets[~batch.valid] == 256).all()
    assert not batch.reset[~batch.valid].any()


def test_a_document_in_a_stream_is_the_document_alone(folder, documents, tmp_path, byte):
    """Same inputs, targets and reset: what makes a score in a stream the score of the document."""
    whole = next(Stream(folder, 10_000).in_order(1))
    starts = np.flatnonzero(whole.reset[0])
    for number in (1, 3):
        write_tokens(tmp_path / str(number), [documents[number]], byte)
        alone_folder = TokenFolder.open(tmp_path / str(number))
        alone = Stream(alone_folder, alone_folder.total_tokens).batch(np.array([0]))
        here = slice(starts[number], starts[number] + alone_folder.total_tokens)
        for field in ("tokens", "targets", "reset", "valid"):
            assert np.array_equal(getattr(alone, field)[0], getattr(whole, field)[0, here]), field


def test_a_document_without_an_end_token_hands_nothing_to_the_next(tmp_path, byte):
    """Other writers may leave end tokens out. The border is in the index, and the next document still starts at it."""
    write_tokens(tmp_path, [Document("a", "abcd")], byte)
    index = np.array([2, 5], "<u8").tobytes()  # cut the one document in two: ab, cd<end>
    (tmp_path / "000_tokens.ds.index").write_bytes(index)
    changed = {"documents": 2, "index_sha256": hashlib.sha256(index).hexdigest()}
    edit_meta(tmp_path, lambda meta: meta["shards"][0].update(changed))
    batch = Stream(TokenFolder.open(tmp_path), 5).batch(np.array([0]))
    assert batch.tokens[0].tolist() == [256, *b"a", 256, *b"cd"]
    assert batch.targets[0].tolist() == [*b"abcd", 256]
    assert batch.reset[0].tolist() == [True, False, True, False, False]


def test_a_batch_is_its_rows_in_the_order_asked_for(folder):
    stream = Stream(folder, 16)
    indices = np.array([6, 0, 3, 6])
    batch = stream.batch(indices)
    for row, index in enumerate(indices):
        alone = stream.batch(np.array([index]))
        for field in ("tokens", "targets", "reset", "valid"):
            assert np.array_equal(getattr(batch, field)[row], getattr(alone, field)[0]), field
    assert (batch.tokens.dtype, batch.targets.dtype) == (np.int64, np.int64)
    assert stream.batch(np.array([], np.int64)).tokens.shape == (0, 16)


def test_evaluation_sees_every_window_once_or_evenly_spaced_ones(folder):
    stream = Stream(folder, 7)
    rows = [batch.targets for batch in stream.in_order(4)]
    assert [len(part) for part in rows[:-1]] == [4] * (len(rows) - 1)
    assert np.array_equal(np.concatenate(rows), stream.batch(np.arange(len(stream))).targets)
    few = np.concatenate([batch.targets for batch in stream.in_order(2, limit=5)])
    assert np.array_equal(few, stream.batch(np.arange(5) * len(stream) // 5).targets)
    assert sum(len(batch.tokens) for batch in stream.in_order(4, limit=10**9)) == len(stream)


def test_nonsense_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        Stream(folder, 0)
    stream = Stream(folder, 16)
    for wrong in (-1, len(stream)):
        with pytest.raises(ValueError, match=rf"{wrong}.* must lie in 0\.\.{len(stream) - 1}"):
            stream.batch(np.array([wrong]))
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        next(stream.in_order(1, limit=0))
