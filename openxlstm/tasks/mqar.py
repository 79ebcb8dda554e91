"""Multi-query associative recall: read pairs, then give the value of each key that is asked.

Arora et al. 2023, arXiv:2312.04927; Beck et al. 2024, arXiv:2405.04517, App. B.1.2. L tokens, KV pairs, W ids:

    inputs    k1 v1 k2 v2 k3 v3 | k2 0  0 0  k1 0  0 0  0 0  k3 0         L = 18, KV = 3, six slots of two
    targets   .  .  .  .  .  .  | v2 .  . .  v1 .  . .  . .  v3 .

Keys are from [1, W/2), values from [W/2, W), both without repetition. Each key is asked once, in a slot drawn without
replacement with probability proportional to i ** (a - 1), a = 0.01, i = 1, 2, ...: mostly soon, at times late.

Where (L - 2 KV) / 2 slots are fewer than KV keys, as in the published (756, 256), as many keys are asked as there are
slots. Other places hold 0; `fill="random"` puts any id there, as the authors' default does, which can repeat a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from openxlstm.tasks.base import NOT_ASKED, Sample, generator

FILLS = ("zero", "random")
POWER = 0.01  # a


@dataclass(frozen=True, slots=True)
class MQAR:
    """Samples of `length` tokens with `pairs` keys and values.

    Raises:
        ValueError: more pairs than keys, no slot for a question, a fill that does not exist.
    """

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    fill: str = "zero"

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"fill={self.fill!r} must be one of {', '.join(FILLS)}")
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {max(self.vocab_size // 2 - 1, 0)} keys for pairs={self.pairs}; "
                f"at least {2 * self.pairs + 2}"
            )
        if self.slots < 1:
            raise ValueError(
                f"length={self.length} leaves no slot behind pairs={self.pairs}; at least {2 * self.pairs + 2}"
            )

    @property
    def name(self) -> str:
        """mqar."""
        return "mqar"

    @property
    def features(self) -> int:
        """None: inputs are ids."""
        return 0

    @property
    def chance(self) -> float:
        """That of guessing among the values of the sample."""
        return 1 / self.pairs

    @property
    def slots(self) -> int:
        """Places where a key can be asked."""
        return (self.length - 2 * self.pairs) // 2

    @property
    def queries(self) -> int:
        """Keys that are asked."""
        return min(self.pairs, self.slots)

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        random = generator("mqar", split, seed, index)
        pairs, half = self.pairs, self.vocab_size // 2
        keys = random.choice(half - 1, pairs, replace=False) + 1
        values = random.choice(self.vocab_size - half, pairs, replace=False) + half
        # the k largest of log p + Gumbel noise are k draws without replacement, in their order
        slots = (_log_p(self.slots) + random.gumbel(size=self.slots)).argsort()[: -self.queries - 1 : -1]
        places = 2 * pairs + 2 * slots

        if self.fill == "zero":
            inputs = np.zeros(self.length, dtype=np.int64)
        else:
            inputs = random.integers(self.vocab_size, size=self.length)
        targets = np.full(self.length, NOT_ASKED, dtype=np.int64)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        if self.queries < pairs:
            asked = random.choice(pairs, self.queries, replace=False)
            keys, values = keys[asked], values[asked]
        inputs[places], targets[places] = keys, values
        return Sample(inputs, targets)


@lru_cache(maxsize=64)
def _log_p(slots: int) -> np.ndarray:
    """log i ** (a - 1), i = 1 ... slots; what is missing to a probability is the same for all."""
    return (POWER - 1) * np.log(np.arange(1, slots + 1))
