"""Pairs of texts: duplicates against a count of places that agree, the Anthology's files byte for byte."""

from __future__ import annotations

import pytest
import solvers

from openxlstm.tasks.base import NOT_ASKED, Task
from openxlstm.tasks.retrieval import AnthologyPairs, Duplicates


@pytest.mark.parametrize("letters", [(4, 5), (16, 64)])
def test_copies_are_those_that_agree(letters):
    task, copies = Duplicates(letters), 0
    assert isinstance(task, Task)
    for index in range(1000):
        sample = task.sample("train", 0, index)
        inputs, targets = sample.inputs.tolist(), sample.targets.tolist()
        assert targets[-1:] == solvers.duplicates(inputs)
        assert set(targets[:-1]) == {NOT_ASKED}
        assert letters[0] <= inputs.index(1) <= letters[1]
        assert 0 < min(inputs) <= max(inputs) < task.vocab_size
        copies += targets[-1]
    assert abs(copies - 500) < 80


def test_pairs_of_the_anthology(tmp_path):
    rows = [b"1.0\t3\t4\tone\xff text\tanother", b"0.0\t5\t6\tmore\tless", b"1\t7\t8\tx\ty"]
    for part in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_bytes(b"\n".join(rows))
    task = AnthologyPairs(str(tmp_path), length=5)
    assert isinstance(task, Task)
    sample = task.sample("test", 0, 0)
    assert sample.inputs.tolist() == [*(byte + 2 for byte in b"one\xff "), 1, *(byte + 2 for byte in b"anoth")]
    assert sample.targets.tolist() == [NOT_ASKED] * 10 + [1]
    assert [int(task.sample("test", 0, index).targets[-1]) for index in range(4)] == [1, 0, 1, 1]
    rounds = [task.sample("train", 0, index).inputs.tobytes() for index in range(6)]
    assert sorted(rounds[:3]) == sorted(rounds[3:]) == sorted({*rounds})
    (tmp_path / "new_aan_pairs.eval.tsv").write_bytes(rows[0] + b"\n2\tbad")
    with pytest.raises(ValueError, match=r"eval.tsv:2 must be label"):
        task.sample("validation", 0, 0)


def test_a_mistake_gets_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"letters=\(3, 2\) must be in order and at least 4; nearest is \(4, 4\)"):
        Duplicates((3, 2))
    with pytest.raises(
        ValueError, match=r"has no new_aan_pairs.train.tsv, .*it must hold .* as the Long Range Arena has them"
    ):
        AnthologyPairs(str(tmp_path))
