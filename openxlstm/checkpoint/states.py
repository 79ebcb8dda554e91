"""What the peers remember, as our states: to carry a conversation over, and to compare models step by step.

The peers' states are plain tensors and dicts of them; nothing of theirs is imported. Results are new tensors, fp32 at
least, and every cache of a peer stays as it was.

B batch, H heads, K and V head widths, J taps, U_m inner width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from openxlstm.cells import State, mLSTMState, sLSTMState
from openxlstm.models.interface import ModelState
from openxlstm.models.xlstm import mLSTMBlockState, sLSTMBlockState, xLSTMStackConfig


def nx_mlstm(C: Float[Tensor, "B H K V"], n: Float[Tensor, "B H K 1"], m: Float[Tensor, "B H 1 1"]) -> mLSTMState:
    """NX-AI's xlstm scales keys when it writes, we scale queries when we read: its C and n are ours / sqrt(K)."""
    root = C.shape[2] ** 0.5
    return mLSTMState(C=_wide(C) * root, n=_wide(n)[..., 0] * root, m=_wide(m)[..., 0, 0])


def nx_slstm(state: Float[Tensor, "4 B D"], heads: int) -> sLSTMState:
    """NX-AI's xlstm stacks h, c, n, m, each with its heads side by side."""
    h, c, n, m = _wide(state).unflatten(-1, (heads, -1))
    return sLSTMState(h=h.clone(), c=c.clone(), n=n.clone(), m=m.clone())


def nx_conv(window: Float[Tensor, "B rows U"], taps: int) -> Float[Tensor, "B tail U"]:
    """The last J-1 inputs: NX-AI's `step` keeps J, the current one included, and its layers' `forward` J-1."""
    return _wide(window)[:, window.shape[1] - (taps - 1) :].clone()


def nx_model(state: Mapping[str, Mapping[str, Any]], config: xLSTMStackConfig) -> ModelState:
    """What `xLSTMLMModel.step` of NX-AI's xlstm returns.

    Raises:
        ValueError: a block of the model is missing in it.
    """
    blocks: list[State] = []
    for index, kind in enumerate(config.pattern):
        name = f"block_{index}"
        if name not in state:
            raise ValueError(f"the state has no {name!r}; the model has {len(config.pattern)} blocks")
        block = state[name]
        memory = block["mlstm_state"][0] if kind == "m" else block["slstm_state"][0]
        tail = _nx_tail(block.get("conv_state"), config, memory, config.U_m if kind == "m" else config.width)
        if kind == "m":
            blocks.append(mLSTMBlockState(tail, nx_mlstm(*block["mlstm_state"])))
        else:
            blocks.append(sLSTMBlockState(tail, nx_slstm(block["slstm_state"], config.heads)))
    return ModelState(tuple(blocks))


def large_model(state: Mapping[int, Sequence[Tensor]]) -> ModelState:
    """What `xlstm_large` returns, or `rnn_state` of the cache of transformers' xLSTM: block to (C, n, m [B, H, 1])."""
    blocks = []
    for index in range(len(state)):
        C, n, m = (_wide(tensor).clone() for tensor in state[index])
        blocks.append(mLSTMState(C=C, n=n, m=m[..., 0]))
    return ModelState(tuple(blocks))


def _nx_tail(window: Any, config: xLSTMStackConfig, memory: Tensor, width: int) -> Tensor:
    """The convolution's part of a block; `step` wraps it in a tuple of one, and has none without a convolution."""
    if config.conv == 0:
        batch = memory.shape[0]
        return torch.zeros(batch, 0, width, device=memory.device, dtype=_wide(memory).dtype)
    return nx_conv(window[0] if isinstance(window, tuple) else window, config.conv)


def _wide(tensor: Tensor) -> Tensor:
    """fp32, or fp64 if it is fp64."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
