"""The forms in which sequences arrive, brought to one: [B, T, D] with flags, and back.

nn.LSTM takes [T, B, D], [B, T, D] (batch_first), [T, D] (one sequence) and a `PackedSequence`. Here steps that do not
exist are a mask and cost nothing else; the backward direction reads the same batch from its other end.

B batch, T time, D input width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


@dataclass(frozen=True, slots=True)
class Flags:
    """reset[b, t]: a new sequence starts here. mask[b, t] False: there is no step here. None: nowhere, everywhere."""

    reset: Bool[Tensor, "B T"] | None
    mask: Bool[Tensor, "B T"] | None

    def reversed(self) -> Flags:
        """The flags of the time-reversed batch: a sequence starts there where, here, it ends: before the next reset."""
        reset = self.reset
        if reset is not None:
            reset = torch.cat((reset[:, 1:], torch.zeros_like(reset[:, :1])), dim=1).flip(1)
        return Flags(reset, None if self.mask is None else self.mask.flip(1))


@dataclass(frozen=True, slots=True)
class Batch:
    """One input in the form that the layers read, and how to give the output the form that it came in."""

    x: Float[Tensor, "B T D"]  # 0 where there is no step: 0 * NaN is NaN
    flags: Flags
    batched: bool
    batch_first: bool
    packed: PackedSequence | None

    def restored(self, y: Float[Tensor, "B T width"]) -> Tensor | PackedSequence:
        """The output in the form of the input."""
        if self.packed is not None:
            order = self.packed.sorted_indices
            sorted_TBD = (y if order is None else y[order]).transpose(0, 1)
            steps = [row[:count] for row, count in zip(sorted_TBD, self.packed.batch_sizes.tolist(), strict=True)]
            return PackedSequence(torch.cat(steps), *self.packed[1:])
        if not self.batched:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1).contiguous()  # scripts call output.view(-1, width)


def read(
    x: Tensor | PackedSequence,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    width: int,
    batch_first: bool,
) -> Batch:
    """Any of the forms as a `Batch`.

    Raises:
        ValueError: a shape, dtype or length that does not fit, with what would.
    """
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ValueError("a PackedSequence has its lengths inside; leave lengths=None")
        padded_BTD, counts = pad_packed_sequence(x, batch_first=True)
        _check_floating(padded_BTD)
        if padded_BTD.shape[-1] != width:
            raise ValueError(f"the packed data must have {width} features, input_size; got {padded_BTD.shape[-1]}")
        return _batch(padded_BTD, counts.to(padded_BTD.device), reset, True, batch_first, x)

    _check_floating(x)
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        form = f"[batch, time, {width}]" if batch_first else f"[time, batch, {width}]"
        raise ValueError(
            f"x must be {form} (batch_first={batch_first}), or [time, {width}] for one sequence; got {list(x.shape)}"
        )
    batched = x.ndim == 3
    x_BTD = x[None] if not batched else x if batch_first else x.transpose(0, 1)
    if lengths is not None and not batched:
        raise ValueError("lengths are for batches; of one sequence [time, features] pass the steps that exist")
    steps = None if lengths is None else _lengths(lengths, x_BTD.shape[0], x_BTD.shape[1], x.device)
    return _batch(x_BTD, steps, reset, batched, batch_first, None)


def _batch(
    x: Tensor, counts: Tensor | None, reset: Tensor | None, batched: bool, batch_first: bool,
    packed: PackedSequence | None,
) -> Batch:  # fmt: skip
    B, T, _ = x.shape
    mask = None
    if counts is not None:
        mask = torch.arange(T, device=x.device) < counts[:, None]
        x = torch.where(mask[..., None], x, 0.0)
    if reset is not None:
        form, shape = ("[batch, time]", [B, T]) if batch_first else ("[time, batch]", [T, B])
        form, shape = (form, shape) if batched else ("[time]", [T])
        if reset.dtype != torch.bool or list(reset.shape) != shape:
            raise ValueError(
                f"reset must be bool {form} = {shape}, True where an episode starts; got {reset.dtype} "
                f"{list(reset.shape)}" + ("; use reset.bool()" if list(reset.shape) == shape else "")
            )
        reset = reset[None] if not batched else reset if batch_first else reset.t()
        reset = reset if mask is None else reset & mask  # what does not exist does not start anything
    return Batch(x, Flags(reset, mask), batched, batch_first, packed)


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must hold floating-point features, not {x.dtype}; embed token ids first, or use x.float()")


def _lengths(lengths: Tensor | Sequence[int], B: int, T: int, device: torch.device) -> Tensor:
    """[B], on the device of x. Values are looked at on the CPU only: elsewhere that would make the device wait."""
    counts = torch.as_tensor(lengths)
    if counts.shape != (B,) or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {B} whole numbers, one per sequence; got {counts.dtype} {list(counts.shape)}"
        )
    if counts.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = counts[(counts < 0) | (counts > T)]
        if outside.numel():
            raise ValueError(f"length {int(outside[0])} is outside 0..{T}, the steps that x has")
    return counts.to(device)
