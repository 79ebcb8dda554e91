"""Products with weights that stay as they lie in a GGUF file: rows of blocks, a scale for every 32 numbers.

The layouts are ggml's (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), little-endian:

  f32    4 bytes a number
  bf16   2 bytes a number
  q8_0   34 bytes per 32: scale d (fp16), 32 int8                     w = d q
  q4_0   18 bytes per 32: d (fp16), 16 bytes of two nibbles           w = d (q - 8)
  q4_1   20 bytes per 32: d, m (fp16), 16 bytes of two nibbles        w = d q + m
Byte j of the nibbles holds number j in its low half and number j + 16 in its high half.

O output features, I input features, R bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 32  # numbers that share a scale
PART = 1 << 18  # numbers that are dequantised at a time: 1 MiB in fp32 stays in the cache, and the heap whole


@dataclass(frozen=True, slots=True)
class Kind:
    """How numbers are stored: `size` bytes for every `numbers` of them."""

    numbers: int
    size: int


KINDS = {
    "f32": Kind(1, 4),
    "bf16": Kind(1, 2),
    "q8_0": Kind(BLOCK, 34),
    "q4_0": Kind(BLOCK, 18),
    "q4_1": Kind(BLOCK, 20),
}


def bytes_per_row(kind: str, features: int) -> int:
    """Bytes of a row of `features` numbers.

    Raises:
        ValueError: an unknown kind, or a row that does not end with a block.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    numbers, size = KINDS[kind].numbers, KINDS[kind].size
    if features < 1 or features % numbers:
        raise ValueError(f"a row of {features} numbers does not divide into blocks of {numbers}, as {kind} needs; "
                         f"bf16 and f32 hold any row")  # fmt: skip
    return features // numbers * size


def dequantize(blocks: UInt8[Tensor, "*rows R"], kind: str, features: int) -> Float[Tensor, "*rows {features}"]:
    """The numbers in fp32, to the bit those of the `gguf` library. Of f32 it may be a view: do not write to it.

    Raises:
        ValueError: an unknown kind, or rows of another length than `features` numbers take.
    """
    check_rows(blocks, kind, features)
    if kind == "f32":
        return _as(blocks, torch.float32)
    if kind == "bf16":
        return _as(blocks, torch.bfloat16).float()
    parts = blocks.unflatten(-1, (-1, KINDS[kind].size))
    d = _as(parts[..., :2], torch.float16).float()
    if kind == "q8_0":
        return (parts[..., 2:].view(torch.int8) * d).flatten(-2)
    nibbles = parts[..., KINDS[kind].size - BLOCK // 2 :]
    q = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    if kind == "q4_0":
        return ((q.to(torch.int8) - 8) * d).flatten(-2)
    return (q * d + _as(parts[..., 2:4], torch.float16).float()).flatten(-2)


def quantized_linear(
    x: Float[Tensor, "*any I"], blocks: UInt8[Tensor, "O R"], kind: str, in_features: int
) -> Float[Tensor, "*any O"]:
    """x times the transposed matrix in `blocks`, in the dtype of x; differentiable in x.

    The matrix is dequantised some rows at a time, so the memory beside it is bounded, however large it is.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit each other.
    """
    check_rows(blocks, kind, in_features)
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, and the matrix takes in_features={in_features}")
    rows = max(1, PART // in_features)
    parts = [F.linear(x, dequantize(some, kind, in_features).to(x.dtype)) for some in blocks.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def check_rows(blocks: Tensor, kind: str, features: int) -> None:
    """The bytes are rows of `features` numbers of this kind.

    Raises:
        ValueError: they are not.
    """
    size = bytes_per_row(kind, features)
    if blocks.dtype != torch.uint8 or blocks.shape[-1] != size:
        raise ValueError(f"rows of {features} numbers in {kind} take {size} bytes (uint8); got {blocks.dtype}, rows "
                         f"of {blocks.shape[-1]}")  # fmt: skip


def _as(some: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as numbers; copied where they do not lie as torch asks for: adjacent, and aligned to the number."""
    strides_fit = some.stride(-1) == 1 and all(step % dtype.itemsize == 0 for step in some.stride()[:-1])
    if strides_fit and some.storage_offset() % dtype.itemsize == 0 and some.data_ptr() % dtype.itemsize == 0:
        return some.view(dtype)
    return some.clone(memory_format=torch.contiguous_format).view(dtype)
