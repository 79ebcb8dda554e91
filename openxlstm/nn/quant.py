"""Matrices that stay quantised, as they lie in a file: what `ox.load("model.gguf")` puts in the place of large ones.

They compute and do not learn: a rounded weight has no gradient. `kernels.quantized` has the layouts and the product.

O output features, I input features, D model width, W vocabulary, R bytes of a row, G groups of 16 rows.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from openxlstm.kernels.quantized import (
    bytes_per_row,
    can_pack,
    dequantize,
    is_packed,
    memory_for_packed,
    pack,
    packed_shape,
    quantized_linear,
    unpack,
)


@final
class QuantLinear(nn.Module):
    """y = x Wᵀ + b with W in blocks.

    Args:
        kind: of `kernels.quantized.KINDS`.
        bias: whether there is one; it is fp32.

    Raises:
        ValueError: rows that the kind cannot hold.
    """

    blocks: UInt8[Tensor, "_ _"]  # [O, R], or packed [G, 16 R]

    def __init__(self, in_features: int, out_features: int, kind: str, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.register_buffer("blocks", _empty_blocks(out_features, kind, in_features))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.training = False

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """The whole matrix in fp32, dequantised anew whenever it is asked for: 4 bytes a number."""
        return dequantize(self.rows(), self.kind, self.in_features)

    @property
    def packed(self) -> bool:
        """Whether the blocks lie with 16 rows side by side."""
        return is_packed(self.blocks, self.kind, self.in_features)

    def pack(self, into: UInt8[Tensor, "G bytes"] | None = None) -> None:
        """Lay 16 rows side by side, as the native kernels read fastest, if this kind and this machine have that form.

        The numbers stay the same; where bytes are multiplied, inputs become integers of 15 bits per block of 32.
        """
        if can_pack(self.kind) and self.blocks.device.type == "cpu" and not self.packed:
            self.blocks = pack(self.blocks, self.kind, into)

    def rows(self) -> UInt8[Tensor, "O R"]:
        """The blocks as a file has them: they themselves, or a copy of packed ones."""
        return unpack(self.blocks, self.kind, self.out_features) if self.packed else self.blocks

    def forward(self, x: Float[Tensor, "*any I"]) -> Float[Tensor, "*any O"]:
        y = quantized_linear(x, self.blocks, self.kind, self.in_features, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def train(self, mode: bool = True) -> QuantLinear:
        """Evaluation mode only.

        Raises:
            ValueError: training is asked for.
        """
        _refuse_training(mode, self.kind)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"


@final
class QuantEmbedding(nn.Module):
    """Rows of a matrix in blocks, dequantised to fp32 when they are looked up.

    Raises:
        ValueError: rows that the kind cannot hold.
    """

    blocks: UInt8[Tensor, "W R"]

    def __init__(self, num_embeddings: int, embedding_dim: int, kind: str):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.kind = num_embeddings, embedding_dim, kind
        self.register_buffer("blocks", _empty_blocks(num_embeddings, kind, embedding_dim))
        self.training = False

    @property
    def weight(self) -> Float[Tensor, "W D"]:
        """The whole matrix in fp32, dequantised anew whenever it is asked for: 4 bytes a number."""
        return dequantize(self.blocks, self.kind, self.embedding_dim)

    def forward(self, tokens: Int[Tensor, "*any"]) -> Float[Tensor, "*any D"]:
        return dequantize(F.embedding(tokens, self.blocks), self.kind, self.embedding_dim)

    def train(self, mode: bool = True) -> QuantEmbedding:
        """Evaluation mode only.

        Raises:
            ValueError: training is asked for.
        """
        _refuse_training(mode, self.kind)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, kind={self.kind!r}"


def pack_matrices(model: nn.Module) -> None:
    """Lay the rows of every quantised linear map side by side (`QuantLinear.pack`), all in one piece of memory."""
    found = [m for m in model.modules() if isinstance(m, QuantLinear) and can_pack(m.kind) and not m.packed]
    found = [module for module in found if module.blocks.device.type == "cpu"]
    shapes = [packed_shape(module.out_features, module.kind, module.in_features) for module in found]
    memory = memory_for_packed([groups * size for groups, size in shapes])
    for module, shape, piece in zip(found, shapes, memory, strict=True):
        module.pack(piece.view(shape))


def project(x: Float[Tensor, "*any D"], matrix: nn.Module) -> Float[Tensor, "*any W"]:
    """x times the transposed weight of an embedding or of a head without bias, whichever way that is stored."""
    if isinstance(matrix, QuantLinear):
        return quantized_linear(x, matrix.blocks, matrix.kind, matrix.in_features, matrix.out_features)
    if isinstance(matrix, QuantEmbedding):
        return quantized_linear(x, matrix.blocks, matrix.kind, matrix.embedding_dim)
    assert isinstance(matrix.weight, Tensor), f"{type(matrix).__name__} has no matrix"
    return F.linear(x, matrix.weight)


def _empty_blocks(rows: int, kind: str, features: int) -> Tensor:
    return torch.empty(rows, bytes_per_row(kind, features), dtype=torch.uint8)


def _refuse_training(mode: bool, kind: str) -> None:
    if mode:
        raise ValueError(
            f"a matrix in {kind} of a GGUF file cannot be trained; load the file with dtype=torch.float32, or run "
            f"xlstm convert MODEL.gguf FOLDER --to ours, and train that"
        )
