"""Products with weights that stay as they lie in a GGUF file: rows of blocks, a scale for every 32 numbers.

The layouts are ggml's (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), little-endian:

  f32    4 bytes a number
  bf16   2 bytes a number
  q8_0   34 bytes per 32: scale d (fp16), 32 int8                     w = d q
  q4_0   18 bytes per 32: d (fp16), 16 bytes of two nibbles           w = d (q - 8)
  q4_1   20 bytes per 32: d, m (fp16), 16 bytes of two nibbles        w = d q + m
Byte j of the nibbles holds number j in its low half and number j + 16 in its high half.

Where the processor multiplies bytes, q8_0 and q4_0 matrices are best packed, with 16 rows side by side: `pack` makes
the same number of bytes of the same numbers. Packed rows come as groups, [ceil(O / 16), 16 R], which the product takes.

O output features, I input features, R bytes of a row, G groups of 16 rows.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from openxlstm.kernels.cpu import quantized_ops
from openxlstm.kernels.cpu.library import Native, native
from openxlstm.kernels.cpu.quantized_ops import FORMATS, GROUP, PACKED

BLOCK = 32  # numbers that share a scale
FEW_ROWS = 16  # of x, up to which a product that reads rows of blocks in place is faster than a matrix made of them
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
    x: Float[Tensor, "*any I"], blocks: UInt8[Tensor, "rows bytes"], kind: str, in_features: int,
    out_features: int | None = None,
) -> Float[Tensor, "*any O"]:  # fmt: skip
    """x times the transposed matrix in `blocks`, in the dtype of x; differentiable in x.

    Without a gradient to come, the native library serves packed matrices, and few rows of x with any matrix, in place;
    x then passes packed ones as integers of 15 bits per block of 32. Else the matrix is dequantised some rows at a
    time, so the memory beside it is bounded, however large it is.

    Args:
        out_features: of a packed matrix, whose last group may have fewer than 16 rows; else that of the blocks.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit each other.
    """
    packed = is_packed(blocks, kind, in_features)
    if not packed:
        check_rows(blocks, kind, in_features)
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, and the matrix takes in_features={in_features}")
    O = out_features if out_features is not None else blocks.shape[0] * (GROUP if packed else 1)
    if _serves(x, blocks, packed):
        product: Tensor = torch.ops.openxlstm_cpu.product(x, blocks, (PACKED if packed else FORMATS)[kind], O)
        return product
    height = max(1, PART // in_features // (GROUP if packed else 1))
    parts = []
    for some in blocks.split(height):
        rows = unpack(some, kind, GROUP * some.shape[0]) if packed else some
        parts.append(F.linear(x, dequantize(rows, kind, in_features).to(x.dtype)))
    return parts[0][..., :O] if len(parts) == 1 else torch.cat(parts, dim=-1)[..., :O]


def pack(blocks: UInt8[Tensor, "O R"], kind: str, into: UInt8[Tensor, "G bytes"] | None = None) -> Tensor:
    """The same matrix with 16 rows side by side, in new memory or in `into`.

    Raises:
        ValueError: a kind that has no packed form, or no library to pack with (`can_pack` says so before).
    """
    if not can_pack(kind):
        raise ValueError(
            f"{kind} cannot be packed here; {' and '.join(PACKED)} can, where the native kernels multiply bytes"
        )
    if into is None:
        into = blocks.new_empty(packed_shape(blocks.shape[0], kind, blocks.shape[1] // KINDS[kind].size * BLOCK))
    quantized_ops.pack(blocks.contiguous(), kind, into)
    return into


def packed_shape(rows: int, kind: str, features: int) -> tuple[int, int]:
    """[groups, bytes of a group] of `rows` rows."""
    return -(-rows // GROUP), GROUP * bytes_per_row(kind, features)


def memory_for_packed(sizes: list[int]) -> list[UInt8[Tensor, "_"]]:
    """A piece of fresh memory for every size in bytes, side by side, on large pages where the system has them.

    Matrices of a megabyte are each too small for such pages, and with them Q4_0 reads a fifth faster.
    """
    places = [-(-size // 64) * 64 for size in sizes]
    if not sum(places):
        return [torch.empty(0, dtype=torch.uint8) for _ in sizes]
    memory = mmap.mmap(-1, sum(places))
    if sys.platform == "linux":
        memory = mmap.mmap(-1, sum(places), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    pieces = torch.frombuffer(memory, dtype=torch.uint8).split(places)
    return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def unpack(packed: UInt8[Tensor, "G bytes"], kind: str, rows: int) -> UInt8[Tensor, "{rows} R"]:
    """What `pack` was given."""
    size = KINDS[kind].size
    parts = packed.view(packed.shape[0], -1, GROUP * size)  # [G, blocks of a row, bytes]
    scales = parts[..., : 2 * GROUP].unflatten(-1, (GROUP, 2))
    quants = parts[..., 2 * GROUP :].unflatten(-1, (-1, GROUP, 4)).transpose(-2, -3).flatten(-2)
    if kind == "q8_0":
        quants = quants ^ 128
    return torch.cat((scales, quants), dim=-1).transpose(1, 2).reshape(GROUP * packed.shape[0], -1)[:rows]


def can_pack(kind: str) -> bool:
    """Whether this kind has a packed form, and this machine kernels for it."""
    library = native()
    return kind in PACKED and isinstance(library, Native) and library.multiplies_bytes


def is_packed(blocks: Tensor, kind: str, features: int) -> bool:
    """Whether these are groups of rows of `features` numbers."""
    return kind in PACKED and blocks.shape[-1] == GROUP * bytes_per_row(kind, features)


def _serves(x: Tensor, blocks: Tensor, packed: bool) -> bool:
    """Whether the native product takes this call."""
    library = native()
    if isinstance(library, str) or x.device.type != "cpu" or blocks.device.type != "cpu" or x.dtype == torch.float64:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return library.multiplies_bytes if packed else x.dtype == torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1]


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
