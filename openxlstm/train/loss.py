"""The rows of a step on the model's device, the sums that make its loss, and seeds.

The loss of a batch is the cross-entropy in nats, summed over the valid targets and divided by their number. The number
is that of the whole batch, known before the first backward pass. So accumulation, masked rows and portions with nothing
to learn from change the result by rounding only; a mean of the portions' means would not be the mean.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from openxlstm.data.windows import Batch


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch on the device of the model. Position t of `targets` is what follows position t of `tokens`."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    reset: Bool[Tensor, "B T"]  # a document begins here
    valid: Bool[Tensor, "B T"]  # counts in the loss

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Rows":
        """Move a numpy batch to the device."""
        arrays = (batch.tokens, batch.targets, batch.reset, batch.valid)
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))

    def split(self, size: int) -> Iterator["Rows"]:
        """Portions of at most `size` rows, in order."""
        parts = (part.split(size) for part in (self.tokens, self.targets, self.reset, self.valid))
        return (Rows(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over targets, which can be added. End tokens count in `nats` but stand for no byte."""

    nats: float = 0.0
    tokens: int = 0
    byte_nats: float = 0.0
    bytes: int = 0
    z: float = 0.0  # the z-loss, which is minimised but not reported as loss

    @classmethod
    def of(cls, sums: Float64[Tensor, "5"]) -> "Score":
        """From what an `Objective` sums up, over as many portions and ranks as were added."""
        nats, tokens, byte_nats, of_bytes, z = sums.tolist()
        return cls(nats, int(tokens), byte_nats, int(of_bytes), z)

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.byte_nats + other.byte_nats,
            self.bytes + other.bytes,
            self.z + other.z,
        )

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: end tokens are excluded on both sides."""
        return self.byte_nats / (math.log(2) * max(1, self.bytes))


def derived(*numbers: int) -> int:
    """A seed from numbers, the same everywhere and for ever: 63 bits of BLAKE2b over their decimal forms."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
