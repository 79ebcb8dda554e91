"""Chains of leaves that a processor would rather do in one pass: natively where that can be, else leaf by leaf.

The second is the definition, and the first is tested to be equal to it. The native pass reads weights without calling
their modules, so a module that somebody has wrapped, replaced or hooked sends the whole chain through its leaves.

B batch, T time, U channels, H heads, V head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from openxlstm.kernels import glue
from openxlstm.nn.conv import ConvSiLU
from openxlstm.nn.functional import is_plain, widened
from openxlstm.nn.gates import GateLinear, project_gates
from openxlstm.nn.linear import HeadwiseLinear
from openxlstm.nn.norm import HeadNorm


def conv_qkv_gates(
    x: Float[Tensor, "B T U"],
    conv: ConvSiLU,
    maps: tuple[HeadwiseLinear, HeadwiseLinear, HeadwiseLinear],
    gates: tuple[GateLinear, GateLinear],
    tail: Float[Tensor, "B tail U"] | None,
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c, tail = conv(x); q, k, v of c, c, x; i, f of (q, k, v). Returns c, q, k, v [B,T,U], i, f [B,T,H] and the tail.

    Where the mask says that no step exists, nothing is promised about any of them.
    """
    q_map, k_map, v_map = maps
    if _one_pass(x, conv, maps, gates, tail) and conv.weight is not None and conv.bias is not None:
        i, f = gates
        past = conv.empty_state(x.shape[0], x.device, torch.float32) if tail is None else tail
        c, q, k, v, raw, tail = glue.project(
            x, conv.weight, conv.bias, past, (q_map.weight, k_map.weight, v_map.weight),
            (widened(torch.cat((i.weight, f.weight))), widened(torch.cat((i.bias, f.bias)))), reset=reset, mask=mask,
        )  # fmt: skip
        i_BTH, f_BTH = raw.chunk(2, dim=-1)
        return c, q, k, v, i_BTH, f_BTH, tail
    c, tail = conv(x, tail, reset, mask)
    q, k, v = q_map(c), k_map(c), v_map(x)
    i_BTH, f_BTH = project_gates((q, k, v), *gates)
    return c, q, k, v, i_BTH, f_BTH, tail


def norm_skip_gate(
    h: Float[Tensor, "B T H V"],
    c: Float[Tensor, "B T U"],
    z: Float[Tensor, "B T U"],
    norm: HeadNorm,
    skip: Float[Tensor, "U"],
) -> Float[Tensor, "B T U"]:
    """(norm(h) + skip c) silu(z)."""
    if _is(norm, HeadNorm) and h.dtype == c.dtype == z.dtype and glue.serves(h, c, z, norm.weight, skip):
        return glue.gate(h, c, z, norm.weight, skip, norm.eps)
    return (norm(h) + skip.to(c.dtype) * c) * F.silu(z)


def _one_pass(
    x: Tensor,
    conv: ConvSiLU,
    maps: tuple[HeadwiseLinear, ...],
    gates: tuple[GateLinear, ...],
    tail: Tensor | None,
) -> bool:
    if not (_is(conv, ConvSiLU) and all(_is(part, HeadwiseLinear) for part in maps)):
        return False
    if not all(_is(gate, GateLinear) for gate in gates):
        return False
    if any(part.bias is not None or part.weight.shape[-1] != glue.BLOCK for part in maps):
        return False
    return glue.serves(x, tail, conv.weight, *(part.weight for part in maps), *(part.weight for part in gates))


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind`'s own forward and nothing else."""
    return type(module) is kind and is_plain(module)
