"""bfloat16 in Triton's interpreter, which multiplies its bits as integers and cuts where a GPU rounds.

Casts and products are replaced by right ones: a product of bf16 numbers is exact in fp32, as on a matrix unit. So the
kernels' own bf16 path runs, every rounding of it, on a machine without a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float(bits: np.ndarray) -> np.ndarray:
    """The numbers that 16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def install() -> None:
    """Replace the interpreter's casts and products, for bf16 alone."""
    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        given, wanted = src.dtype.scalar, dst_type.scalar
        if given == tl.bfloat16 and wanted == tl.float32:
            return TensorHandle(to_float(src.data), wanted)
        if given == tl.float32 and wanted == tl.bfloat16:
            return TensorHandle(to_bits(src.data), wanted)
        assert tl.bfloat16 not in (given, wanted) or given == wanted, f"{given} to {wanted} is not replaced"
        return cast_impl(self, src, dst_type)

    def dot(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(to_float(x.data), tl.float32) for x in (a, b))
        return create_dot(self, a, b, d, *options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
