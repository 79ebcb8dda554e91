"""Do two texts belong together? Both are read, byte by byte, and it is asked after the second.

In the Long Range Arena (Tay et al. 2020, arXiv:2011.04006) texts are papers of the ACL Anthology and the question is
whether one cites the other: `AnthologyPairs` reads its files, which nothing here downloads. `Duplicates` is a synthetic
stand-in of any length: the second text is a copy of the first with a fifth of its letters replaced, or another text.

Ids: PAD 0, SEPARATOR 1, then bytes (or letters) from 2. Targets are the classes 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from openxlstm.tasks import files
from openxlstm.tasks.base import NOT_ASKED, SPLITS, Sample, generator

SEPARATOR, FIRST = 1, 2
LETTERS = 26
FILES = {split: f"new_aan_pairs.{part}.tsv" for split, part in zip(SPLITS, ("train", "eval", "test"), strict=True)}


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Two texts of `letters` letters (shortest, longest) and a separator; class 1 if the second is a copy with noise.

    A fifth of the letters of a copy, rounded down, differ; another text differs in more than half of its places.

    Raises:
        ValueError: fewer than four letters, or bounds that are not in order.
    """

    letters: tuple[int, int] = (16, 64)

    def __post_init__(self) -> None:
        low, high = self.letters
        if not 4 <= low <= high:
            raise ValueError(
                f"letters=({low}, {high}) must be in order and at least 4; "
                f"nearest is ({max(low, 4)}, {max(low, high, 4)})"
            )

    @property
    def name(self) -> str:
        """duplicates."""
        return "duplicates"

    @property
    def vocab_size(self) -> int:
        """PAD, the separator, letters."""
        return FIRST + LETTERS

    @property
    def features(self) -> int:
        """None: inputs are ids."""
        return 0

    @property
    def chance(self) -> float:
        """Half of the pairs are copies."""
        return 1 / 2

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        random = generator("duplicates", split, seed, index)
        n, copied = int(random.integers(self.letters[0], self.letters[1] + 1)), int(random.integers(2))
        first = random.integers(LETTERS, size=n)
        if copied:
            second, places = first.copy(), random.choice(n, n // 5, replace=False)
            second[places] = (second[places] + random.integers(1, LETTERS, n // 5)) % LETTERS
        else:
            second = random.integers(LETTERS, size=n)
            while 2 * int((first == second).sum()) >= n:
                second = random.integers(LETTERS, size=n)
        return _pair(first, second, copied)


@dataclass(frozen=True, slots=True)
class AnthologyPairs:
    """The pairs of the ACL Anthology Network in `folder`, the first `length` bytes of each text.

    Files are new_aan_pairs.train.tsv, .eval.tsv and .test.tsv; a line is label, two ids and two texts, with tabs.
    Training samples go through all pairs in an order that is new in each round.

    Raises:
        ValueError: a folder without the files; later a line that does not have this form, by number.
    """

    folder: str | None = None  # None: a description without samples
    length: int = 4000

    def __post_init__(self) -> None:
        files.check(self)
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")

    @property
    def files(self) -> tuple[str, ...]:
        """What the folder must hold."""
        return tuple(FILES.values())

    @property
    def origin(self) -> str:
        """What the files are called."""
        return "the pairs of the ACL Anthology Network, as the Long Range Arena has them"

    @property
    def name(self) -> str:
        """retrieval."""
        return "retrieval"

    @property
    def vocab_size(self) -> int:
        """PAD, the separator, bytes."""
        return FIRST + 256

    @property
    def features(self) -> int:
        """None: inputs are ids."""
        return 0

    @property
    def chance(self) -> float:
        """Half of the pairs belong together."""
        return 1 / 2

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        if split not in FILES or seed < 0 or index < 0:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}, seed={seed} and index={index} >= 0")
        pairs = _lines(str(Path(files.folder(self)) / FILES[split]))
        epoch, place = divmod(index, len(pairs))
        if split == "train":
            place = int(_order(seed, epoch, len(pairs))[place])
        label, first, second = pairs[place]
        a, b = (np.frombuffer(text[: self.length], dtype=np.uint8) for text in (first, second))
        return _pair(a, b, label)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator("retrieval", "train", seed, epoch).permutation(count)


def _pair(first: np.ndarray, second: np.ndarray, label: int) -> Sample:
    inputs = np.concatenate([first + np.int64(FIRST), [SEPARATOR], second + np.int64(FIRST)]).astype(np.int64)
    targets = np.full(len(inputs), NOT_ASKED, dtype=np.int64)
    targets[-1] = label
    return Sample(inputs, targets)


@lru_cache(maxsize=3)
def _lines(file: str) -> list[tuple[int, bytes, bytes]]:
    pairs = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        fields = line.split(b"\t")
        if len(fields) != 5 or fields[0].strip() not in (b"0", b"1", b"0.0", b"1.0"):
            raise ValueError(f"{file}:{number} must be label (0 or 1), id, id, text, text, separated by tabs")
        pairs.append((int(fields[0].strip()[:1]), fields[3], fields[4]))
    if not pairs:
        raise ValueError(f"{file} is empty")
    return pairs
