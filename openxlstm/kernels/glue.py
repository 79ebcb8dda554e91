"""What surrounds a cell, natively where that can be: `serves` says whether, the others compute.

There is no second implementation here: the definition is in `nn` (conv.py, linear.py, gates.py, norm.py), which asks
`serves` and computes itself where the answer is no. Gradients are exact and can be taken once, as those of the cells.

B batch, T time, U channels, J taps, D width, H heads, V head width, G gate projections.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad

from openxlstm.kernels import cpu

BLOCK = 4  # width of the diagonal blocks that `project` knows: that of every published model


def serves(*inputs: Tensor | None) -> bool:
    """Whether all inputs are where and what the native library computes with; None counts as yes.

    No on another device, in fp64 or fp16, without a library, under `vmap`, and for tangents of forward mode.
    """
    if cpu.missing() is not None:
        return False
    given = [x for x in inputs if x is not None]
    if not all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in given):
        return False
    if torch.compiler.is_compiling():
        return True
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
        return False
    return all(forward_ad.unpack_dual(x).tangent is None for x in given)


def project(
    x: Float[Tensor, "B T U"],
    w: Float[Tensor, "U J"],
    b: Float[Tensor, "U"],
    past: Float[Tensor, "B tail U"],
    maps: tuple[Float[Tensor, "N 4 4"], Float[Tensor, "N 4 4"], Float[Tensor, "N 4 4"]] | None = None,
    gates: tuple[Float[Tensor, "G 3*U"], Float[Tensor, "G"]] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c = silu(causal convolution of x), and with maps q = Wq c, k = Wk c, v = Wv x, and the gates of (q, k, v).

    Returns c, q, k, v [B,T,U] in the dtype of x, raw [B,T,G] and the last J-1 inputs [B,J-1,U] in fp32. Without maps
    q, k, v are empty. Sums are fp32 whatever the dtypes. Where the mask says that no step
    exists c, q, k and v are 0.
    """
    q_map, k_map, v_map = (None, None, None) if maps is None else maps
    gate_w, gate_b = (None, None) if gates is None else gates
    return torch.ops.openxlstm_cpu.project(x, w, b, q_map, k_map, v_map, gate_w, gate_b, past, reset, mask)


def gate(
    h: Float[Tensor, "B T H V"],
    c: Float[Tensor, "B T U"],
    z: Float[Tensor, "B T U"],
    weight: Float[Tensor, "U"],
    skip: Float[Tensor, "U"],
    eps: float,
) -> Float[Tensor, "B T U"]:
    """(norm(h) weight + skip c) silu(z), the norm over each head by itself; h, c, z of one dtype, sums in fp32."""
    return torch.ops.openxlstm_cpu.gate(h, c, z, weight, skip, eps)


def layer_norm(
    x: Float[Tensor, "*any D"], weight: Float[Tensor, "D"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*any D"]:
    """LayerNorm without bias, computed in fp32 and rounded once, to `dtype`: fp32 or bf16."""
    return torch.ops.openxlstm_cpu.norm(x, weight, eps, dtype)
