"""What a backward pass keeps in memory, counted without computing anything.

One block of each kind runs forward with tensors that have shapes, dtypes and storages but no numbers (PyTorch's fake
tensors), and every storage that autograd keeps is counted once: exact for the kernels of the torch backend, and no
formula that could grow old. The casts that mixed precision keeps of its weights are among them, the weights are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

Config = xLSTMConfig | xLSTMLargeConfig


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one process, at the moment when the backward pass begins and while it works."""

    blocks: int  # what is kept for the backward pass of every block, and their inputs where a block is recomputed
    working: int  # gradients of what one block keeps, and that itself where it is recomputed: the largest block's

    @property
    def total(self) -> int:
        """Both."""
        return self.blocks + self.working


def kept(config: Config, rows: int, context: int, *, bf16: bool, checkpoint_every: int = 0) -> Kept:
    """Bytes for one forward and backward pass over `rows` windows of `context` tokens.

    Args:
        bf16: products in bf16 (autocast), as `train.precision` says; parameters and the residual stream stay as
            they are.
        checkpoint_every: n > 0: every n-th block keeps its input only.
    """
    pattern = config.pattern if isinstance(config, xLSTMConfig) else "m" * config.blocks
    whole = {kind: _block(config, kind, rows, context, bf16) for kind in set(pattern)}
    blocks = working = 0
    for index, kind in enumerate(pattern):
        recomputed = checkpoint_every > 0 and index % checkpoint_every == 0
        blocks += 4 * rows * context * config.width if recomputed else whole[kind]
        working = max(working, (1 + recomputed) * whole[kind])
    return Kept(blocks, working)


def _block(config: Config, kind: str, rows: int, context: int, bf16: bool) -> int:
    """Bytes that the backward pass of one block keeps, parameters aside."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # an address may be used again, so nothing that was counted may go

    with FakeTensorMode():
        if isinstance(config, xLSTMConfig):
            block = xLSTM(replace(config, pattern=kind, vocab_size=1)).stack.blocks[0]
        else:
            block = xLSTMLarge(replace(config, blocks=1, vocab_size=1)).backbone.blocks[0]
        parameters = {parameter.untyped_storage()._cdata for parameter in block.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                seen[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        x = torch.zeros(rows, context, config.width, requires_grad=True)
        reset = torch.zeros(rows, context, dtype=torch.bool)
        with saved_tensors_hooks(count, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            block(x, None, reset, None)
    return sum(seen.values())
