"""The loss of a batch: cross-entropy in nats, summed over the valid targets and divided by their number.

The number is that of the whole batch, known before the first backward pass. So accumulation, masked rows and portions
with nothing to learn from change the result by rounding only; a mean of the portions' means would not be the mean.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
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


def token_nats(model: torch.nn.Module, rows: Rows, autocast: torch.dtype | None = None) -> Float[Tensor, "B T"]:
    """Cross-entropy of every target in nats, 0 where it does not count. `autocast` is the dtype of the products."""
    with torch.autocast(rows.tokens.device.type, dtype=autocast, enabled=autocast is not None):
        logits_BTW, _ = model(rows.tokens, reset=rows.reset)
    ignored = torch.where(rows.valid, rows.targets, -100)  # cross_entropy: no loss, and a gradient of exactly zero
    return F.cross_entropy(logits_BTW.transpose(1, 2), ignored, ignore_index=-100, reduction="none")


def score(nats: Float[Tensor, "B T"], rows: Rows, bytes_of: Int[Tensor, " W"]) -> Score:
    """The sums of one portion, in float64: a mean over a million fp32 terms should not depend on how it was cut."""
    nats = nats.detach().double()
    bytes_BT = bytes_of[rows.targets] * rows.valid
    sums = torch.stack((nats.sum(), rows.valid.sum(), nats[bytes_BT > 0].sum(), bytes_BT.sum())).tolist()
    return Score(sums[0], int(sums[1]), sums[2], int(sums[3]))


def backward(
    model: torch.nn.Module,
    rows: Rows,
    bytes_of: Int[Tensor, " W"],
    *,
    micro_batch: int,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Score:
    """Add the gradient of the batch's loss to the parameters, `micro_batch` rows at a time.

    `seed` belongs to the step; every portion derives its own dropout from it, so there is no generator to save.
    """
    total, result = rows.valid.sum(), Score()
    assert total > 0, "a batch without a single target has no loss"
    for index, part in enumerate(rows.split(micro_batch)):
        torch.manual_seed(derived(seed, index))
        nats = token_nats(model, part, autocast)
        (nats.sum() / total).backward()
        result += score(nats, part, bytes_of)
    return result


def derived(*numbers: int) -> int:
    """A seed from numbers, the same everywhere and for ever: 63 bits of BLAKE2b over their decimal forms."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
