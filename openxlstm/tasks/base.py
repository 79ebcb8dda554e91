"""What a synthetic task is: samples that are pure functions of numbers, and the positions at which something is asked.

A sample is a sequence of inputs and, of the same length, targets: what has to be known after reading the input at that
place. Most places ask for nothing. Inputs are token ids, or vectors where a task is about numbers; targets are ids, or
numbers. Sequences of a batch are padded on the right, and `exists` says where they end.

Sample `index` of a split is a function of (task, split, seed, index) and of nothing that was drawn before it: batches
may be made in any order, by any number of workers, and sample 7 is the same on every machine.

B batch, T time, F numbers in an input vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

NOT_ASKED = -100  # a target that is none: what torch's cross entropy ignores
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence.

    inputs: int64 [T], ids; or float32 [T, F].
    targets: int64 [T], ids, NOT_ASKED where nothing is asked; or float32 [T], NaN there.
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets; there is one per input")


@runtime_checkable
class Task(Protocol):
    """A family of samples: a frozen dataclass, of which `replace(task, lengths=(40, 256))` asks longer ones."""

    @property
    def name(self) -> str:
        """What it is called on the command line, in results and in the seed of its samples."""
        ...

    @property
    def vocab_size(self) -> int:
        """W, of the ids of inputs and targets; of the targets alone if inputs are vectors; 0 if targets are numbers."""
        ...

    @property
    def features(self) -> int:
        """F, of an input vector; 0 if inputs are ids."""
        ...

    @property
    def chance(self) -> float:
        """The score of guessing evenly among the possible answers: an accuracy; for numbers the error of a constant."""
        ...

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples side by side. inputs [B, T] or [B, T, F]; targets [B, T]; exists bool [B, T]."""

    inputs: Tensor
    targets: Tensor
    exists: Tensor

    @property
    def asked(self) -> Tensor:
        """bool [B, T]: where there is a target."""
        return ~self.targets.isnan() if self.targets.is_floating_point() else self.targets != NOT_ASKED


def generator(name: str, split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one sample: a counter-based stream of its own (Philox, Salmon et al. 2011).

    Raises:
        ValueError: a split that does not exist, a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed} and index={index} must be at least 0")
    return np.random.Generator(np.random.Philox(key=np.array([_key(name, split, seed), index], dtype=np.uint64)))


@lru_cache(maxsize=256)
def _key(name: str, split: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}/{split}/{seed}".encode()).digest()[:8], "little")


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples padded on the right to the longest of them: inputs with 0, targets with nothing asked."""
    longest = max(len(sample.inputs) for sample in samples)
    first = samples[0]
    inputs = np.zeros((len(samples), longest, *first.inputs.shape[1:]), first.inputs.dtype)
    nothing = np.nan if first.targets.dtype.kind == "f" else NOT_ASKED
    targets = np.full((len(samples), longest), nothing, first.targets.dtype)
    exists = np.zeros((len(samples), longest), bool)
    for row, sample in enumerate(samples):
        length = len(sample.inputs)
        inputs[row, :length], targets[row, :length], exists[row, :length] = sample.inputs, sample.targets, True
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(exists))


def batch(task: Task, split: str, seed: int, indices: Iterable[int]) -> Batch:
    """The samples of these numbers, in this order."""
    return collate([task.sample(split, seed, index) for index in indices])


def distinct(task: Task, split: str, seed: int, count: int) -> list[int]:
    """The numbers of the first `count` samples that equal no earlier one: a data set without duplicates.

    Raises:
        ValueError: more than nine of ten samples are known ones: the family is smaller than `count`, or nearly.
    """
    seen: set[bytes] = set()
    found: list[int] = []
    for index in range(10 * count + 100):
        if len(found) == count:
            break
        digest = hashlib.sha256(task.sample(split, seed, index).inputs.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            found.append(index)
    if len(found) < count:
        raise ValueError(f"count={count}: {task.name} gave only {len(found)} distinct samples; ask for that many")
    return found


def answered(prompt: Sequence[int], answer: Sequence[int], pad: int = 0) -> Sample:
    """A prompt and the answer that follows it, as a model sees them that is asked for the next token.

    The answer is replaced by `pad` in the inputs and is all that is asked; both are shifted by one. So the first token
    of the answer is demanded while the last of the prompt is read, and a model does not see its own answers.
    """
    if not prompt or not answer:
        raise ValueError("a prompt and an answer have at least one token each")
    inputs = np.array([*prompt, *[pad] * (len(answer) - 1)], dtype=np.int64)
    targets = np.array([*[NOT_ASKED] * (len(prompt) - 1), *answer], dtype=np.int64)
    return Sample(inputs, targets)


def scaled(score: float, chance: float) -> float:
    """0 at chance, 1 at perfection: (score - chance) / (1 - chance) (arXiv:2405.04517, App. B.1.1)."""
    return (score - chance) / (1 - chance)
