"""Pictures from local files, pixel for pixel."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from openxlstm.tasks import images
from openxlstm.tasks.base import SPLITS, Task
from openxlstm.tasks.images import RECORD, Cifar10, Digits


def test_digits_are_scikit_learns_each_in_one_split():
    data, labels = load_digits(return_X_y=True)
    known = {}
    for picture, label in zip(data, labels, strict=True):
        known.setdefault((picture / 16).astype(np.float32).tobytes(), set()).add(int(label))
    task, total = Digits(), 0
    assert isinstance(task, Task)
    for split, count in zip(SPLITS, (1439, 179, 179), strict=True):
        samples = [task.sample(split, 0, index) for index in range(count)]
        total += count
        assert all(int(sample.targets[-1]) in known[sample.inputs.tobytes()] for sample in samples)
        again = sorted(task.sample(split, 0, count + index).inputs.tobytes() for index in range(count))
        assert again == sorted(sample.inputs.tobytes() for sample in samples)  # a round holds every picture once
        assert np.bincount([sample.targets[-1] for sample in samples]).min() > count / 20
    assert total == len(labels)
    first = [task.sample("train", seed, index).inputs.tobytes() for seed in (0, 1) for index in range(5)]
    assert first[:5] != first[5:]


def write(folder, count=20):
    """Six files of random records."""
    random = np.random.default_rng(0)
    files = {}
    for name in (*images._files("train"), *images._files("test")):
        files[name] = random.integers(0, 256, (count, RECORD), dtype=np.uint8)
        files[name][:, 0] %= 10
        files[name].tofile(folder / name)
    return files


def test_cifar_pixels_are_where_they_belong(tmp_path):
    files = write(tmp_path)
    colour, grey = Cifar10(str(tmp_path), colour=True), Cifar10(str(tmp_path))
    record = files["test_batch.bin"][7]
    sample = colour.sample("test", 0, 7)
    assert sample.inputs.shape == (1024, 3)
    assert sample.targets[-1] == record[0]
    for row, column, channel in ((0, 0, 0), (0, 31, 1), (31, 2, 2), (17, 5, 0)):
        byte = record[1 + channel * 1024 + row * 32 + column]
        assert sample.inputs[row * 32 + column, channel] == np.float32(byte) / 255
    weighed = 0.299 * sample.inputs[:, 0] + 0.587 * sample.inputs[:, 1] + 0.114 * sample.inputs[:, 2]
    np.testing.assert_allclose(grey.sample("test", 0, 7).inputs[:, 0], weighed, rtol=1e-5)
    seen = {split: {grey.sample(split, 0, index).inputs.tobytes() for index in range(200)} for split in SPLITS}
    assert [len(seen[split]) for split in SPLITS] == [90, 10, 20]
    assert len(set().union(*seen.values())) == 120


def test_a_mistake_gets_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no data_batch_1.bin, .*must hold the binary version of CIFAR-10"):
        Cifar10(str(tmp_path))
    write(tmp_path, 10)
    (tmp_path / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"test_batch.bin has 3 bytes; .* records of 3073"):
        Cifar10(str(tmp_path)).sample("test", 0, 0)
    with pytest.raises(ValueError, match="split='tset' must be one of"):
        Digits().sample("tset", 0, 0)
    images._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install \"openxlstm\[digits\]\""):
        Digits().sample("train", 0, 0)
