"""Products with a GGUF file's blocks, native: as they lie, or packed with 16 rows side by side (csrc/bytes.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.kernels.cpu.library import ROWS_TOGETHER, Packing, Product, threads
from openxlstm.kernels.cpu.ops import _lib, _library

FORMATS = {"f32": 0, "bf16": 1, "q8_0": 2, "q4_0": 3, "q4_1": 4}  # XL_F32 and so on
PACKED = {"q8_0": 5, "q4_0": 6}
GROUP = 16  # rows side by side

_lib.define("product(Tensor x, Tensor blocks, int format, int out_features) -> Tensor")


def pack(rows: Tensor, kind: str, into: Tensor) -> None:
    """Rows in blocks [O, R] into groups of 16 of them [ceil(O / 16), 16 R]; what is missing in the last becomes 0."""
    assert rows.is_contiguous(), "rows are read as one piece of memory"
    assert into.is_contiguous(), "groups are written as one piece of memory"
    assert into.shape == (-(-rows.shape[0] // GROUP), GROUP * rows.shape[1]), "the sizes are those of the groups"
    _library().packing(
        Packing(rows.shape[0], rows.shape[1], FORMATS[kind], threads(), rows.data_ptr(), into.data_ptr())
    )


def _product(x: Tensor, blocks: Tensor, format: int, out_features: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    blocks = blocks.contiguous()
    y = flat.new_empty(flat.shape[0], out_features)
    width, count = flat.shape[1], threads()
    scratch = flat.new_empty(count, width * min(ROWS_TOGETHER, max(flat.shape[0], 1)))
    _library().product(
        Product(
            flat.shape[0], width, out_features, format, count, width, out_features, scratch.shape[1],
            flat.data_ptr(), blocks.data_ptr(), y.data_ptr(), scratch.data_ptr(),
        )
    )  # fmt: skip
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _product_fake(x: Tensor, blocks: Tensor, format: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_lib.impl("product", _product, "CPU")
torch.library.register_fake("openxlstm_cpu::product", _product_fake, lib=_lib)
