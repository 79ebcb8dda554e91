"""Pictures read pixel by pixel, row by row; the class is asked at the last pixel. Nothing is downloaded.

Digits are the 1,797 of scikit-learn, 8 x 8 grey, the embedded default. CIFAR-10 is read from the files of its binary
version (data_batch_1.bin ... data_batch_5.bin, test_batch.bin: a label byte, then 32 x 32 of red, of green, of blue).
In the Long Range Arena (Tay et al. 2020, arXiv:2011.04006) CIFAR-10 is grey; colours are given with `colour=True`.

Training samples go through all pictures in an order that is new in each round; those of other splits stay in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from openxlstm.tasks import files
from openxlstm.tasks.base import NOT_ASKED, SPLITS, Sample, generator

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue in grey (ITU-R BT.601)
RECORD = 1 + 3 * 32 * 32
Pictures = tuple[np.ndarray, np.ndarray]  # float32 [N, T, F] from 0 to 1, int64 [N]


@dataclass(frozen=True, slots=True)
class Digits:
    """Handwritten digits: 64 steps, 10 classes; four fifths to train, a tenth each to validate and to test."""

    @property
    def name(self) -> str:
        """digits."""
        return "digits"

    @property
    def vocab_size(self) -> int:
        """Classes."""
        return 10

    @property
    def features(self) -> int:
        """The grey of a pixel."""
        return 1

    @property
    def chance(self) -> float:
        """One class in ten."""
        return 1 / 10

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        return _sample("digits", _digits(_known(split)), split, seed, index)


@dataclass(frozen=True, slots=True)
class Cifar10:
    """CIFAR-10 in `folder`: 1,024 steps, 10 classes. The last tenth of every training file validates.

    Raises:
        ValueError: a folder without the files, or a file that is not whole records.
    """

    folder: str | None = None  # None: a description without samples
    colour: bool = False

    def __post_init__(self) -> None:
        files.check(self)

    @property
    def files(self) -> tuple[str, ...]:
        """What the folder must hold."""
        return (*_files("train"), *_files("test"))

    @property
    def origin(self) -> str:
        """What the files are called."""
        return "the binary version of CIFAR-10"

    @property
    def name(self) -> str:
        """cifar10."""
        return "cifar10"

    @property
    def vocab_size(self) -> int:
        """Classes."""
        return 10

    @property
    def features(self) -> int:
        """Grey, or red, green and blue."""
        return 3 if self.colour else 1

    @property
    def chance(self) -> float:
        """One class in ten."""
        return 1 / 10

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        folder = files.folder(self)
        return _sample("cifar10", _cifar10(folder, _known(split), self.colour), split, seed, index)


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    return split


def _sample(name: str, pictures: Pictures, split: str, seed: int, index: int) -> Sample:
    inputs, labels = pictures
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed} and index={index} must be at least 0")
    epoch, place = divmod(index, len(labels))
    if split == "train":
        place = int(_order(name, seed, epoch, len(labels))[place])
    targets = np.full(inputs.shape[1], NOT_ASKED, dtype=np.int64)
    targets[-1] = labels[place]
    return Sample(inputs[place], targets)


@lru_cache(maxsize=4)
def _order(name: str, seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(name, "train", seed, epoch).permutation(count)


@lru_cache(maxsize=4)
def _digits(split: str) -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the task digits needs scikit-learn: pip install "openxlstm[digits]"') from error
    data, labels = load_digits(return_X_y=True)
    order = generator("digits", "train", 0, 2**32).permutation(len(labels))  # writers stand together in the file
    tenth = len(labels) // 10
    part = {"train": order[2 * tenth :], "validation": order[:tenth], "test": order[tenth : 2 * tenth]}[split]
    return (data[part] / 16).astype(np.float32)[:, :, None], labels[part].astype(np.int64)


def _files(split: str) -> list[str]:
    return ["test_batch.bin"] if split == "test" else [f"data_batch_{number}.bin" for number in range(1, 6)]


@lru_cache(maxsize=3)
def _cifar10(folder: str, split: str, colour: bool) -> Pictures:
    parts = []
    for name in _files(split):
        raw = np.fromfile(Path(folder) / name, dtype=np.uint8)
        if len(raw) == 0 or len(raw) % RECORD:
            raise ValueError(f"{name} has {len(raw)} bytes; it must be a whole number of records of {RECORD}")
        records = raw.reshape(-1, RECORD)
        kept = len(records) - len(records) // 10
        parts.append({"train": records[:kept], "validation": records[kept:], "test": records}[split])
    records = np.concatenate(parts)
    if len(records) == 0 or records[:, 0].max() > 9:
        raise ValueError(f"folder={folder!r}: {split} needs at least one picture, and labels from 0 to 9")
    pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1).astype(np.float32) / 255
    if not colour:
        pixels = (pixels @ np.array(LUMA, np.float32))[:, :, None]
    return pixels, records[:, 0].astype(np.int64)
