"""How tensors that lie anywhere are handed to a kernel, so that one compilation serves every length and batch.

Triton compiles anew when an argument changes between 1, a multiple of 16, and anything else. A stride over rows is T
times something, so it would change with T where widths are no multiple of 16. Strides are therefore not specialised;
those of a width that is a multiple of 16 are passed in units of 16, and the multiplication tells the compiler that
rows are aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Every number that changes from call to call, by the name it has in the kernels.
RUNTIME = ["T", "N", "B", "H", "first", "last", "tiles", "tiles_k", "eps", "scale"]
RUNTIME += [f"s_{tensor}{axis}" for tensor in "qkvhdxyoifg" for axis in "BTGH"]


def readable(x: Tensor) -> Tensor:
    """x itself, unless its last axis is strided or its rows are not aligned as the kernels were compiled for."""
    aligned = x.data_ptr() % 16 == 0 and (x.shape[-1] % 16 or all(s % 16 == 0 for s in x.stride()[:-1]))
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def strides(x: Tensor) -> tuple[int, ...]:
    """All but the last of a readable tensor, in the units that `numbers` expects."""
    unit = 1 if x.shape[-1] % 16 else 16
    return tuple(s // unit for s in x.stride()[:-1])


@triton.jit
def numbers(stride, WIDTH: tl.constexpr):
    """A stride in numbers, 64 bits: a row may begin beyond 2^31."""
    UNIT: tl.constexpr = 1 if WIDTH % 16 else 16
    return stride.to(tl.int64) * UNIT


def compiled() -> int | None:
    """How many kernels this process has compiled or loaded, on all devices; None where they are interpreted."""
    from openxlstm.kernels.triton import mlstm_backward, mlstm_forward, mlstm_step, slstm

    found = [x for module in (mlstm_forward, mlstm_backward, mlstm_step, slstm) for x in vars(module).values()]
    kernels = [x for x in found if isinstance(x, triton.runtime.jit.JITFunction)]
    return sum(len(caches[0]) for x in kernels for caches in x.device_caches.values()) if kernels else None
